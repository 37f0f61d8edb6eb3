"""One batch on the workers: what of it runs next, and what becomes of what has ended."""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from avatar_core.errors import AvatarError, BackendError, Cancelled, StoreError
from avatar_core.execution.faults import Trouble, owners
from avatar_core.execution.jobs import jobs_of
from avatar_core.execution.schedule import Schedule, Shard
from avatar_core.execution.settings import RunSettings
from avatar_core.execution.shard_call import ShardCall, Submit, in_a_thread
from avatar_core.execution.tally import Tally, counted
from avatar_core.execution.work import Work
from avatar_core.execution.worker import Cancellation, JobResult, Row, Worker
from avatar_core.planning.batch import Batch
from avatar_core.planning.plan import StagePlan
from avatar_core.progress import Observer
from avatar_core.stages.base import ItemSpec
from avatar_core.store.arrivals import Row as StoredRow
from avatar_core.store.manifest import write_manifest
from avatar_core.store.sharing import Sharing, Taken

log = logging.getLogger(__name__)

MAX_PASSES = 3
"""How often damaged results are computed again before the store itself must be at fault."""


class Post(Protocol):
    def __call__(self, event: Callable[[], None], *, at_once: bool = False) -> None: ...


OnShardEnded = Callable[["BatchRun", Shard, JobResult | None], None]


@dataclass
class _Flight:
    """A shard at a worker: its `specs`, and their numbers in the schedule by key."""

    shard: Shard
    numbers: dict[str, int]
    specs: Sequence[ItemSpec]


