"""The dataset folder: videos by name, `metadata.parquet` with a row per clip, `failures.csv`."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from avatar_core.clips import STAGES, Clips
from avatar_core.errors import StoreError
from avatar_core.plan import Results, first_failure
from avatar_core.progress import Observer
from avatar_core.store.disk import FileInfo
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
_SAME = ["name", "sha256", "error", "run_id"]
_KEPT = ["file_name", *_SAME]


@dataclass(frozen=True)
class Published:
    """`metadata` has the rows of this run, in Arrow: a data frame of a large table is made only on demand."""

    uri: str
    metadata: pa.Table


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
    old = _read(storage, f"{folder}/metadata.parquet", _KEPT if complete else None)
    videos = _Videos(clips, results["decode"])
    fresh = _keep_run_ids(_metadata(clips, results, videos, backend, run_id), old)
    if old is not None:
        _warn_of_other_table(old, table, name, observer)
    merged = fresh if complete or old is None else _merge(old, fresh)
    metadata = merged.replace_schema_metadata({_TABLE: (table or "").encode()})
    there = storage.list(f"{folder}/videos")
    _copy_videos(storage, folder, fresh, videos, old, there, observer)
    failures = to_frame(metadata.filter(pc.equal(metadata["status"], "failed")))
    _write(storage, f"{folder}/failures.csv", _csv(failures))
    buffer = io.BytesIO()
    pq.write_table(metadata, buffer)
    _write(storage, f"{folder}/metadata.parquet", buffer.getvalue())
    _delete_unlisted(storage, folder, old, metadata, there)
    return Published(f"{storage.uri}/{folder}", fresh)


class _Videos:
    """Manifest columns of the finished clips; `clips` are their indices, in the order of the columns."""

    def __init__(self, clips: Clips, results: Results) -> None:
        keys = clips.hex_keys("decode")
        self.clips = [index for index, key in enumerate(keys) if key is not None and results.has(key)]
        self.keys = [key for index in self.clips if (key := keys[index])]
        self.columns = results.columns(self.keys, (*_VIDEO_COLUMNS, "data"))

    def spread(self, values: Sequence[Any], length: int) -> list[Any]:
        """A value for each clip, None where there is no video."""
        column: list[Any] = [None] * length
        for index, value in zip(self.clips, values, strict=True):
            column[index] = value
        return column


def _metadata(
    clips: Clips, results: Mapping[str, Results], videos: _Videos, backend: str, run_id: str
) -> pa.Table:
    """A row per clip under our schema, followed by the columns of the input."""
    length = len(clips)
    rows = [clips.rows[position] for position in clips.position]
    names = [clips.name(index) for index in range(length)]
    finished = videos.spread([True] * len(videos.clips), length)
    failures = [None if finished[i] else first_failure(clips[i], results) for i in range(length)]
    columns: dict[str, Any] = {
        "file_name": [f"videos/{name}.mp4" if ok else None for name, ok in zip(names, finished, strict=True)],
        "name": names,
        "row": [row.index for row in rows],
        "take": clips.take,
        "part": clips.part,
        "status": [
            "ok" if ok else "failed" if failure else "to do"
            for ok, failure in zip(finished, failures, strict=True)
        ],
        "failed_stage": [failure and failure.stage for failure in failures],
        "error_type": [failure and failure.error_type for failure in failures],
        "error": [failure and failure.error for failure in failures],
        "prompt": [row.prompt for row in rows],
        "negative_prompt": [row.negative_prompt for row in rows],
        "seed": [None if i in clips.rejected else clips.seed[i] for i in range(length)],
        "backend": [backend] * length,
        "run_id": [run_id] * length,
        **{name: videos.spread(videos.columns[name], length) for name in _VIDEO_COLUMNS},
        **{f"{stage}_key": clips.hex_keys(stage) for stage in STAGES},
    }
    ours = {field.name: pa.array(columns[field.name], field.type) for field in SCHEMA}
    theirs = {
        new: _input_column([row.source.get(name) for row in rows]) for name, new in _renamed(clips).items()
    }
    return pa.table(ours | theirs)


def _renamed(clips: Clips) -> dict[str, str]:
    """What each column of the input is called in the dataset."""
    names = dict.fromkeys(name for row in clips.rows for name in row.source)
    renamed = {}
    for name in names:
        new = name
        while new in SCHEMA.names or (new != name and new in names):
            new = f"input_{new}"
        renamed[name] = new
    return renamed


def _keep_run_ids(fresh: pa.Table, old: pa.Table | None) -> pa.Table:
    """A clip that is as an earlier run left it keeps that run's id, so that nothing changes needlessly."""
    if old is None:
        return fresh
    before = {tuple(same): run_id for *same, run_id in _rows(old, _SAME)}
    run_ids = [before.get(tuple(same), run_id) for *same, run_id in _rows(fresh, _SAME)]
    index = fresh.column_names.index("run_id")
    return fresh.set_column(index, "run_id", pa.array(run_ids, pa.string()))


