"""What becomes of a flow run on the server when its process is killed."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from flows.alive import crash_lost_runs
from tests.flows.conftest import PrefectServer
from tests.processes import until

pytestmark = pytest.mark.timeout(180)

RUN = """
import time
from prefect import flow, runtime, task
from flows.alive import mark_alive

@task
def work():
    time.sleep(600)

@flow(name="marked")
def marked():
    mark_alive(runtime.flow_run.id, runtime.flow_run.run_count)
    work.submit()
    print(runtime.flow_run.id, flush=True)
    time.sleep(600)

marked()
"""

StartRun = Callable[[], tuple[subprocess.Popen[str], str]]


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AVATAR_STATE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def start_run(prefect_server: PrefectServer, state: Path) -> Iterator[StartRun]:
    """Starts a flow run in a process of its own; gives that and the run's id."""
    processes = []

    def start() -> tuple[subprocess.Popen[str], str]:
        environment = {**prefect_server.environment, "AVATAR_STATE_DIR": str(state)}
        process = subprocess.Popen(
            [sys.executable, "-c", RUN], env=environment, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout
        return process, process.stdout.readline().strip()

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def flow_run(server: PrefectServer, run_id: str) -> dict[str, Any]:
    found: dict[str, Any] = server.get(f"flow_runs/{run_id}")
    return found


def task_run_states(server: PrefectServer, run_id: str) -> list[str]:
    found = server.post("task_runs/filter", {"flow_runs": {"id": {"any_": [run_id]}}})
    return [run["state_type"] for run in found]


@pytest.mark.drill
def test_a_killed_run_crashes_and_a_live_one_stays(
    prefect_server: PrefectServer, start_run: StartRun, state: Path
) -> None:
    (killed, killed_id), (_, live_id) = start_run(), start_run()
    for run_id in (killed_id, live_id):
        until(lambda run_id=run_id: task_run_states(prefect_server, run_id) == ["RUNNING"], every_s=0.1)
    killed.kill()
    killed.wait()
    assert flow_run(prefect_server, killed_id)["state_type"] == "RUNNING"
    crash_lost_runs(f"{prefect_server.address}/api")
    found = flow_run(prefect_server, killed_id)["state"]
    assert found["type"] == "CRASHED"
    assert "ended without a word to the server" in found["message"]
    assert task_run_states(prefect_server, killed_id) == ["CRASHED"]
    assert flow_run(prefect_server, live_id)["state_type"] == "RUNNING"
    assert task_run_states(prefect_server, live_id) == ["RUNNING"]
    assert [path.name for path in (state / "flow-runs").iterdir()] == [live_id]


def lose(state: Path, run_id: str, run_count: int = 1) -> Path:
    """As a killed process leaves it."""
    path = state / "flow-runs" / run_id
    path.parent.mkdir(exist_ok=True)
    path.write_text(str(run_count))
    return path


def create_run(server: PrefectServer, state_type: str) -> str:
    flow = server.post("flows/", {"name": "marked"})
    run = server.post("flow_runs/", {"flow_id": flow["id"], "state": {"type": "PENDING"}})
    server.post(f"flow_runs/{run['id']}/set_state", {"state": {"type": "RUNNING"}, "force": True})
    if state_type != "RUNNING":
        server.post(f"flow_runs/{run['id']}/set_state", {"state": {"type": state_type}, "force": True})
    return str(run["id"])


@pytest.mark.parametrize(
    ("before", "after"),
    [("RUNNING", "CRASHED"), ("CANCELLING", "CRASHED"), ("COMPLETED", "COMPLETED"), ("PENDING", "PENDING")],
)
def test_only_what_is_shown_as_running_crashes(
    prefect_server: PrefectServer, state: Path, before: str, after: str
) -> None:
    run_id = create_run(prefect_server, before)
    path = lose(state, run_id)
    crash_lost_runs(f"{prefect_server.address}/api")
    assert flow_run(prefect_server, run_id)["state_type"] == after
    assert not path.exists()


def test_a_later_attempt_elsewhere_is_left_alone(prefect_server: PrefectServer, state: Path) -> None:
    run_id = create_run(prefect_server, "RUNNING")
    for state_type in ("PENDING", "RUNNING"):
        prefect_server.post(f"flow_runs/{run_id}/set_state", {"state": {"type": state_type}, "force": True})
    assert flow_run(prefect_server, run_id)["run_count"] == 2
    lose(state, run_id, run_count=1)
    crash_lost_runs(f"{prefect_server.address}/api")
    assert flow_run(prefect_server, run_id)["state_type"] == "RUNNING"


def test_a_run_of_another_machine_is_left_alone(prefect_server: PrefectServer, state: Path) -> None:
    run_id = create_run(prefect_server, "RUNNING")
    lose(state, str(uuid4()))
    crash_lost_runs(f"{prefect_server.address}/api")
    assert flow_run(prefect_server, run_id)["state_type"] == "RUNNING"


def test_a_run_of_another_server_is_kept_for_a_while(prefect_server: PrefectServer, state: Path) -> None:
    recent, old = lose(state, str(uuid4())), lose(state, str(uuid4()))
    os.utime(old, (0, time.time() - 8 * 86400))
    crash_lost_runs(f"{prefect_server.address}/api")
    assert recent.exists()
    assert not old.exists()


def test_without_lost_runs_no_prefect_is_imported(state: Path) -> None:
    (state / "flow-runs").mkdir()
    (state / "flow-runs" / "no run").touch()
    code = "import sys; sys.modules['prefect'] = None; from flows.alive import crash_lost_runs as c; c('')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_on_prefect_s_own_temporary_server_leaves_no_trace(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.alive import mark_alive

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    mark_alive(uuid4(), 1)
    assert not (state / "flow-runs").exists()


def test_a_state_folder_that_cannot_be_written_stops_no_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from flows.alive import mark_alive

    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setenv("AVATAR_STATE_DIR", "/proc/nowhere")
    mark_alive(uuid4(), 1)
    assert "its server will not hear of it" in caplog.text
