"""The flow that renders a batch: `avatar render` runs it, and so does every Prefect deployment."""

import contextvars
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import flow, get_client, runtime, tags
from prefect.artifacts import create_link_artifact, create_progress_artifact, create_table_artifact
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.client.schemas.objects import State
from prefect.events.worker import EventsWorker
from prefect.exceptions import MissingContextError
from prefect.futures import PrefectFuture, wait
from prefect.logging import get_run_logger
from prefect.logging.handlers import APILogWorker
from prefect.states import Cancelled as CancelledState
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner
from slugify import slugify

from avatar_core.batch import Batch, open_batch, open_storage
from avatar_core.config import Config, parse
from avatar_core.errors import Cancelled
from avatar_core.pipeline import Result, finish_batch, record_run
from avatar_core.plan import StagePlan
from avatar_core.progress import Observer, Silent
from avatar_core.runs import find_run
from flows.cli import stoppable
from flows.compose import compose_config, quoted
from flows.coordinate import NOUNS, Coordinator, RunSettings, counted, run_settings
from flows.queues import JobResult, LocalQueues
from tasks.shards import reuse, run_shard_on_queue

log = logging.getLogger(__name__)

UPDATE_INTERVAL_S = 2.0
SETTLE_S = 15.0  # for the last task runs to be told to the server
SEND_TIMEOUT_S = 10.0
FAILURES_SHOWN = 500


@dataclass
class Handover:
    """A batch that this process has opened already, and what became of it."""

    batch: Batch
    run_id: str
    observer: Observer
    cancelled: Callable[[], bool]
    result: Result | None = None
    undone: int = 0
    """Items that the budget left over."""


_handover: ContextVar[Handover | None] = ContextVar("handover", default=None)


@contextmanager
def handed_over(handover: Handover) -> Iterator[None]:
    """`render_dataset` within takes this batch, whatever its parameters say."""
    token = _handover.set(handover)
    try:
        yield
    finally:
        _handover.reset(token)


@flow(
    name="render-dataset",
    task_runner=ThreadPoolTaskRunner(),  # type: ignore[arg-type]
    persist_result=False,
)
def render_dataset(
    table: str | None = None, overrides: list[str] | None = None, run: str | None = None
) -> State[Any]:
    """Render a table to a dataset; a retry does what is missing and tries anew what failed.

    `table` is a path or URI, `overrides` are options as on the command line; `run` names a recorded run
    whose options count instead, but for the store. Prefect keeps parameters: credentials belong into the
    environment.
    """
    stop = threading.Event()
    with _stop_signals() as stopped:
        try:
            handover = _handover.get() or _opened(_config(table, overrides or [], run), stopped)
            return _render(handover, stop, lambda: stop.is_set() or stopped() or handover.cancelled())
        except Cancelled as ending:
            return CancelledState(message=f"{ending}; what is finished is kept, a retry goes on from here")


def _config(table: str | None, overrides: Sequence[str], run: str | None) -> Config:
    again = ["retry_failed=true"] if runtime.flow_run.run_count > 1 else []
    config = compose_config([*([f"table={quoted(table)}"] if table else []), *overrides, *again])
    if run is None:
        return config
    recorded = find_run(open_storage(config), run).config
    changes = {"table": table or recorded["table"], "storage": config.storage, "retry_failed": True}
    return parse(Config, {**recorded, **changes})


def flow_parameters(config: Config, run_id: str) -> dict[str, Any]:
    """What a retry needs of a run that was handed over; its record has the rest, credentials excepted."""
    table, root = config.table, config.storage.root
    if table and "://" in table and re.search("[@?]", table):
        table = None  # may hold credentials
    if "://" not in root:
        root = str(Path(root).expanduser().resolve())
    return {"table": table, "overrides": [f"storage.root={quoted(root)}"], "run": run_id}


def _opened(config: Config, cancelled: Callable[[], bool]) -> Handover:
    observer = LogObserver()
    batch = open_batch(config, observer, cancelled)
    return Handover(batch, record_run(batch), observer, cancelled)


