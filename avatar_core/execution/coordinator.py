"""Feeds the queues with shards of a batch until all is done. No Prefect here: bare threads can submit too."""

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from avatar_core.errors import BackendError, Cancelled, StoreError
from avatar_core.execution.faults import Trouble, owners, passes_by_itself, raised
from avatar_core.execution.schedule import Schedule, Shard, StageInfo
from avatar_core.execution.settings import RunSettings
from avatar_core.execution.work import Work
from avatar_core.execution.worker_process import Job, JobResult, LocalQueue
from avatar_core.pipeline import MAX_PASSES, consumed_rows, continued_data, seconds_per_work
from avatar_core.planning.batch import Batch, forget, take_in_again
from avatar_core.progress import Observer, StepClock
from avatar_core.stages.base import ItemSpec
from avatar_core.store.arrivals import Row
from avatar_core.store.manifest import write_manifest
from avatar_core.store.sharing import Sharing, Taken

log = logging.getLogger(__name__)

MAX_DEATHS = 3
"""Deaths of queues that one item may cause, or one queue have outside of any item."""
MAX_GIVEN_UP = 3
"""Shards in a row that no retry could save before the run ends: then nothing works, not only they."""
RETRY_DELAY_S = 2.0  # the first; each further one is four times as long
STEPS_LOGGED_S = 30.0  # between two lines on how far a long item is
POLL_S = 0.2

NOUNS = {
    "face": "picture",
    "audio": "recording",
    "text": "prompt",
    "reference": "picture",
    "denoise": "clip",
    "decode": "clip",
}

Call = Callable[[Callable[[], None]], JobResult]
"""`call(on_start)` waits for a shard; `on_start` is called when its turn on the queue has come."""
Submit = Callable[[str, str, str, Call], None]
"""`submit(stage, queue, label, call)` has `call` made in a thread of its own, and returns at once."""


@dataclass
class Tally:
    """What a stage has and what this run did; `cached` was there at its start or came from another run."""

    items: int
    cached: int
    to_do: int = 0
    done: int = 0
    failed: int = 0
    seconds: float = 0.0

    def count(self, row: Mapping[str, Any]) -> None:
        self.done += row["status"] == "ok"
        self.failed += row["status"] == "failed"
        self.seconds += row.get("seconds") or 0.0

    def count_other(self, row: Mapping[str, Any]) -> None:
        """Of another run."""
        self.to_do -= 1
        self.cached += row["status"] == "ok"
        self.failed += row["status"] == "failed"


@dataclass(frozen=True)
class _InFlight:
    shard: Shard
    numbers: Mapping[str, int]  # of the items, by key
    specs: Sequence[ItemSpec]


