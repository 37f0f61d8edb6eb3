"""Which shard a queue runs next. Pure: it is told what ended, and answers `next`.

Items are integers. Inside, they are renumbered to ranks: by stage, and within a stage by the clip that they
lead to, longest clip first. A stage's ready items are then the READY bytes in its stretch of one bytearray,
best first, and no Python object exists per item.
"""

from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import inf
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

QueueKind = Literal["cpu", "gpu"]

WAITING, READY, RUNNING, DONE, FAILED, BLOCKED = range(6)
UNFINISHED = (WAITING, READY, RUNNING)

CHEAP = 0.1
"""A stage is cheap beside another if its mean item takes at most this part of the other's."""
SMALLEST_SHARD = 0.125
"""Towards the end shards shrink to no less than this part of `shard_seconds`: each costs a submission."""


@dataclass(frozen=True)
class StageInfo:
    """`model` names what must be loaded: stages of equal names share it, "" needs nothing. What a stage that
    `opens_clips` gives is what clips are planned from: more of the other stages follows."""

    name: str
    queue: QueueKind
    model: str
    seconds_per_work: float
    max_items: int = 256
    opens_clips: bool = False


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
        self._graph = _Graph(stages, stage_of, work, edges)
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
        self._graph = _Graph(stages, stage_of, work, edges)
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

    def next(self, queue_name: str) -> Shard | None:
        """A shard for this queue, None if it has enough or there is nothing for it now.

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
        ranks, seconds = self._pack(stage, queue, share_s)
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

    def _choose(self, queue: "_Queue") -> "_Stage | None":
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

    def _waits(self, stage: "_Stage", others: Sequence["_Stage"], queue: "_Queue") -> bool:
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

    def _pack(self, stage: "_Stage", queue: "_Queue", share_s: float) -> tuple[list[int], float]:
        """The best ready items: `shard_seconds` of them, or `share_s` if that is less, but one at least."""
        limit_s = min(self._shard_seconds, max(share_s, SMALLEST_SHARD * self._shard_seconds))
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

    def _give(self, stage: "_Stage", ranks: Sequence[int], queue: "_Queue", seconds: float) -> Shard:
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

    stages: "list[_Stage]"
    size: int

    def seconds_through(self) -> float:
        """In which all queues together do what is ready; endless for one alone, which need not share."""
        if self.size < 2:
            return inf
        return sum(stage.seconds(READY) for stage in self.stages) / self.size


class _Stage:
    """`counts` and `work` are indexed by state; `level` is how many stages lie above, on the longest way."""

    def __init__(
        self, info: StageInfo, level: int, chained: bool, first_rank: int, work: NDArray[np.float64]
    ) -> None:
        self.info = info
        self.level = level
        self.chained = chained
        self.end_rank = first_rank + len(work)
        self.first_ready = self.end_rank  # no ready rank is smaller
        self.counts = [len(work), 0, 0, 0, 0, 0]
        self.work = [float(work.sum()), 0.0, 0.0, 0.0, 0.0, 0.0]
        self.mean_work = float(work.mean()) if len(work) else 0.0
        self.ramp = 1  # items of the next shard at most: 1, 2, 4, ... so that the first clip is early
        self.measured_seconds = 0.0
        self.measured_work = 0.0

    def go_on_from(self, before: "_Stage") -> None:
        """With what was learned of the same stage."""
        self.ramp = before.ramp
        self.measured_seconds, self.measured_work = before.measured_seconds, before.measured_work

    @property
    def seconds_per_work(self) -> float:
        if not self.measured_work:
            return self.info.seconds_per_work
        return self.measured_seconds / self.measured_work

    @property
    def item_seconds(self) -> float:
        return self.mean_work * self.seconds_per_work

    def seconds(self, *states: int) -> float:
        return sum(self.work[state] for state in states) * self.seconds_per_work


class _Graph:
    """The states of all items, by rank; `unmet` counts an item's inputs that are not DONE."""

    def __init__(
        self,
        stages: Sequence[StageInfo],
        stage_of: NDArray[np.integer[Any]],
        work: NDArray[np.floating[Any]],
        edges: NDArray[np.integer[Any]],
    ) -> None:
        edges = np.asarray(edges, np.intc).reshape(-1, 2)
        seconds_per_work = np.array([info.seconds_per_work for info in stages], np.float64)
        clips = _clips(work * seconds_per_work[stage_of], edges)
        by_rank = np.lexsort((clips, stage_of))
        ranks = np.empty(len(by_rank), np.intc)
        ranks[by_rank] = np.arange(len(by_rank), dtype=np.intc)
        starts, consumers = _adjacency(ranks[edges], len(ranks))
        unmet = np.bincount(consumers, minlength=len(ranks))

        self.rank_of, self.item_at = _integers(ranks), _integers(by_rank)
        self.work = array("d", work[by_rank].astype(np.float64).tobytes())
        self.state = bytearray(len(ranks))
        self.stages = _tallies(stages, stage_of[by_rank], np.asarray(self.work), stage_of[edges])
        self._stage_at = _integers(stage_of[by_rank])
        self._clip_at = _integers(clips[by_rank])
        self._starts, self._consumers = _integers(starts), _integers(consumers)
        self._unmet = _integers(unmet)
        for rank in np.flatnonzero(unmet == 0).tolist():
            self.move(rank, READY)

    def ready(self, stage: _Stage, limit: int) -> Iterable[int]:
        rank = stage.first_ready - 1
        for _ in range(limit):
            rank = self.state.find(READY, rank + 1, stage.end_rank)
            if rank < 0:
                return
            yield rank

    def first_clip(self, stage: _Stage) -> int:
        """The place of the first clip that waits for a ready item of the stage."""
        stage.first_ready = self.state.find(READY, stage.first_ready, stage.end_rank)
        return self._clip_at[stage.first_ready]

    def move(self, rank: int, state: int) -> None:
        stage, before, work = self.stages[self._stage_at[rank]], self.state[rank], self.work[rank]
        if state == READY:
            stage.first_ready = min(stage.first_ready, rank) if stage.counts[READY] else rank
        self.state[rank] = state
        stage.counts[before] -= 1
        stage.counts[state] += 1
        stage.work[before] = stage.work[before] - work if stage.counts[before] else 0.0
        stage.work[state] += work

    def finish(self, rank: int) -> bool:
        """Whether it is a clip: nothing consumes it, and no clips are opened by it."""
        self.move(rank, DONE)
        consumers = self._consumers_of(rank)
        for consumer in consumers:
            self._unmet[consumer] -= 1
            if self.state[consumer] == WAITING and not self._unmet[consumer]:
                self.move(consumer, READY)
        return not consumers and not self.stages[self._stage_at[rank]].info.opens_clips

    def fail(self, rank: int) -> None:
        """Blocks all that descends from it."""
        self.move(rank, FAILED)
        lost = [rank]
        while lost:
            for consumer in self._consumers_of(lost.pop()):
                if self.state[consumer] == WAITING:
                    self.move(consumer, BLOCKED)
                    lost.append(consumer)

    def _consumers_of(self, rank: int) -> "array[int]":
        return self._consumers[self._starts[rank] : self._starts[rank + 1]]


