"""Tensors of many items in one safetensors file, each named `<item key>/<tensor name>`."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from avatar_core.errors import StoreError

_OPEN_FILES = 64


def pack(items: Mapping[str, Mapping[str, NDArray[Any]]]) -> bytes:
    """The same bytes for the same tensors, whatever their order or memory layout."""
    arrays: dict[str, NDArray[Any]] = {}
    for key, tensors in items.items():
        if not key or "/" in key:
            raise StoreError(f"item key {key!r} must be text without a slash")
        for name, tensor in tensors.items():
            arrays[f"{key}/{name}"] = np.asarray(tensor, order="C")
    try:
        return bytes(save(dict(sorted(arrays.items()))))
    except (KeyError, SafetensorError) as error:
        dtypes = sorted({str(array.dtype) for array in arrays.values()})
        raise StoreError(f"safetensors cannot hold one of the types {', '.join(dtypes)}") from error


class TensorFile:
    """A memory-mapped file: opening reads the names, a tensor is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = safe_open(path, framework="numpy")
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path} is not a readable safetensors file: {error}") from error
        self._names: dict[str, list[str]] = {}
        for full_name in sorted(self._file.keys()):
            key, _, name = full_name.partition("/")
            self._names.setdefault(key, []).append(name)

    def keys(self) -> list[str]:
        return list(self._names)

    def item(self, key: str) -> "ItemTensors":
        return ItemTensors(self, key, tuple(self._names.get(key, ())))

    def tensor(self, key: str, name: str) -> NDArray[Any]:
        try:
            tensor: NDArray[Any] = self._file.get_tensor(f"{key}/{name}")
        except (TypeError, SafetensorError) as error:
            raise StoreError(f"{key}/{name} in {self.path} cannot be read: {error}") from error
        return tensor


class ItemTensors(Mapping[str, NDArray[Any]]):
    """One item's tensors by name; every access reads the file anew."""

    def __init__(self, file: TensorFile, key: str, names: tuple[str, ...]) -> None:
        self._file, self._key, self._names = file, key, names

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._names:
            raise KeyError(name)
        return self._file.tensor(self._key, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_item(path: Path, key: str) -> ItemTensors:
    """Empty where the file has no tensor of this item; `StoreError` where the file cannot be read."""
    try:
        status = path.stat()
    except OSError as error:
        raise StoreError(f"{path} cannot be opened: {error.strerror}") from error
    return _tensor_file(path, status.st_size, status.st_mtime_ns).item(key)


@functools.lru_cache(_OPEN_FILES)
def _tensor_file(path: Path, size: int, mtime_ns: int) -> TensorFile:
    return TensorFile(path)
