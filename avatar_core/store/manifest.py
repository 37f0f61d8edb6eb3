"""Attempts: what one try at a shard left behind, written last and in one piece."""

import functools
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from avatar_core.errors import StoreError
from avatar_core.store.keys import file_sha256, new_id
from avatar_core.store.storage import Storage

BASE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("status", pa.string()),  # ok, failed, dropped
        pa.field("retryable", pa.bool_()),
        pa.field("error_type", pa.string()),
        pa.field("error", pa.string()),
        pa.field("seconds", pa.float64()),
        pa.field("device", pa.string()),
        pa.field("memory", pa.string()),
        pa.field("work", pa.float64()),  # units of work done, for estimates
        pa.field("data", pa.string()),
        pa.field("sha256", pa.string()),
        pa.field("dropped", pa.string()),  # the attempt that a dropped row hides
    ]
)
ASSETS = "assets"  # the folder of accepted inputs, shared by all stages
STATUSES = ("ok", "failed", "dropped")
ATTEMPT_NAME = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.parquet")

_REUSE_AGE_S = 86400.0  # an older copy is written anew, lest gc finds it old enough to delete
_SENT_UNASKED_BYTES = 8 << 20  # to a remote store: asking first whether it is there takes as long
_THREADS_PAY_BYTES = 1 << 20


def manifest_folder(stage: str) -> str:
    return f"stages/{stage}/manifests"


def data_folder(stage: str) -> str:
    return f"stages/{stage}/data"


def write_data(
    storage: Storage, stage: str, data: bytes | Path, suffix: str, folder: str | None = None
) -> tuple[str, str]:
    """Path and SHA-256 of `data`, stored under its own hash below `folder` or the stage's data."""
    sha256 = hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else file_sha256(data)
    path = f"{folder or data_folder(stage)}/{sha256[:2]}/{sha256}{suffix}"
    size = len(data) if isinstance(data, bytes) else data.stat().st_size
    is_asked = storage.is_local or size > _SENT_UNASKED_BYTES
    if not (is_asked and storage.holds(path, data, _REUSE_AGE_S)):
        if isinstance(data, bytes):
            storage.write_bytes(path, data)
        else:
            storage.put_file(path, data)
    return path, sha256


def write_manifest(
    storage: Storage, stage: str, rows: Sequence[Mapping[str, Any]], columns: pa.Schema
) -> str:
    """Commits one attempt and returns its id; `columns` are the stage's own, absent values become null."""
    schema = _full_schema(columns)
    _check_rows(stage, rows, schema)
    try:
        table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise StoreError(f"a {stage} row does not fit the columns of its stage: {error}") from error
    attempt = new_id()
    storage.write_bytes(f"{manifest_folder(stage)}/{attempt}.parquet", parquet_bytes(table))
    return attempt


def parquet_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def read_parquet(data: bytes) -> pa.Table:
    """Raises `StoreError` for anything but a whole table with the base columns."""
    try:
        file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
        table = file.read(use_threads=len(data) > _THREADS_PAY_BYTES)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StoreError(f"not a readable Parquet file: {error}") from error
    for field in BASE_SCHEMA:
        if field.name not in table.column_names or table.schema.field(field.name).type != field.type:
            raise StoreError(f"the column {field.name} is absent or not a {field.type}")
    return table


@functools.lru_cache(64)
def _full_schema(columns: pa.Schema) -> pa.Schema:
    clashes = sorted(set(columns.names) & {*BASE_SCHEMA.names, "attempt"})
    if clashes:
        raise StoreError(f"a stage cannot have its own columns {', '.join(clashes)}: every manifest has them")
    return pa.schema([*BASE_SCHEMA, *columns])


def _check_rows(stage: str, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    if not rows:
        raise StoreError(f"an attempt at {stage} must have at least one row")
    names = set(schema.names)
    for row in rows:
        unknown = sorted(row.keys() - names)
        if unknown:
            raise StoreError(
                f"a {stage} row has the columns {', '.join(unknown)}, which its stage does not declare"
            )
        if row.get("status") not in STATUSES or not row.get("key"):
            raise StoreError(
                f"a {stage} row has key {row.get('key')!r} and status {row.get('status')!r}: "
                f"it needs a key and one of {', '.join(STATUSES)}"
            )
