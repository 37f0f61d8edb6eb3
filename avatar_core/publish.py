"""The dataset folder: videos by name, `metadata.parquet` with a row per clip, `failures.csv`."""

import io
import math
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from avatar_core.errors import StoreError
from avatar_core.media.cells import as_column, column_type, from_arrow
from avatar_core.media.table import TableRows
from avatar_core.planning.clips import Clips
from avatar_core.planning.plan import first_failure
from avatar_core.progress import Observer
from avatar_core.store.catalog import OK
from avatar_core.store.disk import FileInfo
from avatar_core.store.results import StageResults
from avatar_core.store.storage import Storage
from avatar_core.store.tables import put_table, stretches

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
    }
)
"""Our columns, whatever the backend. The key of each of its stages follows, then the columns of the input,
under `input_<name>` where the name is taken."""

_VIDEO_COLUMNS = ("renderer", "width", "height", "fps", "num_frames", "duration_s", "bytes", "sha256")
_KEPT = ["file_name", "name", "sha256", "error", "run_id"]


@dataclass(frozen=True)
class Published:
    """`metadata` has the rows of this run, in Arrow: a data frame of a large table is made only on demand."""

    uri: str
    metadata: pa.Table


def publish(
    storage: Storage,
    name: str,
    clips: Clips,
    results: Mapping[str, StageResults],
    *,
    backend: str,
    complete: bool,
    origin: Mapping[bytes, bytes],
    run_id: str,
    observer: Observer,
) -> Published:
    """Bring `datasets/<name>/` up to date; `metadata.parquet` is replaced last, with `origin` in its schema.

    Unless `complete`, clips that an earlier run published and this one does not mention stay.
    """
    folder = f"datasets/{name}"
    old = _read(storage, f"{folder}/metadata.parquet", _KEPT if complete else None)
    there = storage.list(f"{folder}/videos")
    rows = _Rows(clips, results, backend, run_id, old)

    def copied() -> Iterator[pa.Table]:
        for stretch in stretches(len(clips)):
            piece = rows.piece(*stretch)
            _copy_videos(storage, folder, piece, there, observer)
            yield piece.metadata

    with tempfile.TemporaryDirectory(prefix="avatar-publish-") as scratch:
        spool = Path(scratch) / "clips.arrow"
        fresh = _spooled(spool, rows.schema, copied())
        merged = None if complete or old is None else _merge(old, fresh)
        metadata = fresh if merged is None else merged
        failures = to_frame(metadata.filter(pc.equal(metadata["status"], "failed")))
        _write(storage, f"{folder}/failures.csv", _csv(failures, rows.ours.names))
        schema = metadata.schema.with_metadata(dict(origin))
        pieces = _pieces(spool) if merged is None else iter([merged])
        put_table(storage, f"{folder}/metadata.parquet", schema, pieces)
    _delete_unlisted(storage, folder, old, metadata, there)
    return Published(f"{storage.uri}/{folder}", fresh)


@dataclass(frozen=True)
class _Piece:
    """`metadata` of a stretch of the clips; `videos` has columns of those that are finished, `known` their
    SHA-256 in the dataset as it is."""

    metadata: pa.Table
    videos: Mapping[str, Sequence[Any]]
    known: Sequence[str | None]


