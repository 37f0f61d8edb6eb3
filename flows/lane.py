"""A lane: serves the queue of one GPU, with a child process that keeps its models between shards, runs and
users.

The lane itself computes nothing. So it goes on beating while its child hangs, and survives whatever kills
that. It is the only one on its queue, which a lock sees to: what it finds running there as it starts was
another process's, which has died.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import OrchestrationResult
from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter, WorkQueueFilter
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.responses import SetStateStatus
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import SyncClientContext
from prefect.events import emit_event
from prefect.exceptions import Abort, ObjectAlreadyExists, Pause
from prefect.flow_engine import run_flow
from prefect.settings import (
    PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    temporary_settings,
)
from prefect.states import Cancelled, Crashed, Failed, Pending

from avatar_core.backends.base import create_backend
from avatar_core.config import Config
from avatar_core.errors import AvatarError, ConfigError
from avatar_core.execution.job_file import JobFile
from avatar_core.execution.worker import Cancellation, Job, Row, StoreAddress
from avatar_core.execution.worker_process import WorkerProcess, visible_device
from avatar_core.store.claims import claimed
from avatar_core.weights import present_entries
from flows.compose import compose_config
from flows.deploy import ensure_pool
from flows.events import AWAY, listen
from flows.lane_info import LaneInfo, read_description
from flows.lane_lock import LaneLock
from flows.names import POOL, gpu_queue, host_name
from flows.queues import forget_worker
from flows.shard import PROGRESS, serving, shard
from tasks.shard import GAVE_BACK, state_of

log = logging.getLogger(__name__)

BEAT_S = 5.0
POLL_S = 15.0
"""Between two looks at the queue; it is told of what comes, this is for what it was not told."""
FLOW_BEAT_S = 30.0
"""Between two signs of life of a shard, which the automation that buries dead ones waits for."""
READY_S = 20.0
"""Between two requests as workers make them, without which for a minute the server shows the queue as not
ready."""
RETRY_S = 2.0
SAME_NAME_S = 4 * BEAT_S
"""In which a lane that is alive has been heard of."""
STUCK_S = 300.0
"""For what the flow engine has to tell the server before and after a shard; then this process ends, and its
supervisor starts another."""
STALE_S = 5.0
"""After which a lane that comes to a shard asks whether it is still its own: it may have been stopped."""
PROGRESS_S = 0.5
EXIT_STUCK = 75
_RELATED_FLOW = {
    "prefect.resource.id": "prefect.flow.shard",
    "prefect.resource.role": "flow",
    "prefect.resource.name": "shard",
}
_SETTINGS = {
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,  # the lane sends its own
    PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED: False,  # it would end a lane that starts while there is none
}
_LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
_LIVE = {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}


class Lane:
    """`run` serves the queue until it is stopped."""

    def __init__(self, queue: str, info: LaneInfo, worker: WorkerProcess, config: Config) -> None:
        self.queue, self.info = queue, info
        self._worker, self._config = worker, config
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._at_hand: FlowRun | None = None
        self._cancellation = Cancellation()
        self._stopped_at_once = False
        self._is_pool_paused = False
        self._engine_s: float | None = None
        self._taken_s = 0.0
        self._outcome: State[Any] | None = None  # of what is at hand
        self._of_queue: dict[str, Any] = {
            "work_pool_filter": WorkPoolFilter.model_validate({"name": {"any_": [POOL]}}),
            "work_queue_filter": WorkQueueFilter.model_validate({"name": {"any_": [queue]}}),
        }

    def run(self) -> None:
        """Raises `ConfigError` where another lane serves the queue, here or on another machine."""
        # The flow engine takes client and settings from the context, and would make its own for each shard.
        with (
            LaneLock(self.queue) as lock,
            temporary_settings(_SETTINGS),
            SyncClientContext.get_or_create() as context,
        ):
            client = context.client
            token = serving.set(self._serve)
            try:
                self._insist(lambda: self._introduce(client, lock.former))
                self._worker.start()
                self._start("beats", self._beat)
                self._start("watches", self._watch)
                listen(["prefect.flow-run.Scheduled"], lambda event: self._wake.set(), f"{self.queue} hears")
                while not self._stopping.is_set():
                    self._take_next(client)
            finally:
                serving.reset(token)
                self._worker.stop()
                with suppress(*AWAY):
                    forget_worker(client, self.info.worker)

    def stop(self, *, at_once: bool = False) -> None:
        """After the shard at hand; `at_once` breaks that off at its next report."""
        self._stopping.set()
        self._wake.set()
        if at_once:
            self._stopped_at_once = True
            self._cancellation.ask()

    # --- the queue

    def _introduce(self, client: SyncPrefectClient, former: str) -> None:
        ensure_pool(client)
        with suppress(ObjectAlreadyExists):
            client.create_work_queue(self.queue, work_pool_name=POOL, concurrency_limit=1)
        queue = client.read_work_queue_by_name(self.queue, work_pool_name=POOL)
        self._check_is_free(client, read_description(queue.description), former)
        client.update_work_queue(queue.id, description=self.info.describe(), concurrency_limit=1)
        self._bury(client)
        client.send_worker_heartbeat(POOL, self.info.worker, BEAT_S)
        self._forget_former(client)

    def _check_is_free(self, client: SyncPrefectClient, other: LaneInfo | None, former: str) -> None:
        """The lock does not reach other machines, of which one may be called the same."""
        if other is None or other.worker == f"{self.queue}.{former}":
            return
        for worker in client.read_workers_for_work_pool(POOL):
            beat = worker.last_heartbeat_time if worker.name == other.worker else None
            if beat and (datetime.now(UTC) - beat).total_seconds() < SAME_NAME_S:
                raise ConfigError(
                    f"the queue {self.queue} is served by {other.worker}, no process of this machine: "
                    f"another one is called {self.info.host} too; call this one something else with --name"
                )

    def _bury(self, client: SyncPrefectClient) -> None:
        """Shards that a former lane of this queue had are nobody's now."""
        for run in client.read_flow_runs(
            **self._of_queue, flow_run_filter=FlowRunFilter.model_validate(_LIVE)
        ):
            client.set_flow_run_state(run.id, Crashed(message="its lane died"), force=True)

    def _forget_former(self, client: SyncPrefectClient) -> None:
        """Each process has a name of its own, and old ones would pile up."""
        for worker in client.read_workers_for_work_pool(POOL):
            if worker.name.startswith(f"{self.queue}.") and worker.name != self.info.worker:
                forget_worker(client, worker.name)

    def _take_next(self, client: SyncPrefectClient) -> None:
        self._wake.clear()
        try:
            run = self._claimed(client)
        except AWAY as error:
            log.info("the server cannot be asked: %s", error)
            self._stopping.wait(RETRY_S)
            return
        if run is None:
            self._wake.wait(POLL_S)
        elif not self._stopping.is_set():
            self._run(client, run)

    def _claimed(self, client: SyncPrefectClient) -> FlowRun | None:
        """Found by reading: how workers ask makes the server write, and SQLite bears little of that."""
        if self._is_pool_paused or client.read_work_queue_by_name(self.queue, POOL).is_paused:
            return None
        due = {"before_": datetime.now(UTC)}
        found = client.read_flow_runs(
            **self._of_queue,
            flow_run_filter=FlowRunFilter.model_validate(
                {"state": {"type": {"any_": ["SCHEDULED"]}}, "next_scheduled_start_time": due}
            ),
            sort=FlowRunSort.NEXT_SCHEDULED_START_TIME_ASC,
            limit=1,
        )
        if not found or self._stopping.is_set():
            return None
        run = found[0]
        answer: OrchestrationResult[Any] = client.set_flow_run_state(run.id, Pending())
        if answer.status != SetStateStatus.ACCEPT:
            return None
        run.state = answer.state
        return run

    def _run(self, client: SyncPrefectClient, run: FlowRun) -> None:
        self._cancellation = Cancellation()
        self._taken_s = time.monotonic()
        self._at_hand, self._engine_s, self._outcome = run, self._taken_s, None
        # Of a run of a deployment the engine asks, by a thread and a connection for each, whether it is to be
        # suspended: a shard is not.
        run.deployment_id = None
        try:
            state = run_flow(shard, flow_run=run, parameters=run.parameters, return_type="state")
            if isinstance(state, State) and state.is_final():
                return
        except (Abort, Pause):
            pass  # its state was changed by others: cancelled or buried
        except Exception as error:  # the server was away for longer than its client tries
            log.warning("shard %s: the server was not told of the end: %s", run.name, error)
        finally:
            self._at_hand, self._engine_s = None, None
        self._insist(lambda: self._settle(client, run.id))

    def _settle(self, client: SyncPrefectClient, run_id: UUID) -> None:
        """A run that is still open would block the queue, which has one place."""
        state = client.read_flow_run(run_id).state
        if state is None or state.is_final() or state.is_scheduled():
            return
        broken_off: State[Any] = Cancelled() if state.is_cancelling() else Crashed(message="broken off")
        ended = self._outcome or broken_off
        client.set_flow_run_state(run_id, ended, force=True)

    def _insist(self, step: Callable[[], None]) -> None:
        """Until the server has answered."""
        while not self._stopping.is_set():
            try:
                step()
                return
            except AWAY as error:
                log.info("the server cannot be asked: %s", error)
                self._stopping.wait(RETRY_S)

    # --- a shard

    def _serve(
        self, store: str, run: str, job_id: str, item_timeout_s: float, options: Mapping[str, Any]
    ) -> State[Any]:
        self._engine_s = None
        try:
            self._outcome = self._computed(store, run, job_id, item_timeout_s, options)
            return self._outcome
        finally:
            self._engine_s = time.monotonic()

    def _computed(
        self, store: str, run: str, job_id: str, item_timeout_s: float, options: Mapping[str, Any]
    ) -> State[Any]:
        address = self._address(store, options)
        try:
            file = JobFile(address.open(), run, job_id)
            job, labels = file.read(address)
            _make_tiny_weights(job)
        except AvatarError as error:
            return Failed(name=GAVE_BACK, message=f"{self.queue} cannot read the store: {error}")
        if time.monotonic() - self._taken_s > STALE_S:
            with get_client(sync_client=True) as client, suppress(*AWAY):
                self._ask_if_unwanted(client)
        # Whoever asked may be killed meanwhile, and the next one is to wait for this rather than do it again.
        with claimed(file.storage, job.stage, [item.key for item in job.items], job.asker):
            result = self._worker.run(job, item_timeout_s, self._cancellation, _Listener(run, job_id))
        if self._stopped_at_once and result.cancelled:
            return Cancelled(message=f"{self.queue} was stopped")
        try:
            file.write_result(result)
        except AvatarError as error:
            return Failed(name=GAVE_BACK, message=f"{self.queue} cannot write to the store: {error}")
        return state_of(result, lambda key: labels.get(key, key))

    def _address(self, store: str, options: Mapping[str, Any]) -> StoreAddress:
        runtime = self._config.runtime
        own = self._config.storage.options
        return StoreAddress(store, {**options, **own}, runtime.cache_dir, runtime.cache_bytes)

    # --- beside it

    def _start(self, name: str, target: Callable[[], None]) -> None:
        threading.Thread(target=target, name=f"{self.queue} {name}", daemon=True).start()

    def _beat(self) -> None:
        told_s, ready_s = 0.0, float("-inf")
        with get_client(sync_client=True) as client:
            while True:
                with suppress(*AWAY):
                    client.send_worker_heartbeat(POOL, self.info.worker, BEAT_S)
                    self._is_pool_paused = client.read_work_pool(POOL).is_paused
                    if time.monotonic() - ready_s >= READY_S:
                        self._show_ready(client)
                        ready_s = time.monotonic()
                run, engine_s = self._at_hand, self._engine_s
                if engine_s and time.monotonic() - engine_s > STUCK_S:
                    log.error("%s: the flow engine does not come back: this lane is given up", self.queue)
                    os._exit(EXIT_STUCK)
                if run and time.monotonic() - told_s >= FLOW_BEAT_S:
                    told_s = time.monotonic()
                    emit_event(
                        "prefect.flow-run.heartbeat",
                        {"prefect.resource.id": f"prefect.flow-run.{run.id}"},
                        related=[_RELATED_FLOW],
                    )
                time.sleep(BEAT_S)

    def _show_ready(self, client: SyncPrefectClient) -> None:
        """The server takes a queue for served if it is asked what waits there; the answer is of no use here,
        and there is none for what was due that long ago."""
        queue = client.read_work_queue_by_name(self.queue, work_pool_name=POOL)
        client.get_runs_in_work_queue(queue.id, limit=1, scheduled_before=_LONG_AGO)

    def _watch(self) -> None:
        """Somebody may cancel what is at hand, or give it to another lane."""
        with get_client(sync_client=True) as client:
            while True:
                self._cancellation.wait(1.0)
                if self._at_hand is None or self._cancellation.asked():
                    time.sleep(0.2)
                    continue
                with suppress(*AWAY):
                    self._ask_if_unwanted(client)

    def _ask_if_unwanted(self, client: SyncPrefectClient) -> None:
        run, cancellation = self._at_hand, self._cancellation
        state = client.read_flow_run(run.id).state if run else None
        if state and (state.is_cancelling() or state.is_final()):
            cancellation.ask()


