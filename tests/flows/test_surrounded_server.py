"""Servers of this machine where the environment has proxies, or settings that are wrong."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from avatar_core.errors import AvatarError, ConfigError
from flows.prefect_client import load_prefect, prefect_client
from flows.server import messages, running_server, start_server
from tests.flows.conftest import PrefectServer, free_port
from tests.sample_rows import Rendered, RunAvatar

AVATAR = Path(sys.executable).with_name("avatar")
NO_ONE = "127.0.0.1:9"
"""Where nobody listens, so that whatever goes to this proxy fails."""

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AVATAR_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


def avatar(*words: object) -> str:
    """What it prints; it must succeed."""
    done = subprocess.run([AVATAR, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.drill
@pytest.mark.parametrize(
    ("name", "proxy"),
    [
        ("HTTP_PROXY", f"http://{NO_ONE}"),
        ("http_proxy", f"http://{NO_ONE}"),
        ("ALL_PROXY", f"socks5://{NO_ONE}"),
    ],
)
def test_renders_show_on_our_server_whatever_the_proxies(
    state: Path, rendered: Rendered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, proxy: str
) -> None:
    monkeypatch.setenv(name, proxy)
    port = free_port()
    try:
        assert f"up: http://127.0.0.1:{port}\n" in avatar("up", "--port", port)
        root = f"storage.root={tmp_path / 'store'}"
        output = avatar("render", rendered.table, root, "--limit", 1)
        assert "1 of 1 clips in" in output
        assert "warning" not in output
        run = avatar("status", root).splitlines()[1].split()[0]
        assert "flow run: Completed, http" in avatar("status", run, root)
    finally:
        assert avatar("down") == f"stopped http://127.0.0.1:{port}\n"


SURROUNDINGS = {
    "ALL_PROXY": (f"socks5://{NO_ONE}", None),
    "HTTP_PROXY": (f"http://{NO_ONE}", None),
    "PREFECT_LOGGING_LEVEL": ("nonsense", "PREFECT_LOGGING_LEVEL: Input should be 'DEBUG', "),
    "PREFECT_CLIENT_MAX_RETRIES": (
        "many",
        "PREFECT_CLIENT_MAX_RETRIES: Input should be a valid integer",
    ),
    "PREFECT_PROFILES_PATH": ("/etc", "Prefect's settings cannot be read ([Errno 21] Is a directory"),
    "SSL_CERT_FILE": ("/nowhere", "SSL_CERT_FILE=/nowhere: no such file"),
}
"""By variable: a value, and what is said of it where there is a server."""


def warnings_of_a_render(table: Path, root: Path) -> list[str]:
    output = avatar("render", table, f"storage.root={root}", "--limit", 1)
    assert "1 of 1 clips in" in output
    return [line for line in output.splitlines() if line.startswith("warning: ")]


@pytest.mark.drill
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_render_says_why_its_server_cannot_be_used(
    state: Path,
    prefect_server: PrefectServer,
    rendered: Rendered,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    value, problem = SURROUNDINGS[name]
    monkeypatch.setenv("PREFECT_API_URL", f"{prefect_server.address}/api")
    monkeypatch.setenv(name, value)
    if problem is None:
        assert warnings_of_a_render(rendered.table, tmp_path / "store") == []
        return
    words = ["render", str(rendered.table), f"storage.root={tmp_path / 'store'}"]
    done = subprocess.run([AVATAR, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert problem in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", [name for name in SURROUNDINGS if name != "PREFECT_PROFILES_PATH"])
def test_a_render_without_a_server_does_not_depend_on_prefect(
    state: Path, rendered: Rendered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv(name, SURROUNDINGS[name][0])
    assert warnings_of_a_render(rendered.table, tmp_path / "store") == []


@pytest.mark.drill
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("PREFECT_LOGGING_LEVEL", "nonsense", "PREFECT_LOGGING_LEVEL: Input should be 'DEBUG', "),
        ("PREFECT_API_URL", "http://[bad", "Prefect's settings are wrong: Value error, Invalid IPv6 URL; "),
        ("SSL_CERT_FILE", "/nowhere", "SSL_CERT_FILE=/nowhere: no such file; mend or unset it"),
    ],
)
def test_up_says_which_setting_is_wrong_and_starts_nothing(
    state: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(name, value)
    done = subprocess.run([AVATAR, "up"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(state.iterdir()) == []


@pytest.mark.drill
def test_up_stops_the_server_that_it_cannot_use(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its password is not ours."""
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "admin:hunter2")
    port = free_port()
    done = subprocess.run([AVATAR, "up", "--port", str(port)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the Prefect server http://127.0.0.1:{port}/api cannot be used: ")
    assert "401 Unauthorized" in done.stderr
    assert "hunter2" not in done.stderr
    assert running_server() is None
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_server_that_cannot_be_noted_is_ended(state: Path) -> None:
    port = free_port()
    (state / "server.json").mkdir()
    with pytest.raises(IsADirectoryError):
        start_server(port=port)
    with socket.create_server(("127.0.0.1", port)):
        pass


@pytest.mark.parametrize("url", ["nonsense", "http://[bad", "http://host:port/api", "http://ä..b/api"])
def test_an_address_that_is_none(
    state: Path, in_process: RunAvatar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", url)
    code, output = in_process("status", f"storage.root={tmp_path}")
    assert code == 0
    assert f"server: {url} (does not answer)\n" in output


@pytest.fixture
def in_process(request: pytest.FixtureRequest) -> RunAvatar:
    run: RunAvatar = request.getfixturevalue("avatar")
    return run


def test_a_login_is_not_shown(
    state: Path, in_process: RunAvatar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"http://me:hunter2@{NO_ONE}/api")
    _, output = in_process("status", f"storage.root={tmp_path}")
    assert f"server: http://{NO_ONE}/api (does not answer)\n" in output


def test_a_server_elsewhere_needs_a_proxy_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the request would leave by a way that the user has not chosen."""
    monkeypatch.setenv("ALL_PROXY", f"nonsense://me:hunter2@{NO_ONE}")
    with pytest.raises(
        ConfigError, match=r"at example\.org cannot be reached by the proxy in ALL_PROXY"
    ) as caught:
        load_prefect("http://example.org/api")
    assert "hunter2" not in str(caught.value)


def test_a_client_that_fails_is_a_sentence(state: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/api"
    load_prefect(url)
    with (
        pytest.raises(AvatarError, match=rf"the Prefect server {url} cannot be used: "),
        prefect_client(url) as client,
    ):
        client.read_work_pools()


def test_a_log_is_shown_without_its_tracebacks() -> None:
    log = (
        "starting\n\nTraceback (most recent call last):\n"
        '  File "a.py", line 1, in <module>\n    1 / 0\n    ~~^~~\nZeroDivisionError: division by zero\n'
        "\nDuring handling of the above exception, another exception occurred:\n\nended\n"
    )
    assert messages(log) == ["starting", "ZeroDivisionError: division by zero", "ended"]