class _Rows:
    """The rows of this run, made piece by piece: all at once would take most of the memory of a large run."""

    def __init__(
        self,
        clips: Clips,
        results: Mapping[str, StageResults],
        backend: str,
        run_id: str,
        old: pa.Table | None,
    ) -> None:
        self._clips = clips
        self._results = results
        self._backend = backend
        self._run_id = run_id
        kept = pa.schema([SCHEMA.field(name) for name in _KEPT])
        self._old = kept.empty_table() if old is None else old.select(_KEPT).combine_chunks()
        keys = pa.schema({f"{stage}_key": pa.string() for stage in clips.stages})
        self.ours = pa.schema([*SCHEMA, *keys])
        self._inputs = _input_fields(clips.rows, self.ours.names)
        self.schema = pa.schema([*self.ours, *self._inputs.values()])
        decode = clips.stages["decode"]
        self._finished = np.append(results["decode"].states(decode.keys) == OK, False)[decode.of_clip]

    def piece(self, start: int, stop: int) -> _Piece:
        finished = self._finished[start:stop]
        decode = self._clips.stages["decode"]
        keys = decode.keys[decode.of_clip[start:stop][finished]]
        videos = self._results["decode"].columns(keys, ("key", *_VIDEO_COLUMNS, "data"))
        ours = self._columns(start, stop, videos)
        theirs = self._input_columns(start, stop)
        metadata = pa.table(
            [pa.array(ours[field.name], field.type) for field in self.ours] + theirs, self.schema
        )
        # of the same name in the dataset as it is, null where there is none
        before = self._old.take(pc.index_in(metadata["name"], value_set=self._old["name"]))
        known = before["sha256"].filter(pa.array(finished)).to_pylist()
        index = self.schema.get_field_index("run_id")
        return _Piece(metadata.set_column(index, "run_id", _run_ids(metadata, before)), videos, known)

    def _columns(
        self, start: int, stop: int, videos: Mapping[str, Sequence[Any]]
    ) -> dict[str, Sequence[Any]]:
        """Ours, by name."""
        clips, indices = self._clips, range(start, stop)
        finished = self._finished[start:stop]
        names = [clips.name(i) for i in indices]
        failures = [
            None if ok else first_failure(clips[i], self._results)
            for i, ok in zip(indices, finished, strict=True)
        ]
        return {
            "file_name": [
                f"videos/{name}.mp4" if ok else None for name, ok in zip(names, finished, strict=True)
            ],
            "name": names,
            "row": clips.row_column("index", start, stop),
            "take": clips.take[start:stop].tolist(),
            "part": clips.part[start:stop].tolist(),
            "status": [
                "ok" if ok else "failed" if failure else "to do"
                for ok, failure in zip(finished, failures, strict=True)
            ],
            "failed_stage": [failure and failure.stage for failure in failures],
            "error_type": [failure and failure.error_type for failure in failures],
            "error": [failure and failure.error for failure in failures],
            "prompt": clips.row_column("prompt", start, stop),
            "negative_prompt": clips.row_column("negative_prompt", start, stop),
            "seed": [None if i in clips.rejected else int(clips.seed[i]) for i in indices],
            "backend": [self._backend] * len(names),
            "run_id": [self._run_id] * len(names),
            **{name: _spread(videos[name], finished) for name in _VIDEO_COLUMNS},
            **{f"{stage}_key": clips.hex_keys(stage, start, stop) for stage in clips.stages},
        }

    def _input_columns(self, start: int, stop: int) -> list[pa.Array]:
        sources = self._clips.row_column("source", start, stop)
        return [
            as_column([source.get(name) for source in sources], field.type)
            for name, field in self._inputs.items()
        ]


def _spread(values: Sequence[Any], finished: NDArray[np.bool_]) -> list[Any]:
    """A value for each clip, None where there is no video."""
    remaining = iter(values)
    return [next(remaining) if ok else None for ok in finished]


def _input_fields(rows: TableRows, taken: Collection[str]) -> dict[str, pa.Field]:
    """By column of the input: what it is called in the dataset, beside `taken` names, and its type."""
    types: dict[str, set[pa.DataType]] = {}
    for start, stop in stretches(len(rows)):
        sources = rows.column("source", start, stop)
        for name in dict.fromkeys(name for source in sources for name in source):
            types.setdefault(name, set()).add(column_type([source.get(name) for source in sources]))
    fields = {}
    for name, found in types.items():
        if len(found - {pa.null()}) > 1:
            found = {column_type([source.get(name) for (source,) in rows.columns("source")])}
        kind = max(found, key=lambda each: not pa.types.is_null(each))
        fields[name] = pa.field(_renamed(name, types, taken), pa.string() if pa.types.is_null(kind) else kind)
    return fields


def _renamed(name: str, names: Collection[str], taken: Collection[str]) -> str:
    new = name
    while new.lower() in taken or (new != name and new in names):
        new = f"input_{new}"
    return new


