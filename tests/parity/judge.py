"""Run the cases of a golden folder and hold every computed value against the recorded one."""

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.parity.golden import Case, Compare, Golden, Tolerance, Values, load_expected, load_golden, names

Compute = Callable[[Golden], Values]
Spoil = Callable[[Golden], Golden]


def unchanged(golden: Golden) -> Golden:
    return golden


@dataclass(frozen=True)
class Perturbation:
    """Something spoilt on purpose. Exactly the cases with the prefixes `touches` must fail. `code` names
    constants of the project (`module:NAME`) and what stands in their place while it is `applied`."""

    spoil: Spoil
    touches: tuple[str, ...]
    code: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def applied(self) -> Iterator[None]:
        with ExitStack() as undo:
            for place, value in self.code.items():
                module, _, name = place.partition(":")
                owner = importlib.import_module(module)
                undo.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)
            yield


@dataclass(frozen=True)
class Verdict:
    """One line of the table. `fault` is empty where the value is right, else says what is wrong."""

    case: str
    result: str
    max_abs: float = math.nan
    mean_abs: float = math.nan
    tolerance: Tolerance | None = None
    fault: str = ""


@dataclass(frozen=True)
class Parity:
    """The cases of one backend on one golden folder.

    The backend is found by name: `tests.parity.NAME` has its `TABLE` and `PARTS`, each part has `CASES`.
    """

    backend: str
    folder: Path
    spoil: Spoil = unchanged

    @cached_property
    def table(self) -> tuple[Case, ...]:
        return tuple(importlib.import_module(f"tests.parity.{self.backend}").TABLE)

    @cached_property
    def parts(self) -> list[Mapping[str, Compute]]:
        names = importlib.import_module(f"tests.parity.{self.backend}").PARTS
        return [importlib.import_module(f"tests.parity.{self.backend}.{name}").CASES for name in names]

    def functions(self, name: str) -> list[Compute]:
        """Of every part that has to do with this file; the longest prefix within a part wins."""
        fitting = [[prefix for prefix in part if name.startswith(prefix)] for part in self.parts]
        chosen = zip(self.parts, fitting, strict=True)
        return [part[max(prefixes, key=len)] for part, prefixes in chosen if prefixes]

    @cached_property
    def names(self) -> list[str]:
        return names(self.folder)

    def case(self, name: str) -> Case | None:
        """The row of the table that a file belongs to; the longest prefix wins."""
        fitting = [case for case in self.table if name.startswith(case.prefix)]
        return max(fitting, key=lambda case: len(case.prefix), default=None)

    def absent(self) -> list[str]:
        """Prefixes of the table for which the folder has no file."""
        return [case.prefix for case in self.table if not any(self.case(name) is case for name in self.names)]

    def load(self, name: str) -> Golden:
        case = self.case(name)
        if case is None:
            raise KeyError(f"no row of the table fits {name}")
        return self.spoil(load_golden(self.folder, name, case, self.load))

    def verdicts(self, name: str) -> list[Verdict]:
        """Every recorded result of one file, right, wrong or not computed."""
        case = self.case(name)
        if case is None:
            return [Verdict(name, "", fault="no row of the table fits this file")]
        if not case.compared:
            return []
        try:
            computed = [function(self.load(name)) for function in self.functions(name)]
        except Exception as error:
            return [Verdict(name, "", fault=f"{type(error).__name__}: {error}")]
        values = {result: value for part in computed for result, value in part.items()}
        return list(judge(name, case, values, load_expected(self.folder, name, case)))

    def all_verdicts(self) -> Iterator[Verdict]:
        for prefix in self.absent():
            yield Verdict(f"{prefix}*", "", fault="required, but the folder has no such file")
        for name in self.names:
            yield from self.verdicts(name)


def judge(name: str, case: Case, values: Values, expected: Mapping[str, Any]) -> Iterator[Verdict]:
    if not expected:
        yield Verdict(name, "", fault="the file has no recorded result")
    for result, recorded in expected.items():
        if result not in values:
            yield Verdict(name, result, fault="not computed")
        else:
            yield compare(name, result, values[result], recorded, case.tolerance(name, result))
    for result in values.keys() - expected.keys():
        yield Verdict(name, result, fault="computed, but not recorded")


def compare(name: str, result: str, value: Any, recorded: Any, tolerance: Tolerance) -> Verdict:
    rows: Any = ...
    if isinstance(value, Compare):
        value, rows = value.value, value.rows
    computed, wanted = as_tensor(value), as_tensor(recorded)
    if computed is None or wanted is None:
        fault = "" if value == recorded else f"got {value!r}, recorded {recorded!r}"
        return Verdict(name, result, tolerance=tolerance, fault=fault)
    if computed.shape != wanted.shape:
        fault = f"shape {list(computed.shape)}, recorded {list(wanted.shape)}"
        return Verdict(name, result, tolerance=tolerance, fault=fault)
    error = (computed[rows] - wanted[rows]).abs()
    if error.numel() == 0:
        fault = "nothing compared" if wanted.numel() else ""
        return Verdict(name, result, tolerance=tolerance, fault=fault)
    max_abs, mean_abs = error.max().item(), error.mean().item()
    # Written so that a NaN is too far off.
    near = max_abs <= tolerance.max_abs and mean_abs <= tolerance.mean_abs
    return Verdict(name, result, max_abs, mean_abs, tolerance, "" if near else "too far off")


def as_tensor(value: Any) -> Tensor | None:
    """Numbers, and lists of numbers, as float64; `None` for anything else (text, null, ragged lists)."""
    try:
        return value.double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return None
