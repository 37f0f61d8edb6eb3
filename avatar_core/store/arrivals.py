"""What other runs commit to a stage after its catalog was read."""

import threading
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pyarrow as pa

from avatar_core.errors import StoreError
from avatar_core.store.catalog import Catalog
from avatar_core.store.manifest import ATTEMPT_NAME, manifest_folder, read_parquet
from avatar_core.store.storage import Storage

Row = Mapping[str, Any]


class Arrivals:
    """Rows that count as results: `ok`, or failed for good. Each is given once. Threads may share it."""

    def __init__(self, storage: Storage, catalog: Catalog) -> None:
        self._storage = storage
        self._catalog = catalog
        self._seen: set[str] | None = None
        self._rows: dict[str, tuple[str, pa.Table, int]] = {}  # attempt, its table, the place therein
        self._own: set[str] = set()
        self._continued: dict[str, str] = {}
        self._looking = threading.Lock()
        self._looked_s = float("-inf")

    def take(self, keys: Collection[str], max_age_s: float = 0.0) -> dict[str, Row]:
        """Rows of these keys, as the store had them at most `max_age_s` before this call."""
        needed_s = time.monotonic() - max_age_s
        with self._looking:
            if self._looked_s < needed_s:
                self._look()
            found = {key: self._rows.pop(key) for key in keys if key in self._rows}
        rows = {key: table.slice(place, 1).to_pylist()[0] for key, (_, table, place) in found.items()}
        return {key: row for key, row in rows.items() if self._fits(row)}

    def expect(self, continued: Mapping[str, str]) -> None:
        """Of these keys only rows count that continue the result of this SHA-256."""
        with self._looking:
            self._continued.update(continued)

    def _fits(self, row: Row) -> bool:
        return row["status"] != "ok" or row.get("previous_sha256") == self._continued.get(row["key"])

    def leave_out(self, keys: Iterable[str]) -> None:
        """This run has committed these itself, and will not ask for them."""
        with self._looking:
            for key in keys:
                if self._rows.pop(key, None) is None:  # its manifest is still to be read
                    self._own.add(key)

    def _look(self) -> None:
        self._looked_s = time.monotonic()
        tables = dict(self._unseen())
        for attempt, table in tables.items():
            self._keep(attempt, table)
        for table in tables.values():
            dropped = zip(table["key"].to_pylist(), table["dropped"].to_pylist(), strict=True)
            for key, attempt in dropped:
                if attempt and key in self._rows and self._rows[key][0] == attempt:
                    del self._rows[key]

    def _unseen(self) -> list[tuple[str, pa.Table]]:
        if self._seen is None:
            self._seen = set(self._catalog.table["attempt"].unique().to_pylist())
        unseen = []
        for path in sorted(self._storage.list(manifest_folder(self._catalog.stage))):
            name = path.rpartition("/")[2]
            attempt = name.removesuffix(".parquet")
            if attempt in self._seen or not ATTEMPT_NAME.fullmatch(name):
                continue
            self._seen.add(attempt)
            try:
                unseen.append((attempt, read_parquet(self._storage.read_bytes(path))))
            except StoreError:
                continue  # damaged or gone: whoever needs it does it again
        return unseen

    def _keep(self, attempt: str, table: pa.Table) -> None:
        columns = [table[name].to_pylist() for name in ("key", "status", "retryable")]
        for place, (key, status, retryable) in enumerate(zip(*columns, strict=True)):
            if key in self._own:
                self._own.remove(key)
            elif status == "ok" or (status == "failed" and not retryable):
                self._rows.setdefault(key, (attempt, table, place))
