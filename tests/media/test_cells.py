"""Cells of any type: what the table's reader, the store and the dataset have to agree on."""

import datetime as dt
import enum
import json
import math
import pickle
import uuid
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avatar_core.media.cells import as_column, as_text, column_type, from_arrow, plain
from avatar_core.media.table import parse_rows, read_table
from avatar_core.publish import to_frame

UTC = dt.UTC
PAST_PYTHON = 10**12  # seconds: the year 33658


class Voice(str, enum.Enum):  # noqa: UP042 - whose text is not its value
    ANNA = "af_heart"


class Level(enum.IntEnum):
    HIGH = 3


class Text(str):
    pass


def deep(levels: int) -> Any:
    value: Any = "end"
    for _ in range(levels):
        value = [value]
    return value


CELLS: list[tuple[Any, Any]] = [
    (pd.NA, None),
    (pd.NaT, None),
    (np.datetime64("NaT"), None),
    (Decimal("NaN"), None),
    (Decimal("Infinity"), math.inf),
    (Decimal("1.50"), Decimal("1.50")),
    (np.float32(0.5), 0.5),
    (np.float16(0.5), 0.5),
    (np.longdouble(0.5), 0.5),
    (np.int8(-3), -3),
    (np.uint64(2**64 - 1), 2**64 - 1),
    (2**64, str(2**64)),
    (-(2**63), -(2**63)),
    (-(2**63) - 1, str(-(2**63) - 1)),
    (np.bool_(True), True),
    (np.str_("a"), "a"),
    (np.bytes_(b"a"), "a"),
    (np.array([1.5, 2.5], np.float32), [1.5, 2.5]),
    (np.array(7), 7),
    (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
    (pd.Series([1, 2]), [1, 2]),
    (Fraction(1, 2), 0.5),
    (1 + 2j, "(1+2j)"),
    (np.complex64(1j), "1j"),
    (Voice.ANNA, "af_heart"),
    (Level.HIGH, 3),
    (Text("a"), "a"),
    (Path("a/b.png"), "a/b.png"),
    (b"caf\xc3\xa9", "café"),
    (bytearray(b"a"), "a"),
    (memoryview(b"a"), "a"),
    (b"\xff", b"\xff"),
    ("\ud800", b"\xed\xa0\x80"),
    ("caf\udce9", b"caf\xe9"),
    (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    (dt.date(2020, 1, 2), dt.date(2020, 1, 2)),
    (dt.time(1, 2), dt.time(1, 2)),
    (dt.time(1, 2, tzinfo=UTC), "01:02:00+00:00"),
    (pd.Timestamp("2020-01-02 03:04:05.6"), dt.datetime(2020, 1, 2, 3, 4, 5, 600_000)),
    (pd.Timestamp("2020-01-02", tz="UTC"), dt.datetime(2020, 1, 2, tzinfo=UTC)),
    (pd.Timestamp("2020-01-02 00:00:00.000000007"), "2020-01-02 00:00:00.000000007"),
    (pd.Timestamp(np.datetime64("12000-01-01", "s")), "12000-01-01 00:00:00"),
    (np.datetime64("2020-01-02"), dt.datetime(2020, 1, 2)),
    (pd.Timedelta(seconds=1), dt.timedelta(seconds=1)),
    (np.timedelta64(7, "ns"), "0 days 00:00:00.000000007"),
    (pd.Period("2020-01"), "2020-01"),
    (pd.Interval(0, 1), "(0, 1]"),
    ({"b", "a"}, ["a", "b"]),
    ((1, np.float32(2)), [1, 2.0]),
    (range(3), [0, 1, 2]),
    ({1: {"a": Decimal("2"), "b": Decimal("0.5")}}, {"1": {"a": 2, "b": 0.5}}),
    ({"when": dt.date(2020, 1, 2), "raw": b"\xff"}, {"when": "2020-01-02", "raw": "\\xff"}),
    (deep(59), deep(59)),
]


@pytest.mark.parametrize(("value", "cell"), CELLS)
def test_a_value_of_any_library_becomes_a_cell(value: Any, cell: Any) -> None:
    found = plain(value)
    assert (type(found), found) == (type(cell), cell)
    assert plain(found) == found


def test_a_number_longer_than_python_writes_is_text() -> None:
    assert plain(10**5000) == hex(10**5000)


def test_a_list_that_holds_itself_ends() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    assert json.dumps(plain(loop)).startswith("[1, [1, [1, ")


@pytest.mark.parametrize(
    ("cells", "kind", "values"),
    [
        ([None, None], pa.null(), [None, None]),
        ([True, None], pa.bool_(), [True, None]),
        ([1, None], pa.int64(), [1, None]),
        ([1, 2**64 - 1], pa.uint64(), [1, 2**64 - 1]),
        ([-1, 2**64 - 1], pa.string(), ["-1", str(2**64 - 1)]),
        ([1, 2.5], pa.float64(), [1.0, 2.5]),
        ([2**53 + 1, 2.5], pa.string(), ["9007199254740993", "2.5"]),
        ([True, 1], pa.string(), ["true", "1"]),
        (["a", b"\xff"], pa.binary(), [b"a", b"\xff"]),
        (["a", 1], pa.string(), ["a", "1"]),
        ([b"\xff", 1], pa.string(), ["\\xff", "1"]),
        ([[1], ["ä"]], pa.string(), ["[1]", '["ä"]']),
        ([Decimal("1.5"), Decimal("10")], pa.decimal128(3, 1), [Decimal("1.5"), Decimal("10.0")]),
        ([Decimal(10) ** 90], pa.string(), [str(Decimal(10) ** 90)]),
        (
            [dt.date(2020, 1, 2), dt.datetime(2020, 1, 2, 3)],
            pa.string(),
            ["2020-01-02", "2020-01-02 03:00:00"],
        ),
        (
            [dt.datetime(2020, 1, 2), dt.datetime(2020, 1, 2, tzinfo=UTC)],
            pa.string(),
            ["2020-01-02 00:00:00", "2020-01-02 00:00:00+00:00"],
        ),
        ([dt.timedelta.max], pa.string(), [str(dt.timedelta.max)]),
    ],
)
def test_a_column_keeps_its_values_in_a_type_or_as_text(
    cells: list[Any], kind: pa.DataType, values: list[Any]
) -> None:
    assert column_type(cells) == kind
    assert as_column(cells, kind).to_pylist() == values


# --- Arrow

int64s = st.integers(-(2**63), 2**63 - 1)
days = st.integers(-(2**31), 2**31 - 1)
decimals = st.decimals(-(10**6), 10**6, places=3)
units = st.sampled_from(["s", "ms", "us", "ns"])
zones = st.sampled_from([None, "UTC", "Europe/Berlin", "+05:30", "Mars/Base"])
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)

FLAT: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    (pa.bool_(), st.booleans()),
    (pa.int8(), st.integers(-128, 127)),
    (pa.int64(), int64s),
    (pa.uint64(), st.integers(0, 2**64 - 1)),
    (pa.float16(), st.floats(width=16)),
    (pa.float32(), st.floats(width=32)),
    (pa.float64(), st.floats()),
    (pa.string(), texts),
    (pa.large_string(), texts),
    (pa.string_view(), texts),
    (pa.binary(), st.binary(max_size=8)),
    (pa.large_binary(), st.binary(max_size=8)),
    (pa.binary(2), st.binary(min_size=2, max_size=2)),
    (pa.decimal128(20, 3), decimals),
    (pa.decimal256(50, 3), decimals),
    (pa.uuid(), st.uuids().map(lambda value: value.bytes)),
]


