"""The queues of GPUs as the server has them: what each does, how busy it is, and its last death."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from avatar_core.errors import ConfigError
from flows.deploy import remove_host_deployment
from flows.lane_lock import is_served_here
from flows.names import POOL, host_of, items_in, machine_of

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, WorkQueue

WINDOW = timedelta(hours=1)
"""For which shards are counted and the busy share is told."""
PAGE = 200
_SILENT = timedelta(seconds=60)
_WAITING, _AT_WORK = ("SCHEDULED",), ("PENDING", "RUNNING", "CANCELLING")
_COMPUTED = ("Completed", "RowsFailed")


@dataclass(frozen=True)
class QueueStatus:
    """`doing` says what is at work, or why nothing is; `items` are those of the `shards` that were computed;
    `busy` is the part of the time that had a shard at work. These three are of the last hour, or of the time
    since its first shard in it, or of the last 200 shards. `last_death` is when a shard of it crashed."""

    name: str
    gpu: str
    is_served: bool
    doing: str
    since: datetime | None
    waiting: int
    busy: float | None
    shards: int
    items: int
    last_death: datetime | None


@dataclass(frozen=True)
class Fleet:
    """All GPUs of the server; `gone` are machines of which nothing is heard."""

    queues: tuple[QueueStatus, ...]
    gone: tuple[str, ...]


def read_fleet(client: "SyncPrefectClient") -> Fleet:
    from prefect.exceptions import ObjectNotFound

    try:
        found = client.read_work_queues(work_pool_name=POOL)
    except ObjectNotFound:
        return Fleet((), ())
    alive = served_queues(client)
    here = {host for queue in found if queue.name in alive and (host := machine_of(queue.name))}
    hosts = {host for queue in found if (host := host_of(queue.name))}
    queues = sorted((queue for queue in found if host_of(queue.name)), key=lambda queue: queue.name)
    statuses = [_status(client, queue, is_served=queue.name in alive) for queue in queues]
    return Fleet(tuple(statuses), tuple(sorted(hosts - here)))


def remove_host(client: "SyncPrefectClient", host: str) -> list[str]:
    """Queues, workers and the run form of a machine that is gone; what `avatar deploy` made there stays, and
    renders nothing until that machine is back. Raises `ConfigError` where it is not gone, or never was."""
    found = client.read_work_queues(work_pool_name=POOL)
    names = sorted(queue.name for queue in found if machine_of(queue.name) == host)
    if not names:
        known = sorted({machine for queue in found if (machine := machine_of(queue.name))})
        raise ConfigError(f"no machine is called `{host}` on the server; known: {', '.join(known) or 'none'}")
    if served := sorted(served_queues(client).intersection(names)):
        raise ConfigError(
            f"{host} serves {', '.join(served)}: stop `avatar worker` there first (one that was killed "
            f"counts as gone after {_SILENT.seconds} s)"
        )
    for worker in client.read_workers_for_work_pool(POOL):
        if worker.name.rpartition(".")[0] in names:
            forget_worker(client, worker.name)
    remove_host_deployment(client, host)
    for name in names:
        path = {"work_pool_name": POOL, "name": name}
        client.request("DELETE", "/work_pools/{work_pool_name}/queues/{name}", path_params=path)
    return names


def forget_worker(client: "SyncPrefectClient", name: str) -> None:
    """So that nobody takes one that has ended for alive until its last heartbeat is old."""
    path = {"work_pool_name": POOL, "name": name}
    client.request("DELETE", "/work_pools/{work_pool_name}/workers/{name}", path_params=path)


def served_queues(client: "SyncPrefectClient") -> set[str]:
    """Queues whose lane, or worker, has been heard of lately; of lanes on this machine a lock tells it."""
    now = datetime.now(UTC)
    heard = {
        worker.name.rpartition(".")[0]
        for worker in client.read_workers_for_work_pool(POOL)
        if worker.last_heartbeat_time and now - worker.last_heartbeat_time < _SILENT
    }
    return {queue for queue in heard if is_served_here(queue) is not False}


def _status(client: "SyncPrefectClient", queue: "WorkQueue", *, is_served: bool) -> QueueStatus:
    from flows.lane_info import read_description

    info = read_description(queue.description)
    begin = datetime.now(UTC) - WINDOW
    at_work = _runs(client, queue.name, {"state": {"type": {"any_": _AT_WORK}}})
    ended = _runs(client, queue.name, {"end_time": {"after_": begin}})
    crashed = _runs(client, queue.name, {"state": {"type": {"any_": ("CRASHED",)}}}, limit=1)
    since: datetime | None = None
    if at_work:
        run = at_work[0]
        doing, since = f"{run.name} of {run.parameters.get('run', 'an unknown run')}", run.start_time
    else:
        doing = "idle" if is_served else "no lane"
        since = max((run.end_time for run in ended if run.end_time), default=None)
    computed = [run for run in ended if run.state_name in _COMPUTED]
    return QueueStatus(
        name=queue.name,
        gpu=info.gpu if info else "",
        is_served=is_served,
        doing=f"paused, {doing}" if queue.is_paused else doing,
        since=since,
        waiting=len(_runs(client, queue.name, {"state": {"type": {"any_": _WAITING}}})),
        busy=_busy_share([*at_work, *ended], begin),
        shards=len(computed),
        items=sum(items_in(run.name) for run in computed),
        last_death=crashed[0].end_time if crashed else None,
    )


def _runs(
    client: "SyncPrefectClient", queue: str, wanted: Mapping[str, Any], limit: int = PAGE
) -> Sequence["FlowRun"]:
    """The latest first."""
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter, WorkQueueFilter
    from prefect.client.schemas.sorting import FlowRunSort

    return client.read_flow_runs(
        work_pool_filter=WorkPoolFilter.model_validate({"name": {"any_": [POOL]}}),
        work_queue_filter=WorkQueueFilter.model_validate({"name": {"any_": [queue]}}),
        flow_run_filter=FlowRunFilter.model_validate(wanted),
        sort=FlowRunSort.END_TIME_DESC,
        limit=limit,
    )


def _busy_share(runs: Sequence["FlowRun"], begin: datetime) -> float | None:
    now = datetime.now(UTC)
    stretches = [(max(run.start_time, begin), run.end_time or now) for run in runs if run.start_time]
    if not stretches:
        return None
    first = min(start for start, _ in stretches)
    busy_s = sum((end - start).total_seconds() for start, end in stretches)
    return float(min(1.0, busy_s / max((now - first).total_seconds(), 1.0)))
