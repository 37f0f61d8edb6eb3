"""The items that the clips of a batch need of each stage, as arrays: no Python object exists per item."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
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


class NewEntries:
    """What clips need of a stage, one clip after the other."""

    def __init__(self) -> None:
        self.keys = bytearray()
        self.work = array("d")
        self.counts = array("i")

    def add(self, items: Sequence[tuple[str, float]]) -> None:
        """Key and work of the items of the next clip: several where they continue each other, none where its
        row is rejected."""
        for key, work in items or [_NONE]:
            self.keys += bytes.fromhex(key)
            self.work.append(work)
        self.counts.append(len(items) or 1)


_NONE = "00" * 32, 0.0


@dataclass(frozen=True)
class Entries:
    """For each clip, one after the other, the places in `keys` (binary, sorted) of the items that it needs,
    -1 where its row is rejected; `counts` how many each clip has. `work` is that of the items."""

    keys: NDArray[np.bytes_] = field(default_factory=lambda: np.empty(0, KEY))
    work: NDArray[np.float64] = field(default_factory=lambda: np.empty(0, np.float64))
    items: NDArray[np.intc] = field(default_factory=lambda: np.empty(0, np.intc))
    counts: NDArray[np.intc] = field(default_factory=lambda: np.empty(0, np.intc))

    def joined(self, new: NewEntries, order: NDArray[np.intp]) -> "Entries":
        """With those of further clips, the clips then put into this `order`."""
        found, first, places = np.unique(
            np.concatenate([self.keys, np.frombuffer(bytes(new.keys), KEY)]),
            return_index=True,
            return_inverse=True,
        )
        absent = int(len(found) > 0 and found[0] == b"")
        places = (places - absent).astype(np.intc)
        work = np.concatenate([self.work, np.asarray(new.work)])[first[absent:]]
        ours = np.append(places[: len(self.keys)], np.intc(-1))[self.items]
        items = np.concatenate([ours, places[len(self.keys) :]])
        counts = np.concatenate([self.counts, np.asarray(new.counts, np.intc)])
        starts = np.cumsum(counts) - counts
        counts = counts[order]
        within = np.arange(len(items), dtype=np.intc) - np.repeat(np.cumsum(counts) - counts, counts)
        items = items[np.repeat(starts[order], counts) + within]
        return Entries(found[absent:], work, items, counts)


def stage_items(entries: Entries, *, chained: bool = False) -> StageItems:
    """With `chained` the items of a clip continue each other."""
    ends = np.cumsum(entries.counts)
    clips = np.repeat(np.arange(len(ends), dtype=np.intc), entries.counts)
    accepted = entries.items >= 0
    first = np.full(len(entries.keys), len(ends), np.intc)
    np.minimum.at(first, entries.items[accepted], clips[accepted])
    of_clip = entries.items[ends - 1]
    if not chained:
        return StageItems(entries.keys, entries.work, first, of_clip)
    within = np.arange(len(clips), dtype=np.intc) - (ends - entries.counts)[clips].astype(np.intc)
    window, previous = np.zeros((2, len(entries.keys)), np.intc)
    previous -= 1
    later = np.flatnonzero(within)
    window[entries.items[accepted]] = within[accepted]
    previous[entries.items[later]] = entries.items[later - 1]
    return StageItems(entries.keys, entries.work, first, of_clip, Chain(window, previous))
