"""The bytes of a table as plain records: CSV, Parquet, JSON Lines, JSON."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from avatar_core.errors import InputError
from avatar_core.media.documents import columns_of, is_document, other_columns

REQUIRED = ("image", "audio")

_BINARY = {
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"PK\x03\x04": "a zip or Excel file",
    b"\x1f\x8b": "a gzip file",
    b"%PDF": "a PDF",
    b"\xd0\xcf\x11\xe0": "an old Excel file",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}
_FORMATS = "a table is CSV, JSON Lines or JSON in UTF-8, or Parquet"


@dataclass(frozen=True)
class Record:
    """One row: `values` by column, the `source` they came from, or why it could not be read."""

    values: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


def parse_records(content: bytes, max_bytes: int) -> Iterator[Record]:
    """The format is told by the content; rows may be MultiTalk's documents. Raises `InputError` where the
    whole is no table, which may show only after the first rows."""
    return map(_with_our_columns, _parse(content, max_bytes))


def _with_our_columns(record: Record) -> Record:
    if record.error or not is_document(record.values):
        return record
    try:
        return Record(columns_of(record.values), record.source)
    except InputError as error:
        return Record(other_columns(record.values), record.source, f"MultiTalk document: {error}")


def _parse(content: bytes, max_bytes: int) -> Iterator[Record]:
    if not content.strip():
        raise InputError(f"is empty; {_FORMATS}")
    if content.startswith(b"PAR1"):
        return _parse_parquet(content, max_bytes)
    text = _decode(content)
    if text.lstrip()[0] in "{[":
        return iter(_parse_json(text))
    return _parse_csv(text)


def _decode(content: bytes) -> str:
    for magic, name in _BINARY.items():
        if content.startswith(magic):
            raise InputError(f"is {name}; {_FORMATS}: save it as one of them")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"is not UTF-8 (byte {error.start}, line {line}); save it as UTF-8") from error
    if "\0" in text:
        raise InputError(f"holds NUL bytes, so it is binary or UTF-16; {_FORMATS}")
    if not text.strip():
        raise InputError(f"is empty; {_FORMATS}")
    return text


def check_columns(columns: Sequence[str]) -> None:
    """Column names count without surrounding blanks and without case."""
    doubled = [name for name, count in Counter(column.lower() for column in columns).items() if count > 1]
    if doubled:
        raise InputError(
            f"has the column {', '.join(map(repr, doubled))} more than once; rename or remove one"
        )


def _parse_parquet(content: bytes, max_bytes: int) -> Iterator[Record]:
    try:
        file = pq.ParquetFile(io.BytesIO(content))
        check_columns([name.strip() for name in file.schema_arrow.names])
        unpacked = 0
        for batch in file.iter_batches(batch_size=8192):
            unpacked += batch.nbytes
            if unpacked > 4 * max_bytes:
                raise InputError(f"unpacks to more than {4 * max_bytes} bytes; split the table")
            for row in batch.to_pylist():
                yield Record({name.strip(): value for name, value in row.items()}, row)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"is a broken Parquet file ({reason}); write it again") from error


def _parse_csv(text: str) -> Iterator[Record]:
    delimiter = _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = (row for row in reader if any(cell.strip() for cell in row))
    try:
        header = [cell.strip() or f"column_{index}" for index, cell in enumerate(next(rows), start=1)]
        check_columns(header)
        for row in rows:
            yield _csv_record(header, row)
    except csv.Error as error:
        raise InputError(f"line {reader.line_num}: {error}; check the quotes of this line") from error


def _csv_record(header: Sequence[str], row: Sequence[str]) -> Record:
    values = dict(zip(header, row, strict=False))
    if len(row) == len(header):
        return Record(values, values)
    hint = "quote a value that holds the delimiter" if len(row) > len(header) else "a value is missing"
    return Record(values, values, f"the row has {len(row)} values for {len(header)} columns; {hint}")


def _delimiter(text: str) -> str:
    """Of comma, semicolon and tab the one under which the header holds most of the columns we need."""

    def fitness(delimiter: str) -> tuple[int, int]:
        names = [cell.strip().lower() for cell in _header(text, delimiter)]
        return sum(name in names for name in REQUIRED), len(names)

    return max(",;\t", key=fitness)


def _header(text: str, delimiter: str) -> list[str]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        return next(row for row in reader if any(cell.strip() for cell in row))
    except (csv.Error, StopIteration):
        return []


def _parse_json(text: str) -> list[Record]:
    """A document, a list of objects, or an object a line."""
    try:
        document = json.loads(text)
    except RecursionError as error:
        raise InputError("is JSON nested too deeply for a table") from error
    except ValueError as error:
        return _parse_json_lines(text, error)
    rows = document if isinstance(document, list) else [document]
    if not any(isinstance(row, dict) for row in rows):
        raise InputError("holds no rows; give JSON objects with image and audio")
    return [_json_record(row) for row in rows]


def _parse_json_lines(text: str, whole_error: ValueError) -> list[Record]:
    records = [_json_line(line) for line in io.StringIO(text, newline=None) if line.strip()]
    if all(record.error for record in records):
        raise InputError(f"is neither JSON nor JSON Lines ({whole_error})") from whole_error
    return records


def _json_line(line: str) -> Record:
    try:
        return _json_record(json.loads(line))
    except (ValueError, RecursionError) as error:
        return Record(error=f"the line is not JSON ({error})")


def _json_record(row: Any) -> Record:
    if not isinstance(row, dict):
        return Record(error=f"the row is a {type(row).__name__}; give a JSON object with image and audio")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Record(error="the row holds half a character (a lone \\ud800 to \\udfff escape)")
    values = {name.strip(): value for name, value in row.items()}
    try:
        check_columns([name.strip() for name in row])
    except InputError as error:
        return Record(values, row, f"the row {error}")
    return Record(values, row)
