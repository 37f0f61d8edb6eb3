"""Parquet files of many rows, written in pieces."""

import math
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from avatar_core.store.storage import Storage

PIECE_ROWS = 4096


def stretches(length: int) -> Iterator[tuple[int, int]]:
    """Start and end of the pieces of a table; one at least, though it be empty."""
    for start in range(0, max(length, 1), PIECE_ROWS):
        yield start, min(start + PIECE_ROWS, length)


def put_table(storage: Storage, path: str, schema: pa.Schema, pieces: Iterable[pa.Table]) -> None:
    """Nothing is written where exactly this table is there already."""
    with tempfile.TemporaryDirectory(prefix="avatar-table-") as folder:
        local = Path(folder) / "table.parquet"
        with pq.ParquetWriter(local, schema) as writer:
            for piece in pieces:
                writer.write_table(piece)
        if not storage.holds(path, local, math.inf):
            storage.put_file(path, local)
