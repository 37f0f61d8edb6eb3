"""Which table, or rows given as such, a dataset comes from, so that none takes another's place unasked."""

import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from avatar_core.config import Config
from avatar_core.errors import ConfigError, StoreError
from avatar_core.media.cells import as_text, from_arrow
from avatar_core.media.source import STORES, local_path, scheme_of
from avatar_core.media.table import PATHS, is_absent
from avatar_core.planning.batch import Batch
from avatar_core.planning.clips import Clips

_TABLE, _ROWS = b"avatar_table", b"avatar_rows"
"""In the schema's metadata of a dataset: the table's path or URI, else what to call its rows."""

_MADE_FROM = (*PATHS, "tts_text", "voice", "voice_2", "cond_image", "cond_audio", "tts_audio")
"""Columns that tell rows apart which are given as such."""


@dataclass(frozen=True)
class Replacement:
    """A dataset becomes that of another origin. That is `allowed` where the table before, or each file of the
    rows before, is gone, or where nothing is lost."""

    message: str
    allowed: bool


def origin_of(config: Config) -> dict[bytes, bytes]:
    """What a dataset's schema says of where its clips come from. `config` is that of a `Batch`."""
    if config.table:
        return {_TABLE: os.fsencode(config.table)}
    return {_TABLE: b"", _ROWS: _called(config).encode()}


def check_origin(batch: Batch) -> str | None:
    """A warning where the dataset becomes that of another table, `ConfigError` where that must not be."""
    found = replacement(batch)
    if found and not found.allowed:
        raise ConfigError(found.message)
    return found.message if found else None


def is_undecided(batch: Batch) -> bool:
    """Whether only the clips tell if those of another table would be lost, and they are not all known yet."""
    if batch.is_complete:
        return False
    found = replacement(batch)
    return found is not None and not found.allowed


def replacement(batch: Batch) -> Replacement | None:
    """None where the dataset is absent or comes from the same table or rows.

    Rows that are given as such have no place: they are the same, edited, where one of them is still there.
    """
    folder = f"datasets/{batch.name}"
    path = f"{folder}/metadata.parquet"
    if not batch.storage.exists(path):
        return None
    try:
        file = pq.ParquetFile(io.BytesIO(batch.storage.read_bytes(path)))
        return _replacement(file, batch, f"{batch.storage.uri}/{folder}")
    except (pa.ArrowException, OSError) as error:
        raise StoreError(
            f"{path} in {batch.storage.uri} cannot be read ({error}); delete it and run again"
        ) from error


def _replacement(file: pq.ParquetFile, batch: Batch, dataset: str) -> Replacement | None:
    config, names = batch.config, file.schema_arrow.names
    if not {"name", "decode_key"} <= {*names}:
        return None  # of another layout
    told = file.schema_arrow.metadata or {}
    before = os.fsdecode(told.get(_TABLE, b""))
    if before and config.table:
        is_same = _is_same_table(before, config.table)
    else:
        is_same = not before and not config.table and _shares_a_row(file, config.rows)
    if is_same:
        return None
    old = _shown(before) or told.get(_ROWS, b"a list of rows").decode()
    new = _shown(config.table or "") or _called(config)
    options = config.storage.options
    is_gone = not _is_there(before, options) if before else _are_gone(_paths(file), options)
    if is_gone or _keeps_all(file.read(["name", "decode_key"]), batch.clips):
        message = (
            f"dataset `{batch.name}` was made from {old} and now becomes that of {new}; "
            "give `name=...` to keep both"
        )
        return Replacement(message, allowed=True)
    message = (
        f"dataset `{batch.name}` holds the clips of {old}, which would go if those of {new} took their "
        f"place; give `name=...` to keep both, or delete {dataset} first"
    )
    return Replacement(message, allowed=False)


def _shown(table: str) -> str:
    """Without the credentials that a URI may hold."""
    return re.sub(r"(?<=://)[^/@]*@|\?.*", "", table) if "://" in table else table


def _called(config: Config) -> str:
    if len(config.rows) > 1:
        return f"a list of {len(config.rows)} rows"
    texts = (" ".join(text.split()) for _, text in _identity(config.rows[0]))
    return " with ".join(text if len(text) <= 200 else f"{text[:200]}..." for text in texts) or "a row"


def _is_same_table(one: str, other: str) -> bool:
    if one == other:
        return True
    if any(scheme_of(table) not in (None, "file") for table in (one, other)):
        return _canonical(one) == _canonical(other)
    paths = Path(local_path(one)), Path(local_path(other))
    try:  # by another way, not as another link to it: relative paths in it must mean the same
        return paths[0].samefile(paths[1]) and paths[0].parent.samefile(paths[1].parent)
    except OSError:
        return False


def _canonical(table: str) -> str:
    return re.sub("^s3a:", "s3:", table)


def _is_there(table: str, options: Mapping[str, Any]) -> bool:
    """Also where nobody can tell, such as of a server that does not answer."""
    try:
        if scheme_of(table) in (None, "file"):
            Path(local_path(table)).stat()
        elif scheme_of(_canonical(table)) in STORES:
            storage, path = fsspec.core.url_to_fs(table, **options)
            return bool(storage.exists(path))
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except Exception:  # every fsspec file system has its own exception types
        return True


def _are_gone(places: Iterable[str], options: Mapping[str, Any]) -> bool:
    """Of rows that were moved none of the files is where it was."""
    places = set(places)
    return bool(places) and not any(_is_there(place, options) for place in places)


def _paths(file: pq.ParquetFile) -> Iterator[str]:
    for name in file.schema_arrow.names:
        if name.lower() in PATHS:
            yield from (as_text(cell) for cell in _cells(file.read([name])[name]) if not is_absent(cell))


def _shares_a_row(file: pq.ParquetFile, rows: Iterable[Mapping[str, Any]]) -> bool:
    names = [name for name in file.schema_arrow.names if name.lower() in _MADE_FROM]
    columns = [_cells(file.read([name])[name]) for name in names]
    before = {_identity(dict(zip(names, cells, strict=True))) for cells in zip(*columns, strict=True)}
    return any(_identity(row) in before for row in rows)


def _cells(column: pa.ChunkedArray) -> list[Any]:
    return [cell for chunk in column.chunks for cell in from_arrow(chunk)]


def _identity(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What a row is made from, in the order of `_MADE_FROM`."""
    cells = {name.lower(): cell for name, cell in row.items()}
    return tuple((name, as_text(cells[name])) for name in _MADE_FROM if not is_absent(cells.get(name)))


def _keeps_all(old: pa.Table, clips: Clips) -> bool:
    """Whether each clip of the dataset is still made, under its name."""
    names = pa.array([clips.name(index) for index in range(len(clips))], pa.string())
    places = pc.index_in(old["name"], value_set=names)
    if places.null_count:
        return False
    keys = pa.array(clips.hex_keys("decode"), pa.string()).take(places.combine_chunks())
    return bool(keys.equals(old["decode_key"].combine_chunks()))
