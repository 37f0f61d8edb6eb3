"""What `avatar status` says of the queues of a server's GPUs."""

import io
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from avatar_core.errors import ConfigError
from flows import status_view
from flows.deploy import ensure_pool, register_host
from flows.names import POOL, gpu_queue, items_in, machine_of, shard_name
from flows.prefect_client import prefect_client
from flows.queues import Fleet, QueueStatus, read_fleet, remove_host
from tests.flows.conftest import PrefectServer
from tests.processes import until
from tests.sample_rows import RunAvatar

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

pytestmark = pytest.mark.timeout(240)

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


@pytest.fixture
def client(prefect_server: PrefectServer) -> "Iterator[SyncPrefectClient]":
    with prefect_client(f"{prefect_server.address}/api") as client:
        ensure_pool(client)
        yield client


@pytest.fixture
def queue(client: "SyncPrefectClient", request: pytest.FixtureRequest) -> str:
    """Of a machine of this test's own, whose lane was just heard of."""
    name = gpu_queue(f"m{zlib.crc32(request.node.name.encode())}", 0)
    client.create_work_queue(name, work_pool_name=POOL)
    client.send_worker_heartbeat(POOL, f"{name}.1", 5.0)
    return name


def add_shard(client: "SyncPrefectClient", queue: str, name: str, *states: Any) -> None:
    from flows.lanes import ensure_shard_deployment

    run = client.create_flow_run_from_deployment(
        ensure_shard_deployment(client), name=name, parameters={"run": "batch-1"}, work_queue_name=queue
    )
    for state in states:
        client.set_flow_run_state(run.id, state, force=True)


def status_of(client: "SyncPrefectClient", queue: str) -> QueueStatus:
    (found,) = [each for each in read_fleet(client).queues if each.name == queue]
    return found


def printed(fleet: Fleet) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(status_view._queue_table(fleet))
    return console.file.getvalue()  # type: ignore[attr-defined]


# --- what the server has


def test_a_queue_tells_of_its_shards(client: "SyncPrefectClient", queue: str) -> None:
    from prefect.states import Completed, Crashed, Failed, Running

    assert status_of(client, queue).doing == "idle"
    assert status_of(client, queue).busy is None
    add_shard(client, queue, shard_name("denoise", 3, "anna · b"), Running(), Completed())
    add_shard(client, queue, shard_name("denoise", 2, "anna · b"), Running(), Failed(name="RowsFailed"))
    add_shard(client, queue, shard_name("decode", 9, "anna · b"), Running(), Failed(name="GaveBack"))
    add_shard(client, queue, shard_name("decode", 5, "anna · b"), Running(), Crashed())
    add_shard(client, queue, shard_name("decode", 7, "anna · b"))
    add_shard(client, queue, shard_name("text", 1, "anna · b"), Running())
    status = status_of(client, queue)
    assert (status.shards, status.items) == (2, 5)  # those that were computed
    assert status.doing == "text · 1 · anna · b of batch-1"
    assert status.waiting == 1
    assert status.busy is not None
    assert 0 < status.busy <= 1
    assert status.last_death
    assert datetime.now(UTC) - status.last_death < timedelta(minutes=2)


def test_a_paused_queue_says_so(client: "SyncPrefectClient", queue: str) -> None:
    found = client.read_work_queue_by_name(queue, POOL)
    client.update_work_queue(found.id, is_paused=True)
    assert status_of(client, queue).doing == "paused, idle"


def test_a_machine_that_is_gone_is_forgotten(client: "SyncPrefectClient", queue: str) -> None:
    host = machine_of(queue) or ""
    register_host(client, host)
    with pytest.raises(ConfigError, match=f"{host} serves {queue}: stop `avatar worker` there first"):
        remove_host(client, host)
    assert host not in read_fleet(client).gone
    path = {"work_pool_name": POOL, "name": f"{queue}.1"}
    client.request("DELETE", "/work_pools/{work_pool_name}/workers/{name}", path_params=path)
    assert host in read_fleet(client).gone
    assert status_of(client, queue).doing == "no lane"
    assert remove_host(client, host) == [queue, f"{host}-render"]
    assert host not in read_fleet(client).gone
    assert host not in {found.name for found in client.read_deployments()}
    with pytest.raises(ConfigError, match=f"no machine is called `{host}` on the server; known: "):
        remove_host(client, host)


def test_status_lists_the_queues(
    avatar: RunAvatar,
    client: "SyncPrefectClient",
    queue: str,
    prefect_server: PrefectServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    client.create_work_queue("lost-gpu-0", work_pool_name=POOL)
    api_url = f"{prefect_server.address}/api"
    monkeypatch.setenv("PREFECT_API_URL", api_url)
    monkeypatch.setenv("COLUMNS", "200")
    with temporary_settings({PREFECT_API_URL: api_url}):
        code, output = avatar("status", f"storage.root={tmp_path}")
    assert code == 0
    (line,) = [line for line in output.splitlines() if line.startswith(queue)] or [output]
    assert line.split()[1:] == ["idle", "0", "0"], output
    assert (
        "nothing is heard of the machine lost; if it does not come back: `avatar worker --remove lost`"
        in output
    )


# --- how it is shown


def test_a_table_of_queues() -> None:
    at_work = QueueStatus("alpha-gpu-0", "H200", True, "denoise · 4 of b-1", NOON, 1, 0.876, 23, 92, None)
    dead = QueueStatus("beta-gpu-0", "H200", False, "no lane", None, 0, None, 0, 0, NOON)
    lines = printed(Fleet((at_work, dead), ("beta",))).splitlines()
    assert lines[0].split() == ["queue", "does", "since", "waiting", "shards", "busy", "last", "death"]
    assert "denoise · 4 of b-1" in lines[1]
    assert lines[1].split()[-3:] == ["1", "23", "88%"]
    assert lines[2].split()[:3] == ["beta-gpu-0", "no", "lane"]
    assert "2026-01-02" in lines[1]
    assert "2026-01-02" in lines[2]


def test_names_of_shards_tell_their_items() -> None:
    assert items_in(shard_name("denoise", 12, "anna · b")) == 12
    assert items_in("a run of somebody's own") == 0


# --- watching


def test_watching_goes_on_until_it_is_interrupted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flows.cli", "status", "--watch", f"storage.root={tmp_path}"]
    log = tmp_path / "log"
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        until(lambda: log.read_text().count("no runs are recorded yet") >= 2, [process])
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert "stopped" not in log.read_text()


def test_a_terminal_is_drawn_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_view, "WATCH_S", 0.0)
    console = Console(file=io.StringIO(), force_terminal=True, width=80, _environ={})
    left = iter(["first", "second"])

    def show(screen: Console) -> None:
        screen.print(next(left, None) or interrupt())

    def interrupt() -> str:
        raise KeyboardInterrupt

    status_view.watch(console, show)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[2K" in output[output.index("first") : output.index("second")]  # its line is erased
