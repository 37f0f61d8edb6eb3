"""Surroundings that a user may have without knowing: every command ends with a sentence, and no traceback."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.environment import settle_environment
from flows.proxies import leave_out_unusable_proxies, reach_directly, unusable_proxies
from tests.sample_rows import Rendered

COMMANDS = {
    "--help": "Commands",
    "--version": "avatar-dataset",
    "plan TABLE ROOT": "4 clips, 0 rejected",
    "render TABLE ROOT": "4 of 4 clips in",
    "status ROOT": "run ",
    "doctor ROOT": "python",
    "verify batch ROOT": "0 damaged or missing",
    "gc ROOT": "0.0 MB can go",
}
"""What each of them prints in any case."""

FULL = "error: standard output takes no more: No space left on device\n"
GONE = "error: the working directory was deleted; change to another one\n"

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def words(rendered: Rendered, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the capital words of commands stand for: a finished batch."""
    store = shutil.copytree(rendered.store, tmp_path_factory.mktemp("finished") / "store")
    return {"TABLE": str(rendered.table), "ROOT": f"storage.root={store}"}


def shell(
    line: str, command: str, words: dict[str, str], environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a line of bash in which `avatar` is the command."""
    arguments = [words.get(word, word) for word in command.split()]
    avatar = shlex.join([sys.executable, "-P", "-m", "flows.cli", *arguments])
    path = str(Path(__file__).parents[2])
    return subprocess.run(
        ["bash", "-c", line.replace("avatar", avatar)],
        env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )


# --- standard output


@pytest.mark.drill
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_behind_standard_output(command: str, words: dict[str, str]) -> None:
    done = shell("avatar > /dev/full", command, words)
    assert done.stderr.splitlines(keepends=True)[-1:] == [FULL]
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_a_reader_that_has_left(command: str, words: dict[str, str]) -> None:
    done = shell("{ sleep 0.1; avatar; } > >(exec true); exit $?", command, words)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert "error" not in done.stderr


@pytest.mark.drill
@pytest.mark.parametrize("command", ["--version", "render TABLE ROOT"])
def test_closed_streams(command: str, words: dict[str, str]) -> None:
    for line in ("avatar <&- >&- 2>&-", "avatar > /dev/null 2> /dev/full"):
        assert shell(line, command, words).returncode == 0


@pytest.mark.drill
def test_a_render_without_a_reader_stops_and_goes_on_later(rendered: Rendered, tmp_path: Path) -> None:
    words = {"TABLE": str(rendered.table), "ROOT": f"storage.root={tmp_path}"}
    done = shell("avatar | head -1; exit ${PIPESTATUS[0]}", "render TABLE ROOT", words)
    assert done.stdout == "ingest: 4 to do, 0 of 4 cached\n"
    assert done.stderr == "stopped; what is finished is kept, the same command goes on from here\n"
    assert done.returncode == 141
    assert not (tmp_path / "datasets").exists()


# --- folders


@pytest.mark.parametrize("command", COMMANDS)
def test_a_working_directory_that_was_deleted(command: str, words: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = shell(f"cd {tmp_path}/gone && rmdir ../gone && avatar", command, words)
    if command.startswith("--"):
        assert done.returncode == 0
    else:
        assert (done.returncode, done.stderr) == (2, GONE)


def test_a_working_directory_that_cannot_be_written(words: dict[str, str]) -> None:
    done = shell("cd /proc && avatar", "plan TABLE", words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write")
    assert done.stderr.count("\n") == 1


@pytest.mark.drill
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HOME", ""),
        ("HOME", "/proc/nowhere"),
        ("XDG_CACHE_HOME", "here"),
        ("XDG_STATE_HOME", "here"),
        ("TMPDIR", "/nowhere"),
        ("TERM", ""),
        ("TERM", "dumb"),
        ("NO_COLOR", "1"),
    ],
)
def test_variables_that_lead_nowhere(words: dict[str, str], tmp_path: Path, name: str, value: str) -> None:
    done = shell(f"cd {tmp_path} && avatar", "render TABLE ROOT", words, {name: value})
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 of 4 clips in" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_relative_folders_count_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the XDG specification says; a relative home would be another one in each working directory."""
    for name, value in {"XDG_STATE_HOME": "a", "XDG_CACHE_HOME": "/b", "HOME": "c"}.items():
        monkeypatch.setenv(name, value)
    settle_environment()
    assert [os.environ.get(name) for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "HOME")] == [
        None,
        "/b",
        None,
    ]


# --- width and letters


@pytest.mark.drill
@pytest.mark.parametrize("columns", ["0", "1", "-5", "abc", "²", "1000000000", "", " "])
@pytest.mark.parametrize("command", ["--help", "status ROOT"])
def test_a_width_that_is_none(words: dict[str, str], columns: str, command: str) -> None:
    done = shell("avatar", command, words, {"COLUMNS": columns})
    assert done.returncode == 0
    assert COMMANDS[command] in done.stdout
    assert 60 < max(map(len, done.stdout.splitlines())) <= 80


