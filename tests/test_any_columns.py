"""Columns of any type and name, from the table to the dataset."""

import datetime as dt
import json
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from avatar_core.config import Config, parse
from avatar_core.pipeline import render, rerun
from avatar_core.result import Result
from tests.sample_rows import videos

UTC = dt.UTC


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any_columns")


def metadata(result: Result) -> pa.Table:
    return pq.read_table(Path(result.dataset) / "metadata.parquet")


def recorded(result: Result, store: Path) -> dict[str, Any]:
    rows = pq.read_table(store / "runs" / result.run_id / "rows.parquet")
    first: dict[str, Any] = json.loads(rows["values"][0].as_py())
    return first


PARQUET: dict[str, tuple[pa.Array, pa.DataType, list[Any]]] = {
    "raw": (pa.array([b"\xff\0", None]), pa.binary(), [b"\xff\0", None]),
    "text": (pa.array([b"caf\xc3\xa9", None]), pa.string(), ["café", None]),
    "far": (pa.array([4_000_000, 0], pa.date32()), pa.string(), ["12921-08-18", "1970-01-01"]),
    "day": (pa.array([0, None], pa.date32()), pa.date32(), [dt.date(1970, 1, 1), None]),
    "late": (
        pa.array([10**15, None], pa.timestamp("ms", "UTC")),
        pa.string(),
        ["33658-09-27 01:46:40.000+00:00", None],
    ),
    "now": (
        pa.array([10**15, None], pa.timestamp("us", "UTC")),
        pa.timestamp("us", "UTC"),
        [dt.datetime(2001, 9, 9, 1, 46, 40, tzinfo=UTC), None],
    ),
    "span": (pa.array([1, None], pa.duration("ms")), pa.duration("us"), [dt.timedelta(milliseconds=1), None]),
    "price": (pa.array([Decimal("1.50"), None]), pa.decimal128(3, 2), [Decimal("1.50"), None]),
    "half": (pa.array(np.array([1.5, 2], np.float16)), pa.float64(), [1.5, 2.0]),
    "large": (pa.array([2**64 - 1, None], pa.uint64()), pa.uint64(), [2**64 - 1, None]),
    "exact": (pa.array([2**60 + 1, None]), pa.int64(), [2**60 + 1, None]),
    "empty": (pa.nulls(2), pa.string(), [None, None]),
    "class": (pa.array(["a", "b"]).dictionary_encode(), pa.string(), ["a", "b"]),
    "tree": (pa.array([{"a": [1], "b": b"\xff"}, None]), pa.string(), ['{"a": [1], "b": "\\\\xff"}', None]),
    "pairs": (
        pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
        pa.string(),
        ['{"k": 1}', None],
    ),
    "key": (
        pa.array([uuid.UUID(int=1).bytes, None], pa.uuid()),
        pa.string(),
        ["00000000-0000-0000-0000-000000000001", None],
    ),
    "__index_level_0__": (pa.array([7, 8]), pa.int64(), [7, 8]),
    "Status": (pa.array(["x", "y"]), pa.string(), ["x", "y"]),
    "file_name": (pa.array(["x", "y"]), pa.string(), ["x", "y"]),
}
RENAMED = {"Status": "input_Status", "file_name": "input_file_name"}


def test_columns_of_any_type_come_back(inputs: Path, shared_store: Path, tmp_path: Path) -> None:
    picture = str(inputs / "portrait.jpg").encode()
    columns = {
        "image": pa.array([picture, b"/absent/caf\xe9.png"]),
        "audio": pa.array([str(inputs / "hello.wav")] * 2, pa.large_string()),
        "name": pa.array([b"good", b"bad"]),
        "seed": pa.array([1, 1], pa.uint8()),
        **{name: column for name, (column, _, _) in PARQUET.items()},
    }
    pq.write_table(pa.table(columns), tmp_path / "table.parquet")
    result = render({"table": str(tmp_path / "table.parquet"), "storage": {"root": str(shared_store)}})
    assert result.metadata["status"].tolist() == ["ok", "failed"]
    assert "column 'image': b'/absent/caf\\xe9.png' is no text in UTF-8" in result.failures["error"].iloc[0]
    assert list(videos(result.dataset)) == ["good.mp4"]
    table = metadata(result)
    for name, (_, kind, values) in PARQUET.items():
        found = table[RENAMED.get(name, name)]
        assert (name, found.type, found.to_pylist()) == (name, kind, values)
    assert recorded(result, shared_store)["far"] == "12921-08-18"
    listed = pd.read_csv(Path(result.dataset) / "failures.csv")
    assert listed["input_Status"].tolist() == ["y"]


