"""Reads a stage's attempts from single manifests and from catalog files, which hold many of them.

A catalog file covers the manifests whose rows it holds and the older catalog files that it names.
Whatever cannot be read counts as absent, with a warning: its work is done again.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avatar_core.errors import StoreError
from avatar_core.store.keys import new_id
from avatar_core.store.manifest import (
    ATTEMPT_NAME,
    BASE_SCHEMA,
    manifest_folder,
    parquet_bytes,
    read_parquet,
)
from avatar_core.store.storage import Storage

logger = logging.getLogger(__name__)

_READERS = 16
_LISTINGS = 10  # gc may delete a listed file before it is read; what it held is in a newer one
_SUPERSEDES = b"avatar.supersedes"
_PIECES = 8
_COMPACTED = 64  # manifests that are put into one catalog file
_GROWTH = 4  # a compaction takes in older catalog files up to so many times its own rows


@dataclass(frozen=True)
class CatalogFile:
    table: pa.Table
    supersedes: frozenset[str]


@dataclass(frozen=True)
class Attempts:
    """`catalogs` and `manifests`, oldest first, hold every row; two catalog files may share some.

    `superseded` catalog files and `covered` manifests exist but add nothing to them.
    """

    catalogs: Mapping[str, CatalogFile]
    manifests: Mapping[str, pa.Table]
    superseded: frozenset[str]
    covered: frozenset[str]

    def table(self) -> pa.Table:
        tables = _distinct([file.table for file in self.catalogs.values()])
        tables += [_with_attempt(table, attempt) for attempt, table in self.manifests.items()]
        table = _united(tables)
        # One large catalog file is not copied; many small manifests would make every look at a row slow.
        return table if table["attempt"].num_chunks <= _PIECES else table.combine_chunks()


def catalog_folder(stage: str) -> str:
    return f"catalog/{stage}"


def read_attempts(storage: Storage, stage: str) -> Attempts:
    for _ in range(_LISTINGS):
        try:
            return _read_listed(storage, stage)
        except _VanishedError:
            continue
    raise StoreError(
        f"the attempts at {stage} in {storage.uri} are deleted while they are read; try again later"
    )


def compact(storage: Storage, stage: str, min_manifests: int = 64) -> list[str]:
    """Once so many manifests are uncovered, writes them into catalog files; deletes nothing.

    Older catalog files are taken in by size, so that few are left to read and each row is copied
    only a few times as a store grows. A file covers a part of many manifests, so that they are not in memory
    all at once.
    """
    try:
        listed = _list(storage, stage)
        names = list(listed.open_paths)
        if len(names) < max(min_manifests, 1):
            return []
        groups = [names[at : at + _COMPACTED] for at in range(0, len(names), _COMPACTED)]
        return [_compact_group(storage, stage, listed, group, first=group is groups[0]) for group in groups]
    except _VanishedError:
        return []  # gc deletes what another compaction has covered


def _compact_group(
    storage: Storage, stage: str, listed: "_Listed", names: Sequence[str], *, first: bool
) -> str:
    manifests = _read_manifests(storage, {name: listed.open_paths[name] for name in names})
    tables = [_with_attempt(table, attempt) for attempt, table in manifests.items()]
    rows = sum(table.num_rows for table in tables)
    taken, supersedes = [], set()
    older = sorted(listed.catalogs.items(), key=lambda item: item[1].table.num_rows) if first else []
    for name, file in older:
        if file.table.num_rows > _GROWTH * rows:
            break
        # whole, also where a file not taken shares its rows: another compaction may supersede that one
        taken.append(file.table)
        rows += file.table.num_rows
        supersedes |= {name, *file.supersedes}
    known = json.dumps(sorted(supersedes & {*listed.catalogs, *listed.superseded}))
    table = _united([*_distinct(taken), *tables]).replace_schema_metadata({_SUPERSEDES: known.encode()})
    catalog = new_id()
    storage.write_bytes(f"{catalog_folder(stage)}/{catalog}.parquet", parquet_bytes(table))
    del manifests, tables, taken, table
    pa.default_memory_pool().release_unused()  # else the process keeps the heap of the largest stage
    return catalog


@dataclass(frozen=True)
class _Listed:
    catalogs: Mapping[str, CatalogFile]
    superseded: frozenset[str]
    covered: frozenset[str]
    open_paths: Mapping[str, str]  # of manifests in no catalog file, oldest first


class _VanishedError(Exception):
    pass


def _read_listed(storage: Storage, stage: str) -> Attempts:
    listed = _list(storage, stage)
    manifests = _read_manifests(storage, listed.open_paths)
    return Attempts(listed.catalogs, manifests, listed.superseded, listed.covered)


def _list(storage: Storage, stage: str) -> _Listed:
    # Manifests are listed first: one that is gone by then is in a catalog file that is listed after it.
    found = _attempt_paths(storage, manifest_folder(stage))
    catalogs, superseded = _read_catalogs(storage, _settled_paths(storage, catalog_folder(stage)))
    held = {attempt for file in catalogs.values() for attempt in file.table["attempt"].unique().to_pylist()}
    open_paths = {attempt: path for attempt, path in found.items() if attempt not in held}
    return _Listed(catalogs, superseded, frozenset(found.keys() & held), open_paths)


def _read_manifests(storage: Storage, paths: Mapping[str, str]) -> dict[str, pa.Table]:
    """Those that can be read."""
    manifests = {}
    # Threads hide the way to a remote store; on a disk they only spread memory over as many heaps.
    with ThreadPoolExecutor(1 if storage.is_local else _READERS) as pool:
        contents = pool.map(lambda path: _read(storage, path), paths.values())
        for (attempt, path), data in zip(paths.items(), contents, strict=True):
            if (table := _parsed(storage, path, data)) is not None:
                manifests[attempt] = table
    return manifests


def _read_catalogs(
    storage: Storage, paths: Mapping[str, str]
) -> tuple[dict[str, CatalogFile], frozenset[str]]:
    """The files that no other one supersedes, oldest first."""
    files: dict[str, CatalogFile] = {}
    superseded: set[str] = set()
    for name in sorted(paths, reverse=True):
        if name in superseded:
            continue
        table = _parsed(storage, paths[name], _read(storage, paths[name]))
        if table is not None and "attempt" in table.column_names:
            named = json.loads((table.schema.metadata or {}).get(_SUPERSEDES, b"[]"))
            files[name] = CatalogFile(table, frozenset(named))
            superseded.update(named)
    catalogs = {name: files[name] for name in sorted(files.keys() - superseded)}
    return catalogs, frozenset(superseded & paths.keys())


def _distinct(tables: Iterable[pa.Table]) -> list[pa.Table]:
    """Each attempt in the first of the tables that has it; whichever it is has all its rows."""
    held = pa.array([], pa.string())
    distinct = []
    for table in tables:
        doubled = pc.is_in(table["attempt"], value_set=held)
        rest = table.filter(pc.invert(doubled)) if pc.any(doubled).as_py() else table
        held = pa.concat_arrays([held, pc.unique(rest["attempt"])])
        distinct.append(rest)
    return distinct


def _attempt_paths(storage: Storage, folder: str) -> dict[str, str]:
    """Oldest first."""
    paths = [path for path in sorted(storage.list(folder)) if ATTEMPT_NAME.fullmatch(path.rpartition("/")[2])]
    return {path.rpartition("/")[2].removesuffix(".parquet"): path for path in paths}


def _settled_paths(storage: Storage, folder: str) -> dict[str, str]:
    """A listing may miss both a file that goes and its successor that comes: two in a row do not."""
    paths = _attempt_paths(storage, folder)
    if _attempt_paths(storage, folder) != paths:
        raise _VanishedError
    return paths


def _read(storage: Storage, path: str) -> bytes:
    try:
        return storage.read_bytes(path)
    except StoreError:
        if storage.exists(path):
            raise
        raise _VanishedError from None


def _parsed(storage: Storage, path: str, data: bytes) -> pa.Table | None:
    try:
        return read_parquet(data)
    except StoreError as error:
        logger.warning("%s in %s is ignored: %s", path, storage.uri, " ".join(str(error).split()))
        return None


def _with_attempt(table: pa.Table, attempt: str) -> pa.Table:
    return table.append_column("attempt", pa.repeat(attempt, table.num_rows))


def _united(tables: Iterable[pa.Table]) -> pa.Table:
    """Rows by attempt, oldest first, with the columns of all."""
    empty = BASE_SCHEMA.append(pa.field("attempt", pa.string())).empty_table()
    plain = [empty, *(table.replace_schema_metadata(None) for table in tables)]
    try:
        table = pa.concat_tables(plain, promote_options="permissive")
    except pa.ArrowException:
        table = pa.concat_tables(_without_clashes(plain), promote_options="permissive")
    order = pc.sort_indices(table, [("attempt", "ascending")])
    return table if np.array_equal(order, np.arange(len(order))) else table.take(order)


def _without_clashes(tables: list[pa.Table]) -> list[pa.Table]:
    """Where a stage changed the type of a column, the newest type stays and other values count as absent."""
    newest = {field.name: field for table in tables for field in table.schema}
    settled = []
    for table in tables:
        clashing = [field.name for field in table.schema if not _unite(field, newest[field.name])]
        if clashing:
            logger.warning("older values of %s have another type and are ignored", ", ".join(clashing))
        settled.append(table.drop_columns(clashing))
    return settled


def _unite(field: pa.Field, newest: pa.Field) -> bool:
    try:
        pa.unify_schemas([pa.schema([field]), pa.schema([newest])], promote_options="permissive")
    except pa.ArrowException:
        return False
    return True