def _render(handover: Handover, stop: threading.Event, cancelled: Callable[[], bool]) -> State[Any]:
    batch, observer = handover.batch, handover.observer
    shown = _Shown()
    _show_reused(batch.plan(), batch.backend.name, shown)
    settings = run_settings(batch.config)
    coordinator = Coordinator(batch, settings, observer)

    def run() -> None:
        with _queues(batch, settings) as queues:
            coordinator.run(queues, _submitter(batch.backend.name, shown), cancelled)

    with _forwarded_logs(coordinator), _Monitor(coordinator, handover, stop):
        handover.result = finish_batch(batch, handover.run_id, run, observer)
    handover.undone = coordinator.undone
    shown.settle()
    with _not_vital():
        _show_result(batch.name, handover.result)
    return _final_state(handover)


def _final_state(handover: Handover) -> State[Any]:
    assert handover.result
    metadata, limit = handover.result.metadata, handover.batch.config.max_failed_fraction
    failed, total = int(metadata["failed_stage"].notna().sum()), len(metadata)
    finished = int((metadata["status"] == "ok").sum())
    if failed > limit * total:
        return Failed(message=f"{failed} of {total} clips failed; max_failed_fraction={limit:g} allows fewer")
    left = f"; the budget left {handover.undone} items undone" if handover.undone else ""
    return Completed(message=f"{finished} of {total} clips in {handover.result.dataset}{left}")


def _queues(batch: Batch, settings: RunSettings) -> LocalQueues:
    """No more queues than could be busy at once, none where nothing is to do."""
    to_do = {stage: len(stage_plan.to_do) for stage, stage_plan in batch.plan().items()}
    on_gpu = any(count and batch.stages[stage].queue == "gpu" for stage, count in to_do.items())
    cpus = min(settings.cpus, max(to_do.values(), default=0))
    return LocalQueues(settings.gpus if on_gpu else (), settings.pretend, cpus)


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """As on the command line; Prefect's own handler would break off in mid-shard."""
    if threading.current_thread() is threading.main_thread():
        with stoppable() as stopped:
            yield stopped
    else:
        yield lambda: False


def send_what_is_left() -> None:
    """Logs and states are sent in the background; call before a server ends with the process."""
    for worker in (EventsWorker, APILogWorker):
        worker.drain_all(timeout=SEND_TIMEOUT_S)


# --- what Prefect shows


class LogObserver(Silent):
    """Where no terminal looks on, the log tells what the tables do not; failures are logged in any case."""

    def warning(self, message: str) -> None:
        get_run_logger().warning(message)


def _submitter(backend: str, shown: "_Shown") -> Callable[[str, str, str, Callable[[], JobResult]], None]:
    def submit(stage: str, queue: str, label: str, call: Callable[[], JobResult]) -> None:
        called = threading.Event()

        def in_task() -> State[Any]:
            called.set()
            return _shard_state(call())

        def ended(future: Any) -> None:
            if not called.is_set():  # the server is away: the work goes on without being shown
                call()

        with tags(stage, queue, backend):
            future = run_shard_on_queue.submit(label, in_task)
        shown.add(future)
        future.add_done_callback(ended)

    return submit


def _shard_state(result: JobResult) -> State[Any]:
    failed = [row for row in result.rows if row["status"] == "failed"]
    if result.cancelled:
        return CancelledState(message=f"{counted('item', len(result.rows))} kept")
    if result.error:
        return Failed(message=result.error)
    if failed:
        return Failed(message=f"{len(failed)} of {len(result.rows)} items failed: {failed[0]['error']}")
    return Completed(message=counted("item", len(result.rows)))


class _Shown:
    """Task runs on their way to the server; those still open when the flow returns would be cancelled."""

    def __init__(self) -> None:
        self._open: set[PrefectFuture[Any]] = set()

    def add(self, future: PrefectFuture[Any]) -> None:
        self._open.add(future)
        future.add_done_callback(self._open.discard)

    def settle(self) -> None:
        wait(list(self._open), timeout=SETTLE_S)


def _show_reused(plan: Mapping[str, StagePlan], backend: str, shown: _Shown) -> None:
    for stage, stage_plan in plan.items():
        if stage_plan.cached:
            label = f"{stage} reused · {counted(NOUNS.get(stage, 'item'), stage_plan.cached)}"
            with tags(stage, backend):
                shown.add(reuse.submit(label, counted("item", stage_plan.cached)))


