"""Feeds workers with the shards of all batches that are open, fairly, until each is done."""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from avatar_core.execution.batch_run import BatchRun
from avatar_core.execution.schedule import Shard
from avatar_core.execution.worker import JobResult, Worker

POLL_S = 0.2
SHARED_PART = 0.1
"""Of its usual length has a shard while others wait for the same workers."""
REST_S = 2.0
"""Between two looks at a device that another render holds."""


class Coordinator:
    """One set of `workers`, by name, for any number of batches.

    It has no thread of its own: whoever waits for a batch turns the crank, one thread at a time. Of the
    batches that have something for a worker the one gets it that has had the least time on the workers.
    """

    def __init__(self, workers: Mapping[str, Worker]) -> None:
        self._workers = dict(workers)
        self._runs: list[BatchRun] = []
        self._in_flight: Counter[str] = Counter()
        self._resting: dict[str, float] = {}
        self._away: set[str] = set()
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._changing = threading.Lock()
        self._leading = threading.Lock()
        self._leader: int | None = None

    def drive(self, run: BatchRun) -> None:
        """Returns once the batch is done. Raises `Cancelled` once everything of it has stopped, or the error
        that makes going on pointless."""
        with self._opened(run):
            while not run.has_ended:
                with self._lead() as leads:
                    while leads and not run.has_ended:
                        self._turn()
        run.raise_error()

    def join(self, name: str, worker: Worker) -> None:
        """From any thread, at any time; a worker that leaves is `unavailable` from then on."""
        self._post(lambda: self._join(name, worker))

    def _join(self, name: str, worker: Worker) -> None:
        self._workers[name] = worker
        for run in tuple(self._runs):
            run.join(name)

    @contextmanager
    def _opened(self, run: BatchRun) -> Iterator[None]:
        with run.opened(self._workers, self._post, self._shard_ended):
            with self._changing:
                # A newcomer begins where the others are, and takes nothing back for when it was not there.
                run.used_s = min((other.used_s for other in self._runs), default=0.0)
                self._runs.append(run)
            for name in tuple(self._away):
                run.pause(name, self._workers[name].unavailable or "is away")
            try:
                yield
            finally:
                with self._changing:
                    self._runs.remove(run)

    @contextmanager
    def _lead(self) -> Iterator[bool]:
        leads = self._leading.acquire(timeout=POLL_S)
        try:
            if leads:
                self._leader = threading.get_ident()
            yield leads
        finally:
            if leads:
                self._leader = None
                self._leading.release()

    def _turn(self) -> None:
        runs = tuple(self._runs)
        self._wake()
        self._look_at_workers()
        for run in runs:
            run.look()
        for name in self._workers:
            while self._in_flight[name] < self._workers[name].capacity and self._give(name):
                pass
        idle = not self._in_flight.total() and not self._resting and not self._away
        for run in runs:
            run.is_starving = any(not self._in_flight[name] for name in self._workers)
            run.settle(is_stuck=idle)
        if not all(run.has_ended for run in runs):
            try:
                self._events.get(timeout=POLL_S)()
            except queue.Empty:
                return

    def _give(self, name: str) -> bool:
        """Whether some batch had a shard for this worker."""
        if name in self._resting or name in self._away:
            return False
        runs = tuple(self._runs)
        part = SHARED_PART if len(runs) > 1 else 1.0
        for run in sorted(runs, key=lambda each: each.used_s):
            shard = run.next(name, part)
            if shard is not None:
                run.used_s += shard.seconds
                self._in_flight[name] += 1
                run.start(shard)
                return True
        return False

    def _shard_ended(self, run: BatchRun, shard: Shard, result: JobResult | None) -> None:
        self._in_flight[shard.queue] -= 1
        if result is None:
            return
        run.used_s += sum(row.get("seconds") or 0.0 for row in result.rows) - shard.seconds
        if result.busy and shard.queue not in self._resting:
            self._resting[shard.queue] = time.monotonic() + REST_S
            for each in tuple(self._runs):
                each.pause(shard.queue, f"is held by {result.busy}: waiting for it")

    def _wake(self) -> None:
        now_s = time.monotonic()
        for name in [name for name, until_s in self._resting.items() if until_s <= now_s]:
            del self._resting[name]
            self._resume(name)

    def _look_at_workers(self) -> None:
        for name, worker in self._workers.items():
            reason = worker.unavailable
            if reason and name not in self._away:
                self._away.add(name)
                for run in tuple(self._runs):
                    run.pause(name, reason)
            elif not reason and name in self._away:
                self._away.remove(name)
                self._resume(name)

    def _resume(self, name: str) -> None:
        if name not in self._resting and name not in self._away:
            for run in tuple(self._runs):
                run.resume(name)

    def _post(self, event: Callable[[], None], *, at_once: bool = False) -> None:
        """Has `event` called by the thread that leads; `at_once` if that is this one."""
        if at_once and threading.get_ident() == self._leader:
            event()
        else:
            self._events.put(event)
