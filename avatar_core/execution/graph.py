"""The items of a schedule and their states.

They are renumbered to ranks: by stage, and within a stage by the clip that they lead to, longest clip first.
A stage's ready items are then the READY bytes in its stretch of one bytearray, best first, and no Python
object exists per item.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

QueueKind = Literal["cpu", "gpu"]

WAITING, READY, RUNNING, DONE, FAILED, BLOCKED = range(6)
UNFINISHED = (WAITING, READY, RUNNING)


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


class StageState:
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

    def go_on_from(self, before: "StageState") -> None:
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


class Graph:
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

    def ready(self, stage: StageState, limit: int) -> Iterable[int]:
        rank = stage.first_ready - 1
        for _ in range(limit):
            rank = self.state.find(READY, rank + 1, stage.end_rank)
            if rank < 0:
                return
            yield rank

    def first_clip(self, stage: StageState) -> int:
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
) -> list[StageState]:
    # What opens clips comes after what they need.
    levels, chained = [0 if not info.opens_clips else -1 for info in infos], [False] * len(infos)
    for above, below in np.unique(stage_edges, axis=0).tolist():
        if above > below:
            raise ValueError(f"{infos[below].name} follows {infos[above].name}: give stages in depth order")
        chained[above] |= above == below
        levels[below] = max(levels[below], levels[above] + (above < below))
    bounds = np.searchsorted(stage_of_rank, np.arange(len(infos) + 1)).tolist()
    return [
        StageState(info, levels[index], chained[index], first, work[first:end])
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
