"""A pickle that asks for anything but plain values and arrays is refused before anything of it runs."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avatar_core.backends.ditto.config_pickle import read_pickle
from avatar_core.errors import WeightsError

PLAIN = {"a": [1, 2.5, None, True, "text"], "b": ("x", {"c": -3}), 7: 10**30}


class Runs:
    """Unpickled without care, it makes a file."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.arguments


def written(tmp_path: Path, value: Any, protocol: int = 4) -> Path:
    path = tmp_path / "settings.pkl"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_plain_values_come_back(tmp_path: Path, protocol: int) -> None:
    assert read_pickle(written(tmp_path, PLAIN, protocol)) == PLAIN


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dtype", ["<f4", "<f8", ">f4", "<i8", "|u1", "|b1", "<f2"])
def test_arrays_come_back(tmp_path: Path, protocol: int, dtype: str) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    inputs = {
        "rows": array,
        "columns": np.asfortranarray(array[0]),
        "empty": array[:0],
        "scalar": array[1, 2, 3],
    }
    result = read_pickle(written(tmp_path, inputs, protocol))
    for name in ("rows", "columns", "empty"):
        assert result[name].shape == inputs[name].shape
        assert np.array_equal(result[name], inputs[name])
        assert result[name].dtype == inputs[name].dtype.newbyteorder("=")
    assert type(result["scalar"]) in (int, float, bool)
    assert result["scalar"] == inputs["scalar"]


def test_names_of_older_and_newer_numpy_are_known(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32)
    data = pickle.dumps({"a": array}, protocol=3)
    for module in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        path = tmp_path / "settings.pkl"
        path.write_bytes(data.replace(b"numpy._core.multiarray", module))
        assert np.array_equal(read_pickle(path)["a"], array)


def test_code_is_never_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    for call in (Runs(os.mkdir, str(made)), Runs(eval, f"__import__('os').mkdir({str(made)!r})")):
        with pytest.raises(
            WeightsError, match=r"asks for \w+\.\w+ and is not opened, since it could run code"
        ):
            read_pickle(written(tmp_path, {"base_cfg": call}))
    assert not made.exists()


@pytest.mark.parametrize(
    "value",
    [OrderedDict(a=1), Path("x"), Runs(getattr, "a", "b"), Runs(np.load, "x"), {1}, b"bytes", np.float32],
)
def test_other_types_are_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(WeightsError):
        read_pickle(written(tmp_path, {"key": value}))


@pytest.mark.parametrize("array", [np.array([{}, []], object), np.array(["a"]), np.zeros(2, "f4,f4")])
def test_only_numbers_are_taken_as_arrays(tmp_path: Path, array: Any) -> None:
    with pytest.raises(WeightsError, match="allowed are numbers"):
        read_pickle(written(tmp_path, {"key": array}))


def test_array_of_another_length_than_its_shape_is_refused(tmp_path: Path) -> None:
    content = np.arange(4, dtype=np.float32)
    path = written(tmp_path, content, 3)
    path.write_bytes(path.read_bytes().replace(b"K\x04\x85", b"K\x09\x85"))
    with pytest.raises(WeightsError, match="has 4 values for the shape"):
        read_pickle(path)


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps(PLAIN)[:-9], b"\x80\x04N"])
def test_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "settings.pkl"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"settings\.pkl cannot be read as a pickled configuration"):
        read_pickle(path)


def test_value_that_holds_itself_is_refused(tmp_path: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(WeightsError, match="cannot be read"):
        read_pickle(written(tmp_path, endless))
