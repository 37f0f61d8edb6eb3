"""Clips and the catalog become work: which items of which stage still have to run. Pure.

Needs are pulled backwards from the finished clip: an item is wanted only if a missing item consumes it, so
results that were cleaned away cost nothing once the videos exist.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from avatar_core.errors import InputError
from avatar_core.planning.clip import Clip
from avatar_core.planning.clip_items import StageItems
from avatar_core.planning.clips import Clips
from avatar_core.planning.sources import SourceItems, Sources
from avatar_core.stages.base import ItemSpec
from avatar_core.store.catalog import FAILED_FOR_GOOD, OK
from avatar_core.store.key_index import binary_keys, text_keys
from avatar_core.store.results import StageResults


class Items(Sequence[ItemSpec]):
    """Items of one stage, each built when it is asked for; `numbers` are their places in `clips.stages`."""

    def __init__(self, clips: Clips, stage: str, numbers: NDArray[np.integer]) -> None:
        self._clips = clips
        self._stage = stage
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> ItemSpec: ...

    @overload
    def __getitem__(self, index: slice) -> "Items": ...

    def __getitem__(self, index: int | slice) -> "ItemSpec | Items":
        if isinstance(index, slice):
            return Items(self._clips, self._stage, self._numbers[index])
        items, number = self._clips.stages[self._stage], self._numbers[index]
        clip = self._clips[int(items.first[number])]
        return clip.of_stage(self._stage)[items.chain.window[number] if items.chain else 0]

    @property
    def work(self) -> NDArray[np.float64]:
        work: NDArray[np.float64] = self._clips.stages[self._stage].work[self._numbers]
        return work

    @property
    def inputs(self) -> set[str]:
        """Stages that the items may consume."""
        chained = self._clips.stages[self._stage].chain is not None
        return {*self[0].inputs, *([self._stage] if chained else [])}

    def places(self, keys: Collection[str]) -> dict[str, int]:
        """Where the items of these keys stand, for those that are among them."""
        items, known = self._clips.stages[self._stage].keys, sorted(keys)
        numbers = np.searchsorted(items, binary_keys(known))
        there = np.append(np.full(len(items), -1, np.intc), -1)
        there[self._numbers] = np.arange(len(self))
        found = zip(known, numbers.tolist(), there[numbers].tolist(), strict=True)
        return {
            key: place
            for key, number, place in found
            if place >= 0 and items[number : number + 1].tobytes() == bytes.fromhex(key)
        }

    def places_in(self, producers: "Items") -> NDArray[np.intc]:
        """Which of the `producers` each item consumes, -1 where that is not among them; the last, where it
        consumes a whole chain."""
        items = self._clips.stages[producers._stage]
        places = np.full(len(items.keys), -1, np.intc)
        places[producers._numbers] = np.arange(len(producers))
        if items.chain and producers._stage == self._stage:
            consumed = items.chain.previous[self._numbers]
        else:
            consumed = items.of_clip[self._clips.stages[self._stage].first[self._numbers]]
        return np.where(consumed < 0, np.intc(-1), places[consumed])


@dataclass(frozen=True)
class StagePlan:
    """`cached` of the `items` that all clips need together are in the store; `to_do` are missing and
    needed for a missing clip; `failed` are not tried again. The rest is behind a failure, or in front of a
    finished video."""

    items: int
    cached: int
    to_do: Items | SourceItems
    failed: int


@dataclass(frozen=True)
class Outlook:
    """Numbers of clips, without those of rejected rows. `failed` are not tried again; `reasons` has how many
    of them there are for each stage and its error."""

    done: int
    to_do: int
    failed: int
    reasons: Counter[tuple[str, str]]


@dataclass(frozen=True)
class Failure:
    stage: str
    error_type: str
    error: str


def make_plan(
    clips: Clips, results: Mapping[str, StageResults], *, retry_failed: bool = False
) -> dict[str, StagePlan]:
    """What is left to do, by stage in running order."""
    accepted = np.ones(len(clips), bool)
    accepted[list(clips.rejected)] = False
    if not accepted.any():
        return {}
    states = {stage: results[stage].states(items.keys) for stage, items in clips.stages.items()}
    blocked = np.zeros(len(clips), bool)
    if not retry_failed:
        for stage, of_items in states.items():
            blocked |= _of_clips(clips, stage, of_items == FAILED_FOR_GOOD)
    wanted = {stage: np.zeros(len(clips), bool) for stage in states}
    wanted["decode"] = accepted & ~blocked
    inputs = {stage: spec.inputs for stage, spec in clips[int(accepted.argmax())].items.items()}
    plan: dict[str, StagePlan] = {}
    for stage in reversed(states):
        absent = states[stage] != OK
        missing = wanted[stage] & _of_clips(clips, stage, absent)
        for upstream in inputs[stage]:
            wanted[upstream] |= missing
        to_do = _missing_items(clips, stage, missing, absent)
        failed = 0 if retry_failed else int((states[stage] == FAILED_FOR_GOOD).sum())
        plan[stage] = StagePlan(len(absent), int((~absent).sum()), to_do, failed)
    return {stage: plan[stage] for stage in states}


def plan_sources(sources: Sources) -> dict[str, StagePlan]:
    """What is left to be taken in: the first stages of a plan."""
    plan = {}
    for stage in sources.stages:
        items, cached = sources.counts(stage)
        to_do = sources.to_do(stage)
        plan[stage] = StagePlan(items, cached, to_do, failed=items - cached - len(to_do))
    return plan


def outlook(clips: Clips, results: Mapping[str, StageResults], *, retry_failed: bool = False) -> Outlook:
    left = np.ones(len(clips), bool)
    left[list(clips.rejected)] = False
    accepted = int(left.sum())
    left &= ~_of_clips(clips, "decode", results["decode"].states(clips.stages["decode"].keys) == OK)
    done, reasons = accepted - int(left.sum()), Counter[tuple[str, str]]()
    for stage, items in clips.stages.items() if not retry_failed else ():
        causes = _first_failed(items, results[stage].states(items.keys) == FAILED_FOR_GOOD)
        failed = left & (causes >= 0)
        numbers, counts = np.unique(causes[failed], return_counts=True)
        for key, count in zip(text_keys(items.keys[numbers]), counts.tolist(), strict=True):
            failure = results[stage].failure(key.decode())
            assert failure is not None
            reasons[stage, failure["error"]] += count
        left &= ~failed
    return Outlook(done, int(left.sum()), reasons.total(), reasons)


def _first_failed(items: StageItems, failed: NDArray[np.bool_]) -> NDArray[np.intp]:
    """For each clip the first of its items that `failed`, -1 where none did."""
    causes = np.where(failed, np.arange(len(failed)), -1)
    for later, previous in items.chain.links if items.chain else ():
        causes[later] = np.where(causes[previous] >= 0, causes[previous], causes[later])
    return np.append(causes, -1)[items.of_clip]


def _of_clips(clips: Clips, stage: str, of_items: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What is true of an item, or of any in its chain, for each clip; false where the row is rejected."""
    items = clips.stages[stage]
    if items.chain:
        of_items = items.chain.onwards(of_items)
    return np.append(of_items, False)[items.of_clip]


