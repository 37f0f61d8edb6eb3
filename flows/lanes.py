"""The lanes that serve the queues of GPUs, as the workers of a render: what they are given, and how they are.

One thread looks at the server for all of them, as soon as it is told of something and once a second anyway.
Where the server is away nothing new is given out, and what is under way is waited for.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State, WorkQueue
from prefect.client.schemas.objects import Worker as Heartbeats
from prefect.events import Event
from prefect.states import Cancelling, Crashed, Scheduled
from prefect.utilities.callables import parameter_schema

from avatar_core.errors import AvatarError
from avatar_core.execution.job_file import JobFile
from avatar_core.execution.worker import Cancellation, Job, JobResult, Listener, WorkerKind
from avatar_core.store.storage import Storage
from flows.events import AWAY, listen
from flows.lane_info import LaneInfo, read_description
from flows.lane_lock import is_served_here
from flows.names import POOL, host_of, shard_name
from flows.shard import ENTRYPOINT, PROGRESS, shard
from tasks.shard import GAVE_BACK

log = logging.getLogger(__name__)

LOOK_S = 1.0
QUEUES_S = 3.0
"""Between two looks at what queues and lanes there are."""
SILENT_S = 60.0
"""After which a lane that sends no heartbeats is gone; of one on this machine a lock tells at once."""
GRACE_S = 10.0
"""For a shard that was cancelled."""
AGAIN_S = 2.0
LEAVE_S = 2.0
"""For a look that is under way at the end: at a server that was killed meanwhile it may take minutes."""
RESULT_S = 5.0
"""Between two looks into the store for a result, while the server is away."""
PRIORITY_STEP = timedelta(hours=1)
"""A queue takes first what was scheduled first: so much earlier is a render of the next priority."""


@dataclass(frozen=True)
class Dispatch:
    """Whose shards these are: the `deployment` that they are runs of; `options` open the store at `root`,
    but for credentials; `clip_of` names what an item of a stage belongs to, by its key."""

    run_id: str
    deployment: UUID
    storage: Storage
    root: str
    options: Mapping[str, Any] = field(repr=False)
    clip_of: Callable[[str, str], str]
    priority: int = 0


@dataclass
class LaneTally:
    """What a lane has done for this render; `busy_s` since `first_s`, the begin of its first shard."""

    shards: int = 0
    items: int = 0
    deaths: int = 0
    busy_s: float = 0.0
    first_s: float | None = None

    @property
    def busy_share(self) -> float:
        if self.first_s is None:
            return 0.0
        return min(1.0, self.busy_s / max(time.monotonic() - self.first_s, 0.001))

    def begin(self) -> float:
        now_s = time.monotonic()
        if self.first_s is None:
            self.first_s = now_s
        return now_s

    def count(self, begun_s: float, result: JobResult) -> None:
        self.busy_s += time.monotonic() - begun_s
        self.deaths += result.died or result.hung
        self.shards += bool(result.rows)
        self.items += len(result.rows)


@dataclass
class _Order:
    """A shard's run on a queue; `state` is the last that was seen of it."""

    flow_run_id: UUID
    state: State[Any]
    changed: threading.Event = field(default_factory=threading.Event)


def ensure_shard_deployment(client: SyncPrefectClient) -> UUID:
    """What shards are runs of, whichever queue they are for."""
    return client.create_deployment(
        client.create_flow(shard),
        name="gpu",
        work_pool_name=POOL,
        entrypoint=ENTRYPOINT,
        description="One shard on the queue of a GPU; renders start these.",
        parameter_openapi_schema=parameter_schema(shard).model_dump(),
        enforce_parameter_schema=False,
    )


