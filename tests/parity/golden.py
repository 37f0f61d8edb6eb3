"""Golden folders: tensors recorded from a reference implementation, and what a case may see of them.

A folder holds `NAME.safetensors` (absent where the sidecar says it all) and the sidecar `NAME.json`. A case
gets a `Golden`: settings, inputs and weights. Recorded results are not in it; `load_expected` reads them for
the comparison alone.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from torch import Tensor

Row = TypeVar("Row")


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed error: of any entry, and (where stated) on average."""

    max_abs: float
    mean_abs: float = float("inf")


EXACT = Tolerance(0.0)


@dataclass(frozen=True)
class Case:
    """How the files whose names begin with `prefix` are read and judged.

    `inputs` and `weights` are globs over tensor names; every other tensor is a result that the case must
    return, as is every value of the sidecar whose dotted path (`rows.0.out_w`) fits `recorded`. `tolerances`
    are globs over `NAME:RESULT`, the first that fits counts. A case that is not `compared` (a file of weights
    for others) has no results.
    """

    prefix: str
    tolerances: Mapping[str, Tolerance] = field(default_factory=dict)
    inputs: tuple[str, ...] = ("in.*",)
    weights: tuple[str, ...] = ("w.*", "weight.*")
    recorded: tuple[str, ...] = ()
    compared: bool = True

    def tolerance(self, name: str, result: str) -> Tolerance:
        for pattern, tolerance in self.tolerances.items():
            if fnmatchcase(f"{name}:{result}", pattern):
                return tolerance
        raise KeyError(f"the table gives no tolerance for {name}:{result}")


@dataclass(frozen=True)
class Compare:
    """A value of which only a part must match: `rows` indexes the computed and the recorded tensor alike."""

    value: Tensor
    rows: Any = ...


Values = Mapping[str, Any]
"""Computed values by the name of the recorded tensor or the dotted path of the recorded value in the sidecar
(`cases.0.mask_rows`); a value is a tensor, a `Compare` or plain JSON data."""


@dataclass(frozen=True)
class Golden:
    """What a case may read.

    `inputs` and `weights` are named without a leading `in.`, `w.` or `weight.`; other names stay whole.
    `results` are the names of what is recorded, for files whose names say what was done; not the values.
    `wrong_rows` is empty except under a perturbation: reference name -> reference name whose row of the name
    map is to be taken in its place (`misdirected` applies it). Cases load weights through it.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    inputs: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    load_sibling: Callable[[str], "Golden"]
    wrong_rows: Mapping[str, str] = field(default_factory=dict)
    results: frozenset[str] = frozenset()

    def sibling(self, name: str) -> "Golden":
        """Another file of the folder, by its name with or without `.safetensors`."""
        return self.load_sibling(name.removesuffix(".safetensors"))

    def misdirected(self, name_map: Mapping[str, Row]) -> dict[str, Row]:
        """The name map (rows by reference name) that the weights of this golden are to be loaded through."""
        return {name: name_map.get(self.wrong_rows.get(name, name), row) for name, row in name_map.items()}


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def load_tensors(folder: Path, name: str, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    path = folder / f"{name}.safetensors"
    if not path.exists():
        return {}
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if wanted(key)}  # noqa: SIM118


def load_settings(folder: Path, name: str) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return settings


def load_golden(folder: Path, name: str, case: Case, load_sibling: Callable[[str], Golden]) -> Golden:
    inputs = load_tensors(folder, name, lambda key: matches(key, case.inputs))
    weights = load_tensors(folder, name, lambda key: matches(key, case.weights))
    return Golden(
        name=name,
        folder=folder,
        settings=without(load_settings(folder, name), (*case.recorded, "tensors")),
        inputs={key.removeprefix("in."): tensor for key, tensor in inputs.items()},
        weights={key.removeprefix("w.").removeprefix("weight."): tensor for key, tensor in weights.items()},
        load_sibling=load_sibling,
        results=result_names(folder, name, case),
    )


def result_names(folder: Path, name: str, case: Case) -> frozenset[str]:
    """Of one file: its recorded tensors and sidecar values."""
    values = {path for path in leaves(load_settings(folder, name)) if matches(path, case.recorded)}
    path = folder / f"{name}.safetensors"
    if not path.exists():
        return frozenset(values)
    with safe_open(path, framework="pt") as file:
        tensors = set(file.keys())
    return frozenset(values | {key for key in tensors if not matches(key, case.inputs + case.weights)})


def load_expected(folder: Path, name: str, case: Case) -> dict[str, Any]:
    recorded = leaves(load_settings(folder, name))
    tensors = load_tensors(folder, name, lambda key: not matches(key, case.inputs + case.weights))
    return {path: value for path, value in recorded.items() if matches(path, case.recorded)} | tensors


def children(value: Any) -> dict[str, Any]:
    """What a sidecar value consists of: members of an object, or objects in a list; nothing for a leaf."""
    if isinstance(value, dict):
        return {str(key): child for key, child in value.items()}
    if isinstance(value, list) and value and all(isinstance(child, dict) for child in value):
        return {str(index): child for index, child in enumerate(value)}
    return {}


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Values by dotted path; a list of anything but objects is one value."""
    inner = children(value)
    if not inner:
        return {path: value}
    prefix = f"{path}." if path else ""
    return {leaf: found for key in inner for leaf, found in leaves(inner[key], prefix + key).items()}


def without(value: Any, patterns: tuple[str, ...], path: str = "") -> Any:
    """The same data less the values whose dotted path fits one of the patterns."""
    inner = children(value)
    if not inner:
        return value
    prefix = f"{path}." if path else ""
    kept = {
        key: without(child, patterns, prefix + key)
        for key, child in inner.items()
        if not matches(prefix + key, patterns)
    }
    return list(kept.values()) if isinstance(value, list) else kept


def names(folder: Path) -> list[str]:
    """Every recorded file. Raises `FileNotFoundError` for a tensor file without a sidecar."""
    found = sorted(path.stem for path in folder.glob("*.json"))
    alone = sorted({path.stem for path in folder.glob("*.safetensors")} - set(found))
    if alone:
        raise FileNotFoundError(f"{folder}: no sidecar for {', '.join(alone)}")
    return found