def test_a_width_that_is_one(words: dict[str, str]) -> None:
    done = shell("avatar", "--help", words, {"COLUMNS": "50"})
    assert max(map(len, done.stdout.splitlines())) == 50


@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        ("LC_ALL=C", "é声"),
        ("LC_ALL=POSIX PYTHONUTF8=0 PYTHONCOERCECLOCALE=0", "é声"),
        ("LC_ALL=C PYTHONUTF8=0", "é声"),
        ("PYTHONIOENCODING=ascii", r"\xe9\u58f0"),
        ("LC_ALL=C PYTHONUTF8=0 PYTHONIOENCODING=ascii:strict", r"\xe9\u58f0"),
        ("PYTHONIOENCODING=latin-1", r"�\u58f0"),
    ],
)
def test_names_in_any_locale(words: dict[str, str], tmp_path: Path, variables: str, shown: str) -> None:
    done = shell(f"env {variables} avatar", f"plan {tmp_path}/é声.csv ROOT", words)
    assert done.returncode == 2
    assert done.stderr == f"error: table {tmp_path}/{shown}.csv: no such file\n"


@pytest.mark.parametrize(
    ("variables", "shown"),
    [("LC_ALL=C PYTHONUTF8=0", "é声"), ("PYTHONIOENCODING=ascii", r"\xe9\u58f0")],
)
def test_datasets_in_any_locale(
    words: dict[str, str], rendered: Rendered, variables: str, shown: str
) -> None:
    table = shutil.copy(rendered.table, rendered.table.with_name("é声.csv"))
    done = shell(f"env {variables} avatar", f"render {table} ROOT --limit 1", words)
    assert done.returncode == 0, done.stderr
    assert f"1 of 1 clips in {words['ROOT'].partition('=')[2]}/datasets/{shown}\n" in done.stdout


def test_a_file_name_that_is_not_utf8(inputs: Path, tmp_path: Path, words: dict[str, str]) -> None:
    shutil.copy(inputs / "portrait.jpg", f"{tmp_path}/caf\udce9.jpg")
    words = {**words, "RECORDING": str(inputs / "hello.wav")}
    done = shell(f"cd {tmp_path} && avatar caf$'\\xe9'.jpg", "render RECORDING ROOT", words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(r"error: `caf\udce9.jpg` is not UTF-8")


# --- proxies

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in PROXIES:
        for spelling in (name, name.upper()):
            monkeypatch.setenv(spelling, "")  # so that it is as before after the test
            monkeypatch.delenv(spelling)
    return monkeypatch


@pytest.mark.parametrize(
    ("given", "lower", "upper"),
    [
        ({}, "127.0.0.1,localhost,::1", "127.0.0.1,localhost,::1"),
        ({"NO_PROXY": "a, b"}, "a,b,127.0.0.1,localhost,::1", "a,b,127.0.0.1,localhost,::1"),
        ({"no_proxy": "a"}, "a,127.0.0.1,localhost,::1", "a,127.0.0.1,localhost,::1"),
        (
            {"no_proxy": "a", "NO_PROXY": "localhost,b"},
            "a,127.0.0.1,localhost,::1",
            "localhost,b,127.0.0.1,::1",
        ),
        ({"no_proxy": "", "NO_PROXY": "b"}, "b,127.0.0.1,localhost,::1", "b,127.0.0.1,localhost,::1"),
    ],
)
def test_this_machine_is_reached_directly(
    no_proxies: pytest.MonkeyPatch, given: dict[str, str], lower: str, upper: str
) -> None:
    for name, value in given.items():
        no_proxies.setenv(name, value)
    for _ in range(2):  # a worker's runs inherit what was added
        reach_directly("127.0.0.1", "localhost", "::1")
        assert (os.environ["no_proxy"], os.environ["NO_PROXY"]) == (lower, upper)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:9"),
        ("all_proxy", "socks5h://127.0.0.1:9"),
        ("HTTPS_PROXY", "nonsense://x"),
        ("http_proxy", "http://host:port"),
    ],
)
def test_proxies_that_no_client_can_be_made_with(
    no_proxies: pytest.MonkeyPatch, name: str, value: str
) -> None:
    import httpx

    no_proxies.setenv(name, value)
    no_proxies.setenv("HTTP_PROXY" if name != "http_proxy" else "HTTPS_PROXY", "http://proxy:3128")
    no_proxies.setenv("NO_PROXY", "[::1],example.org,10.0.0.0/8,a:b:c")
    with pytest.raises((ImportError, ValueError, httpx.InvalidURL)):
        httpx.Client()
    assert unusable_proxies() == [name]
    leave_out_unusable_proxies()
    assert name not in os.environ
    assert "http://proxy:3128" in (os.environ.get("HTTP_PROXY"), os.environ.get("HTTPS_PROXY"))
    assert os.environ["NO_PROXY"] == "example.org,10.0.0.0/8"
    httpx.Client().close()
