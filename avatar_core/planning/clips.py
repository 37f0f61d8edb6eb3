"""The clips of a batch, in columns: no Python object exists per clip."""

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from avatar_core.media.table import TableRows
from avatar_core.planning.clip import Clip
from avatar_core.planning.clip_builder import ClipBuilder
from avatar_core.planning.clip_items import Entries, NewEntries, stage_items
from avatar_core.planning.clip_names import numbered_name
from avatar_core.store.key_index import KEY


class Clips(Sequence[Clip]):
    """Clips of a batch, in columns of some 150 bytes a clip; a `Clip` is built when it is asked for.

    Those of a row are added once its sources are known.
    """

    def __init__(
        self, builder: ClipBuilder, rows: TableRows, names: Sequence[str] | NDArray[np.str_]
    ) -> None:
        """`names` holds the clip name of each row."""
        self.builder = builder
        self._recent: tuple[int, list[Clip]] = -1, []
        self.rows = rows
        self.names: NDArray[np.str_] = np.asarray(names, np.dtypes.StringDType())
        self.position: NDArray[np.intc] = np.empty(0, np.intc)  # of each clip's row in `rows`
        self.take: NDArray[np.intc] = np.empty(0, np.intc)
        self.part: NDArray[np.intc] = np.empty(0, np.intc)
        self.seed: NDArray[np.uint64] = np.empty(0, np.uint64)
        self.rejected: dict[int, str] = {}  # reasons by clip
        self._nth: NDArray[np.intc] = np.empty(0, np.intc)  # among the clips of its row
        self._split: NDArray[np.bool_] = np.empty(0, bool)  # whether the row has several parts
        self._entries = {stage: Entries() for stage in builder.stages}
        self.stages = {stage: stage_items(entries) for stage, entries in self._entries.items()}

    def add(self, positions: Iterable[int]) -> None:
        """The clips of these rows, in the order of the rows with those that are there."""
        columns = [array(kind) for kind in "iiiQib"]
        entries = {stage: NewEntries() for stage in self._entries}
        errors: list[str | None] = []
        for position in positions:
            clips = self.builder.clips(self.rows[position], self.names[position])
            split = max(clip.part for clip in clips) > 0
            for nth, clip in enumerate(clips):
                errors.append(clip.error)
                values = (position, clip.take, clip.part, clip.seed or 0, nth, split)
                for column, value in zip(columns, values, strict=True):
                    column.append(value)
                for stage, new in entries.items():
                    new.add([(item.key, item.work) for item in clip.of_stage(stage)] if clip.items else [])
        rejected = [*map(self.rejected.get, range(len(self))), *errors]
        # Typed by hand: mypy's own join of these came out as `object` in some of its runs.
        before: list[NDArray[Any]] = [self.position, self.take, self.part, self.seed, self._nth, self._split]
        joined = [
            np.concatenate([old, np.asarray(new, old.dtype)])
            for old, new in zip(before, columns, strict=True)
        ]
        order = np.lexsort((joined[4], joined[0]))
        self.position, self.take, self.part, self.seed, self._nth, self._split = (
            column[order] for column in joined
        )
        self.rejected = {
            index: error for index, clip in enumerate(order.tolist()) if (error := rejected[clip]) is not None
        }
        for stage, new in entries.items():
            self._entries[stage] = self._entries[stage].joined(new, order)
            chained = stage in self.builder.chained
            self.stages[stage] = stage_items(self._entries[stage], chained=chained)
        self._recent = -1, []

    def __len__(self) -> int:
        return len(self.position)

    @overload
    def __getitem__(self, index: int) -> Clip: ...

    @overload
    def __getitem__(self, index: slice) -> list[Clip]: ...

    def __getitem__(self, index: int | slice) -> Clip | list[Clip]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._of_row(int(self.position[index]))[int(self._nth[index])]

    def _of_row(self, position: int) -> list[Clip]:
        if self._recent[0] != position:
            self._recent = position, self.builder.clips(self.rows[position], self.names[position])
        return self._recent[1]

    def name(self, index: int) -> str:
        part = self.part[index] if self._split[index] else None
        return numbered_name(self.names[self.position[index]], self.take[index], part)

    def keys(self, stage: str) -> NDArray[np.bytes_]:
        """The binary key of each clip's item of a stage, shape (clips,); empty where the row is rejected."""
        items = self.stages[stage]
        return np.append(items.keys, np.zeros(1, KEY))[items.of_clip]

    def hex_keys(self, stage: str, start: int = 0, stop: int | None = None) -> list[str | None]:
        """The same as text for the clips from `start` to before `stop`, None where the row is rejected."""
        items = self.stages[stage]
        of_clip = items.of_clip[start:stop]
        text = items.keys[of_clip[of_clip >= 0]].tobytes().hex()
        keys = (text[at : at + 64] for at in range(0, len(text), 64))
        return [next(keys) if known else None for known in (of_clip >= 0).tolist()]

    def window_keys(self, stage: str, start: int, stop: int) -> list[list[str] | None]:
        """The keys of all windows of the clips from `start` to before `stop`, None where the row is
        rejected."""
        return [[item.key for item in clip.windows.get(stage, ())] or None for clip in self[start:stop]]

    def name_of_item(self, stage: str, key: str) -> str:
        """The name of the first clip that needs an item, with the window that it is, if of several."""
        items = self.stages[stage]
        item = np.searchsorted(items.keys, np.array(bytes.fromhex(key), KEY))
        clip = int(items.first[item])
        count = len(self[clip].windows[stage]) if items.chain else 0
        if not items.chain or count < 2:
            return self.name(clip)
        return f"{self.name(clip)}, window {items.chain.window[item] + 1} of {count}"

    def row_column(self, name: str, start: int, stop: int) -> list[Any]:
        """A field of their rows for the clips from `start` to before `stop`."""
        positions: list[int] = self.position[start:stop].tolist()
        if not positions:
            return []
        values = self.rows.column(name, positions[0], positions[-1] + 1)
        return [values[position - positions[0]] for position in positions]

    def assets(self) -> set[str]:
        """SHA-256 of every picture and recording that the batch stands on."""
        return {source.asset.sha256 for source in self.builder.sources.values() if source.asset}
