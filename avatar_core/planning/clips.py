"""The clips of a batch, in columns: no Python object exists per clip."""

from array import array
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from avatar_core.media.table import TableRows
from avatar_core.planning.clip import Clip
from avatar_core.planning.clip_builder import ClipBuilder
from avatar_core.planning.clip_items import chained, stage_items
from avatar_core.planning.clip_names import numbered_name
from avatar_core.store.key_index import KEY

_NO_KEY = bytes(32)


class Clips(Sequence[Clip]):
    """All clips of a batch, in columns of some 150 bytes a clip; a `Clip` is built when it is asked for."""

    def __init__(
        self, builder: "ClipBuilder", rows: TableRows, names: Sequence[str] | NDArray[np.str_]
    ) -> None:
        """`names` holds the clip name of each row."""
        self._builder = builder
        self._recent: tuple[int, list[Clip]] = -1, []
        self.rows = rows
        self.names: NDArray[np.str_] = np.asarray(names, np.dtypes.StringDType())
        self.position = array("i")  # of each clip's row in `rows`
        self.take = array("i")
        self.part = array("i")
        self.seed = array("Q")
        self.rejected: dict[int, str] = {}  # reasons by clip
        self._nth = array("i")  # among the clips of its row
        self._split = bytearray()  # whether the row has several parts
        stages = list(builder.stages)
        keys = {stage: bytearray() for stage in stages}
        work = {stage: array("d") for stage in stages}
        windows = {stage: array("i") for stage in builder.chained}  # of each clip, and 1 of a rejected one
        for position, row in enumerate(rows):
            clips = builder.clips(row, self.names[position])
            parts = max(clip.part for clip in clips)
            for nth, clip in enumerate(clips):
                if clip.error is not None:
                    self.rejected[len(self)] = clip.error
                for stage, items in clip.windows.items():
                    for window in items[:-1]:
                        keys[stage] += bytes.fromhex(window.key)
                        work[stage].append(window.work)
                for stage in stages:
                    item = clip.items.get(stage)
                    keys[stage] += bytes.fromhex(item.key) if item else _NO_KEY
                    work[stage].append(item.work if item else 0.0)
                self.position.append(position)
                self.take.append(clip.take)
                self.part.append(clip.part)
                self.seed.append(clip.seed or 0)
                self._nth.append(nth)
                self._split.append(parts > 0)
                for stage, counts in windows.items():
                    counts.append(len(clip.windows.get(stage, ())) or 1)
        self.stages = {stage: stage_items(keys.pop(stage), work.pop(stage)) for stage in stages}
        for stage, counts in windows.items():
            self.stages[stage] = chained(self.stages[stage], np.asarray(counts))

    def __len__(self) -> int:
        return len(self.position)

    @overload
    def __getitem__(self, index: int) -> Clip: ...

    @overload
    def __getitem__(self, index: slice) -> list[Clip]: ...

    def __getitem__(self, index: int | slice) -> Clip | list[Clip]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._of_row(self.position[index])[self._nth[index]]

    def _of_row(self, position: int) -> list[Clip]:
        if self._recent[0] != position:
            self._recent = position, self._builder.clips(self.rows[position], self.names[position])
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
        positions = self.position[start:stop]
        if not positions:
            return []
        values = self.rows.column(name, positions[0], positions[-1] + 1)
        return [values[position - positions[0]] for position in positions]

    def assets(self) -> set[str]:
        """SHA-256 of every picture and recording that the batch stands on."""
        return {source.asset.sha256 for source in self._builder.sources.values() if source.asset}
