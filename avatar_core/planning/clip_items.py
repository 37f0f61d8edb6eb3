"""The items that the clips of a batch need of each stage, as arrays: no Python object exists per item."""

from array import array
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from avatar_core.store.key_index import KEY


@dataclass(frozen=True)
class Chain:
    """Items that continue each other: the `window` of each and the item `previous` to it, -1 for the first;
    shape (items,)."""

    window: NDArray[np.intc]
    previous: NDArray[np.intc]

    @cached_property
    def links(self) -> list[tuple[NDArray[np.intp], NDArray[np.intc]]]:
        """Items and those that they continue, by window: from the second to the last."""
        order = np.argsort(self.window, kind="stable")
        _, *later = np.split(order, np.flatnonzero(np.diff(self.window[order])) + 1)
        return [(items, self.previous[items]) for items in later]

    def onwards(self, flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """What is true of an item or of one before it."""
        flags = flags.copy()
        for items, previous in self.links:
            flags[items] |= flags[previous]
        return flags

    def backwards(self, flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """What is true of an item or of one after it."""
        flags = flags.copy()
        for items, previous in reversed(self.links):
            flags[previous[flags[items]]] = True
        return flags


@dataclass(frozen=True)
class StageItems:
    """The items of one stage that the clips need: `keys` (binary, sorted), `work` and the `first` clip of
    each, shape (items,); `of_clip` is the item of each clip, the last one of a `chain`, shape (clips,), -1
    where the row is rejected."""

    keys: NDArray[np.bytes_]
    work: NDArray[np.float64]
    first: NDArray[np.intc]
    of_clip: NDArray[np.intc]
    chain: Chain | None = None


def stage_items(keys: bytearray, work: "array[float]") -> StageItems:
    found, first, of_clip = np.unique(np.frombuffer(keys, KEY), return_index=True, return_inverse=True)
    absent = int(len(found) > 0 and found[0] == b"")
    first = first[absent:]
    return StageItems(
        found[absent:], np.asarray(work)[first], first.astype(np.intc), (of_clip - absent).astype(np.intc)
    )


def chained(entries: StageItems, windows: NDArray[np.intc]) -> StageItems:
    """The items of `entries` for each window of each clip, given the number of `windows` of each clip."""
    ends = np.cumsum(windows)
    clips = np.repeat(np.arange(len(windows), dtype=np.intc), windows)
    item = entries.of_clip
    within = np.arange(len(item), dtype=np.intc) - (ends - windows)[clips].astype(np.intc)
    window, previous = np.zeros((2, len(entries.keys)), np.intc)
    previous -= 1
    accepted, later = item >= 0, np.flatnonzero(within)
    window[item[accepted]] = within[accepted]
    previous[item[later]] = item[later - 1]
    first, last = clips[entries.first], item[ends - 1]
    return replace(entries, first=first, of_clip=last, chain=Chain(window, previous))
