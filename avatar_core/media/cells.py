"""What a cell of a table holds, whatever handed it over, and the Arrow type of a column of cells.

A cell is None, a bool, an int of 64 bits, a float, a text, bytes (what is no text in UTF-8), a date, a
datetime, a time, a timedelta, a finite Decimal, or a list or dict of JSON values. All else becomes text.
"""

import datetime as dt
import json
import os
from collections.abc import Mapping, Sequence, Set
from decimal import Decimal
from enum import Enum
from numbers import Integral, Real
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

MAX_DEPTH = 60
"""Of lists and dicts in each other; what is deeper is left out, as Python shows what holds itself."""

_DIGITS_BITS = 10_000  # Python writes no longer numbers in digits
_TIMES = (dt.date, dt.datetime, dt.time, dt.timedelta)

# What Arrow makes of more than one kind of value loses some of it (a date of a time, a zone).
_ALONE = {str, bool, float, bytes, dt.date, dt.datetime, dt.time, dt.timedelta, Decimal}
_TOGETHER = ({int, float}, {str, bytes}, {int, Decimal})

_PLAIN = (
    pa.types.is_null,
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_string,
    pa.types.is_large_string,
)
"""Of Arrow's types those that Python gets as cells."""


def plain(value: Any) -> Any:
    """The cell that says the same as a value of Python, numpy, pandas or torch."""
    kind = type(value)
    if kind is str:
        return value if value.isascii() else _text(value)
    if value is None or kind is bool or kind is float:
        return value
    return _integer(value) if kind is int else _plain(value, 0)


def as_text(cell: Any) -> str:
    """A cell as people read it: lists and dicts as JSON."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, bytes):
        return cell.decode(errors="backslashreplace")
    return json.dumps(cell, ensure_ascii=False) if isinstance(cell, list | dict | bool) else str(cell)


def column_type(cells: Sequence[Any]) -> pa.DataType:
    """Null where all are absent; text where Arrow has no type that keeps them all as they are."""
    kinds = {*map(type, cells)} - {type(None)}
    if not kinds:
        return pa.null()
    if kinds == {int}:
        return _integers(cells)
    if kinds not in _TOGETHER and not (len(kinds) == 1 and kinds <= _ALONE):
        return pa.string()
    if kinds == {dt.datetime} and len({cell.tzinfo is None for cell in cells if cell is not None}) > 1:
        return pa.string()
    try:
        return pa.array(cells).type
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return pa.string()


def as_column(cells: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """`kind` is the `column_type` of these cells, or of more."""
    if pa.types.is_string(kind):
        cells = [None if cell is None else as_text(cell) for cell in cells]
    return pa.array(cells, kind)


def from_arrow(column: pa.Array) -> list[Any]:
    """The cells of a column of any type."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if kind == pa.time64("ns"):
        try:
            column = column.cast(pa.time64("us"))
        except pa.ArrowInvalid:  # Python's would lose their end
            column = column.cast(pa.string())
    try:
        values = column.to_pylist(maps_as_pydicts="lossy")
    except Exception:  # among others OverflowError, ValueError, and KeyError of an unknown zone
        values = [_from_scalar(scalar) for scalar in column]
    return values if any(is_kind(kind) for is_kind in _PLAIN) else [plain(value) for value in values]