def _missing_items(clips: Clips, stage: str, missing: NDArray[np.bool_], absent: NDArray[np.bool_]) -> Items:
    """What the clips that are `missing` a result need of the `absent` items, in the order of the clips."""
    items = clips.stages[stage]
    wanted = np.zeros(len(items.keys), bool)
    wanted[items.of_clip[missing]] = True
    if items.chain:
        wanted = items.chain.backwards(wanted) & items.chain.onwards(absent)
    numbers = np.flatnonzero(wanted).astype(np.intc)
    order = [items.first[numbers]]
    if items.chain:
        order.insert(0, items.chain.window[numbers])  # the last is the first to sort by
    return Items(clips, stage, numbers[np.lexsort(order)])


def first_failure(
    clip: Clip, results: Mapping[str, StageResults], *, lasting: bool = False
) -> Failure | None:
    """Why a clip has no video: the first of its items that failed, None if none did.

    With `lasting` only failures count that will not pass by themselves.
    """
    if clip.error is not None:
        return Failure("ingest", InputError.__name__, clip.error)
    if results["decode"].has(clip.items["decode"].key):
        return None
    for stage in clip.items:
        for item in clip.of_stage(stage):
            row = results[stage].failure(item.key)
            if row is not None and not (lasting and row["retryable"]):
                return Failure(stage, row["error_type"], row["error"])
    return None
