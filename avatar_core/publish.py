"""The dataset folder: videos by name, `metadata.parquet` with a row per clip, `failures.csv`."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from avatar_core.clips import STAGES, Clip, Clips
from avatar_core.errors import StoreError
from avatar_core.plan import Results, first_failure
from avatar_core.progress import Observer
from avatar_core.store.storage import Storage

SCHEMA = pa.schema(
    {
        "file_name": pa.string(),
        "name": pa.string(),
        "row": pa.int64(),
        "take": pa.int64(),
        "part": pa.int64(),
        "status": pa.string(),
        "failed_stage": pa.string(),
        "error_type": pa.string(),
        "error": pa.string(),
        "prompt": pa.string(),
        "negative_prompt": pa.string(),
        "seed": pa.int64(),
        "backend": pa.string(),
        "renderer": pa.string(),
        "width": pa.int64(),
        "height": pa.int64(),
        "fps": pa.float64(),
        "num_frames": pa.int64(),
        "duration_s": pa.float64(),
        "bytes": pa.int64(),
        "sha256": pa.string(),
        "run_id": pa.string(),
        **{f"{stage}_key": pa.string() for stage in STAGES},
    }
)
"""Our columns; those of the input follow, under `input_<name>` where the name is taken."""

_VIDEO_COLUMNS = ("renderer", "width", "height", "fps", "num_frames", "duration_s", "bytes", "sha256")
_TABLE = b"avatar_table"


@dataclass(frozen=True)
class Published:
    uri: str
    metadata: pd.DataFrame
    failures: pd.DataFrame


def publish(
    storage: Storage,
    name: str,
    clips: Clips,
    results: Mapping[str, Results],
    *,
    backend: str,
    complete: bool,
    table: str | None,
    run_id: str,
    observer: Observer,
) -> Published:
    """Bring `datasets/<name>/` up to date; `metadata.parquet` is replaced last.

    Unless `complete`, clips that an earlier run published and this one does not mention stay.
    """
    folder = f"datasets/{name}"
    old = _read(storage, f"{folder}/metadata.parquet")
    renamed = _renamed(clips)
    fresh = _table([_row(clip, results, renamed, backend, run_id) for clip in clips])
    if old is not None:
        _warn_of_other_table(old, table, name, observer)
    merged = fresh if complete or old is None else _merge(old, fresh)
    metadata = merged.replace_schema_metadata({_TABLE: (table or "").encode()})
    _copy_videos(storage, folder, clips, results, old, observer)
    failures = metadata.to_pandas(types_mapper=_pandas_type)
    failures = failures[failures["status"] != "ok"]
    _write(storage, f"{folder}/failures.csv", _csv(failures))
    if old is None or not metadata.equals(old, check_metadata=True):
        buffer = io.BytesIO()
        pq.write_table(metadata, buffer)
        storage.write_bytes(f"{folder}/metadata.parquet", buffer.getvalue())
    _delete_unlisted(storage, folder, old, metadata)
    ours = fresh.to_pandas(types_mapper=_pandas_type)
    return Published(f"{storage.uri}/{folder}", ours, ours[ours["status"] != "ok"])


def _row(
    clip: Clip, results: Mapping[str, Results], renamed: Mapping[str, str], backend: str, run_id: str
) -> dict[str, Any]:
    failure = first_failure(clip, results)
    video = results["decode"].ok(clip.items["decode"].key) if clip.items else None
    ours: dict[str, Any] = {
        "file_name": f"videos/{clip.name}.mp4" if video else None,
        "name": clip.name,
        "row": clip.row.index,
        "take": clip.take,
        "part": clip.part,
        "status": "ok" if video else "failed",
        "failed_stage": failure.stage if failure else None,
        "error_type": failure.error_type if failure else None,
        "error": failure.error if failure else None,
        "prompt": clip.row.prompt,
        "negative_prompt": clip.row.negative_prompt,
        "seed": clip.seed,
        "backend": backend,
        "run_id": run_id,
        **{name: video[name] if video else None for name in _VIDEO_COLUMNS},
        **{f"{stage}_key": spec.key for stage, spec in clip.items.items()},
    }
    return ours | {renamed[name]: value for name, value in clip.row.source.items()}


def _renamed(clips: Clips) -> dict[str, str]:
    """What each column of the input is called in the dataset."""
    names = dict.fromkeys(name for row in clips.rows for name in row.source)
    taken = {*SCHEMA.names, *names}
    renamed = {}
    for name in names:
        new = name
        while new in SCHEMA.names or (new != name and new in taken):
            new = f"input_{new}"
        renamed[name] = new
    return renamed


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The rows under our schema; columns of the input keep their type, or become text where values differ."""
    columns: dict[str, pa.Array] = {
        field.name: pa.array([row.get(field.name) for row in rows], field.type) for field in SCHEMA
    }
    for name in dict.fromkeys(name for row in rows for name in row if name not in SCHEMA.names):
        columns[name] = _input_column([row.get(name) for row in rows])
    return pa.table(columns)