def _rows(table: pa.Table, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    return zip(*(table[name].to_pylist() for name in names), strict=True)


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
    columns = {field.name: pa.array([row[field.name] for row in rows], field.type) for field in SCHEMA}
    for name in dict.fromkeys([*old.column_names, *fresh.column_names]):
        if name not in columns:
            columns[name] = _input_column([row.get(name) for row in rows])
    return pa.table(columns)


def _copy_videos(
    storage: Storage,
    folder: str,
    fresh: pa.Table,
    videos: _Videos,
    old: pa.Table | None,
    there: Mapping[str, FileInfo],
    observer: Observer,
) -> None:
    known = dict(_rows(old, ["file_name", "sha256"])) if old is not None else {}
    names = fresh["file_name"].to_pylist()
    columns = (videos.columns[name] for name in ("data", "sha256", "bytes"))
    for index, key, data, sha256, size in zip(videos.clips, videos.keys, *columns, strict=True):
        path = f"{folder}/{names[index]}"
        if path not in there or there[path].size != size or known.get(names[index]) != sha256:
            _copy(storage, data, sha256, path, key)
        observer.clip_published(names[index], f"{storage.uri}/{path}")


def _copy(storage: Storage, data: str, sha256: str, path: str, key: str) -> None:
    try:
        storage.copy_out(data, path, sha256)
    except StoreError as error:
        if _is_sound(storage, data, sha256):
            raise  # the fault is where it goes, for example a full disk
        raise StoreError(str(error), keys=[f"decode:{key}"]) from error


def _is_sound(storage: Storage, path: str, sha256: str) -> bool:
    try:
        storage.local_path(path, sha256)
    except StoreError:
        return False
    return True


def _delete_unlisted(
    storage: Storage,
    folder: str,
    old: pa.Table | None,
    metadata: pa.Table,
    there: Mapping[str, FileInfo],
) -> None:
    """Videos that an earlier run published under a name that no row has any more."""
    if old is not None:
        gone = set(old["file_name"].to_pylist()) - set(metadata["file_name"].to_pylist()) - {None}
        storage.delete([path for name in sorted(gone) if (path := f"{folder}/{name}") in there])


def to_frame(table: pa.Table) -> pd.DataFrame:
    frame: pd.DataFrame = table.to_pandas(types_mapper=_pandas_type)
    return frame


def _warn_of_other_table(old: pa.Table, table: str | None, name: str, observer: Observer) -> None:
    before = (old.schema.metadata or {}).get(_TABLE, b"").decode()
    if before and table and before != table:
        observer.warning(
            f"dataset `{name}` was made from {before} and now becomes that of {table}; "
            "give `name=...` to keep both"
        )


def _read(storage: Storage, path: str, columns: list[str] | None) -> pa.Table | None:
    """The dataset's table as it is; None if there is none, or one of another layout."""
    if not storage.exists(path):
        return None
    try:
        file = pq.ParquetFile(io.BytesIO(storage.read_bytes(path)))
        if not {*SCHEMA.names} <= {*file.schema_arrow.names}:
            return None
        table: pa.Table = file.read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(
            f"{path} in {storage.uri} cannot be read ({error}); delete it and run again"
        ) from error
    return table


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
