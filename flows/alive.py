"""Tells flow runs whose process was killed from those that go on.

A killed process tells its server nothing, which shows the run as running for ever. So a process locks a file
that is named by its flow run; the kernel unlocks it when the process ends, however it ends. The file is in
this machine's state folder: nothing is said of runs elsewhere.
"""

import fcntl
import logging
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING
from uuid import UUID

from flows.prefect_client import load_prefect, prefect_client
from flows.server import state_folder

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

log = logging.getLogger(__name__)

MESSAGE = (
    "the process of this run ended without a word to the server: it was killed, or the server was away; "
    "what was finished is kept, and rendering the table again goes on from there"
)
_KEPT_S = 7 * 86400.0
"""Runs of a server that is not asked any more are forgotten after that."""

_held: list[IO[str]] = []


def mark_alive(flow_run_id: UUID | str, run_count: int) -> None:
    """From now on this process answers for that attempt at a flow run, until it ends: after the run, too,
    since the server may be away just when it is to hear of the end."""
    if not os.environ.get("PREFECT_API_URL"):
        return  # the server ends with the run
    try:
        _folder().mkdir(parents=True, exist_ok=True)
        fresh = _path(f"{flow_run_id}.new")
        file = fresh.open("w", encoding="ascii")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write(str(run_count))
        file.flush()
        fresh.replace(_path(flow_run_id))  # nobody sees it unlocked
    except OSError as error:
        log.warning("should this run be killed, its server will not hear of it: %s", error)
    else:
        _held.append(file)


def crash_lost_runs(api_url: str | None = None) -> None:
    """Sets runs that are shown as running, and whose process on this machine is gone, to `Crashed`.

    `api_url` is a server that answers; without it the one that Prefect's settings name. Raises `AvatarError`
    where it cannot be asked.
    """
    lost = _lost_runs()
    if not lost:
        return  # the usual case, for which Prefect is not imported
    load_prefect(api_url)
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    wanted = FlowRunFilter(id=FlowRunFilterId(any_=list(lost)))
    with prefect_client(api_url) as client:
        for run in client.read_flow_runs(flow_run_filter=wanted):
            # One that waits is about to be tried again; a higher count is a later attempt, wherever that is.
            under_way = run.state_type in ("RUNNING", "CANCELLING")
            if under_way and run.run_count == lost[run.id]:
                _crash(client, run)
            _path(run.id).unlink(missing_ok=True)
    _forget_old(lost)


def _crash(client: "SyncPrefectClient", run: "FlowRun") -> None:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, TaskRunFilter
    from prefect.states import Crashed

    within = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
    begun = TaskRunFilter.model_validate({"state": {"type": {"any_": ["PENDING", "RUNNING"]}}})
    for task_run in client.read_task_runs(flow_run_filter=within, task_run_filter=begun):
        client.set_task_run_state(task_run.id, Crashed(message=MESSAGE), force=True)
    client.set_flow_run_state(run.id, Crashed(message=MESSAGE), force=True)
    _recall_shards(client, run)


def _recall_shards(client: "SyncPrefectClient", run: "FlowRun") -> None:
    """Nobody waits any more for what of the run still waits on queues of GPUs; what is at work there is
    committed in any case."""
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.states import Cancelled

    waiting = {"tags": {"all_": [run.name]}, "state": {"type": {"any_": ["SCHEDULED"]}}}
    for shard in client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(waiting)):
        client.set_flow_run_state(shard.id, Cancelled(message=MESSAGE), force=True)


def _lost_runs() -> dict[UUID, int]:
    """Runs that no process answers for, with the number of the attempt that was lost."""
    lost = {}
    for path in _folder().glob("*"):
        with suppress(OSError, ValueError):
            run_id = UUID(path.name)
            with path.open(encoding="ascii") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                lost[run_id] = int(file.read())
    return lost


def _forget_old(run_ids: Iterable[UUID]) -> None:
    for run_id in run_ids:
        with suppress(FileNotFoundError):
            if time.time() - _path(run_id).stat().st_mtime > _KEPT_S:
                _path(run_id).unlink()


def _path(flow_run_id: UUID | str) -> Path:
    return _folder() / str(flow_run_id)


def _folder() -> Path:
    return state_folder() / "flow-runs"
