"""Arrays in joblib files, read by an unpickler that can build nothing else."""

import io
from pathlib import Path
from typing import Any

import lz4.frame
import numpy as np
from joblib.numpy_pickle import NumpyArrayWrapper, NumpyUnpickler
from numpy.typing import NDArray

from avatar_core.errors import WeightsError

Array = NDArray[np.float32]


def unpickle_arrays(data: bytes, path: Path) -> list[Array]:
    """Arrays of an lz4-compressed joblib file; raises WeightsError when it holds anything else."""
    try:
        arrays = _ArrayUnpickler(path.name, io.BytesIO(lz4.frame.decompress(data))).load()
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(f"{path} cannot be read as joblib arrays: {error}") from error
    if not isinstance(arrays, list) or not all(isinstance(array, np.ndarray) for array in arrays):
        raise WeightsError(f"{path} must hold a list of arrays, got {type(arrays).__name__}")
    return arrays


class _ArrayUnpickler(NumpyUnpickler):  # type: ignore[misc]  # joblib has no stubs
    """Builds float32 arrays and nothing else: a pickle may otherwise call any function."""

    def __init__(self, name: str, stream: io.BytesIO) -> None:
        super().__init__(name, stream, ensure_native_byte_order=True)

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("joblib.numpy_pickle", "NumpyArrayWrapper"): NumpyArrayWrapper,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): _float32,
        }
        if (module, name) not in allowed:
            raise WeightsError(f"weight file {self.filename} asks for {module}.{name}: refused, arrays only")
        return allowed[module, name]


def _float32(code: str, *_: object) -> np.dtype[np.float32]:
    # An object array would carry a second pickle inside.
    if code != "f4":
        raise WeightsError(f"weight arrays must be float32 ('f4'), got {code!r}")
    return np.dtype(np.float32)
