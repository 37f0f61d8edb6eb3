"""State dicts of models: read without executing them, rename, load strictly, write again as safetensors.

Tensors of a checkpoint are views of the mapped file, so what is read costs no memory before it is used, and a
model built on the meta device takes them as they are (`load_strict`).
"""

import json
import logging
import pickle
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from avatar_core.errors import WeightsError

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"

_SHARD_BYTES = 2 << 30
_SHOWN = 5


@dataclass(frozen=True)
class Rename:
    """One tensor of a model. `rows` of the source (all where None) go to `target`; `swap_halves` exchanges
    the upper and the lower half of its rows."""

    source: str
    target: str
    rows: slice | None = None
    swap_halves: bool = False


def rename(state: Mapping[str, Tensor], name_map: Sequence[Rename]) -> dict[str, Tensor]:
    """The state under its target names; views where that is possible. Every source name must be there and no
    other, else `WeightsError`."""
    sources = {entry.source for entry in name_map}
    problems = [_listed("missing", sources - state.keys()), _listed("unexpected", state.keys() - sources)]
    _refuse(problems, "the checkpoint does not have the names of this model")
    renamed = {}
    for entry in name_map:
        tensor = state[entry.source]
        if entry.rows is not None:
            tensor = tensor[entry.rows]
        renamed[entry.target] = torch.cat(tensor.chunk(2)[::-1]) if entry.swap_halves else tensor
    return renamed


def undo_rename(state: Mapping[str, Tensor], name_map: Sequence[Rename]) -> dict[str, Tensor]:
    """The state that `rename` would take apart into this one."""
    pieces: dict[str, dict[int, Tensor]] = {}
    for entry in name_map:
        tensor = state[entry.target]
        if entry.swap_halves:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        pieces.setdefault(entry.source, {})[entry.rows.start if entry.rows else 0] = tensor
    return {source: torch.cat([rows[start] for start in sorted(rows)]) for source, rows in pieces.items()}


def load_strict(
    model: nn.Module, state: Mapping[str, Tensor], *, ignored: Mapping[str, str] | None = None
) -> None:
    """Give the tensors to the model, in place of those it has, without a copy: their dtype and device stay.

    `ignored`: names of the checkpoint that the model does not have (`*` = anything) and why they may be left
    out. Raises `WeightsError` that lists missing, unexpected and mis-shaped names.
    """
    reasons = ignored or {}
    left_out = {name: why for name in state for pattern, why in reasons.items() if fnmatchcase(name, pattern)}
    for name, why in left_out.items():
        logger.debug("%s is left out: %s", name, why)
    given = {name: tensor for name, tensor in state.items() if name not in left_out}
    wanted = model.state_dict()
    shapes = [
        f"{name} is {tuple(given[name].shape)}, the model has {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    problems = [
        _listed("missing", wanted.keys() - given.keys()),
        _listed("unexpected", given.keys() - wanted.keys()),
        _listed("mis-shaped", shapes),
    ]
    _refuse(problems, f"the checkpoint does not fit {type(model).__name__}")
    model.load_state_dict(given, strict=True, assign=True)
    _refuse([_listed("without values", _on_meta(model))], f"{type(model).__name__} has buffers of its own")


