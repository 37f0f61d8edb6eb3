"""What is known of one stage's items: what the store held at the start and what this run added."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avatar_core.store.catalog import ABSENT, FAILED, FAILED_FOR_GOOD, OK, Catalog
from avatar_core.store.key_index import KEY, KeyIndex, binary_keys, text_keys
from avatar_core.store.packed import PackedRows

_NEWEST_KEYS = 1024
_NEWEST_SHARE = 1 / 16


class StageResults:
    """Manifest rows by key: those that were added, else those of the catalog. All keys are SHA-256s."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self._rows = PackedRows()
        self._states = bytearray()  # by row
        self._index = KeyIndex(np.empty(0, KEY), np.empty(0, np.intc))
        self._newest: dict[str, int] = {}  # rows that the index does not have yet

    def add(self, row: Mapping[str, Any]) -> None:
        self._newest[row["key"]] = len(self._rows)
        self._rows.append(row)
        self._states.append(_state(row))
        if len(self._newest) >= max(_NEWEST_KEYS, _NEWEST_SHARE * len(self._index)):
            self._index.add(*self._newest_positions())
            self._newest.clear()

    def has(self, key: str) -> bool:
        """Whether `ok` would give a row."""
        added = self._added(key)
        return key in self.catalog if added is None else bool(self._states[added] == OK)

    def ok(self, key: str) -> Mapping[str, Any] | None:
        added = self._added(key)
        if added is None:
            return self.catalog.get(key)
        return self._rows[added] if self._states[added] == OK else None

    def failure(self, key: str) -> Mapping[str, Any] | None:
        added = self._added(key)
        if added is None:
            return self.catalog.failure(key)
        return self._rows[added] if self._states[added] in (FAILED, FAILED_FOR_GOOD) else None

    def states(self, keys: NDArray[np.bytes_]) -> NDArray[np.int8]:
        """ABSENT, OK, FAILED or FAILED_FOR_GOOD for each of the binary `keys`."""
        states = self.catalog.states(text_keys(keys))
        added = self._all_added(keys)
        states[added >= 0] = np.frombuffer(self._states, np.int8)[added[added >= 0]]
        return states

    def columns(self, keys: NDArray[np.bytes_], names: Sequence[str]) -> dict[str, list[Any]]:
        """Columns of the `ok` rows of these binary keys, in their order."""
        added = self._all_added(keys)
        is_added = added >= 0
        stored = self.catalog.select(text_keys(keys[~is_added]))
        columns = {name: np.empty(len(keys), object) for name in names}
        for name, column in columns.items():
            column[is_added] = self._rows.take(name, added[is_added])
            if name in stored.column_names:
                column[~is_added] = stored[name].to_pylist()
        return {name: column.tolist() for name, column in columns.items()}

    def _added(self, key: str) -> int | None:
        if (newest := self._newest.get(key)) is not None:
            return newest
        position = int(self._index.find(binary_keys([key]))[0])
        return None if position < 0 else position

    def _all_added(self, keys: NDArray[np.bytes_]) -> NDArray[np.intc]:
        newest = KeyIndex(*self._newest_positions()).find(keys)
        return np.where(newest >= 0, newest, self._index.find(keys))

    def _newest_positions(self) -> tuple[NDArray[np.bytes_], NDArray[np.intc]]:
        return binary_keys(self._newest), np.fromiter(self._newest.values(), np.intc, len(self._newest))


def _state(row: Mapping[str, Any]) -> int:
    if row["status"] == "ok":
        return int(OK)
    if row["status"] != "failed":
        return int(ABSENT)
    return int(FAILED if row.get("retryable") else FAILED_FOR_GOOD)