def _make_tiny_weights(job: Job) -> None:
    backend = create_backend(job.backend)
    if backend.renders_on_cpu:
        backend.resolve()


def serve_queue(gpu: int, *, pretend: bool = False) -> None:
    """The life of the lane of one GPU of this machine, until a signal: the first lets the shard at hand
    finish, as does the end of the process that started this one; the second breaks it off."""
    name = host_name()
    queue = gpu_queue(name, gpu)
    config = compose_config([])
    device = queue if pretend else visible_device(gpu)
    info = LaneInfo(
        host=name,
        gpu="pretended, computes on the CPU" if pretend else describe_gpu(gpu),
        worker=f"{queue}.{os.getpid()}",
        weights=tuple(present_entries()),
    )
    worker = WorkerProcess(queue, device, pretend=pretend, idle_s=config.runtime.idle_s)
    lane = Lane(queue, info, worker, config)
    signals = SimpleQueue[int]()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, frame: signals.put(got))
    with ThreadPoolExecutor(1, thread_name_prefix=queue) as pool:
        serving_queue = pool.submit(lane.run)  # not in this thread, where Prefect would take the signals
        is_stopping, parent = False, os.getppid()
        while not serving_queue.done():
            if os.getppid() != parent and not is_stopping:
                signals.put(signal.SIGTERM)  # its supervisor was killed, and the next one starts another lane
            with suppress(Empty):
                signals.get(timeout=0.2)
                lane.stop(at_once=is_stopping)
                is_stopping = True
        serving_queue.result()


def describe_gpu(gpu: int) -> str:
    """As the driver tells it; without loading CUDA, which would take memory of the GPU."""
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))[gpu : gpu + 1]:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return f"number {gpu}"


class _Listener:
    """Passes on how far a shard is, by events of the server."""

    def __init__(self, run: str, job: str) -> None:
        self._run, self._job = run, job
        self._told_s = 0.0

    def on_start(self) -> None:
        pass

    def on_progress(self, key: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if now_s - self._told_s < PROGRESS_S:
            return
        self._told_s = now_s
        resource = {"prefect.resource.id": f"avatar.run.{self._run}"}
        emit_event(PROGRESS, resource, payload={"job": self._job, "key": key, "done": done, "total": total})

    def on_row(self, row: Row) -> None:
        pass
