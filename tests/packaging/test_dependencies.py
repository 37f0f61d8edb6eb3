"""What the packages import is declared, and what is declared is pinned."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"avatar_core", "flows", "tasks"}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    return {normalised(re.split(r"[^\w.-]", requirement, maxsplit=1)[0]) for requirement in requirements}


def imported_by(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found - OURS - set(sys.stdlib_module_names)


@pytest.fixture(scope="module")
def extras() -> dict[str, list[str]]:
    """What is always installed counts as the extra `core`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {**project["optional-dependencies"], "core": project["dependencies"]}


def test_every_import_is_declared(extras: dict[str, list[str]]) -> None:
    declared = names([r for extra, wanted in extras.items() if extra != "dev" for r in wanted])
    known = packages_distributions()
    undeclared = {}
    for path in (path for top in OURS for path in (ROOT / top).rglob("*.py")):
        for module in imported_by(path):
            carriers = {normalised(name) for name in known.get(module, [module])}
            if not carriers & declared:
                undeclared[module] = str(path.relative_to(ROOT))
    assert undeclared == {}


def test_every_declared_dependency_is_pinned(extras: dict[str, list[str]]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {normalised(line.split("==")[0]) for line in lines if "==" in line}
    assert names([r for wanted in extras.values() for r in wanted]) - pinned == set()


def test_constraints_fit_every_index() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "torch==2.13.0\n" in text
    assert not re.search(r"^--|://|\+cpu| @ ", text, flags=re.MULTILINE)