def read_checkpoint(path: Path | str, *, key: str | None = None, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of a `.safetensors` file, of a folder of them with an index, or of a file written by
    `torch.save`, memory-mapped.

    `key` is the entry of a `torch.save` file that holds the state, where it is not the whole file; `prefix`
    is taken off the names that carry it. Raises `WeightsError`, also for a file that would run code.
    """
    path = Path(path)
    if path.is_dir() or path.suffix in (".safetensors", ".json"):
        state = _read_safetensors(path)
    else:
        state = _tensors(_unpickle(path), key, path)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def write_shards(
    state: Mapping[str, Tensor],
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    keep: Iterable[str] = (),
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write the state as safetensors with an index; of a mapped state, one shard at a time is in memory.

    Floating tensors are cast to `dtype` (None: as they are), except names that match a pattern of `keep`.
    The folder appears when it is complete and replaces one of an earlier call; a link stays, and leads to it.
    """
    folder = folder.resolve()
    kept = tuple(keep)
    shards = list(_shards(state, dtype, kept, shard_bytes))
    notes = {"format": "pt", **(metadata or {})}
    scratch = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        places: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            filename = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            piece = {name: _cast(name, state[name], dtype, kept).contiguous() for name in names}
            save_file(_unshared(piece), scratch / filename, metadata=notes)
            places |= dict.fromkeys(names, filename)
        index = {"metadata": notes, "weight_map": places}
        (scratch / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        scratch.replace(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise WeightsError(f"the converted model cannot be written to {folder}: {error}") from error


def read_metadata(folder: Path) -> dict[str, str]:
    """What `write_shards` was told about the state."""
    return dict(_read_index(folder / INDEX)["metadata"])


def _listed(what: str, names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f", ... ({len(ordered)} in all)" if len(ordered) > _SHOWN else ""
    return f"{what}: {', '.join(ordered[:_SHOWN])}{more}" if ordered else ""


def _refuse(problems: Sequence[str], what: str) -> None:
    if found := [problem for problem in problems if problem]:
        raise WeightsError(f"{what}; {'; '.join(found)}")


def _on_meta(model: nn.Module) -> list[str]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in tensors if tensor.device.type == "meta"]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    folder = path if path.is_dir() else path.parent
    if path.suffix == ".safetensors" and path.is_file():
        return _read_shard(path)
    index = path if path.suffix == ".json" else folder / INDEX
    if not index.is_file():
        indexes = sorted(folder.glob("*.safetensors.index.json"))
        single = sorted(folder.glob("*.safetensors"))
        if not indexes and len(single) == 1:
            return _read_shard(single[0])
        if len(indexes) != 1:
            raise WeightsError(f"{path} holds no safetensors checkpoint; expected one file or an {INDEX}")
        index = indexes[0]
    places: dict[str, str] = _read_index(index)["weight_map"]
    state: dict[str, Tensor] = {}
    for filename in sorted(set(places.values())):
        state |= _read_shard(folder / Path(filename).name)
    absent = _listed("missing", places.keys() - state.keys())
    _refuse([absent, _listed("unexpected", state.keys() - places.keys())], f"{index} does not fit its files")
    return state


def _read_index(index: Path) -> dict[str, dict[str, str]]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        return {"metadata": dict(content.get("metadata", {})), "weight_map": dict(content["weight_map"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is no index of a sharded checkpoint: {error}") from error


def _read_shard(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors: {error}") from error


def _unpickle(path: Path) -> object:
    """Tensors and plain containers only. The older format of `torch.save` cannot be mapped: read whole."""
    try:
        with path.open("rb") as file:
            mapped = file.read(2) == b"PK"
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds more than tensors and is not opened, since it could run code; "
            "get the official file or save its state dict alone"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise WeightsError(f"{path} cannot be read as a checkpoint: {reason}") from error


def _tensors(content: object, key: str | None, path: Path) -> dict[str, Tensor]:
    """Numbers count as tensors: scales may be saved as either."""
    if key is not None and isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
        content = content[key]
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds {type(content).__name__}, expected a state dict")
    odd = [str(name) for name, value in content.items() if not isinstance(value, Tensor | int | float)]
    _refuse([_listed("found", odd)], f"{path} holds entries that are no tensors")
    return {str(name): torch.as_tensor(value) for name, value in content.items()}


def _shards(
    state: Mapping[str, Tensor], dtype: torch.dtype | None, kept: Sequence[str], shard_bytes: int
) -> Iterator[list[str]]:
    """Names in order, cut so that no shard is larger than asked, unless one tensor alone is."""
    names: list[str] = []
    size = 0
    for name, tensor in state.items():
        target = _target_dtype(name, tensor, dtype, kept)
        bytes_needed = tensor.numel() * target.itemsize
        if names and size + bytes_needed > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += bytes_needed
    if names:
        yield names


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With a copy for every further name of the same tensor: a file has each name once."""
    owners = {tensor.data_ptr(): name for name, tensor in reversed(list(state.items()))}
    return {name: t if owners[t.data_ptr()] == name else t.clone() for name, t in state.items()}


def _target_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None, kept: Sequence[str]) -> torch.dtype:
    fixed = dtype is None or not tensor.is_floating_point() or any(fnmatchcase(name, p) for p in kept)
    return tensor.dtype if fixed or dtype is None else dtype


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None, kept: Sequence[str]) -> Tensor:
    return tensor.to(_target_dtype(name, tensor, dtype, kept))
