"""Clips and the catalog become work: which items of which stage still have to run. Pure.

Needs are pulled backwards from the finished clip: an item is wanted only if a missing item consumes it, so
results that were cleaned away cost nothing once the videos exist.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from avatar_core.clips import Clip
from avatar_core.errors import InputError
from avatar_core.stages.base import ItemSpec

STAGES = ("face", "audio", "reference", "denoise", "decode")
"""Stages after ingest, in the order in which they run; a backend leaves out what it does not need."""


class Results(Protocol):
    """What is known of one stage's items: manifest rows by key."""

    def has(self, key: str) -> bool:
        """Whether `ok` would give a row."""
        ...

    def ok(self, key: str) -> Mapping[str, Any] | None: ...

    def failure(self, key: str) -> Mapping[str, Any] | None: ...


@dataclass(frozen=True)
class StagePlan:
    """`cached` of the `items` that all clips need together are in the store; `to_do` are missing and
    needed for a missing clip."""

    items: int
    cached: int
    to_do: tuple[ItemSpec, ...]


@dataclass(frozen=True)
class Failure:
    stage: str
    error_type: str
    error: str


def make_plan(
    clips: Sequence[Clip], results: Mapping[str, Results], *, retry_failed: bool = False
) -> dict[str, StagePlan]:
    """What is left to do, by stage in running order."""
    wanted: dict[str, dict[str, ItemSpec]] = {stage: {} for stage in STAGES}
    seen: dict[str, set[str]] = {stage: set() for stage in STAGES}
    for clip in clips:
        for stage, spec in clip.items.items():
            seen[stage].add(spec.key)
        if clip.items and (retry_failed or first_failure(clip, results, lasting=True) is None):
            _pull(clip, "decode", results, wanted)
    return {
        stage: StagePlan(
            items=len(keys),
            cached=sum(map(results[stage].has, keys)),
            to_do=tuple(wanted[stage].values()),
        )
        for stage, keys in seen.items()
        if keys
    }


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


def _pull(
    clip: Clip, stage: str, results: Mapping[str, Results], wanted: Mapping[str, dict[str, ItemSpec]]
) -> None:
    spec = clip.items[stage]
    if spec.key in wanted[stage] or results[stage].has(spec.key):
        return
    wanted[stage][spec.key] = spec
    for upstream in spec.inputs:
        _pull(clip, upstream, results, wanted)


def shards(
    items: Sequence[ItemSpec], seconds_per_work: float, shard_seconds: float
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
