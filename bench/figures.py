"""What a benchmark found: as a table of the terminal, and as a section of a file in bench/results."""

import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from processor import processor
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    test: str
    what: str
    value: str
    goal: str = ""
    met: bool | None = None


def as_table(figures: Sequence[Figure]) -> Table:
    table = Table(header_style="bold", box=None)
    for heading in ("test", "what", "found", "goal", "met"):
        table.add_column(heading)
    for figure in figures:
        style = "red" if figure.met is False else ""
        table.add_row(*_cells(figure), style=style)
    return table


def add_section(file: Path, title: str, figures: Sequence[Figure], lines: Sequence[str]) -> None:
    """To the results of earlier runs, which stay."""
    file.parent.mkdir(exist_ok=True)
    text = ["", f"## {title}", *(f"- {line}" for line in lines), "", *table_lines(figures), ""]
    with file.open("a", encoding="utf-8") as kept:
        kept.write("\n".join(text))


def table_lines(figures: Sequence[Figure]) -> list[str]:
    rows = [" | ".join(_cells(figure)).join(("| ", " |")) for figure in figures]
    return ["| test | what | found | goal | met |", "| --- | --- | --- | --- | --- |", *rows]


def about(*more: str) -> list[str]:
    """When, on what and by which command."""
    names = ("prefect", "pyarrow", "numpy", "pandas")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    words = ["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    return [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, load average {os.getloadavg()[0]:.1f}",
        f"{len(os.sched_getaffinity(0))} cores, {processor()}",
        f"Python {platform.python_version()}, {versions}",
        f"`{shlex.join(words)}`",
        *more,
    ]


def _cells(figure: Figure) -> list[str]:
    met = {True: "yes", False: "no", None: ""}[figure.met]
    return [figure.test, figure.what, figure.value, figure.goal, met]
