"""Pickles of plain values and numeric arrays, read by an unpickler that can build nothing else."""

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avatar_core.errors import WeightsError

MAX_BYTES = 256 << 20

_KINDS = "biuf"  # of numpy's dtypes: an array of objects would hold anything
_NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC_MODULES = ("numpy.core.numeric", "numpy._core.numeric")


def read_pickle(path: Path) -> Any:
    """Dictionaries, lists, tuples, texts, numbers and arrays; numbers of numpy as Python's. Raises
    `WeightsError`, also for a pickle that asks for anything else."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise WeightsError(f"{path} has more than {MAX_BYTES >> 20} MB; this is no configuration")
        return _plain(_Unpickler(path, io.BytesIO(path.read_bytes())).load())
    except WeightsError:
        raise
    except Exception as error:  # a damaged pickle may raise any
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise WeightsError(f"{path} cannot be read as a pickled configuration: {reason}") from error


class _DType:
    """Stands in for numpy.dtype."""

    def __init__(self, code: object = None, *_: object) -> None:
        dtype = np.dtype(code) if isinstance(code, str) else None
        if dtype is None or dtype.kind not in _KINDS or dtype.shape:
            raise WeightsError(f"an array of the configuration has the type {code!r}; allowed are numbers")
        self.dtype = dtype

    def __setstate__(self, state: object) -> None:
        """Only the byte order of the state matters to a number."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])

    def array(self, content: object, shape: object, order: str) -> NDArray[Any]:
        shape = (shape,) if isinstance(shape, int) else shape
        if not isinstance(shape, tuple) or not all(isinstance(size, int) and size >= 0 for size in shape):
            raise WeightsError(f"an array of the configuration has the shape {shape!r}")
        if not isinstance(content, bytes | bytearray | memoryview):
            raise WeightsError(f"an array of the configuration holds {type(content).__name__}")
        values = np.frombuffer(content, self.dtype)
        if values.size != math.prod(shape):
            raise WeightsError(
                f"an array of the configuration has {values.size} values for the shape {shape}"
            )
        ordered = values.reshape(shape, order="F" if order == "F" else "C")
        return np.ascontiguousarray(ordered, self.dtype.newbyteorder("=")).reshape(shape)


class _Array:
    """Stands in for numpy.ndarray."""

    def __init__(self) -> None:
        self.value: NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, in_columns, content = state
        self.value = _numeric(dtype).array(content, shape, "F" if in_columns else "C")


def _numeric(dtype: object) -> _DType:
    if not isinstance(dtype, _DType):
        raise WeightsError("an array of the configuration has no type")
    return dtype


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _scalar(dtype: object, content: object) -> Any:
    return _numeric(dtype).array(content, (), "C").item()


def _frombuffer(content: object, dtype: object, shape: object, order: str) -> NDArray[Any]:
    return _numeric(dtype).array(content, shape, order)


class _Unpickler(pickle.Unpickler):
    def __init__(self, path: Path, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self._path = path
        self._allowed: dict[tuple[str, str], Any] = {("numpy", "dtype"): _DType, ("numpy", "ndarray"): _Array}
        for module in _NUMPY_MODULES:
            self._allowed |= {(module, "_reconstruct"): _reconstruct, (module, "scalar"): _scalar}
        for module in _NUMERIC_MODULES:
            self._allowed[module, "_frombuffer"] = _frombuffer

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise WeightsError(
                f"{self._path} asks for {module}.{name} and is not opened, since it could run code; "
                "a configuration holds plain values and arrays only"
            )
        return self._allowed[module, name]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(each) for each in value)
    if isinstance(value, _Array):
        value = value.value
    if value is None or isinstance(value, bool | int | float | str | np.ndarray):
        return value
    raise WeightsError(f"the configuration holds {type(value).__name__}; allowed are plain values and arrays")