class Lanes:
    """`unfit` says why a lane is left out of this render, None for one that takes part; `on_lane` is told of
    each that does, with the name of its queue."""

    def __init__(
        self,
        dispatch: Dispatch,
        unfit: Callable[[LaneInfo], str | None],
        on_lane: Callable[[str, "LaneWorker"], None],
        warn: Callable[[str], None],
    ) -> None:
        self.dispatch = dispatch
        self.is_server_away = False
        self._unfit, self._on_lane, self._warn = unfit, on_lane, warn
        self._workers: dict[str, LaneWorker] = {}
        self._told: set[str] = set()
        self._orders: dict[UUID, _Order] = {}
        self._listeners: dict[str, Listener] = {}
        self._wake, self._over = threading.Event(), threading.Event()
        self._seen_s = float("-inf")
        self._client = get_client(sync_client=True)
        self._thread = threading.Thread(target=self._watch, name="lanes", daemon=True)

    def __enter__(self) -> "Lanes":
        self._client.__enter__()
        with suppress(*AWAY):
            self._look()
        self._thread.start()
        wanted = ["prefect.flow-run.", "prefect.work-queue.", PROGRESS]
        self._stop_listening = listen(wanted, self._on_event, "lanes' events")
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop_listening()
        self._over.set()
        self._wake.set()
        self._thread.join(LEAVE_S)

    @property
    def names(self) -> list[str]:
        return list(self._workers)

    @property
    def tallies(self) -> dict[str, tuple[LaneTally, str]]:
        """By queue, with why it is given nothing."""
        return {name: (each.tally, each.unavailable or "") for name, each in list(self._workers.items())}

    # --- for the workers

    def order(self, queue: str, job: Job, item_timeout_s: float, name: str) -> _Order:
        dispatch = self.dispatch
        due = datetime.now(UTC) - dispatch.priority * PRIORITY_STEP
        flow_run = self._client.create_flow_run_from_deployment(
            dispatch.deployment,
            parameters={
                "store": dispatch.root,
                "run": dispatch.run_id,
                "job": job.id,
                "item_timeout_s": item_timeout_s,
                "options": dict(dispatch.options),
            },
            state=Scheduled(scheduled_time=due),
            name=name,
            tags=[dispatch.run_id, job.stage],
            idempotency_key=f"{dispatch.run_id}/{job.id}",
            work_queue_name=queue,
        )
        order = self._orders[flow_run.id] = _Order(flow_run.id, flow_run.state or Scheduled())
        self._wake.set()
        return order

    def forget(self, order: _Order) -> None:
        self._orders.pop(order.flow_run_id, None)

    def recall(self, order: _Order) -> None:
        """What waits does not begin; what is at work stops at its next report."""
        with suppress(*AWAY):
            self._client.set_flow_run_state(order.flow_run_id, Cancelling())
        self._wake.set()

    def bury(self, order: _Order) -> None:
        with suppress(*AWAY):
            self._client.set_flow_run_state(order.flow_run_id, Crashed(message="its lane died"), force=True)

    def heard_by(self, job_id: str, listener: Listener | None) -> None:
        if listener:
            self._listeners[job_id] = listener
        else:
            self._listeners.pop(job_id, None)

    # --- the server

    def _on_event(self, event: Event) -> None:
        if event.event.startswith("prefect.work-queue."):
            self._seen_s = float("-inf")
        if event.event != PROGRESS:
            self._wake.set()
        elif listener := self._listeners.get(event.payload.get("job", "")):
            told = event.payload
            listener.on_progress(told["key"], told["done"], told["total"])

    def _watch(self) -> None:
        try:
            while not self._over.is_set():
                self._wake.wait(LOOK_S)
                self._wake.clear()
                self._look_if_possible()
        finally:
            self._client.__exit__(None, None, None)

    def _look_if_possible(self) -> None:
        try:
            self._look()
            self.is_server_away = False
        except AWAY as error:
            if not self.is_server_away:
                log.warning("the Prefect server does not answer: %s", error)
            self.is_server_away = True
            self._over.wait(LOOK_S)

    def _look(self) -> None:
        if time.monotonic() - self._seen_s >= QUEUES_S:
            self._look_at_queues()
            self._seen_s = time.monotonic()
        if self._orders:
            wanted = FlowRunFilter(id=FlowRunFilterId(any_=list(self._orders)))
            for run in self._client.read_flow_runs(flow_run_filter=wanted):
                order = self._orders.get(run.id)
                if order and run.state and order.state.id != run.state.id:
                    order.state = run.state
                    order.changed.set()

    def _look_at_queues(self) -> None:
        pool = self._client.read_work_pool(POOL)
        queues = self._client.read_work_queues(work_pool_name=POOL)
        beats = {each.name: each for each in self._client.read_workers_for_work_pool(POOL)}
        for queue in queues:
            info = read_description(queue.description) if host_of(queue.name) else None
            if info:
                self._see(queue, info, beats.get(info.worker), is_pool_paused=pool.is_paused)

    def _see(
        self, queue: WorkQueue, info: LaneInfo, beats: Heartbeats | None, *, is_pool_paused: bool
    ) -> None:
        worker = self._workers.get(queue.name)
        if worker is None:
            worker = LaneWorker(self, queue.name)
            worker.see(queue, info, beats, is_pool_paused=is_pool_paused)
            if worker.is_gone:
                return
            if reason := self._unfit(info):
                if reason not in self._told:
                    self._told.add(reason)
                    self._warn(f"{queue.name} is left out: {reason}")
                return
            self._workers[queue.name] = worker
            self._on_lane(queue.name, worker)
        else:
            worker.see(queue, info, beats, is_pool_paused=is_pool_paused)


