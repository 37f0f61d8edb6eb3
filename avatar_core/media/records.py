"""The bytes of a table as plain records: CSV, Parquet, JSON Lines, JSON."""

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from avatar_core.errors import InputError
from avatar_core.media.cells import from_arrow, plain
from avatar_core.media.columns import column_names
from avatar_core.media.csv_rows import parse_csv
from avatar_core.media.documents import columns_of, is_document, other_columns
from avatar_core.media.table_bytes import FORMATS, decode


@dataclass(frozen=True)
class Record:
    """One row: `values` by column, the `source` they came from, or why it could not be read."""

    values: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


def parse_records(content: bytes, max_bytes: int, known: frozenset[str]) -> Iterator[Record]:
    """The format is told by the content; rows may be MultiTalk's documents. `known` are the columns that mean
    something. Raises `InputError` where the whole is no table, which may show only after the first rows."""
    return map(_with_our_columns, _parse(content, max_bytes, known))


def record_of(row: Mapping[str, Any], known: frozenset[str]) -> Record:
    """A row that is given as such."""
    pairs = row.pairs if isinstance(row, _Doubled) else row.items()
    try:
        names = column_names(tuple(name for name, _ in pairs), known)
    except InputError as error:
        values = {name: plain(value) for name, value in row.items()}
        return Record(values, values, f"the row {error}")
    values = {name: plain(value) for name, (_, value) in zip(names, pairs, strict=True)}
    return _with_our_columns(Record(values, values))


class _Doubled(dict[str, Any]):
    """A JSON object that has a key more than once: all its `pairs`."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Doubled(pairs)


def _with_our_columns(record: Record) -> Record:
    if record.error or not is_document(record.values):
        return record
    try:
        return Record(columns_of(record.values), record.source)
    except InputError as error:
        return Record(other_columns(record.values), record.source, f"MultiTalk document: {error}")


def _parse(content: bytes, max_bytes: int, known: frozenset[str]) -> Iterator[Record]:
    if not content.strip():
        raise InputError(f"is empty; {FORMATS}")
    if content.startswith(b"PAR1"):
        return _parse_parquet(content, max_bytes, known)
    text = decode(content)
    if text.lstrip()[0] in "{[":
        return _parse_json(text, known)
    return (Record(values, values, error) for values, error in parse_csv(text, known))


def _parse_parquet(content: bytes, max_bytes: int, known: frozenset[str]) -> Iterator[Record]:
    try:
        file = pq.ParquetFile(io.BytesIO(content))
        names = column_names(tuple(file.schema_arrow.names), known)
        unpacked = 0
        for batch in file.iter_batches(batch_size=8192):
            unpacked += batch.nbytes
            if unpacked > 4 * max_bytes:
                raise InputError(f"unpacks to more than {4 * max_bytes} bytes; split the table")
            for cells in zip(*map(from_arrow, batch.columns), strict=True):
                row = dict(zip(names, cells, strict=True))
                yield Record(row, row)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"is a broken Parquet file ({reason}); write it again") from error


def _parse_json(text: str, known: frozenset[str]) -> Iterator[Record]:
    """A document, a list of objects, or an object a line."""
    try:
        document = json.loads(text, object_pairs_hook=_json_object)
    except RecursionError as error:
        raise InputError("is JSON nested too deeply for a table") from error
    except ValueError as error:
        return _parse_json_lines(text, error, known)
    rows = document if isinstance(document, list) else [document]
    if not any(isinstance(row, dict) for row in rows):
        raise InputError("holds no rows; give JSON objects with image and audio")
    return (_json_record(row, "", known) for row in rows)


def _parse_json_lines(text: str, whole_error: ValueError, known: frozenset[str]) -> Iterator[Record]:
    lines = enumerate(io.StringIO(text, newline=None), start=1)
    records = [_json_line(line, f"line {number}: ", known) for number, line in lines if line.strip()]
    # A list is no JSON Lines, though some of its objects may fill a line each.
    if text.lstrip()[0] == "[" or all(record.error for record in records):
        reason = _reason(whole_error)
        raise InputError(
            f"is neither JSON nor JSON Lines ({reason}); give a list of objects, or an object a line"
        ) from whole_error
    return iter(records)


def _json_line(line: str, where: str, known: frozenset[str]) -> Record:
    try:
        row = json.loads(line.rstrip("\n"), object_pairs_hook=_json_object)
        return _json_record(row, where, known)
    except (ValueError, RecursionError) as error:
        return Record(error=f"{where}the line is not JSON ({_reason(error)}); mend it")


def _reason(error: Exception) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    before, after = error.doc[: error.pos].rstrip(), error.doc[error.pos :]
    is_surplus = (before.endswith(",") and after[:1] in ("]", "}")) or "trailing comma" in error.msg
    what = "a comma too many" if is_surplus else error.msg
    line = f"line {error.lineno}, " if "\n" in error.doc else ""
    return f"{what}: {line}column {error.colno}"


def _json_record(row: Any, where: str, known: frozenset[str]) -> Record:
    if isinstance(row, dict):
        return record_of(row, known)
    kind = type(row).__name__
    return Record(error=f"{where}the row is a {kind}; give a JSON object with image and audio")
