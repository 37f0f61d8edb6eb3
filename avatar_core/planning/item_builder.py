"""The items that clips need of one stage: asked of the stage itself, once for all clips of equal facts."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, cast

from avatar_core.stages.base import Asset, ItemSpec
from avatar_core.stages.clip_stage import ClipStage
from avatar_core.stages.subject import Subject
from avatar_core.store.keys import config_values, digest, item_key

RECENT = 4096  # items kept for the rows that follow

IN_KEY = ("seed", "window")
"""Facts that stand in the key by themselves, not in the digest of a configuration."""

Facts = tuple[Hashable, ...]
Consumed = tuple[tuple[str, ...], ...]
"""Keys of the items that an item consumes, for each input of its stage."""


_SOURCES = {"picture": ("picture", "footage"), "recordings": ("recordings",)}
"""Facts that stand for the assets that a stage reads."""


@dataclass(frozen=True, slots=True)
class _Need:
    """What all items of equal facts have in common."""

    config: Any
    digest: str
    weights: str
    in_key: Mapping[str, tuple[str, ...]]
    work: float


class ItemBuilder:
    """`fingerprint` gives that of weights by their registry names."""

    def __init__(self, stage: ClipStage[Any, Any], fingerprint: Callable[[tuple[str, ...]], str]) -> None:
        self.stage = stage
        self._fingerprint = fingerprint
        self._facts = _getter(stage.facts)
        self._sources = _getter([fact for asset in stage.reads for fact in _SOURCES[asset]])
        # Neighbouring rows share pictures, recordings and options.
        self._need = lru_cache(RECENT)(self._ask)
        self._item = lru_cache(RECENT)(self._make)
        self._digest = lru_cache(RECENT)(lambda config: digest(config_values(config)))

    def items(self, subject: Subject, made: Mapping[str, tuple[ItemSpec, ...]]) -> tuple[ItemSpec, ...]:
        """The clip's item, or its windows, given those `made` of the stages before."""
        stage = self.stage
        consumed = tuple([tuple([item.key for item in made[name]]) for name in stage.inputs])
        sources = self._sources(subject)
        if not stage.chained:
            return (self._item(self._facts(subject), sources, consumed),)
        windows: list[ItemSpec] = []
        count = stage.num_windows(subject)
        for window in range(count):
            facts = self._facts(replace(subject, window=window) if window else subject)
            previous = windows[-1].key if windows else None
            windows.append(self._make(facts, sources, consumed, previous, count))
        return tuple(windows)

    def _make(
        self, facts: Facts, sources: Facts, consumed: Consumed, previous: str | None = None, windows: int = 1
    ) -> ItemSpec:
        """Each of several `windows` continues the `previous` one; none knows how many there are."""
        stage, need = self.stage, self._need(facts)
        inputs = dict(zip(stage.inputs, consumed, strict=True))
        if previous:
            inputs[stage.name] = (previous,)
        assets = self._assets(sources)
        hashes = {column: tuple([asset.sha256 for asset in found]) for column, found in assets.items()}
        in_key = {**inputs, **hashes, **need.in_key}
        key = item_key(stage.owner, stage.version, need.digest, need.weights, in_key)
        return ItemSpec(key, need.config, inputs, assets, need.work / windows)

    def _assets(self, sources: Facts) -> dict[str, tuple[Asset, ...]]:
        """By column."""
        values = iter(cast(Sequence[Any], sources))
        assets: dict[str, tuple[Asset, ...]] = {}
        for kind in self.stage.reads:
            if kind == "picture":
                picture, footage = next(values), next(values)
                assets["video" if footage else "image"] = (picture,)
            else:
                assets["audio"] = next(values)
        return assets

    def _ask(self, facts: Facts) -> _Need:
        known = dict(zip(self.stage.facts, facts, strict=True))
        # Only what the stage has declared: an item must not depend on more than it is remembered by.
        subject = cast(Subject, SimpleNamespace(**known))
        config = self.stage.configure(subject)
        return _Need(
            config,
            self._digest(config),
            self._fingerprint(self.stage.weights(config)),
            {name: (str(known[name]),) for name in IN_KEY if name in known},
            self.stage.work(subject),
        )


def _getter(names: Sequence[str]) -> Callable[[Subject], Facts]:
    if not names:
        return lambda subject: ()
    get = attrgetter(*names)
    return get if len(names) > 1 else lambda subject: (get(subject),)
