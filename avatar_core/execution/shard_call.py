"""A shard on its way: claimed for this run, given to a worker, tried again where trouble passes by itself."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from avatar_core.execution.faults import passes_by_itself
from avatar_core.execution.worker import Cancellation, Job, JobResult, Row, Worker
from avatar_core.progress import StepClock
from avatar_core.store.sharing import Sharing, Taken

log = logging.getLogger(__name__)

RETRY_DELAY_S = 2.0  # the first; each further one is four times as long
STEPS_LOGGED_S = 30.0  # between two lines on how far a long item is


class ShardCall:
    """Calling it waits for the shard, in whatever thread. `jobs` are its items, those apart that may take a
    worker down; what other runs have done of them, or are at, is told to `on_taken` and left out."""

    def __init__(
        self,
        stage: str,
        label: str,
        jobs: Sequence[Job],
        worker_name: str,
        worker: Worker,
        *,
        sharing: Sharing,
        cancellation: Cancellation,
        retries: int,
        item_timeout_s: float,
        on_taken: Callable[[Taken], None],
        on_progress: Callable[[str, int, int], None],
        on_end: Callable[[JobResult | BaseException], None],
    ) -> None:
        self.stage, self.label, self.jobs, self.worker_name = stage, label, jobs, worker_name
        self._worker = worker
        self._sharing, self._cancellation = sharing, cancellation
        self._retries, self._item_timeout_s = retries, item_timeout_s
        self._on_taken, self._on_progress, self._on_end = on_taken, on_progress, on_end
        self._has_ended = False

    def __call__(self, on_start: Callable[[], None] = lambda: None) -> JobResult:
        """`on_start` is called when its turn on the worker has come. The result has others' rows too."""
        try:
            keys = [item.key for job in self.jobs for item in job.items]
            taken = self._sharing.take(self.stage, keys, _continued(self.jobs))
            try:
                if taken.others:
                    self._on_taken(taken)
                result = self._run(_left(self.jobs, taken), on_start)
                if result.died or result.hung or result.cancelled:
                    self._sharing.look_closely()
            finally:
                self._sharing.release(taken)
        except BaseException as error:
            self._end(error)
            raise
        self._end(result)
        return replace(result, rows=(*map(dict, taken.found.values()), *result.rows))

    def abandon(self, error: BaseException) -> None:
        """Whoever was to call it never will, and its run would wait for ever: that ends with the error. Does
        nothing where it was called."""
        if not self._has_ended:
            self._end(error)

    def _end(self, outcome: JobResult | BaseException) -> None:
        self._has_ended = True
        self._on_end(outcome)

    def _run(self, jobs: Sequence[Job], on_start: Callable[[], None]) -> JobResult:
        """Until one goes wrong for good; the result has the rows of all."""
        rows: list[Row] = []
        attempts: list[str] = []
        result = JobResult()
        listener = _Listener(on_start, self._on_progress)
        for job in jobs:
            for attempt in range(self._retries + 1):
                if self._cancellation.asked():
                    result = JobResult(cancelled=True)
                    break
                result = self._worker.run(job, self._item_timeout_s, self._cancellation, listener)
                rows += result.rows
                attempts += result.attempts
                if not passes_by_itself(result) or attempt == self._retries:
                    break
                log.warning("%s; trying again", result.error)
                self._cancellation.wait(RETRY_DELAY_S * 4**attempt)
                job = job.again(result.unfinished)
            if result.error or result.cancelled or result.busy or result.refused:
                break
        return replace(result, rows=tuple(rows), attempts=tuple(attempts))


Submit = Callable[[ShardCall], None]
"""Has the call made, in a thread of its own unless the worker works in the thread that calls it."""


def in_a_thread(call: ShardCall) -> None:
    threading.Thread(target=call, name=call.label, daemon=True).start()


def in_this_thread(call: ShardCall) -> None:
    call()


class _Listener:
    """Tells how a shard goes on, now and then also in the log."""

    def __init__(self, on_start: Callable[[], None], on_progress: Callable[[str, int, int], None]) -> None:
        self.on_start = on_start
        self._on_progress = on_progress
        self._clock, self._told_s = StepClock(), time.monotonic()

    def on_progress(self, key: str, done: int, total: int) -> None:
        self._on_progress(key, done, total)
        text = self._clock.text(key, done, total)
        if text and time.monotonic() - self._told_s >= STEPS_LOGGED_S:
            self._told_s = time.monotonic()
            log.info("%s", text, extra={"item_key": key})

    def on_row(self, row: Row) -> None:
        pass  # it counts once it is committed


def _continued(jobs: Sequence[Job]) -> dict[str, str]:
    """SHA-256 of the result that an item continues, for those that do."""
    return {
        spec.key: job.inputs[job.stage][spec.inputs[job.stage][0]]["sha256"]
        for job in jobs
        for spec in job.items
        if job.stage in spec.inputs
    }


def _left(jobs: Sequence[Job], taken: Taken) -> Sequence[Job]:
    if not taken.others:
        return jobs
    left = [job.again([item.key for item in job.items if item.key not in taken.others]) for job in jobs]
    return [job for job in left if job.items]