ODD: dict[str, tuple[Any, Any]] = {
    "when": (pd.NaT, None),
    "missing": (pd.NA, None),
    "stamp": (pd.Timestamp("2020-01-02"), dt.datetime(2020, 1, 2)),
    "weight": (np.float32(0.5), 0.5),
    "points": (np.array([1, 2]), "[1, 2]"),
    "wave": (1 + 2j, "(1+2j)"),
    "half a character": ("\ud800", b"\xed\xa0\x80"),
    "set": ({"b", "a"}, '["a", "b"]'),
    "path": (Path("a/b"), "a/b"),
    "huge": (10**30, str(10**30)),
    "Prompt": (7, 7),
}


def test_values_of_any_library_come_back_from_rows(inputs: Path, tmp_path: Path) -> None:
    row = {
        "image": inputs / "portrait.jpg",
        "Audio": inputs / "hello.wav",
        "name": "a",
        "seed": np.int64(1),
        "params": {"mouth_gain": np.float32(1.25)},
        **{name: value for name, (value, _) in ODD.items()},
    }
    config = {"rows": [row], "name": "odd", "storage": {"root": str(tmp_path)}}
    result = render(config)
    assert result.failures.empty
    (clip,) = metadata(result).to_pylist()
    for name, (_, value) in ODD.items():
        assert (name, clip[{"Prompt": "input_Prompt"}.get(name, name)]) == (name, value)
    assert clip["params"] == '{"mouth_gain": 1.25}'
    assert clip["prompt"] == "7"
    again = rerun(parse(Config, {"storage": {"root": str(tmp_path)}}), "odd")
    assert again.failures.empty
    assert again.metadata["sha256"].tolist() == [clip["sha256"]]


def test_a_bad_number_in_params_fails_its_row(inputs: Path, shared_store: Path) -> None:
    good = {"image": inputs / "portrait.jpg", "audio": inputs / "hello.wav", "seed": 1}
    rows = [{**good, "name": "bad", "params": {"mouth_gain": float("nan")}}, {**good, "name": "good"}]
    result = render({"rows": rows, "name": "params", "storage": {"root": str(shared_store)}})
    (failure,) = result.failures.to_dict("records")
    assert (failure["name"], failure["row"]) == ("bad", 0)
    assert failure["error"].startswith(
        "column 'params': {'mouth_gain': nan} holds a number that is not finite"
    )
    assert result.metadata["status"].tolist() == ["failed", "ok"]


def test_a_part_of_a_table_keeps_the_types_of_the_rest(inputs: Path, shared_store: Path) -> None:
    good = {"image": inputs / "portrait.jpg", "audio": inputs / "hello.wav", "seed": 1}
    rows = [
        {**good, "name": "a", "day": dt.date(2020, 1, 2), "size": 1, "raw": b"\xff", "large": 2**63},
        {**good, "name": "b", "day": None, "size": 2.5, "raw": b"text", "large": 1},
    ]
    config = {"rows": rows, "name": "parts", "storage": {"root": str(shared_store)}}
    whole = metadata(render(config))
    for name in ("a", "b"):
        render({**config, "only": [name]})
        merged = metadata(render({**config, "only": [name]}))
        assert merged.select(["name", "day", "size", "raw", "large"]).equals(
            whole.select(["name", "day", "size", "raw", "large"])
        )
    assert whole["raw"].to_pylist() == [b"\xff", b"text"]
    assert whole["large"].to_pylist() == [2**63, 1]