def _tallies(
    infos: Sequence[StageInfo],
    stage_of_rank: NDArray[np.integer[Any]],
    work: NDArray[np.float64],
    stage_edges: NDArray[np.integer[Any]],
) -> list[_Stage]:
    # What opens clips comes after what they need.
    levels, chained = [0 if not info.opens_clips else -1 for info in infos], [False] * len(infos)
    for above, below in np.unique(stage_edges, axis=0).tolist():
        if above > below:
            raise ValueError(f"{infos[below].name} follows {infos[above].name}: give stages in depth order")
        chained[above] |= above == below
        levels[below] = max(levels[below], levels[above] + (above < below))
    bounds = np.searchsorted(stage_of_rank, np.arange(len(infos) + 1)).tolist()
    return [
        _Stage(info, levels[index], chained[index], first, work[first:end])
        for index, (info, (first, end)) in enumerate(zip(infos, pairwise(bounds), strict=True))
    ]


def _clips(seconds: NDArray[np.float64], edges: NDArray[np.intc]) -> NDArray[np.intc]:
    """For each item the first clip that it leads to: clips are the final items, longest path first."""
    count = len(seconds)
    starts, consumers = _adjacency(edges, count)
    unmet = np.bincount(consumers, minlength=count)
    path_seconds = seconds.astype(np.float64)
    waves: list[tuple[NDArray[np.intc], NDArray[np.intc]]] = []
    wave, seen = np.flatnonzero(unmet == 0), 0
    while wave.size:
        seen += wave.size
        producers, targets = _edges_of(wave, starts, consumers)
        np.maximum.at(path_seconds, targets, path_seconds[producers] + seconds[targets])
        np.subtract.at(unmet, targets, 1)
        waves.append((producers, targets))
        wave = np.unique(targets[unmet[targets] == 0])
    if seen < count:
        raise ValueError(f"{count - seen} of {count} items can never start: they wait for each other")
    finals = np.flatnonzero(np.diff(starts) == 0)
    clips = np.full(count, count, np.intc)
    clips[finals[np.argsort(-path_seconds[finals], kind="stable")]] = np.arange(finals.size)
    for producers, targets in reversed(waves):
        np.minimum.at(clips, producers, clips[targets])
    return clips


def _adjacency(edges: NDArray[np.intc], count: int) -> tuple[NDArray[np.intc], NDArray[np.intc]]:
    """CSR: the consumers of item i are consumers[starts[i] : starts[i + 1]]."""
    starts = np.zeros(count + 1, np.intc)
    np.cumsum(np.bincount(edges[:, 0], minlength=count), out=starts[1:])
    return starts, edges[np.argsort(edges[:, 0], kind="stable"), 1]


def _edges_of(
    items: NDArray[np.intp], starts: NDArray[np.intc], consumers: NDArray[np.intc]
) -> tuple[NDArray[np.intc], NDArray[np.intc]]:
    """Producer and consumer of every edge that leaves `items`."""
    lengths = starts[items + 1] - starts[items]
    before = np.cumsum(lengths) - lengths
    positions = np.arange(lengths.sum()) + np.repeat(starts[items] - before, lengths)
    return np.repeat(items, lengths).astype(np.intc), consumers[positions]


def _integers(values: NDArray[np.integer[Any]]) -> "array[int]":
    return array("i", values.astype(np.intc).tobytes())