def _from_scalar(scalar: pa.Scalar) -> Any:
    """Also of what Python has no value for, such as the year 12000."""
    try:
        return scalar.as_py()
    except Exception:  # as above
        pass
    if isinstance(scalar, pa.StructScalar):
        return {name: _from_scalar(part) for name, part in scalar.items()}
    if isinstance(scalar, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
        return [_from_scalar(part) for part in scalar.values]
    if isinstance(scalar, pa.DictionaryScalar | pa.ExtensionScalar):
        return _from_scalar(scalar.value)
    if isinstance(scalar, pa.Date32Scalar):
        return str(np.datetime64(scalar.value, "D"))
    if isinstance(scalar, pa.Date64Scalar):
        return str(np.datetime64(scalar.value, "ms").astype("datetime64[D]"))
    if isinstance(scalar, pa.TimestampScalar):
        text = str(np.datetime64(scalar.value, scalar.type.unit)).replace("T", " ")
        return f"{text}+00:00" if scalar.type.tz else text
    if isinstance(scalar, pa.DurationScalar):
        return str(np.timedelta64(scalar.value, scalar.type.unit))
    return scalar.cast(pa.binary()).as_py()


def _integers(cells: Sequence[Any]) -> pa.DataType:
    numbers = [cell for cell in cells if cell is not None]
    if max(numbers) < 1 << 63:
        return pa.int64()
    return pa.uint64() if min(numbers) >= 0 else pa.string()


def _text(value: str) -> str | bytes:
    """Bytes for half characters: names of files that are not in UTF-8 have them."""
    for errors in ("strict", "surrogateescape"):
        try:
            encoded = value.encode(errors=errors)
        except UnicodeEncodeError:
            continue
        return value if errors == "strict" else encoded
    return value.encode(errors="surrogatepass")


def _plain(value: Any, depth: int) -> Any:
    if value is None or value is pd.NA or value is pd.NaT:
        return None
    if isinstance(value, Enum):
        return _plain(value.value, depth)
    if isinstance(value, str):
        return _text(str.__str__(value))
    if isinstance(value, bytes | bytearray | memoryview):
        return _decoded(bytes(value))
    if isinstance(value, os.PathLike):
        return _plain(os.fspath(value), depth)
    if isinstance(value, Mapping):
        if depth == MAX_DEPTH:
            return "..."
        return {as_text(plain(name)): _nested(part, depth) for name, part in value.items()}
    if isinstance(value, Sequence | Set):
        if depth == MAX_DEPTH:
            return "..."
        parts = sorted(value, key=str) if isinstance(value, Set) else value
        return [_nested(part, depth) for part in parts]
    if isinstance(value, (*_TIMES, np.datetime64, np.timedelta64)):
        return _time(value)
    return _number(value, depth)


def _number(value: Any, depth: int) -> Any:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, Integral):
        return _integer(int(value))
    if isinstance(value, Decimal):
        return value if value.is_finite() else None if value.is_nan() else float(value)
    if isinstance(value, Real):
        try:
            return float(value)
        except OverflowError:
            return str(value)
    if isinstance(value, np.generic) and not isinstance(value, np.complexfloating):
        return _plain(value.item(), depth)
    if hasattr(value, "tolist"):  # arrays, series, tensors
        return _plain(value.tolist(), depth)
    return plain(str(value))


def _integer(value: int) -> int | str:
    if -1 << 63 <= value < 1 << 64:
        return value
    return str(value) if value.bit_length() <= _DIGITS_BITS else hex(value)


def _decoded(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _time(value: Any) -> Any:
    """Of Python's own types where these hold all of it."""
    try:
        if isinstance(value, np.datetime64):
            value = pd.Timestamp(value)
        elif isinstance(value, np.timedelta64):
            value = pd.Timedelta(value)
        if value is pd.NaT:
            return None
        if isinstance(value, pd.Timestamp | pd.Timedelta):
            if value.nanosecond if isinstance(value, pd.Timestamp) else value.nanoseconds:
                return str(value)
            return value.to_pydatetime() if isinstance(value, pd.Timestamp) else value.to_pytimedelta()
    except (ValueError, OverflowError):
        return str(value)
    if isinstance(value, dt.datetime):
        return dt.datetime.combine(value.date(), value.timetz())
    if isinstance(value, dt.time):
        return str(value) if value.tzinfo else value
    return value if type(value) in _TIMES else str(value)


def _nested(value: Any, depth: int) -> Any:
    """The value in JSON."""
    cell = _plain(value, depth + 1)
    if isinstance(cell, Decimal):
        return int(cell) if cell == cell.to_integral_value() else float(cell)
    return cell if cell is None or isinstance(cell, bool | int | float | list | dict) else as_text(cell)
