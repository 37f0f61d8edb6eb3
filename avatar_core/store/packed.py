"""Many rows in little memory."""

import pickle
import zlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK_ROWS = 512
_OPENED = 4  # chunks kept for rows that are asked for one by one


class PackedRows:
    """Rows that may be added to, kept by columns and compressed: some 100 bytes each, not some 2000.

    The newest stay as they are, so that whoever added a row may still complete it. A row has None for
    columns that only its neighbours have.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._chunks: list[dict[str, bytes]] = []
        self._newest: list[Mapping[str, Any]] = []
        self._opened = lru_cache(_OPENED)(self._open)
        for row in rows:
            self.append(row)

    def __len__(self) -> int:
        return len(self._chunks) * CHUNK_ROWS + len(self._newest)

    def append(self, row: Mapping[str, Any]) -> None:
        self._newest.append(row)
        if len(self._newest) == 2 * CHUNK_ROWS:
            oldest, self._newest = self._newest[:CHUNK_ROWS], self._newest[CHUNK_ROWS:]
            names = dict.fromkeys(name for row in oldest for name in row)
            self._chunks.append({name: _pack([row.get(name) for row in oldest]) for name in names})

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        chunk, offset = divmod(index, CHUNK_ROWS)
        if chunk < len(self._chunks):
            return {name: values[offset] for name, values in self._opened(chunk).items()}
        return dict(self._newest[index - len(self._chunks) * CHUNK_ROWS])

    def column(self, name: str, start: int = 0, stop: int | None = None) -> list[Any]:
        """The values of the rows from `start` to before `stop`."""
        start, stop, _ = slice(start, stop).indices(len(self))
        values: list[Any] = []
        for chunk in range(start // CHUNK_ROWS, -(-stop // CHUNK_ROWS)):
            first = chunk * CHUNK_ROWS
            values += self._chunk(chunk, name)[max(start - first, 0) : stop - first]
        return values

    def take(self, name: str, positions: NDArray[np.integer]) -> NDArray[np.object_]:
        values = np.empty(len(positions), object)
        chunks = positions // CHUNK_ROWS
        for chunk in np.unique(chunks).tolist():
            here = np.flatnonzero(chunks == chunk)
            column = self._chunk(chunk, name)
            values[here] = [column[offset] for offset in (positions[here] % CHUNK_ROWS).tolist()]
        return values

    def _chunk(self, chunk: int, name: str) -> list[Any]:
        if chunk < len(self._chunks):
            packed = self._chunks[chunk].get(name)
            return [None] * CHUNK_ROWS if packed is None else _unpack(packed)
        first = (chunk - len(self._chunks)) * CHUNK_ROWS
        return [row.get(name) for row in self._newest[first : first + CHUNK_ROWS]]

    def _open(self, chunk: int) -> dict[str, list[Any]]:
        return {name: _unpack(packed) for name, packed in self._chunks[chunk].items()}


def _pack(values: list[Any]) -> bytes:
    return zlib.compress(pickle.dumps(values, pickle.HIGHEST_PROTOCOL), 1)


def _unpack(packed: bytes) -> list[Any]:
    values: list[Any] = pickle.loads(zlib.decompress(packed))
    return values
