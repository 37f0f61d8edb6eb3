"""What a stage has: all its attempts resolved to one answer per key.

For a key the earliest `ok` attempt counts, else the newest `failed` one. Rows named by a `dropped`
row do not exist for this purpose. Nor do chained ones that continue another attempt than the one that counts
for the item before: two attempts may differ in bits, and their results are never mixed.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from avatar_core.errors import StoreError
from avatar_core.store.attempts import read_attempts
from avatar_core.store.key_index import KeyIndex, column_keys
from avatar_core.store.manifest import write_manifest
from avatar_core.store.storage import Storage

_READERS = 4

ABSENT, OK, FAILED, FAILED_FOR_GOOD = np.arange(4, dtype=np.int8)
"""What is known of a key. `FAILED` may pass by itself: the row is retryable."""

CHAIN_SCHEMA = pa.schema({"window": pa.int64(), "previous_key": pa.string(), "previous_sha256": pa.string()})
"""Columns of a stage whose items continue each other: the item's place in its chain, and the result that it
continued, null for the first."""


def load_catalog(storage: Storage, stage: str) -> "Catalog":
    catalog = Catalog(stage, read_attempts(storage, stage).table())
    pa.default_memory_pool().release_unused()  # what was read is kept smaller
    return catalog


def load_catalogs(storage: Storage, stages: Iterable[str]) -> dict[str, "Catalog"]:
    """Of several stages: a few at a time from a remote store, whose answers take long whatever they say."""
    names = list(stages)
    with ThreadPoolExecutor(1 if storage.is_local else _READERS) as pool:
        return dict(zip(names, pool.map(lambda stage: load_catalog(storage, stage), names), strict=True))


def drop(storage: Storage, stage: str, keys: Iterable[str], catalog: "Catalog") -> str | None:
    """Hides every row that `catalog` has of these keys, so that they are made again.

    Attempts that `catalog` has not seen stay: a second reader of the same damage does not undo its
    repair. Returns the id of the attempt that says so, or None where there was nothing to hide.
    """
    return hide(storage, stage, catalog.live_attempts(keys))


def hide(storage: Storage, stage: str, attempts: Sequence[tuple[str, str]]) -> str | None:
    """Writes a dropped row for each (key, attempt)."""
    if not attempts:
        return None
    rows = [{"key": key, "status": "dropped", "dropped": attempt} for key, attempt in attempts]
    return write_manifest(storage, stage, rows, pa.schema([]))


class Catalog:
    """`table` has every row ever written, oldest first, with its `attempt`."""

    def __init__(self, stage: str, table: pa.Table) -> None:
        self.stage = stage
        self._live = _live(table)
        states = np.where(self._live, row_states(table), ABSENT)
        states[_strangers(table, states == OK)] = ABSENT
        failed, ok = np.flatnonzero(states > OK), np.flatnonzero(states == OK)[::-1]
        order = np.concatenate([failed, ok])  # of equal keys the last counts: the earliest that is ok
        self._index = KeyIndex(column_keys(table["key"])[order], order)
        self._states = np.append(states, ABSENT)  # which -1, the position of unknown keys, gives
        self.table = _shrunk(table)

    def __contains__(self, key: str) -> bool:
        return bool(self._states[self._find(key)] == OK)

    def __len__(self) -> int:
        return int((self._states[self._index.positions] == OK).sum())

    def ok_keys(self) -> set[str]:
        return self._keys(self._states[self._index.positions] == OK)

    def failed_keys(self) -> set[str]:
        return self._keys(self._states[self._index.positions] > OK)

    def get(self, key: str) -> Mapping[str, Any] | None:
        return self._row(key, OK)

    def failure(self, key: str) -> Mapping[str, Any] | None:
        return self._row(key, FAILED, FAILED_FOR_GOOD)

    def states(self, keys: NDArray[np.bytes_]) -> NDArray[np.int8]:
        return self._states[self._index.find(keys)]

    def select(self, keys: Sequence[str] | NDArray[np.bytes_]) -> pa.Table:
        """The `ok` rows of these keys, in their order; `StoreError` names the keys that have none."""
        return self._take(keys, OK)

    def failures(self, keys: Sequence[str]) -> pa.Table:
        """As `select`, of what `failure` would give."""
        return self._take(keys, FAILED, FAILED_FOR_GOOD)

    def attempts(self, key: str) -> list[dict[str, Any]]:
        """All rows of a key, oldest first, the hidden ones and those that hide them too."""
        rows: list[dict[str, Any]] = self.table.filter(pc.equal(self.table["key"], key)).to_pylist()
        return rows

    def live_attempts(self, keys: Iterable[str]) -> list[tuple[str, str]]:
        """(key, attempt) of every row of these keys that no dropped row hides."""
        return self._live_where("key", keys)

    def attempts_with_data(self, paths: Iterable[str]) -> list[tuple[str, str]]:
        """As `live_attempts`, of the rows whose data file is one of these."""
        return self._live_where("data", paths)

    def _live_where(self, column: str, wanted: Iterable[str]) -> list[tuple[str, str]]:
        found = pc.is_in(self.table[column].cast(pa.string()), value_set=pa.array(wanted, pa.string()))
        rows = self.table.select(["key", "attempt"]).filter(pc.and_(found, pa.array(self._live)))
        return _pairs(rows["key"], rows["attempt"])

    def _keys(self, which: NDArray[np.bool_]) -> set[str]:
        return set(self.table["key"].take(pa.array(self._index.positions[which])).to_pylist())

    def _row(self, key: str, *states: np.int8) -> Mapping[str, Any] | None:
        position = self._find(key)
        if self._states[position] not in states:
            return None
        row: dict[str, Any] = self.table.slice(position, 1).to_pylist()[0]
        return row

    def _find(self, key: str) -> int:
        return int(self._index.find(np.array([key], "S"))[0])

    def _take(self, keys: Sequence[str] | NDArray[np.bytes_], *states: np.int8) -> pa.Table:
        positions = self._index.find(np.array(keys, "S"))
        missing = ~np.isin(self._states[positions], states)
        if missing.any():
            raise StoreError(
                f"{missing.sum()} of {len(keys)} {self.stage} results are not in the catalog; "
                "they have to be made again",
                np.array(keys, "U")[missing].tolist(),
            )
        return self.table.take(pa.array(positions))


def row_states(table: pa.Table) -> NDArray[np.int8]:
    """What each row says of its key, whatever other rows say."""
    ok = _flags(pc.equal(table["status"], "ok"))
    retryable = _flags(table["retryable"])
    return np.where(ok, OK, np.where(retryable, FAILED, FAILED_FOR_GOOD)).astype(np.int8)


def _live(table: pa.Table) -> NDArray[np.bool_]:
    """Whether a row has status ok or failed and no dropped row names it."""
    is_dropped = pc.equal(table["status"], "dropped")
    live = ~_flags(is_dropped)
    dropped = table.select(["key", "dropped"]).filter(is_dropped)
    hidden = set(_pairs(dropped["key"], dropped["dropped"]))
    suspects = np.flatnonzero(_flags(pc.is_in(table["key"], value_set=dropped["key"].unique())))
    rows = table.select(["key", "attempt"]).take(pa.array(suspects))
    pairs = _pairs(rows["key"], rows["attempt"])
    live[suspects] &= np.array([pair not in hidden for pair in pairs], bool)
    return live


def _strangers(table: pa.Table, ok: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Places of the `ok` rows that continue another result than the one that counts for its key."""
    if "previous_key" not in table.column_names:
        return np.empty(0, np.intp)
    chained = np.flatnonzero(ok & ~_flags(pc.is_null(table["window"])))
    rows = table.select(["key", "sha256", *CHAIN_SCHEMA.names]).take(pa.array(chained))
    keys, data = pc.unique(rows["key"]), pc.unique(rows["sha256"])
    key, previous_key = (_places(rows[name], keys) for name in ("key", "previous_key"))
    sha256, previous_sha256 = (_places(rows[name], data) for name in ("sha256", "previous_sha256"))
    window = rows["window"].to_numpy()

    counts = np.full(len(keys) + 2, -1)  # the data that counts, by key; nothing at -2
    stays = np.zeros(len(chained), bool)
    by_window = np.argsort(window, kind="stable")
    for these in np.split(by_window, np.flatnonzero(np.diff(window[by_window])) + 1):
        fits = (window[these] == 0) | (counts[previous_key[these]] == previous_sha256[these])
        these = these[fits]
        stays[these] = True
        counts[key[these[::-1]]] = sha256[these[::-1]]  # of equal keys the last counts: the oldest
    return chained[~stays]


def _places(values: pa.ChunkedArray, among: pa.Array) -> NDArray[np.int64]:
    """Where each value is, -2 for none."""
    places: NDArray[np.int64] = pc.fill_null(pc.index_in(values, value_set=among), -2).to_numpy()
    return places


def _flags(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    return np.asarray(pc.fill_null(column, False), bool)


def _pairs(first: pa.ChunkedArray, second: pa.ChunkedArray) -> list[tuple[str, str]]:
    return list(zip(first.to_pylist(), second.to_pylist(), strict=True))


def _shrunk(table: pa.Table) -> pa.Table:
    """With each text that many rows share, such as the attempt or the data file of a shard, kept once."""
    for index, field in enumerate(table.schema):
        if pa.types.is_string(field.type) and field.name != "key":
            encoded = table.column(index).dictionary_encode()
            if 2 * encoded.nbytes < table.column(index).nbytes:
                table = table.set_column(index, field.name, encoded)
    return table