class BatchRun:
    """`tallies` may be looked at from other threads while it goes on.

    With `sources_only` no clip is begun. `on_complete` is called once all are known, and may raise what
    speaks against going on.
    """

    def __init__(
        self,
        batch: Batch,
        settings: RunSettings,
        observer: Observer,
        cancelled: Callable[[], bool] = lambda: False,
        submit: Submit = in_a_thread,
        *,
        sources_only: bool = False,
        on_complete: Callable[[], None] = lambda: None,
    ) -> None:
        self.batch = batch
        self.tallies: dict[str, Tally] = {}
        self.undone = 0
        """Items left by the budget."""
        self.has_ended = False
        self.used_s = 0.0
        """Time that it has had on the workers, as their coordinator counts it."""
        self.is_starving = False
        """Whether a worker waits, so that what is known should be planned."""
        self._settings = settings
        self._observer = observer
        self._cancelled = cancelled
        self._submit = submit
        self._sources_only = sources_only
        self._on_complete = on_complete
        self._cancellation = Cancellation(cancelled)
        self._flights: dict[int, _Flight] = {}
        self._elsewhere: dict[tuple[str, str], int] = {}  # numbers of what others are at, by stage and key
        self._failed: dict[str, set[str]] = defaultdict(set)  # keys not tried again in this pass
        self._numbers: Counter[str] = Counter()  # shards so far, by stage
        self._trouble = Trouble()
        self._passes = 1
        self._is_stopped = False
        self._is_over_budget = False
        self._start_s = time.monotonic()
        self._error: AvatarError | None = None
        self._workers: Mapping[str, Worker] = {}
        self._post: Post
        self._on_shard_ended: OnShardEnded
        self._sharing: Sharing
        self._work: Work
        self._schedule: Schedule | None = None

    @property
    def progress(self) -> float:
        """The part of the expected time that is over, 0 to 1."""
        if self._schedule is None:
            return 0.0
        elapsed_s, left_s = time.monotonic() - self._start_s, self._schedule.forecast_seconds
        return elapsed_s / (elapsed_s + left_s) if left_s else 1.0

    @property
    def seconds_left(self) -> float | None:
        """Expected, None while that is not known."""
        return self._schedule.forecast_seconds if self._schedule and self.batch.is_complete else None

    def name_of(self, key: str) -> str | None:
        """The first clip that needs an item which is being worked on, or the source that it takes in."""
        for flight in list(self._flights.values()):
            if key in flight.numbers:
                return self.batch.label(flight.shard.stage, key)
        return None

    def raise_error(self) -> None:
        if self._error:
            raise self._error

    # --- for the coordinator

    @contextmanager
    def opened(
        self, workers: Mapping[str, Worker], post: Post, on_shard_ended: OnShardEnded
    ) -> Iterator[None]:
        """Whatever ends it, its shards are told to stop. May be opened again: what has been lost is to do."""
        self._workers, self._on_shard_ended = workers, on_shard_ended
        self._post = post
        self._schedule, self._error, self.has_ended, self._passes = None, None, False, 1
        self._cancellation = Cancellation(self._cancelled)
        self._failed.clear()
        catalogs = {stage: results.catalog for stage, results in self.batch.results.items()}
        with Sharing(self.batch.storage, catalogs, self._settle_later) as self._sharing:
            self._guarded(self._plan)
            try:
                yield
            finally:
                self.has_ended = True
                self._cancellation.ask()

    def look(self) -> None:
        """Sees what is due before work is given out."""
        if self.has_ended:
            return
        if not self._is_stopped and self._cancelled():
            self._is_stopped = True
        if self._is_ending:
            self._cancellation.ask()
        elif self._growth_is_due():
            self._guarded(self._grow)

    def next(self, worker: str, part: float = 1.0) -> Shard | None:
        """A shard for this worker: the `part` of one of usual length."""
        is_over = self._is_ending or (self._is_over_budget and self.batch.is_complete)
        if self.has_ended or is_over or self._schedule is None:
            return None
        shard = self._schedule.next(worker, part)
        if shard is None or not self._exceeds_budget(shard):
            return shard
        self._schedule.give_back(shard.id)
        self._is_over_budget = True
        self._observer.warning(
            f"budget_hours={self._settings.budget_hours:g} is used up: the rest stays undone"
        )
        if self.batch.is_complete:
            return None
        self._plan()  # which rows there are is found out in any case
        return self._schedule.next(worker, part)

    def settle(self, *, is_stuck: bool) -> None:
        """Ends the run, or begins the next pass, where nothing is left; `is_stuck` if no worker has anything
        to do although each was asked."""
        if self._flights or self.has_ended:
            return
        if self._is_ending or (self._is_over_budget and self.batch.is_complete):
            self._end()
        elif self._elsewhere or self._growth_is_due():
            return
        elif self._schedule is None or self._schedule.finished:
            if self._trouble.damaged:
                self._guarded(self._begin_next_pass)
            else:
                self._end()
        elif is_stuck:
            self._end()

    def pause(self, worker: str, reason: str) -> None:
        if self._schedule:
            self._schedule.pause(worker)
            self._trouble.tell_once(f"{worker} {reason}", self._observer.warning)

    def resume(self, worker: str) -> None:
        if self._schedule and worker not in self._trouble.given_up_workers:
            self._schedule.resume(worker)

    def join(self, worker: str) -> None:
        """One more among the workers that it was opened with."""
        if self._schedule:
            self._schedule.add_queue(worker, self._workers[worker].kind, self._workers[worker].capacity)

    @property
    def _is_ending(self) -> bool:
        return self._is_stopped or self._trouble.fatal is not None

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except AvatarError as error:
            self._trouble.fatal = error

    def _end(self) -> None:
        counts = self._schedule.counts.values() if self._schedule else ()
        self.undone = sum(count.waiting + count.ready + count.running for count in counts)
        if self._is_stopped:
            self._error = Cancelled("stopped by the user")
        elif self._trouble.fatal:
            self._error = self._trouble.fatal
        elif self.undone and not self._is_over_budget:
            reasons = "".join(f"; {reason}" for reason in self._trouble.reasons)
            self._error = BackendError(
                f"{self.undone} items are to do and no worker is left that could do them{reasons}"
            )
        self.has_ended = True

    # --- planning

    def _growth_is_due(self) -> bool:
        """Planning costs as much as there is to plan: so when that has doubled, or somebody waits for it."""
        waiting = self.batch.num_waiting
        if not waiting:
            return False
        if self.batch.sources.all_known:
            return True
        if self._sources_only or self._is_over_budget:
            return False
        return waiting >= self.batch.num_planned or self.is_starving

    def _grow(self) -> None:
        self.batch.grow(self._observer)
        if self.batch.is_complete:
            self._on_complete()
        self._plan()

    def _plan(self) -> None:
        plan = self.batch.plan()
        if self._sources_only or (self._is_over_budget and not self.batch.is_complete):
            plan = {stage: plan[stage] for stage in self.batch.sources.stages}
        self._work = Work(plan)
        failed = {stage: self._work.numbers(stage, keys) for stage, keys in self._failed.items()}
        self._announce(plan, {stage: len(numbers) for stage, numbers in failed.items()})
        infos = self._work.stage_infos(self.batch)
        arrays = (self._work.stage_of, self._work.work, self._work.edges)
        if self._schedule is None:
            self._schedule = Schedule(infos, *arrays, shard_seconds=self.batch.config.runtime.shard_seconds)
            for name, worker in self._workers.items():
                self._schedule.add_queue(name, worker.kind, worker.capacity)
        else:
            given_up = {number for numbers in failed.values() for number in numbers.values()}
            self._schedule.extend(infos, *arrays, self._renumbered(), given_up)
        self._warn_of_budget()

    def _renumbered(self) -> dict[int, int]:
        """New numbers, by the old ones, of what is being worked on here and elsewhere."""
        changes: dict[int, int] = {}
        for flight in self._flights.values():
            numbers = self._work.numbers(flight.shard.stage, flight.numbers)
            changes |= {flight.numbers[key]: number for key, number in numbers.items()}
            flight.numbers = numbers
        for (stage, key), old in list(self._elsewhere.items()):
            del self._elsewhere[stage, key]
            for number in self._work.numbers(stage, [key]).values():
                changes[old] = self._elsewhere[stage, key] = number
        return changes

    def _announce(self, plan: Mapping[str, StagePlan], failed: Mapping[str, int]) -> None:
        for stage, planned in plan.items():
            tally = self.tallies.setdefault(stage, Tally())
            is_new = not tally.items and stage in self.batch.sources.stages
            tally.plan(planned.items, planned.cached, len(planned.to_do) - failed.get(stage, 0))
            numbers = {"items": tally.items, "cached": tally.cached, "to_do": tally.to_do}
            if self.batch.is_complete or is_new:
                self._observer.stage_started(stage, **numbers)
            else:
                self._observer.stage_grew(stage, **numbers)

    def _begin_next_pass(self) -> None:
        if self._passes == MAX_PASSES:
            raise StoreError(
                f"results in {self.batch.storage.uri} are damaged again after being recomputed {MAX_PASSES} "
                "times; check the disk or bucket"
            )
        self._passes += 1
        damaged, self._trouble.damaged = self._trouble.damaged, set()
        self._observer.warning(f"{len(damaged)} stored results were damaged or missing: computing them again")
        self._failed.clear()
        self.batch.forget(damaged)
        self.batch.grow(self._observer)
        self._plan()

    # --- a shard on its way

    def start(self, shard: Shard) -> None:
        specs = self._work.specs(shard)
        numbers = {spec.key: item for spec, item in zip(specs, shard.items, strict=True)}
        sound = [spec for spec in specs if not self._trouble.damaged.intersection(owners(spec))]
        self._flights[shard.id] = _Flight(shard, numbers, specs)
        if not sound:
            self._post(partial(self._ended, shard, JobResult()))
            return
        self._numbers[shard.stage] += 1
        label = f"{shard.stage} {self._numbers[shard.stage]:04d} · {self._content(shard.stage, sound)}"
        call = ShardCall(
            shard.stage,
            label,
            jobs_of(self.batch, shard.stage, sound, apart=self._trouble.deaths),
            shard.queue,
            self._workers[shard.queue],
            sharing=self._sharing,
            cancellation=self._cancellation,
            retries=self._settings.retries,
            item_timeout_s=self._settings.item_timeout_s,
            on_taken=lambda taken: self._post(partial(self._divide, shard, taken)),
            on_progress=partial(self._progressed, shard.stage),
            on_end=lambda outcome: self._post(partial(self._came_back, shard, outcome)),
        )
        self._submit(call)

    def _content(self, stage: str, specs: Sequence[ItemSpec]) -> str:
        first = self.batch.label(stage, specs[0].key)
        if len(specs) == 1:
            return first
        return f"{counted(self.batch.stages[stage].noun, len(specs))}: {first}, ..."

    def _progressed(self, stage: str, key: str, done: int, total: int) -> None:
        self._post(partial(self._observer.item_progress, stage, key, done, total), at_once=True)

    # --- what other runs do

    def _divide(self, shard: Shard, taken: Taken) -> None:
        """The rest of the shard goes on."""
        if self.has_ended:
            return
        assert self._schedule
        flight = self._flights[shard.id]
        flight.specs = [spec for spec in flight.specs if spec.key not in taken.others]
        others = {key: flight.numbers[key] for key in taken.others if key in flight.numbers}
        self._schedule.detach(shard.id, others.values())
        self._elsewhere |= {(shard.stage, key): number for key, number in others.items()}
        self._settle(shard.stage, taken.found, set())
        self._sharing.watch(shard.stage, taken.elsewhere)

    def _settle_later(self, stage: str, rows: Mapping[str, StoredRow], free: Set[str]) -> None:
        self._post(partial(self._settle, stage, rows, free))

    def _settle(self, stage: str, rows: Mapping[str, StoredRow], free: Set[str]) -> None:
        """Other runs have finished the items of these `rows`, and left those that are `free`."""
        if self.has_ended:
            return
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
                if rows[key]["status"] != "ok":
                    self._failed[stage].add(key)
        self._schedule.settle(done=numbers["ok"], failed=numbers["failed"], again=numbers["free"])

    # --- what ended

    def _came_back(self, shard: Shard, outcome: JobResult | BaseException) -> None:
        if isinstance(outcome, JobResult):
            self._ended(shard, outcome)
            return
        # The thread failed, not the work: a fault of ours, or of whoever submits.
        self._flights.pop(shard.id, None)
        self._on_shard_ended(self, shard, None)
        text = " ".join(str(outcome).split())
        kind = type(outcome).__name__
        self._trouble.fatal = BackendError(f"unexpected {kind} beside {shard.stage}: {text}")

    def _ended(self, shard: Shard, result: JobResult) -> None:
        self._on_shard_ended(self, shard, result)
        if self.has_ended:
            return
        try:
            self._take_account(shard, result)
        except AvatarError as error:  # of a store that takes no more
            self._trouble.fatal = error
        del self._flights[shard.id]

    def _take_account(self, shard: Shard, result: JobResult) -> None:
        assert self._schedule
        flight = self._flights[shard.id]
        ended = {row["key"]: row for row in result.rows}
        for row in ended.values():
            self._record(shard.stage, row)
        self._sharing.committed(shard.stage, ended)
        left = [spec for spec in flight.specs if spec.key not in ended]
        not_again = {key for key, row in ended.items() if row["status"] != "ok"}
        not_again |= self._find_fault(shard, result, left)
        self._failed[shard.stage] |= not_again
        again = {spec.key for spec in left} - not_again
        self._measure(shard, result.rows)
        self._schedule.ended(
            shard.id,
            failed=[flight.numbers[key] for key in not_again if key in flight.numbers],
            again=[flight.numbers[key] for key in again if key in flight.numbers],
        )

    def _find_fault(self, shard: Shard, result: JobResult, left: Sequence[ItemSpec]) -> set[str]:
        """Keys among the items `left` over that this pass will not try again."""
        if result.died or result.hung:
            name = result.last_item and self.batch.label(shard.stage, result.last_item)
            log.warning("%s: %s", name or shard.stage, result.error)
        verdict = self._trouble.judge(result, left, shard.queue)
        if verdict.failed:
            self._fail(shard.stage, verdict.failed, result)
        if shard.queue in self._trouble.given_up_workers:
            assert self._schedule
            self._schedule.pause(shard.queue)
            self._trouble.tell_once(self._trouble.reasons[-1], self._observer.warning)
        return {spec.key for spec in (*verdict.failed, *verdict.set_aside)}

    def _fail(self, stage: str, specs: Sequence[ItemSpec], result: JobResult) -> None:
        """Commits failures that the next run tries anew."""
        rows: list[Row] = [
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
        write_manifest(self.batch.storage, stage, rows, self.batch.stages[stage].columns)
        for row in rows:
            self._record(stage, row)

    def _record(self, stage: str, row: Row) -> None:
        self.tallies[stage].count(row)
        self._show(stage, row)

    def _show(self, stage: str, row: Row) -> None:
        self.batch.results[stage].add(row)
        if stage in self.batch.sources.stages:
            self.batch.sources.settle(row["key"])
        self._observer.item_ended(stage, row)
        if row["status"] == "failed":
            name = self.batch.label(stage, row["key"])
            log.error("%s: %s failed: %s", name, stage, row["error"], extra={"is_of_item": True})

    def _measure(self, shard: Shard, rows: Sequence[Row]) -> None:
        assert self._schedule
        if finished := [row for row in rows if row["status"] == "ok"]:
            seconds = sum(row["seconds"] for row in finished)
            self._schedule.measured(shard.stage, seconds, sum(row["work"] for row in finished))

    # --- budget

    def _exceeds_budget(self, shard: Shard) -> bool:
        """Whether the shard would end too late, after what its worker has before it."""
        if self._settings.budget_hours is None or shard.stage in self.batch.sources.stages:
            return False
        before_s = sum(f.shard.seconds for f in self._flights.values() if f.shard.queue == shard.queue)
        end_s = time.monotonic() - self._start_s + before_s + shard.seconds
        return end_s > self._settings.budget_hours * 3600

    def _warn_of_budget(self) -> None:
        assert self._schedule
        hours, budget_hours = self._schedule.forecast_seconds / 3600, self._settings.budget_hours
        if self.batch.is_complete and budget_hours is not None and hours > budget_hours:
            self._observer.warning(
                f"this needs about {hours:.2g} hours, budget_hours={budget_hours:g} allows a part of it"
            )