def _run_ids(metadata: pa.Table, before: pa.Table) -> pa.ChunkedArray:
    """A clip that is as an earlier run left it keeps that run's id, so that nothing changes needlessly."""
    same = pc.is_valid(before["name"])
    for name in ("sha256", "error"):
        now, then = metadata[name], before[name]
        both_absent = pc.and_(pc.is_null(now), pc.is_null(then))
        same = pc.and_(same, pc.or_(pc.fill_null(pc.equal(now, then), False), both_absent))
    return pc.if_else(same, before["run_id"], metadata["run_id"])


def _spooled(path: Path, schema: pa.Schema, pieces: Iterable[pa.Table]) -> pa.Table:
    """The pieces as one table that stays on disk until it is looked at, and the file may then be gone."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for piece in pieces:
            writer.write_table(piece)
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _pieces(path: Path) -> Iterator[pa.Table]:
    with pa.OSFile(str(path)) as file:
        reader = pa.ipc.open_file(file)
        for number in range(reader.num_record_batches):
            yield pa.Table.from_batches([reader.get_batch(number)])


def _merge(old: pa.Table, fresh: pa.Table) -> pa.Table:
    """Old rows that the new ones do not replace, and the new ones, in the order of the table."""
    replaced = pc.is_in(old["name"], value_set=fresh["name"].combine_chunks())
    parts = (old.filter(pc.invert(replaced)), fresh)
    names = dict.fromkeys([*SCHEMA.names, *old.column_names, *fresh.column_names])
    merged = pa.table({name: _joined(parts, name) for name in names})
    order = pc.sort_indices(merged, [(name, "ascending") for name in ("row", "take", "part")])
    return merged.take(order)


def _joined(parts: Iterable[pa.Table], name: str) -> pa.ChunkedArray:
    columns = [
        part[name] if name in part.column_names else pa.chunked_array([pa.nulls(len(part))]) for part in parts
    ]
    if len({column.type for column in columns}) == 1:
        return pa.chunked_array([chunk for column in columns for chunk in column.chunks], columns[0].type)
    cells = [cell for column in columns for chunk in column.chunks for cell in from_arrow(chunk)]
    kind = column_type(cells)
    return pa.chunked_array([as_column(cells, pa.string() if pa.types.is_null(kind) else kind)])


def _copy_videos(
    storage: Storage, folder: str, piece: _Piece, there: Mapping[str, FileInfo], observer: Observer
) -> None:
    names = piece.metadata["file_name"].drop_null().to_pylist()
    columns = (piece.videos[name] for name in ("key", "data", "sha256", "bytes"))
    for name, known, key, data, sha256, size in zip(names, piece.known, *columns, strict=True):
        path = f"{folder}/{name}"
        if path not in there or there[path].size != size or known != sha256:
            _copy(storage, data, sha256, path, key)
        observer.clip_published(name, f"{storage.uri}/{path}")


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
        listed = pc.is_in(old["file_name"], value_set=metadata["file_name"])
        gone = old["file_name"].filter(pc.invert(listed)).drop_null().to_pylist()
        storage.delete([path for name in sorted(gone) if (path := f"{folder}/{name}") in there])


def to_frame(table: pa.Table) -> pd.DataFrame:
    frame: pd.DataFrame = table.to_pandas(types_mapper=_pandas_type)
    return frame


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
    if not storage.holds(path, data, math.inf):
        storage.write_bytes(path, data)


def _csv(failures: pd.DataFrame, ours: Collection[str]) -> bytes:
    columns = ["row", "name", "take", "part", "failed_stage", "error_type", "error"]
    inputs = [c for c in failures.columns if c not in ours]
    return failures[columns + inputs].to_csv(index=False).encode()


def _pandas_type(kind: pa.DataType) -> Any:
    """Integers stay integers beside missing values."""
    if pa.types.is_uint64(kind):
        return pd.UInt64Dtype()
    return pd.Int64Dtype() if pa.types.is_int64(kind) else None