def _input_column(values: Sequence[Any]) -> pa.Array:
    plain = [value.item() if isinstance(value, np.generic) else value for value in values]
    if not any(isinstance(value, list | dict | tuple) for value in plain):
        try:
            column = pa.array(plain)
            return column.cast(pa.string()) if pa.types.is_null(column.type) else column
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            pass
    texts = [v if v is None or isinstance(v, str) else json.dumps(v, default=str) for v in plain]
    return pa.array(texts, pa.string())


def _merge(old: pa.Table, fresh: pa.Table) -> pa.Table:
    """Old rows that the new ones do not replace, and the new ones, in the order of the table."""
    names = set(fresh["name"].to_pylist())
    kept = [row for row in old.to_pylist() if row["name"] not in names]
    rows = sorted(kept + fresh.to_pylist(), key=lambda row: (row["row"], row["take"], row["part"]))
    return _table(rows)


def _copy_videos(
    storage: Storage,
    folder: str,
    clips: Sequence[Clip],
    results: Mapping[str, Results],
    old: pa.Table | None,
    observer: Observer,
) -> None:
    there = storage.list(f"{folder}/videos")
    known = dict(zip(old["file_name"].to_pylist(), old["sha256"].to_pylist(), strict=True)) if old else {}
    for clip in clips:
        video = results["decode"].ok(clip.items["decode"].key) if clip.items else None
        if video is None:
            continue
        name = f"videos/{clip.name}.mp4"
        path = f"{folder}/{name}"
        copied = path in there and there[path].size == video["bytes"] and known.get(name) == video["sha256"]
        if not copied:
            _copy(storage, video, path)
        observer.clip_published(clip.name, f"{storage.uri}/{path}")


def _copy(storage: Storage, video: Mapping[str, Any], path: str) -> None:
    try:
        storage.copy_out(video["data"], path, video["sha256"])
    except StoreError as error:
        raise StoreError(str(error), keys=[f"decode:{video['key']}"]) from error


def _delete_unlisted(storage: Storage, folder: str, old: pa.Table | None, metadata: pa.Table) -> None:
    """Videos that an earlier run published under a name that no row has any more."""
    if old is not None:
        gone = set(old["file_name"].to_pylist()) - set(metadata["file_name"].to_pylist()) - {None}
        there = storage.list(f"{folder}/videos")
        storage.delete([path for name in sorted(gone) if (path := f"{folder}/{name}") in there])


def _warn_of_other_table(old: pa.Table, table: str | None, name: str, observer: Observer) -> None:
    before = (old.schema.metadata or {}).get(_TABLE, b"").decode()
    if before and table and before != table:
        observer.warning(
            f"dataset `{name}` was made from {before} and now becomes that of {table}; "
            "give `name=...` to keep both"
        )


def _read(storage: Storage, path: str) -> pa.Table | None:
    if not storage.exists(path):
        return None
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(path)))
    except (pa.ArrowException, OSError) as error:
        raise StoreError(
            f"{path} in {storage.uri} cannot be read ({error}); delete it and run again"
        ) from error
    absent = [column for column in SCHEMA.names if column not in table.column_names]
    return None if absent else table


def _write(storage: Storage, path: str, data: bytes) -> None:
    if not storage.exists(path) or storage.read_bytes(path) != data:
        storage.write_bytes(path, data)


def _csv(failures: pd.DataFrame) -> bytes:
    columns = ["row", "name", "take", "part", "failed_stage", "error_type", "error"]
    inputs = [c for c in failures.columns if c not in SCHEMA.names]
    return failures[columns + inputs].to_csv(index=False).encode()


def _pandas_type(kind: pa.DataType) -> Any:
    """Integers stay integers beside missing values."""
    return pd.Int64Dtype() if pa.types.is_int64(kind) else None
