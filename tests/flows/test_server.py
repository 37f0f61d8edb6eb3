"""`avatar up`, `avatar down` and how a server is found again."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from avatar_core.errors import AvatarError
from flows.server import (
    Server,
    answers,
    process_start,
    running_server,
    server_environment,
    start_server,
    stop_server,
)
from flows.supervisor import stop_supervisor
from tests.flows.conftest import PrefectServer, free_port
from tests.processes import until
from tests.sample_rows import Rendered, RunAvatar

AVATAR = Path(sys.executable).with_name("avatar")

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty state folder; what a test leaves running there is ended."""
    monkeypatch.setenv("AVATAR_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    (tmp_path / "state").mkdir()
    yield tmp_path / "state"
    monkeypatch.setenv("AVATAR_STATE_DIR", str(tmp_path / "state"))
    stop_supervisor(print, at_once=True)
    stop_server()


@pytest.fixture
def shared_state(prefect_server: PrefectServer, monkeypatch: pytest.MonkeyPatch) -> PrefectServer:
    """The state folder of the server that all tests share."""
    monkeypatch.setenv("AVATAR_STATE_DIR", str(prefect_server.folder))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    return prefect_server


@pytest.fixture
def stubborn() -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own that does not heed SIGTERM."""
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(100)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def record(state: Path, server: Server) -> None:
    values = {"pid": server.pid, "started": server.started, "address": server.address}
    (state / "server.json").write_text(json.dumps(values))


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return str(response.read().decode())


def fetched(url: str) -> str | None:
    try:
        return fetch(url)
    except urllib.error.HTTPError:
        return None


def wait_for(line: str, process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=150)
    assert line in output, output
    return output


# --- up and down


@pytest.mark.drill
def test_up_and_down(state: Path) -> None:
    """Two at once start one server, which outlives both, has its pages and settings, and goes as a whole."""
    port = free_port()
    command = [str(AVATAR), "up", "--port", str(port)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [wait_for(f"http://127.0.0.1:{port}", process) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted("up already" in output for output in outputs) == [False, True]
    server = running_server()
    assert server
    assert server.address == f"http://127.0.0.1:{port}"
    assert server_environment()["PREFECT_API_URL"] == f"{server.address}/api"
    assert os.getpgid(server.pid) == server.pid != os.getpgid(os.getpid())

    assert json.loads(fetch(f"{server.address}/ui-settings"))["api_url"] == "/api"
    assert re.search(r"<script[^>]+src=", fetch(f"{server.address}/v2/"))
    settings = json.loads(fetch(f"{server.api_url}/admin/settings"))["server"]
    assert settings["analytics_enabled"] is False
    recorder = settings["services"]["task_run_recorder"]
    assert (recorder["batch_size"], recorder["read_batch_size"]) == (100, 100)
    pool = json.loads(until(lambda: fetched(f"{server.api_url}/work_pools/avatar"), patience_s=60))
    assert pool["type"] == "process"
    assert pool["base_job_template"]["variables"]["properties"]["command"]["default"] == "avatar execute"
    assert (state / "prefect" / "prefect.db").exists()

    done = subprocess.run([str(AVATAR), "down"], capture_output=True, text=True, check=True)
    assert done.stdout == f"stopped {server.address}\n"
    assert not server.alive
    assert not answers(server.api_url)
    assert running_server() is None
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_down_without_a_server(avatar: RunAvatar, state: Path) -> None:
    assert avatar("down") == (0, "no server runs\n")


def test_up_again_says_so(avatar: RunAvatar, shared_state: PrefectServer) -> None:
    code, output = avatar("up")
    assert code == 0
    assert f"up already: {shared_state.address}\n" in output
    assert f"export PREFECT_API_URL={shared_state.address}/api\n" in output


def test_up_elsewhere_while_one_runs(avatar: RunAvatar, shared_state: PrefectServer) -> None:
    code, output = avatar("up", "--port", free_port())
    assert code == 2
    assert f"runs already, at {shared_state.address}; stop it first with `avatar down`" in output


@pytest.mark.drill
def test_a_server_that_cannot_start_says_why(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = "sqlite+aiosqlite:////proc/nowhere/prefect.db"
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", database)
    with pytest.raises(AvatarError, match=r"(?s)ended before it answered.*server\.log") as caught:
        start_server(port=free_port())
    assert len(str(caught.value).splitlines()) < 20
    assert running_server() is None
    assert not (state / "server.json").exists()


def test_a_server_that_takes_too_long_is_ended(state: Path) -> None:
    port = free_port()
    with pytest.raises(AvatarError, match=r"did not answer for 0\.2 s"):
        start_server(port=port, timeout_s=0.2)
    assert running_server() is None
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_down_ends_what_ignores_sigterm(state: Path, stubborn: subprocess.Popen[bytes]) -> None:
    server = Server(stubborn.pid, process_start(stubborn.pid) or "", "http://127.0.0.1:1")
    record(state, server)
    assert stop_server(timeout_s=0.3) == server
    assert stubborn.wait() == -signal.SIGKILL
    assert not (state / "server.json").exists()


# --- the port


def test_a_port_taken_by_another_program(avatar: RunAvatar, state: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, output = avatar("up", "--port", port)
    assert code == 2
    assert f"port {port} on 127.0.0.1 is taken by another program; choose another port with --port" in output


def test_a_port_taken_by_another_prefect_server(
    avatar: RunAvatar, prefect_server: PrefectServer, state: Path
) -> None:
    code, output = avatar("up", "--port", prefect_server.address.rpartition(":")[2])
    assert code == 2
    assert f"set PREFECT_API_URL={prefect_server.address}/api to use it" in output


@pytest.mark.parametrize(("host", "port"), [("no.such.host.invalid", 4200), ("192.0.2.1", 4200)])
def test_a_host_that_is_not_ours(avatar: RunAvatar, state: Path, host: str, port: int) -> None:
    code, output = avatar("up", "--host", host, "--port", port)
    assert code == 2
    assert f"no server can listen on host {host}, port {port}" in output


def test_a_state_folder_that_cannot_be_made(avatar: RunAvatar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVATAR_STATE_DIR", "/proc/nowhere")
    code, output = avatar("up")
    assert code == 2
    assert "choose one with AVATAR_STATE_DIR" in output


# --- finding it again


def test_environment_names_the_running_server(
    shared_state: PrefectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = shared_state.address
    expected = {"PREFECT_API_URL": f"{address}/api", "PREFECT_UI_URL": f"{address}/v2"}
    assert server_environment() == expected
    monkeypatch.setenv("PREFECT_API_URL", f"{address}/api")
    assert server_environment() == expected


def test_environment_leaves_the_users_own_server(
    shared_state: PrefectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere:4200/api")
    assert server_environment() == {}


def test_environment_without_a_server(state: Path) -> None:
    assert server_environment() == {}
    (state / "server.json").write_text("{")
    assert server_environment() == {}


def test_environment_of_a_server_that_does_not_answer(state: Path, stubborn: subprocess.Popen[bytes]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        record(state, Server(stubborn.pid, process_start(stubborn.pid) or "", address))
        assert running_server()
        began = time.monotonic()
        assert server_environment() == {}
        assert time.monotonic() - began < 20


def test_a_process_that_took_over_the_number_is_left_alone(
    avatar: RunAvatar, state: Path, stubborn: subprocess.Popen[bytes]
) -> None:
    own = process_start(os.getpid())
    assert own
    assert own != process_start(stubborn.pid)
    record(state, Server(stubborn.pid, own, "http://127.0.0.1:1"))
    assert server_environment() == {}
    assert avatar("down") == (0, "no server runs\n")
    assert stubborn.poll() is None
    assert not (state / "server.json").exists()


def test_a_process_that_ended_has_no_start(stubborn: subprocess.Popen[bytes]) -> None:
    assert process_start(stubborn.pid) == process_start(stubborn.pid)
    stubborn.kill()
    time_out = time.monotonic() + 10
    while process_start(stubborn.pid) and time.monotonic() < time_out:
        time.sleep(0.01)
    assert process_start(stubborn.pid) is None  # not yet waited for
    stubborn.wait()
    assert process_start(stubborn.pid) is None


def test_finding_the_server_imports_no_prefect(shared_state: PrefectServer) -> None:
    code = (
        "import sys; from flows.server import server_environment as settings; "
        "print(settings()['PREFECT_API_URL'], 'prefect' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{shared_state.address}/api False\n"


# --- status


def test_status_of_all_runs(
    avatar: RunAvatar, state: Path, rendered: Rendered, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output = avatar("status", f"storage.root={rendered.store}")
    assert code == 0
    (line,) = [line for line in output.splitlines() if line.startswith(rendered.result.run_id)]
    assert line.split()[-4:] == ["4", "4", "0", "0"]
    assert "no server runs; `avatar up` starts one" in output


def test_status_of_one_run(avatar: RunAvatar, state: Path, rendered: Rendered) -> None:
    code, output = avatar("status", "batch", f"storage.root={rendered.store}")
    assert code == 0
    assert re.search(r"^face +2 +2 +0 +0 *$", output, re.MULTILINE)
    assert re.search(r"^decode +4 +4 +0 +0 *$", output, re.MULTILINE)
    assert f"{rendered.result.run_id}: 4 of 4 clips ok, 0 failed, 0 to do\n" in output
    assert f"dataset: {rendered.result.dataset}\n" in output
    assert "flow run" not in output


@pytest.mark.drill
def test_status_shows_the_flow_run(shared_state: PrefectServer, rendered: Rendered) -> None:
    flow = shared_state.post("flows/", {"name": "render-dataset"})
    body = {"flow_id": flow["id"], "name": rendered.result.run_id, "state": {"type": "RUNNING"}}
    run = shared_state.post("flow_runs/", body)
    command = [str(AVATAR), "status", rendered.result.run_id, f"storage.root={rendered.store}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    page = f"{shared_state.address}/v2/runs/flow-run/{run['id']}"
    assert f"flow run: Running, {page}\n" in done.stdout


@pytest.mark.drill
def test_status_finds_a_run_whose_process_is_gone(shared_state: PrefectServer, rendered: Rendered) -> None:
    flow = shared_state.post("flows/", {"name": "render-dataset"})
    body = {"flow_id": flow["id"], "name": rendered.result.run_id, "state": {"type": "PENDING"}}
    run = shared_state.post("flow_runs/", body)
    shared_state.post(f"flow_runs/{run['id']}/set_state", {"state": {"type": "RUNNING"}, "force": True})
    marks = shared_state.folder / "flow-runs"
    marks.mkdir(exist_ok=True)
    (marks / run["id"]).write_text("1")
    command = [str(AVATAR), "status", rendered.result.run_id, f"storage.root={rendered.store}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"flow run: Crashed, {shared_state.address}/v2/runs/flow-run/{run['id']}\n" in done.stdout


def test_status_without_a_server_needs_no_prefect(state: Path, rendered: Rendered) -> None:
    code = (
        "import sys; sys.modules['prefect'] = None; "
        f"sys.argv = ['avatar', 'status', 'batch', 'storage.root={rendered.store}']; "
        "from flows.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 clips ok" in done.stdout


def test_status_of_an_unknown_run(avatar: RunAvatar, state: Path, rendered: Rendered) -> None:
    code, output = avatar("status", "bath", f"storage.root={rendered.store}")
    assert code == 2
    assert "no run `bath`" in output
    assert "did you mean `batch`?" in output


def test_status_takes_one_run(avatar: RunAvatar) -> None:
    code, output = avatar("status", "one", "two")
    assert code == 2
    assert "give one RUN" in output