class LaneWorker:
    """The lane of one queue. It has a shard at work and one that waits, so that it is never idle."""

    kind: WorkerKind = "gpu"
    capacity = 2

    def __init__(self, lanes: Lanes, queue: str) -> None:
        self.queue = queue
        self.is_gone = False
        self.tally = LaneTally()
        self._lanes = lanes
        self._is_paused = False
        self._beat: tuple[str, datetime] | None = None
        self._seen_s = time.monotonic()
        self._silent_s = 0.0

    @property
    def unavailable(self) -> str | None:
        if self._lanes.is_server_away:
            return "is not given anything while the Prefect server does not answer"
        if self._is_paused:
            return "is paused: it is given nothing until it is resumed"
        if self.is_gone:
            return "has no lane any more: it is given nothing until one is back"
        return None

    def see(
        self, queue: WorkQueue, info: LaneInfo, beats: Heartbeats | None, *, is_pool_paused: bool
    ) -> None:
        self._is_paused = queue.is_paused or is_pool_paused
        is_silent = self._is_silent(info.worker, beats.last_heartbeat_time if beats else None)
        self.is_gone = is_silent or is_served_here(self.queue) is False

    def _is_silent(self, worker: str, beat: datetime | None) -> bool:
        """Counted in steps from look to look, so that a lane is not blamed for a server that was busy."""
        now_s = time.monotonic()
        step_s, self._seen_s = min(now_s - self._seen_s, 2 * QUEUES_S), now_s
        if beat is None:
            return True
        if self._beat is None:
            self._silent_s = (datetime.now(UTC) - beat).total_seconds()
        elif self._beat == (worker, beat):
            self._silent_s += step_s
        else:
            self._silent_s = 0.0
        self._beat = worker, beat
        return self._silent_s > SILENT_S

    def run(
        self, job: Job, item_timeout_s: float, cancellation: Cancellation, listener: Listener
    ) -> JobResult:
        dispatch = self._lanes.dispatch
        file = JobFile(dispatch.storage, dispatch.run_id, job.id)
        labels = {item.key: dispatch.clip_of(job.stage, item.key) for item in job.items}
        name = shard_name(job.stage, len(job.items), labels[job.items[0].key])
        try:
            file.write(job, labels)
        except AvatarError as error:
            return JobResult(error=str(error), error_type=type(error).__name__, keys=())
        order: _Order | None = None
        self._lanes.heard_by(job.id, listener)
        try:
            order = self._ordered(job, name, item_timeout_s, cancellation)
            result = order and self._awaited(order, file, cancellation, listener)
        finally:
            self._lanes.heard_by(job.id, None)
            if order:
                self._lanes.forget(order)
            with suppress(AvatarError):
                file.delete()
        result = result or JobResult(cancelled=True)
        committed = {row["key"] for row in result.rows}
        return replace(result, unfinished=tuple(i.key for i in job.items if i.key not in committed))

    def _ordered(
        self, job: Job, name: str, item_timeout_s: float, cancellation: Cancellation
    ) -> _Order | None:
        """None where it is cancelled, or the lane has become unavailable, before the server has taken it."""
        while not cancellation.asked() and self.unavailable is None:
            try:
                return self._lanes.order(self.queue, job, item_timeout_s, name)
            except AWAY as error:
                log.info("%s: the server does not take a shard: %s", self.queue, error)
                cancellation.wait(AGAIN_S)
        return None

    def _awaited(
        self, order: _Order, file: JobFile, cancellation: Cancellation, listener: Listener
    ) -> JobResult | None:
        """None where nothing came of it, through no fault of its own."""
        begun_s: float | None = None
        give_up_s, look_s = float("inf"), time.monotonic() + RESULT_S
        with cancellation.heard_by(order.changed.set):
            while time.monotonic() < give_up_s:
                order.changed.wait(LOOK_S)
                order.changed.clear()
                state = order.state
                if state.is_final():
                    result = self._result(state, file)
                    if begun_s is not None:
                        self.tally.count(begun_s, result or JobResult(died=state.is_crashed()))
                    return result
                if begun_s is None and state.is_running():
                    begun_s = self.tally.begin()
                    listener.on_start()
                is_unwanted = cancellation.asked() or (state.is_scheduled() and self._gives_back)
                if is_unwanted and give_up_s == float("inf"):
                    give_up_s = time.monotonic() + GRACE_S
                    self._lanes.recall(order)
                if self._lanes.is_server_away:
                    if time.monotonic() > look_s and (found := self._found(file)):
                        return found
                    look_s = max(look_s, time.monotonic() + RESULT_S)
                elif self.is_gone and not state.is_scheduled():
                    self._lanes.bury(order)
                    return self._found(file)
        return None

    @property
    def _gives_back(self) -> bool:
        return self._is_paused or self.is_gone

    def _result(self, state: State[Any], file: JobFile) -> JobResult | None:
        if state.name == GAVE_BACK:
            return JobResult(refused=state.message)
        found = self._found(file)
        if found is None and state.is_failed():
            message = f"the lane of {self.queue} failed: {state.message}"
            return JobResult(error=message, error_type="ChildProcessError", died=True)
        return found

    def _found(self, file: JobFile) -> JobResult | None:
        with suppress(AvatarError):
            return file.read_result()
        return None
