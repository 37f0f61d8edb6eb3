"""The queues of GPUs as the server has them: what each does, how busy it is, and its last death."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from avatar_core.errors import ConfigError
from flows.names import POOL, host_of, render_queue

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, WorkQueue

WINDOW = timedelta(hours=1)
"""For which the busy share is told."""
PAGE = 200
_SILENT = timedelta(seconds=60)


@dataclass(frozen=True)
class QueueStatus:
    """`doing` says what is at work, or why nothing is; `busy` is the part of the last hour, or of the time
    since its first shard in it, that had a shard at work; `last_death` is when a shard of it crashed."""

    name: str
    gpu: str
    doing: str
    since: datetime | None
    waiting: int
    busy: float | None
    shards: int
    last_death: datetime | None


def read_queues(client: "SyncPrefectClient") -> list[QueueStatus]:
    """Of all machines of the server."""
    from prefect.exceptions import ObjectNotFound

    try:
        queues = client.read_work_queues(work_pool_name=POOL)
    except ObjectNotFound:
        return []
    alive = served_queues(client)
    return [
        _status(client, queue, alive) for queue in sorted(queues, key=lambda q: q.name) if host_of(queue.name)
    ]


def remove_host(client: "SyncPrefectClient", host: str) -> list[str]:
    """Queues, workers and the deployment of a machine that is gone. Raises `ConfigError` where it is not, or
    never was."""
    queues = [
        queue
        for queue in client.read_work_queues(work_pool_name=POOL)
        if host_of(queue.name) == host or queue.name == render_queue(host)
    ]
    if not queues:
        known = sorted(
            {found for q in client.read_work_queues(work_pool_name=POOL) if (found := host_of(q.name))}
        )
        raise ConfigError(f"no machine is called `{host}` on the server; known: {', '.join(known) or 'none'}")
    served = sorted(served_queues(client) & {queue.name for queue in queues})
    if served:
        raise ConfigError(f"{', '.join(served)} are served: stop `avatar worker` on {host} first")
    for queue in queues:
        path = {"work_pool_name": POOL, "name": queue.name}
        client.request("DELETE", "/work_pools/{work_pool_name}/queues/{name}", path_params=path)
    names = {queue.name for queue in queues}
    for worker in client.read_workers_for_work_pool(POOL):
        if worker.name.rpartition(".")[0] in names:
            path = {"work_pool_name": POOL, "name": worker.name}
            client.request("DELETE", "/work_pools/{work_pool_name}/workers/{name}", path_params=path)
    return sorted(names)


def served_queues(client: "SyncPrefectClient") -> set[str]:
    """Queues whose lane, or worker, has been heard of lately."""
    now = datetime.now(UTC)
    return {
        worker.name.rpartition(".")[0]
        for worker in client.read_workers_for_work_pool(POOL)
        if worker.last_heartbeat_time and now - worker.last_heartbeat_time < _SILENT
    }


def _status(client: "SyncPrefectClient", queue: "WorkQueue", alive: set[str]) -> QueueStatus:
    from flows.lane_info import read_description

    runs = _recent_runs(client, queue.name)
    info = read_description(queue.description)
    at_work = next((run for run in runs if run.state_type in ("PENDING", "RUNNING", "CANCELLING")), None)
    deaths = [run.end_time for run in runs if run.state_type == "CRASHED" and run.end_time]
    since: datetime | None = None
    if at_work:
        doing, since = f"{at_work.name} of {_run_of(at_work)}", at_work.start_time
    else:
        doing = "idle" if queue.name in alive else "no lane"
        since = max((run.end_time for run in runs if run.end_time), default=None)
    if queue.is_paused:
        doing = f"paused, {doing}"
    return QueueStatus(
        name=queue.name,
        gpu=info.gpu if info else "",
        doing=doing,
        since=since,
        waiting=sum(run.state_type == "SCHEDULED" for run in runs),
        busy=_busy_share(runs),
        shards=sum(run.state_type == "COMPLETED" for run in runs),
        last_death=max(deaths, default=None),
    )


def _recent_runs(client: "SyncPrefectClient", queue: str) -> Sequence["FlowRun"]:
    from prefect.client.schemas.filters import WorkPoolFilter, WorkQueueFilter
    from prefect.client.schemas.sorting import FlowRunSort

    return client.read_flow_runs(
        work_pool_filter=WorkPoolFilter.model_validate({"name": {"any_": [POOL]}}),
        work_queue_filter=WorkQueueFilter.model_validate({"name": {"any_": [queue]}}),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        limit=PAGE,
    )


def _run_of(run: "FlowRun") -> str:
    return str(run.parameters.get("run", "an unknown run"))


def _busy_share(runs: Sequence["FlowRun"]) -> float | None:
    now = datetime.now(UTC)
    begin = now - WINDOW
    stretches = [
        (max(run.start_time, begin), run.end_time or now)
        for run in runs
        if run.start_time and (run.end_time or now) > begin
    ]
    if not stretches:
        return None
    first = min(start for start, _ in stretches)
    busy_s = sum((end - start).total_seconds() for start, end in stretches)
    return float(min(1.0, busy_s / max((now - first).total_seconds(), 1.0)))
