"""What a stage has: all its attempts resolved to one answer per key.

For a key the earliest `ok` attempt counts, else the newest `failed` one. Rows named by a `dropped`
row do not exist for this purpose.
"""

from collections.abc import Callable, Iterable, KeysView, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from avatar_core.errors import StoreError
from avatar_core.store.attempts import read_attempts
from avatar_core.store.manifest import write_manifest
from avatar_core.store.storage import Storage


def load_catalog(storage: Storage, stage: str) -> "Catalog":
    return Catalog(stage, read_attempts(storage, stage).table())


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
        self.table = table
        self._live = _live_positions(table)
        self._ok: dict[str, int] = {}
        self._failed: dict[str, int] = {}
        keys, statuses = _texts(table["key"]), _texts(table["status"])
        for position in self._live:
            if statuses[position] == "ok":
                self._ok.setdefault(keys[position], position)
            else:
                self._failed[keys[position]] = position
        for key in self._failed.keys() & self._ok.keys():
            del self._failed[key]

    def __contains__(self, key: object) -> bool:
        return key in self._ok

    def __len__(self) -> int:
        return len(self._ok)

    def ok_keys(self) -> KeysView[str]:
        return self._ok.keys()

    def failed_keys(self) -> KeysView[str]:
        return self._failed.keys()

    def get(self, key: str) -> Mapping[str, Any] | None:
        return self._row(self._ok.get(key))

    def failure(self, key: str) -> Mapping[str, Any] | None:
        return self._row(self._failed.get(key))

    def select(self, keys: Sequence[str]) -> pa.Table:
        """The `ok` rows of these keys, in their order; `StoreError` names the keys that have none."""
        return self._take(keys, self._ok)

    def failures(self, keys: Sequence[str]) -> pa.Table:
        """As `select`, of what `failure` would give."""
        return self._take(keys, self._failed)

    def attempts(self, key: str) -> list[dict[str, Any]]:
        """All rows of a key, oldest first, the hidden ones and those that hide them too."""
        rows: list[dict[str, Any]] = self.table.filter(pc.equal(self.table["key"], key)).to_pylist()
        return rows

    def live_attempts(self, keys: Iterable[str]) -> list[tuple[str, str]]:
        """(key, attempt) of every row of these keys that no dropped row hides."""
        wanted = set(keys)
        return self._live_where("key", wanted.__contains__)

    def attempts_with_data(self, paths: Iterable[str]) -> list[tuple[str, str]]:
        """As `live_attempts`, of the rows whose data file is one of these."""
        wanted = set(paths)
        return self._live_where("data", wanted.__contains__)

    def _live_where(self, column: str, wanted: Callable[[object], bool]) -> list[tuple[str, str]]:
        keys, attempts = _texts(self.table["key"]), _texts(self.table["attempt"])
        values = _texts(self.table[column])
        return [(keys[at], attempts[at]) for at in self._live if wanted(values[at])]

    def _take(self, keys: Sequence[str], index: Mapping[str, int]) -> pa.Table:
        missing = [key for key in keys if key not in index]
        if missing:
            raise StoreError(
                f"{len(missing)} of {len(keys)} {self.stage} results are not in the catalog; "
                "they have to be made again",
                missing,
            )
        return self.table.take(pa.array([index[key] for key in keys], pa.int64()))

    def _row(self, position: int | None) -> Mapping[str, Any] | None:
        if position is None:
            return None
        row: dict[str, Any] = self.table.slice(position, 1).to_pylist()[0]
        return row


def _live_positions(table: pa.Table) -> list[int]:
    """Of the rows with status ok or failed that no dropped row names."""
    dropped = table.filter(pc.equal(table["status"], "dropped"))
    hidden = set(zip(_texts(dropped["key"]), _texts(dropped["dropped"]), strict=True))
    rows = zip(_texts(table["key"]), _texts(table["attempt"]), _texts(table["status"]), strict=True)
    return [
        position
        for position, (key, attempt, status) in enumerate(rows)
        if status != "dropped" and (key, attempt) not in hidden
    ]


def _texts(column: pa.ChunkedArray) -> Sequence[str]:
    texts: Sequence[str] = column.to_numpy().tolist()
    return texts
