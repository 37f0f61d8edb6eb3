"""Which shard a queue runs next. Pure: it is told what ended, and answers `next`. Items are integers."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from avatar_core.execution.graph import (
    READY,
    RUNNING,
    UNFINISHED,
    Graph,
    QueueKind,
    StageInfo,
    StageState,
)

CHEAP = 0.1
"""A stage is cheap beside another if its mean item takes at most this part of the other's."""
SMALLEST_SHARD = 0.125
"""Towards the end shards shrink to no less than this part of `shard_seconds`: each costs a submission."""


@dataclass(frozen=True)
class Shard:
    id: int
    stage: str
    items: tuple[int, ...]
    queue: str
    seconds: float


class Counts(NamedTuple):
    """Items of a stage; blocked ones descend from a failed one."""

    waiting: int
    ready: int
    running: int
    done: int
    failed: int
    blocked: int


class Schedule:
    """Shards for queues, which may pause.

    A queue stays with the models that it holds, and otherwise takes the deepest stage that has something
    ready: clips are finished rather than stages. Once the first clip is there it takes turns between that and
    what opens clips, so that all are known before most are finished. While no gpu queue exists, cpu queues
    take all stages.
    """

    def __init__(
        self,
        stages: Sequence[StageInfo],
        stage_of: NDArray[np.integer[Any]],
        work: NDArray[np.floating[Any]],
        edges: NDArray[np.integer[Any]],
        *,
        shard_seconds: float = 10.0,
        models_kept: int = 2,
        drain_seconds: float = 120.0,
    ) -> None:
        """`stages` in depth order; `edges` of shape (m, 2): producer, consumer.

        `drain_seconds`: how long a queue goes on with a stage that is cheap beside a deeper one, before it
        loads the deeper one's model.
        """
        self._graph = Graph(stages, stage_of, work, edges)
        self._stages = {stage.info.name: stage for stage in self._graph.stages}
        self._shard_seconds = shard_seconds
        self._models_kept = models_kept
        self._drain_seconds = drain_seconds
        self._queues: dict[str, _Queue] = {}
        self._shards: dict[int, Shard] = {}
        self._detached: set[int] = set()
        self._has_clip = False
        self._last_id = 0
        self._form_teams()

    def add_queue(self, name: str, kind: QueueKind, capacity: int = 2) -> None:
        """It is given no more than `capacity` shards at once."""
        if name in self._queues:
            raise ValueError(f"queue {name!r} exists already")
        self._queues[name] = _Queue(name, kind, capacity)
        self._form_teams()

    def extend(
        self,
        stages: Sequence[StageInfo],
        stage_of: NDArray[np.integer[Any]],
        work: NDArray[np.floating[Any]],
        edges: NDArray[np.integer[Any]],
        renumbered: Mapping[int, int],
        failed: Collection[int] = (),
    ) -> None:
        """Other items in place of the present ones, as at the beginning. Those that are running go on, under
        the numbers that `renumbered` gives for the present ones; what it leaves out counts no longer."""
        before = self._stages
        self._graph = Graph(stages, stage_of, work, edges)
        self._stages = {stage.info.name: stage for stage in self._graph.stages}
        for name, stage in self._stages.items():
            if name in before:
                stage.go_on_from(before[name])
        for shard in self._shards.values():
            items = tuple(renumbered[item] for item in shard.items if item in renumbered)
            self._shards[shard.id] = replace(shard, items=items)
        self._detached = {renumbered[item] for item in self._detached if item in renumbered}
        for item in renumbered.values():
            self._graph.move(self._graph.rank_of[item], RUNNING)
        for item in failed:
            self._graph.fail(self._graph.rank_of[item])
        self._form_teams()

    def pause(self, name: str) -> None:
        """No more shards for this queue; those that it has are still awaited."""
        self._queues[name].paused = True
        self._form_teams()

    def resume(self, name: str) -> None:
        self._queues[name].paused = False
        self._form_teams()

    def next(self, queue_name: str, part: float = 1.0) -> Shard | None:
        """A shard for this queue, None if it has enough or there is nothing for it now; of several items
        only if they take this `part` of `shard_seconds` together.

        Ask every queue again after each end. A queue that has no shard gets one whenever an item of its
        kind is ready. One that has may be refused: if the others would be through sooner, or where items
        of a stage continue each other, so that no other clip slips in before the next item.
        """
        queue = self._queues[queue_name]
        if queue.paused or len(queue.shard_ids) >= queue.capacity:
            return None
        stage = self._choose(queue)
        if stage is None:
            return None
        share_s = self._teams[queue.kind].seconds_through() / queue.capacity
        ranks, seconds = self._pack(stage, share_s, part)
        if queue.shard_ids and (stage.chained or seconds > share_s):
            return None
        return self._give(stage, ranks, queue, seconds)

    def ended(self, shard_id: int, failed: Collection[int] = (), again: Collection[int] = ()) -> None:
        """`failed` items block their descendants, those of `again` are put back, all others are done.

        Nothing happens for a shard that was put back before: a late word of a queue given up for dead.
        """
        shard = self._shards.get(shard_id)
        if shard is None:
            return
        lost, open_again = set(failed), set(again)
        if not (lost | open_again).issubset(shard.items) or lost & open_again:
            raise ValueError(
                f"shard {shard_id} of {shard.stage} ended with failed={sorted(lost)} and "
                f"again={sorted(open_again)}; each must be one of its items, and in one list only"
            )
        del self._shards[shard_id]
        self._queues[shard.queue].shard_ids.discard(shard_id)
        self._settle(shard.items, lost, open_again)

    def give_back(self, shard_id: int) -> None:
        """The shard was not run: all its items are to do again."""
        if shard_id in self._shards:
            self.ended(shard_id, again=self._shards[shard_id].items)

    def detach(self, shard_id: int, items: Collection[int]) -> None:
        """These items of a shard are done elsewhere: they go on running, on no queue, until `settle`."""
        shard, gone = self._shards[shard_id], set(items)
        left = tuple(item for item in shard.items if item not in gone)
        self._shards[shard_id] = replace(shard, items=left)
        self._detached |= gone.intersection(shard.items)

    def settle(
        self, done: Collection[int] = (), failed: Collection[int] = (), again: Collection[int] = ()
    ) -> None:
        """What became of detached items."""
        items = {*done, *failed, *again}
        if not items <= self._detached:
            raise ValueError(f"items {sorted(items - self._detached)} are not detached from any shard")
        self._detached -= items
        self._settle(items, set(failed), set(again))

    def _settle(self, items: Iterable[int], failed: set[int], again: set[int]) -> None:
        for item in items:
            rank = self._graph.rank_of[item]
            if item in again:
                self._graph.move(rank, READY)
            elif item in failed:
                self._graph.fail(rank)
            else:
                self._has_clip |= self._graph.finish(rank)

    def measured(self, stage: str, seconds: float, work: float) -> None:
        """`work` of the stage took `seconds`; replaces the assumed rate."""
        if stage not in self._stages:
            return
        self._stages[stage].measured_seconds += seconds
        self._stages[stage].measured_work += work

    @property
    def finished(self) -> bool:
        return not any(stage.counts[state] for stage in self._graph.stages for state in UNFINISHED)

    @property
    def counts(self) -> dict[str, Counts]:
        return {name: Counts(*stage.counts) for name, stage in self._stages.items()}

    @property
    def forecast_seconds(self) -> float:
        """Until all is done by the queues that are there now (by one, where none is)."""
        return max(
            sum(stage.seconds(*UNFINISHED) for stage in team.stages) / (team.size or 1)
            for team in self._teams.values()
        )

    def _form_teams(self) -> None:
        kinds = {queue.kind for queue in self._queues.values()}
        deepest_first = sorted(self._graph.stages, key=lambda stage: -stage.level)
        self._teams: dict[QueueKind, _Team] = {}
        for kind in ("cpu", "gpu"):
            stages = [s for s in deepest_first if (s.info.queue if "gpu" in kinds else "cpu") == kind]
            size = sum(queue.kind == kind and not queue.paused for queue in self._queues.values())
            self._teams[kind] = _Team(stages, size)

    def _choose(self, queue: "_Queue") -> StageState | None:
        """The deepest stage whose model the queue holds or that is worth a load."""
        ready = [stage for stage in self._teams[queue.kind].stages if stage.counts[READY]]
        if len(ready) > 1:
            ready.sort(key=lambda stage: (-stage.level, self._graph.first_clip(stage)))
            if self._has_clip:
                ready.sort(key=lambda stage: stage.info.opens_clips == queue.opened_clips)
        for index, stage in enumerate(ready):
            if queue.holds(stage.info.model) or not self._waits(stage, ready[index + 1 :], queue):
                return stage
        return None

    def _waits(self, stage: StageState, others: Sequence[StageState], queue: "_Queue") -> bool:
        """Whether the model of `stage` is not loaded yet because of what `others` have ready.

        A load must pay: where the queue can go on with what it holds, for a full shard only; and what is
        cheap (text, reference) is drained before what is costly (denoise), rather than taken in turns.
        """
        full = stage.counts[READY] >= stage.ramp or stage.seconds(READY) >= self._shard_seconds
        held = [other for other in others if queue.holds(other.info.model)][:1]
        if held and not full:
            return True
        return queue.seconds_since_load < self._drain_seconds and any(
            other.level < stage.level and other.item_seconds <= CHEAP * stage.item_seconds
            for other in held or others
        )

    def _pack(self, stage: StageState, share_s: float, part: float) -> tuple[list[int], float]:
        """The best ready items: a `part` of `shard_seconds`, or of `share_s` if that is less, but one."""
        limit_s = part * min(self._shard_seconds, max(share_s, SMALLEST_SHARD * self._shard_seconds))
        seconds_per_work = stage.seconds_per_work
        ranks: list[int] = []
        total_s = 0.0
        for rank in self._graph.ready(stage, stage.ramp):
            seconds = self._graph.work[rank] * seconds_per_work
            if ranks and total_s + seconds > limit_s:
                break
            ranks.append(rank)
            total_s += seconds
        return ranks, total_s

    def _give(self, stage: StageState, ranks: Sequence[int], queue: "_Queue", seconds: float) -> Shard:
        for rank in ranks:
            self._graph.move(rank, RUNNING)
        stage.first_ready = ranks[-1] + 1
        stage.ramp = min(2 * stage.ramp, stage.info.max_items)
        queue.use(stage.info, seconds, self._models_kept)
        self._last_id += 1
        items = tuple(self._graph.item_at[rank] for rank in ranks)
        shard = Shard(self._last_id, stage.info.name, items, queue.name, seconds)
        self._shards[shard.id] = shard
        queue.shard_ids.add(shard.id)
        return shard


@dataclass
class _Queue:
    name: str
    kind: QueueKind
    capacity: int
    paused: bool = False
    opened_clips: bool = False  # with its last shard
    shard_ids: set[int] = field(default_factory=set)
    models: list[str] = field(default_factory=list)  # least recently used first
    seconds_since_load: float = 0.0

    def holds(self, model: str) -> bool:
        return not model or model in self.models

    def use(self, stage: StageInfo, seconds: float, kept: int) -> None:
        self.opened_clips = stage.opens_clips
        model = stage.model
        if not self.holds(model):
            self.seconds_since_load = 0.0
        self.seconds_since_load += seconds
        if model:
            self.models = [*(other for other in self.models if other != model), model][-kept:]


@dataclass
class _Team:
    """The queues of one kind that are not paused, and the stages that they run, deepest first."""

    stages: list[StageState]
    size: int

    def seconds_through(self) -> float:
        """In which all queues together do what is ready; endless for one alone, which need not share."""
        if self.size < 2:
            return inf
        return sum(stage.seconds(READY) for stage in self.stages) / self.size