def counted(kind: pa.DataType) -> st.SearchStrategy[pa.Array]:
    """Columns of a type that is a count of something."""
    numbers = pa.int32() if kind.bit_width == 32 else pa.int64()
    values = st.lists(st.none() | (days if kind.bit_width == 32 else int64s), max_size=4)
    return values.map(lambda column: pa.array(column, numbers).view(kind))


flat = st.sampled_from(FLAT).flatmap(
    lambda one: st.lists(st.none() | one[1], max_size=4).map(lambda column: pa.array(column, one[0]))
)
times = st.one_of(
    st.sampled_from([pa.date32(), pa.date64()]).flatmap(counted),
    st.builds(pa.timestamp, units, zones).flatmap(counted),
    units.map(pa.duration).flatmap(counted),
    st.sampled_from([pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns")]).flatmap(counted),
)


def in_lists(column: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array([0, len(column)], pa.int32()), column)


def in_structs(column: pa.Array) -> pa.Array:
    return pa.StructArray.from_arrays([column, column], ["a", "b"])


def in_maps(column: pa.Array) -> pa.Array:
    keys = pa.array([str(number) for number in range(len(column))], pa.string())
    return pa.MapArray.from_arrays(pa.array([0, len(column)], pa.int32()), keys, column)


columns = st.one_of(flat, times, st.just(pa.nulls(2))).flatmap(
    lambda column: st.sampled_from([column, in_lists(column), in_structs(column), in_maps(column)])
)


@given(columns)
def test_a_column_of_any_arrow_type_comes_back(column: pa.Array) -> None:
    cells = from_arrow(column)
    assert [cell is None for cell in cells] == column.is_null().to_pylist()
    pickle.dumps(cells)
    json.dumps(cells, default=as_text, ensure_ascii=False).encode()
    kind = column_type(cells)
    kept = as_column(cells, kind)
    kept.validate(full=True)
    to_frame(pa.table({"column": kept})).to_csv().encode()
    if kind not in (pa.string(), pa.binary(), pa.null()):
        assert [str(cell) for cell in kept.to_pylist()] == [
            str(value) if not isinstance(value, pd.Timestamp | pd.Timedelta) else str(plain(value))
            for value in column.to_pylist()
        ]
    if pa.types.is_binary(kind) or (pa.types.is_string(kind) and column.type in (pa.string(), pa.binary())):
        given_bytes = [value.encode() if isinstance(value, str) else value for value in column.to_pylist()]
        assert [
            value.encode() if isinstance(value, str) else value for value in kept.to_pylist()
        ] == given_bytes


@pytest.mark.parametrize(
    ("column", "cells"),
    [
        (pa.array([4_000_000, None], pa.date32()), ["12921-08-18", None]),
        (pa.array([PAST_PYTHON], pa.timestamp("s")), ["33658-09-27 01:46:40"]),
        (pa.array([PAST_PYTHON], pa.timestamp("s", "UTC")), ["33658-09-27 01:46:40+00:00"]),
        (pa.array([10**9], pa.timestamp("s", "Mars/Base")), ["2001-09-09 01:46:40+00:00"]),
        (pa.array([7], pa.timestamp("ns")), ["1970-01-01 00:00:00.000000007"]),
        (pa.array([7000], pa.timestamp("ns")), [dt.datetime(1970, 1, 1, 0, 0, 0, 7)]),
        (pa.array([2**62], pa.duration("s")), [f"{2**62} seconds"]),
        (pa.array([7], pa.time64("ns")), ["00:00:00.000000007"]),
        (pa.array([7000], pa.time64("ns")), [dt.time(0, 0, 0, 7)]),
        (pa.array([[4_000_000, 0]], pa.list_(pa.date32())), [["12921-08-18", "1970-01-01"]]),
        (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), [{"a": 1}]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([b"a", b"\xff"]), ["a", b"\xff"]),
    ],
)
def test_what_python_has_no_value_for_is_text(column: pa.Array, cells: list[Any]) -> None:
    assert from_arrow(column) == cells


def test_text_that_is_not_utf8_is_bytes() -> None:
    raw = pa.array([b"caf\xe9", b"tea"])
    column = pa.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    assert from_arrow(column) == [b"caf\xe9", "tea"]


# --- rows


def test_binary_columns_are_text(tmp_path: Path) -> None:
    table = pa.table(
        {
            "name": pa.array([b"anna", b"ben", b"\xff"]),
            "image": pa.array([b"a.png", b"b.png", b"c.png"], pa.binary(5)),
            "audio": pa.array([b"a.wav", b"b.wav", b"c.wav"], pa.large_binary()),
            "prompt": pa.array(["café".encode(), b"caf\xe9", None]),
            "params": pa.array([b'{"mouth_gain": 1.2}', None, None]),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    good, bad, nameless = read_table(str(tmp_path / "rows.parquet"))
    assert (good.name, good.image, good.audio, good.prompt) == ("anna", "a.png", "a.wav", "café")
    assert (good.params, good.error) == ({"mouth_gain": 1.2}, None)
    no_text = "is no text in UTF-8 (half a character, or another encoding); write it in UTF-8"
    assert bad.error == f"column 'prompt': b'caf\\xe9' {no_text}"
    assert (nameless.name, nameless.error) == (None, f"column 'name': b'\\xff' {no_text}")


def test_numbers_of_other_libraries_are_numbers() -> None:
    row = {"image": "a.png", "audio": "a.wav", "id": np.int64(7)}
    values = {"fps": Decimal("12.5"), "seed": np.uint64(5), "bbox": np.array([[1, 2, 3, 4]])}
    params = {"steps": np.int32(3), "gain": np.float32(0.5), "sizes": np.array([1, 2]), "off": pd.NA}
    (read,) = parse_rows([{**row, **values, "params": params}])
    assert read.error is None
    assert (read.name, read.fps, read.seed) == ("7", 12.5, 5)
    assert read.bbox == ((1.0, 2.0, 3.0, 4.0),)
    assert read.params == {"steps": 3, "gain": 0.5, "sizes": [1, 2]}


@pytest.mark.parametrize("params", [{"gain": math.nan}, {"gain": [np.float32("inf")]}, '{"gain": 1e999}'])
def test_a_number_that_is_not_finite_fails_its_row(params: Any) -> None:
    bad, good = parse_rows([{"image": "a", "audio": "b", "params": params}, {"image": "a", "audio": "b"}])
    assert str(bad.error).startswith("column 'params': ")
    assert str(bad.error).endswith(" holds a number that is not finite; give another")
    assert good.error is None


def test_column_names_may_be_anything(tmp_path: Path) -> None:
    names = ["image", "audio", "", "mood", "mood", "mood_2", "Mood", " padded\xa0", "column_9", ""]
    cells = [pa.array([value]) for value in ["a.png", "a.wav", *range(2, len(names))]]
    pq.write_table(pa.table(cells, names=names), tmp_path / "rows.parquet")
    (row,) = read_table(str(tmp_path / "rows.parquet"))
    assert row.source == {
        "image": "a.png",
        "audio": "a.wav",
        "column_3": 2,
        "mood": 3,
        "mood_3": 4,
        "mood_2": 5,
        "Mood": 6,
        "padded": 7,
        "column_9": 8,
        "column_10": 9,
    }


def test_a_doubled_key_of_a_json_object_is_no_less(tmp_path: Path) -> None:
    lines = [
        '{"image": "a", "audio": "b", "mood": 1, "mood": {"x": 1, "x": 2}}',
        '{"image": "a", "image": "b"}',
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    good, bad = read_table(str(tmp_path / "rows.jsonl"))
    assert good.source == {"image": "a", "audio": "b", "mood": 1, "mood_2": {"x": 2}}
    assert "the row has the column 'image' more than once" in str(bad.error)


def test_a_doubled_column_that_means_something_fails_a_row() -> None:
    (row,) = parse_rows([{"image": "a.png", "Image": "b.png", "audio": "a.wav"}])
    assert "the row has the column 'image' more than once; rename or remove one" in str(row.error)
