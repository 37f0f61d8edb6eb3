"""A batch at work, in threads of its own and from the first moment. No Prefect here.

A flow engine takes seconds to start and its server answers when it likes: it shows the work, and the work
never waits for it. So what there is to show waits in queues until the flow takes it.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from queue import SimpleQueue
from types import TracebackType
from typing import NamedTuple

from avatar_core.execution.batch_run import Call, in_this_thread
from avatar_core.execution.coordinator import Coordinator
from avatar_core.execution.settings import run_settings, workers_for
from avatar_core.execution.worker import InProcess, JobResult
from avatar_core.execution.worker_process import WorkerProcesses
from avatar_core.pipeline import batch_run, finish_run, take_in
from avatar_core.planning.batch import Batch
from avatar_core.planning.runs import RunRecord
from avatar_core.progress import Observer
from avatar_core.result import Result

FEW_ROWS = 8
"""For so many it does not pay to start processes that take in what they name."""


class Line(NamedTuple):
    """Of the log."""

    level: int
    text: str


class ShardRun:
    """A shard at its worker."""

    def __init__(
        self,
        stage: str,
        worker: str,
        label: str,
        call: Call,
        on_start: Callable[["ShardRun"], None],
        on_end: Callable[[], None],
    ) -> None:
        self.stage, self.worker, self.label = stage, worker, label
        self._call, self._on_start, self._on_end = call, on_start, on_end
        self._lines: SimpleQueue[Line | None] = SimpleQueue()
        self._outcome: Future[JobResult] = Future()
        self._begun = False

    def start(self) -> None:
        threading.Thread(target=self._run, name=self.label, daemon=True).start()

    def tell(self, line: Line) -> None:
        self._lines.put(line)

    def lines(self) -> Iterator[Line]:
        """What is logged about it, until it has ended. A second reader gets what the first one left."""
        yield from iter(self._lines.get, None)
        self._lines.put(None)

    def result(self) -> JobResult:
        return self._outcome.result()

    def _run(self) -> None:
        _shard_at_hand.set(self)
        try:
            self._outcome.set_result(self._call(self._begin))
        except BaseException as error:
            self._outcome.set_exception(error)
        finally:
            self._lines.put(None)
            self._begin()
            self._on_end()

    def _begin(self) -> None:
        if not self._begun:  # a second try is part of the first
            self._begun = True
            self._on_start(self)


_shard_at_hand: ContextVar[ShardRun] = ContextVar("shard_at_hand")


class Execution:
    """Renders a batch from when the context is entered; leaving it by an error stops the work."""

    def __init__(
        self,
        batch: Batch,
        record: RunRecord,
        observer: Observer,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self.batch, self.run_id = batch, record.id
        self.reused = {stage: plan.cached for stage, plan in batch.plan().items()}
        """Items by stage that were there at the start."""
        self._record = record
        self._observer = observer
        self._stopped = threading.Event()
        self._reasons_to_stop = [self._stopped.is_set, cancelled]
        self.run = batch_run(batch, record, observer, self._should_stop, self._submit)
        self._news: SimpleQueue[ShardRun | Line | None] = SimpleQueue()
        self._outcome: Future[Result] = Future()
        self._under_way = threading.Event()
        self._workers: WorkerProcesses | None = None
        self._thread = threading.Thread(target=self._run, name=self.run_id)

    def __enter__(self) -> "Execution":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind:
            self.stop()
        if kind and not issubclass(kind, Exception) and self._workers:
            self._workers.stop()  # Ctrl-C for the second time
        self._thread.join()

    def stop(self) -> None:
        """At the next item."""
        self._stopped.set()

    def stop_when(self, reason: Callable[[], bool]) -> None:
        self._reasons_to_stop.append(reason)

    def news(self) -> Iterator[ShardRun | Line]:
        """Shards as their turn comes, and what is logged beside them; for one reader."""
        return iter(self._news.get, None)

    def wait_until_under_way(self, timeout_s: float) -> None:
        """Until a shard has ended."""
        self._under_way.wait(timeout_s)

    @property
    def ended(self) -> bool:
        return self._outcome.done()

    def result(self) -> Result:
        """Waits for the end; raises what the work ended with."""
        return self._outcome.result()

    def _run(self) -> None:
        try:
            with self._logs_heard():
                result = finish_run(self.batch, self._record, self._compute, self._observer)
            self._outcome.set_result(result)
        except BaseException as error:
            self._outcome.set_exception(error)
        finally:
            self._under_way.set()
            self._news.put(None)

    def _compute(self) -> None:
        with workers_for(self.batch, run_settings(self.batch.config)) as self._workers:
            Coordinator(self._workers).drive(self.run)

    def _should_stop(self) -> bool:
        return any(reason() for reason in self._reasons_to_stop)

    def _submit(self, stage: str, worker: str, label: str, call: Call) -> None:
        ShardRun(stage, worker, label, call, self._news.put, self._under_way.set).start()

    @contextmanager
    def _logs_heard(self) -> Iterator[None]:
        handler = _Handler(self.run.name_of, self._news.put)
        loggers = [logging.getLogger(name) for name in ("avatar_core", "flows")]
        before = [(logger, logger.level, logger.propagate) for logger in loggers]
        for logger in loggers:
            logger.propagate = False  # whoever reads the lines passes them on
            logger.setLevel(logging.INFO)
            logger.addHandler(handler)
        try:
            yield
        finally:
            for logger, level, propagate in before:
                logger.setLevel(level)
                logger.propagate = propagate
                logger.removeHandler(handler)


def take_in_sources(batch: Batch, observer: Observer, cancelled: Callable[[], bool]) -> None:
    """What the rows name, so that all clips are known. Nothing is rendered."""
    if batch.is_complete:
        return
    with told_once():
        if len(batch.clips.rows) - batch.num_planned <= FEW_ROWS:
            here = Coordinator({"here": InProcess(gpu=False)})
            take_in(batch, here, observer, cancelled, in_this_thread)
            return
        with workers_for(batch, replace(run_settings(batch.config), gpus=())) as workers:
            take_in(batch, Coordinator(workers), observer, cancelled)


@contextmanager
def told_once() -> Iterator[None]:
    """Who looks at a terminal is told of failures there; the log repeats them where all of it is wanted."""
    logger = logging.getLogger("avatar_core.execution")
    before = logger.level
    if not logging.getLogger().isEnabledFor(logging.INFO):
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


class _Handler(logging.Handler):
    """Gives a record to the shard in whose thread it is made, with the clip that it is about."""

    def __init__(self, name_of: Callable[[str], str | None], tell: Callable[[Line], None]) -> None:
        super().__init__()
        self._name_of = name_of
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        try:
            key = getattr(record, "item_key", None)
            name = key and self._name_of(key)
            line = Line(record.levelno, f"{name}: {self.format(record)}" if name else self.format(record))
            shard = _shard_at_hand.get(None)
            shard.tell(line) if shard else self._tell(line)
        except Exception:
            self.handleError(record)