class Coordinator:
    """One run of a batch. `tallies` may be looked at from other threads while it goes on."""

    def __init__(self, batch: Batch, settings: RunSettings, observer: Observer) -> None:
        self.batch = batch
        self.tallies: dict[str, Tally] = {}
        self.undone = 0
        """Items left by the budget."""
        self._queues: Mapping[str, LocalQueue] = {}
        self._settings = settings
        self._observer = observer
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._in_flight: dict[int, _InFlight] = {}
        self._elsewhere: dict[tuple[str, str], int] = {}  # numbers of what others are at, by stage and key
        self._numbers: Counter[str] = Counter()  # shards so far, by stage
        self._trouble = Trouble()
        self._stopping = threading.Event()
        self._over_budget = False
        self._start_s = time.monotonic()
        self._work: Work
        self._schedule: Schedule | None = None
        self._sharing: Sharing

    def run(
        self,
        queues: Mapping[str, LocalQueue],
        submit: Submit,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Raises `Cancelled` once everything has stopped, or the error that makes going on pointless."""
        self._queues = queues
        catalogs = {stage: results.catalog for stage, results in self.batch.results.items()}
        with Sharing(self.batch.storage, catalogs, self._settle_later) as self._sharing:
            for _ in range(MAX_PASSES):
                self._plan()
                self._drive(submit, cancelled)
                if not self._trouble.damaged or self._over_budget:
                    return
                self._forget_damaged(cancelled)
        raise StoreError(
            f"results in {self.batch.storage.uri} are damaged again after being recomputed {MAX_PASSES} "
            "times; check the disk or bucket"
        )

    def _forget_damaged(self, cancelled: Callable[[], bool]) -> None:
        damaged, self._trouble.damaged = self._trouble.damaged, set()
        self._observer.warning(f"{len(damaged)} stored results were damaged or missing: computing them again")
        forget(self.batch, damaged)
        if any(owner.startswith("ingest:") for owner in damaged):
            take_in_again(self.batch, self._observer, cancelled)

    @property
    def progress(self) -> float:
        """The part of the expected time that is over, 0 to 1."""
        if self._schedule is None:
            return 0.0
        elapsed_s, left_s = time.monotonic() - self._start_s, self._schedule.forecast_seconds
        return elapsed_s / (elapsed_s + left_s) if left_s else 1.0

    def clip_name(self, key: str) -> str | None:
        """The first clip that needs an item which is being worked on."""
        for flight in list(self._in_flight.values()):
            if key in flight.numbers:
                return self.batch.clips.name_of_item(flight.shard.stage, key)
        return None

    # --- planning

    def _plan(self) -> None:
        plan = self.batch.plan()
        for stage, stage_plan in plan.items():
            items, cached, to_do = stage_plan.items, stage_plan.cached, len(stage_plan.to_do)
            self._observer.stage_started(stage, items=items, cached=cached, to_do=to_do)
            self.tallies.setdefault(stage, Tally(items, cached)).to_do += to_do
        self.undone = 0
        self._elsewhere.clear()
        self._work = Work(plan)
        self._schedule = Schedule(
            [self._stage_info(stage) for stage in self._work.stages],
            self._work.stage_of,
            self._work.work,
            self._work.edges,
            shard_seconds=self.batch.config.runtime.shard_seconds,
        )
        for name, local in self._queues.items():
            self._schedule.add_queue(name, local.kind)
        self._warn_of_budget()

    def _stage_info(self, name: str) -> StageInfo:
        stage = self.batch.stages[name]
        seconds = seconds_per_work(self.batch, name)
        loads = stage.weights(self._work.example(name).config)
        return StageInfo(name, stage.device_kind, name if loads else "", seconds, stage.max_items)

    # --- driving

    def _drive(self, submit: Submit, cancelled: Callable[[], bool]) -> None:
        assert self._schedule
        stopped = False
        while True:
            stopped = stopped or cancelled()
            if stopped or self._trouble.fatal:
                self._stopping.set()
                for local in self._queues.values():
                    local.cancel()
            elif not self._over_budget:
                self._submit_ready(submit)
            ending = stopped or self._trouble.fatal or self._over_budget
            if not self._in_flight and (ending or not self._elsewhere):
                break
            try:
                self._events.get(timeout=POLL_S)()
            except queue.Empty:
                continue
        if stopped:
            raise Cancelled("stopped by the user")
        if self._trouble.fatal:
            raise self._trouble.fatal
        self.undone = sum(c.waiting + c.ready + c.running for c in self._schedule.counts.values())
        if self.undone and not self._over_budget:
            raise BackendError(f"{self.undone} items are to do and no queue is left that could do them")

    def _submit_ready(self, submit: Submit) -> None:
        assert self._schedule
        for name in self._queues:
            while not self._over_budget and (shard := self._schedule.next(name)) is not None:
                if self._exceeds_budget(shard):
                    self._schedule.give_back(shard.id)
                    self._over_budget = True
                    self._observer.warning(
                        f"budget_hours={self._settings.budget_hours:g} is used up: the rest stays undone"
                    )
                else:
                    self._submit(shard, submit)

    def _submit(self, shard: Shard, submit: Submit) -> None:
        assert self._schedule
        specs = self._work.specs(shard)
        numbers = {spec.key: item for spec, item in zip(specs, shard.items, strict=True)}
        sound = [spec for spec in specs if not self._trouble.damaged.intersection(owners(spec))]
        if not sound:
            self._schedule.ended(shard.id, failed=shard.items)
            return
        self._in_flight[shard.id] = _InFlight(shard, numbers, specs)
        self._numbers[shard.stage] += 1
        chained = self.batch.clips.stages[shard.stage].chain is not None
        size = counted("window" if chained else NOUNS.get(shard.stage, "item"), len(sound))
        label = f"{shard.stage} {self._numbers[shard.stage]:04d} · {size}"
        submit(shard.stage, shard.queue, label, partial(self._call, shard, self._jobs(shard.stage, sound)))

    def _jobs(self, stage: str, specs: Sequence[ItemSpec]) -> list[Job]:
        """One, and one more for each item that has killed a queue before, so that it takes no other along."""
        suspects = [spec for spec in specs if spec.key in self._trouble.deaths]
        others = [spec for spec in specs if spec.key not in self._trouble.deaths]
        batch, runtime = self.batch, self.batch.config.runtime
        return [
            Job(
                root=batch.config.storage.root,
                options=batch.config.storage.options,
                cache_dir=runtime.cache_dir and str(Path(runtime.cache_dir).expanduser()),
                cache_bytes=runtime.cache_bytes,
                backend={"name": batch.backend.name, **asdict(batch.backend.config)},
                stage=stage,
                items=tuple(items),
                inputs=consumed_rows(batch, items),
                memory=runtime.memory,
            )
            for items in (others, *([suspect] for suspect in suspects))
            if items
        ]

    # --- in a thread of `submit`

    def _call(self, shard: Shard, jobs: Sequence[Job], on_start: Callable[[], None]) -> JobResult:
        try:
            keys = [item.key for job in jobs for item in job.items]
            continued: dict[str, str] = {}
            for job in jobs:
                continued |= continued_data(job.stage, job.items, job.inputs)
            taken = self._sharing.take(shard.stage, keys, continued)
            try:
                if taken.others:
                    self._events.put(partial(self._divide, shard, taken))
                result = self._run(shard, _left(jobs, taken), on_start)
            finally:
                self._sharing.release(taken)
        except BaseException as error:
            self._events.put(partial(self._broken, shard, error))
            raise
        self._events.put(partial(self._ended, shard, result))
        return replace(result, rows=(*map(dict, taken.found.values()), *result.rows))

    def _run(self, shard: Shard, jobs: Sequence[Job], on_start: Callable[[], None]) -> JobResult:
        """Runs the jobs until one goes wrong for good; its result has the rows of all."""
        rows: list[dict[str, Any]] = []
        result = JobResult()
        clock, told_s = StepClock(), time.monotonic()

        def progressed(key: str, done: int, total: int) -> None:
            nonlocal told_s
            self._events.put(partial(self._observer.item_progress, shard.stage, key, done, total))
            text = clock.text(key, done, total)
            if text and time.monotonic() - told_s >= STEPS_LOGGED_S:
                told_s = time.monotonic()
                log.info("%s", text, extra={"item_key": key})

        for job in jobs:
            for attempt in range(self._settings.retries + 1):
                if self._stopping.is_set():
                    result = JobResult(cancelled=True)
                    break
                result = self._queues[shard.queue].run(
                    job,
                    item_timeout_s=self._settings.item_timeout_s,
                    on_start=on_start,
                    on_progress=progressed,
                )
                rows += result.rows
                if not passes_by_itself(result) or attempt == self._settings.retries:
                    break
                log.warning("%s; trying again", result.error)
                self._stopping.wait(RETRY_DELAY_S * 4**attempt)
                job = replace(job, items=tuple(i for i in job.items if i.key in result.unfinished))
            if result.error or result.cancelled:
                break
        return replace(result, rows=tuple(rows))

    # --- what other runs do

    def _divide(self, shard: Shard, taken: Taken) -> None:
        """The rest of the shard goes on."""
        assert self._schedule
        flight = self._in_flight[shard.id]
        specs = [spec for spec in flight.specs if spec.key not in taken.others]
        self._in_flight[shard.id] = replace(flight, specs=specs)
        self._schedule.detach(shard.id, [flight.numbers[key] for key in taken.others])
        self._elsewhere |= {(shard.stage, key): flight.numbers[key] for key in taken.others}
        self._settle(shard.stage, taken.found, set())
        self._sharing.watch(shard.stage, taken.elsewhere)

    def _settle_later(self, stage: str, rows: Mapping[str, Row], free: Set[str]) -> None:
        self._events.put(partial(self._settle, stage, rows, free))

    def _settle(self, stage: str, rows: Mapping[str, Row], free: Set[str]) -> None:
        """Other runs have finished the items of these `rows`, and left those that are `free`."""
        assert self._schedule
        numbers: dict[str, list[int]] = {"ok": [], "failed": [], "free": []}
        for key in (*rows, *free):
            number = self._elsewhere.pop((stage, key), None)
            if number is None:  # of an earlier pass
                continue
            numbers["free" if key in free else rows[key]["status"]].append(number)
            if key in rows:
                self.tallies[stage].count_other(rows[key])
                self._show(stage, dict(rows[key]))
        self._schedule.settle(done=numbers["ok"], failed=numbers["failed"], again=numbers["free"])

    # --- what ended

    def _broken(self, shard: Shard, error: BaseException) -> None:
        """The thread failed, not the work: a fault of ours, or of whoever submits."""
        del self._in_flight[shard.id]
        text = " ".join(str(error).split())
        self._trouble.fatal = BackendError(f"unexpected {type(error).__name__} beside {shard.stage}: {text}")

    def _ended(self, shard: Shard, result: JobResult) -> None:
        assert self._schedule
        flight = self._in_flight[shard.id]
        ended = {row["key"]: row for row in result.rows}
        for row in ended.values():
            self._record(shard.stage, row)
        self._sharing.committed(shard.stage, ended)
        left = [spec for spec in flight.specs if spec.key not in ended]
        set_aside = self._find_fault(shard, result, left)
        failed = {key for key, row in ended.items() if row["status"] != "ok"} | set_aside
        again = {spec.key for spec in left} - failed
        self._measure(shard, ended.values())
        self._schedule.ended(
            shard.id,
            failed=[flight.numbers[key] for key in failed],
            again=[flight.numbers[key] for key in again],
        )
        del self._in_flight[shard.id]

    def _find_fault(self, shard: Shard, result: JobResult, left: Sequence[ItemSpec]) -> set[str]:
        """Keys among the items `left` over that this pass will not try again."""
        if result.keys:
            self._trouble.damaged.update(result.keys)
        damaged = {s.key for s in left if self._trouble.damaged.intersection(owners(s))}
        if result.keys and not damaged:
            return {s.key for s in left}
        if result.cancelled or result.keys:
            return damaged
        if result.died or result.hung:
            return damaged | self._blame(shard, result, left)
        if result.error is None:
            self._trouble.given_up = 0
            self._trouble.deaths.pop(shard.queue, None)
            for row in result.rows:
                self._trouble.deaths.pop(row["key"], None)
            return damaged
        if not passes_by_itself(result):
            self._trouble.fatal = raised(result)
            return damaged
        return damaged | self._give_up(shard, result, left)

    def _blame(self, shard: Shard, result: JobResult, left: Sequence[ItemSpec]) -> set[str]:
        """An item that hangs, or has killed too many queues, gets a row."""
        assert self._schedule
        log.warning("%s: %s", self._named(result.last_item) or shard.stage, result.error)
        culprit = result.last_item or shard.queue
        self._trouble.deaths[culprit] += 1
        too_often = self._trouble.deaths[culprit] >= MAX_DEATHS
        if result.last_item is None:
            if too_often:
                self._schedule.pause(shard.queue)
                self._observer.warning(f"queue {shard.queue} is given up: {result.error}")
            return set()
        if not result.hung and not too_often:
            return set()
        return self._fail(shard.stage, [spec for spec in left if spec.key == result.last_item], result)

    def _give_up(self, shard: Shard, result: JobResult, left: Sequence[ItemSpec]) -> set[str]:
        self._trouble.given_up += 1
        if self._trouble.given_up >= MAX_GIVEN_UP:
            self._trouble.fatal = raised(result)
            return set()
        return self._fail(shard.stage, left, result)

    def _fail(self, stage: str, specs: Sequence[ItemSpec], result: JobResult) -> set[str]:
        """Commits failures that the next run tries anew."""
        rows: list[dict[str, Any]] = [
            {
                "key": spec.key,
                "status": "failed",
                "retryable": True,
                "error_type": result.error_type,
                "error": result.error,
                "work": spec.work,
            }
            for spec in specs
        ]
        if rows:
            write_manifest(self.batch.storage, stage, rows, self.batch.stages[stage].columns)
        for row in rows:
            self._record(stage, row)
        return {spec.key for spec in specs}

    def _record(self, stage: str, row: dict[str, Any]) -> None:
        self.tallies[stage].count(row)
        self._show(stage, row)

    def _show(self, stage: str, row: dict[str, Any]) -> None:
        self.batch.results[stage].add(row)
        self._observer.item_ended(stage, row)
        if row["status"] == "failed":
            log.error("%s: %s failed: %s", self._named(row["key"]), stage, row["error"])

    def _named(self, key: str | None) -> str | None:
        return key and (self.clip_name(key) or key)

    def _measure(self, shard: Shard, rows: Iterable[Mapping[str, Any]]) -> None:
        assert self._schedule
        finished = [row for row in rows if row["status"] == "ok"]
        if finished:
            seconds = sum(row["seconds"] for row in finished)
            self._schedule.measured(shard.stage, seconds, sum(row["work"] for row in finished))

    # --- budget

    def _exceeds_budget(self, shard: Shard) -> bool:
        """Whether the shard would end too late, after what its queue has before it."""
        if self._settings.budget_hours is None:
            return False
        before_s = sum(f.shard.seconds for f in self._in_flight.values() if f.shard.queue == shard.queue)
        end_s = time.monotonic() - self._start_s + before_s + shard.seconds
        return end_s > self._settings.budget_hours * 3600

    def _warn_of_budget(self) -> None:
        assert self._schedule
        hours, budget_hours = self._schedule.forecast_seconds / 3600, self._settings.budget_hours
        if budget_hours is not None and hours > budget_hours:
            self._observer.warning(
                f"this needs about {hours:.2g} hours, budget_hours={budget_hours:g} allows a part of it"
            )


def counted(noun: str, count: int) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _left(jobs: Sequence[Job], taken: Taken) -> Sequence[Job]:
    if not taken.others:
        return jobs
    left = [replace(job, items=tuple(i for i in job.items if i.key not in taken.others)) for job in jobs]
    return [job for job in left if job.items]