@contextmanager
def _not_vital() -> Iterator[None]:
    """A server that is away costs its pages, not the run."""
    try:
        yield
    except Exception as error:
        log.warning("the Prefect server was not told: %s", error)


def _show_result(name: str, result: Result) -> None:
    failures = result.failures.head(FAILURES_SHOWN)
    if len(failures):
        columns = ["name", "row", "failed_stage", "error_type", "error"]
        table = json.loads(failures[columns].to_json(orient="records"))
        create_table_artifact(
            table, f"{_key(name)}-failures", f"{len(result.failures)} of {len(result.metadata)} clips failed"
        )
    link = result.dataset if "://" in result.dataset else f"file://{result.dataset}"
    create_link_artifact(link, f"dataset {name}", f"{_key(name)}-dataset", f"`{result.dataset}`")


def _key(name: str) -> str:
    """Artifact keys hold small ASCII letters, digits and dashes only."""
    return slugify(name) or "dataset"


class _Monitor:
    """Beside the run: gives it its name, shows its progress and hears of a cancellation.

    In a thread of its own, so that a slow or absent server never keeps a queue waiting.
    """

    def __init__(self, coordinator: Coordinator, handover: Handover, stop: threading.Event) -> None:
        self._coordinator = coordinator
        self._name, self._run_id = handover.batch.name, handover.run_id
        self._stop = stop
        self._over = threading.Event()
        self._flow_run_id = UUID(runtime.flow_run.id)
        self._progress_id: Any = None
        self._table_id: Any = None
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._watch,), daemon=True)

    def __enter__(self) -> "_Monitor":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        with get_client(sync_client=True) as client:
            over = False
            while not over:
                with _not_vital():
                    if self._table_id is None:
                        self._introduce(client)
                    else:
                        self._update(client)
                over = self._over.wait(UPDATE_INTERVAL_S)
            with _not_vital():
                self._update(client)

    def _introduce(self, client: SyncPrefectClient) -> None:
        client.update_flow_run(self._flow_run_id, name=self._run_id)
        self._progress_id = create_progress_artifact(0.0, f"{_key(self._name)}-progress", "part of the time")
        self._table_id = create_table_artifact(
            self._table(), f"{_key(self._name)}-stages", "what each stage had, and what this run did"
        )

    def _update(self, client: SyncPrefectClient) -> None:
        state = client.read_flow_run(self._flow_run_id).state
        if state and (state.is_cancelling() or state.is_cancelled()):
            self._stop.set()
        percent = round(100 * self._coordinator.progress, 1)
        client.update_artifact(self._progress_id, ArtifactUpdate(data=percent))
        client.update_artifact(self._table_id, ArtifactUpdate(data=json.dumps(self._table())))

    def _table(self) -> list[dict[str, Any]]:
        return [
            {
                "stage": stage,
                "items": tally.items,
                "cached": tally.cached,
                "done": tally.done,
                "failed": tally.failed,
                "seconds": round(tally.seconds, 1),
            }
            for stage, tally in list(self._coordinator.tallies.items())
        ]


@contextmanager
def _forwarded_logs(coordinator: Coordinator) -> Iterator[None]:
    """Our log goes to the run in Prefect, with the clip that a line is about."""
    handler = _RunHandler(coordinator)
    loggers = [logging.getLogger(name) for name in ("avatar_core", "flows")]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.propagate = False  # Prefect's loggers pass it on
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, level, propagate in before:
            logger.setLevel(level)
            logger.propagate = propagate
            logger.removeHandler(handler)


class _RunHandler(logging.Handler):
    """Writes to the task run in whose thread a record is made, else to the flow run."""

    def __init__(self, coordinator: Coordinator) -> None:
        super().__init__()
        self._coordinator = coordinator
        self._flow_logger = get_run_logger()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            logger = get_run_logger()
        except MissingContextError:
            logger = self._flow_logger
        try:
            key = getattr(record, "item_key", None)
            name = key and self._coordinator.clip_name(key)
            logger.log(record.levelno, "%s%s", f"{name}: " if name else "", self.format(record))
        except Exception:
            self.handleError(record)
