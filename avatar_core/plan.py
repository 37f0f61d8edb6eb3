"""Clips and the catalog become work: which items of which stage still have to run. Pure.

Needs are pulled backwards from the finished clip: an item is wanted only if a missing item consumes it, so
results that were cleaned away cost nothing once the videos exist.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from avatar_core.clips import STAGES, Clip, Clips
from avatar_core.errors import InputError
from avatar_core.stages.base import ItemSpec


class Results(Protocol):
    """What is known of one stage's items: manifest rows by key."""

    def has(self, key: str) -> bool:
        """Whether `ok` would give a row."""
        ...

    def ok(self, key: str) -> Mapping[str, Any] | None: ...

    def failure(self, key: str) -> Mapping[str, Any] | None: ...

    def columns(self, keys: Sequence[str], names: Sequence[str]) -> dict[str, list[Any]]:
        """Columns of the `ok` rows of these keys, in their order."""
        ...


class Items(Sequence[ItemSpec]):
    """Items of one stage, each built when it is asked for; `indices` are clips that need one each."""

    def __init__(self, clips: Clips, stage: str, indices: NDArray[np.intp]) -> None:
        self._clips = clips
        self._stage = stage
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> ItemSpec: ...

    @overload
    def __getitem__(self, index: slice) -> "Items": ...

    def __getitem__(self, index: int | slice) -> "ItemSpec | Items":
        if isinstance(index, slice):
            return Items(self._clips, self._stage, self._indices[index])
        return self._clips[int(self._indices[index])].items[self._stage]


@dataclass(frozen=True)
class StagePlan:
    """`cached` of the `items` that all clips need together are in the store; `to_do` are missing and
    needed for a missing clip."""

    items: int
    cached: int
    to_do: Items


@dataclass(frozen=True)
class Failure:
    stage: str
    error_type: str
    error: str


def make_plan(
    clips: Clips, results: Mapping[str, Results], *, retry_failed: bool = False
) -> dict[str, StagePlan]:
    """What is left to do, by stage in running order."""
    accepted = np.ones(len(clips), bool)
    accepted[list(clips.rejected)] = False
    if not accepted.any():
        return {}
    columns = {stage: _StageColumn(clips, stage, results[stage]) for stage in STAGES}
    blocked = np.zeros(len(clips), bool)
    if not retry_failed:
        for column in columns.values():
            blocked |= column.failed
    wanted = {stage: np.zeros(len(clips), bool) for stage in STAGES}
    wanted["decode"] = accepted & ~blocked
    inputs = {stage: spec.inputs for stage, spec in clips[int(accepted.argmax())].items.items()}
    plan: dict[str, StagePlan] = {}
    for stage in reversed(STAGES):
        missing = wanted[stage] & ~columns[stage].ok
        for upstream in inputs[stage]:
            wanted[upstream] |= missing
        plan[stage] = columns[stage].plan(clips, stage, missing)
    return {stage: plan[stage] for stage in STAGES}


class _StageColumn:
    """What is known of each clip's item of one stage: `ok` and `failed` (for good), shape (clips,)."""

    def __init__(self, clips: Clips, stage: str, results: Results) -> None:
        _, first, self._item = np.unique(clips.keys(stage), return_index=True, return_inverse=True)
        every = clips.hex_keys(stage)
        keys = [every[index] for index in first.tolist()]
        ok = np.array([key is not None and results.has(key) for key in keys], bool)
        failed = np.array([key is not None and _failed_for_good(key, results) for key in keys], bool) & ~ok
        self._first = first
        self._items, self._cached = sum(key is not None for key in keys), int(ok.sum())
        self.ok, self.failed = ok[self._item], failed[self._item]

    def plan(self, clips: Clips, stage: str, missing: NDArray[np.bool_]) -> StagePlan:
        items = np.unique(self._item[missing])
        return StagePlan(self._items, self._cached, Items(clips, stage, np.sort(self._first[items])))


def _failed_for_good(key: str, results: Results) -> bool:
    row = results.failure(key)
    return row is not None and not row["retryable"]


def first_failure(clip: Clip, results: Mapping[str, Results], *, lasting: bool = False) -> Failure | None:
    """Why a clip has no video: the first of its items that failed, None if none did.

    With `lasting` only failures count that will not pass by themselves.
    """
    if clip.error is not None:
        return Failure("ingest", InputError.__name__, clip.error)
    if results["decode"].has(clip.items["decode"].key):
        return None
    for stage in STAGES:
        row = results[stage].failure(clip.items[stage].key) if stage in clip.items else None
        if row is not None and not (lasting and row["retryable"]):
            return Failure(stage, row["error_type"], row["error"])
    return None


def shards(
    items: Iterable[ItemSpec], seconds_per_work: float, shard_seconds: float
) -> Iterator[tuple[ItemSpec, ...]]:
    """Items in pieces of about `shard_seconds`; the first hold 1, 2, 4, ... so that results come early."""
    shard: list[ItemSpec] = []
    seconds, limit = 0.0, 1
    for item in items:
        shard.append(item)
        seconds += item.work * seconds_per_work
        if len(shard) >= limit or seconds >= shard_seconds:
            yield tuple(shard)
            shard, seconds, limit = [], 0.0, min(2 * limit, 256)
    if shard:
        yield tuple(shard)
