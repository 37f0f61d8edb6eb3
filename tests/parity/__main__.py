"""`python -m tests.parity BACKEND FOLDER [--perturb NAME]`: a table of errors; fails on any wrong value."""

import importlib
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.parity.golden import Tolerance
from tests.parity.judge import Parity, Perturbation, Verdict, unchanged

app = typer.Typer(add_completion=False)

COLUMNS = ("case", "result", "max abs", "mean abs", "tolerance", "verdict")
FILE_WIDTH = 150  # characters, where the table does not go to a terminal


def allowed(tolerance: Tolerance | None) -> str:
    if tolerance is None:
        return ""
    if tolerance.max_abs == 0:
        return "exact"
    mean = f", mean {tolerance.mean_abs:.0e}" if tolerance.mean_abs != float("inf") else ""
    return f"{tolerance.max_abs:.0e}{mean}"


def cells(verdict: Verdict) -> list[str]:
    measured = verdict.max_abs == verdict.max_abs
    errors = [f"{verdict.max_abs:.1e}", f"{verdict.mean_abs:.1e}"] if measured else ["", ""]
    judged = f"[red]FAILED: {escape(verdict.fault)}[/red]" if verdict.fault else "[green]ok[/green]"
    return [verdict.case, verdict.result, *errors, allowed(verdict.tolerance), judged]


@app.command()
def main(
    backend: Annotated[str, typer.Argument(help="hunyuan, ditto, ...: a package of tests.parity")],
    folder: Annotated[Path, typer.Argument(help="folder of NAME.json and NAME.safetensors")],
    perturb: Annotated[str, typer.Option(help="spoil one thing on purpose; its cases must fail")] = "",
) -> None:
    torch.set_num_threads(1)
    perturbation = Perturbation(unchanged, touches=())
    if perturb:
        perturbations = importlib.import_module(f"tests.parity.{backend}.perturbations").PERTURBATIONS
        if perturb not in perturbations:
            raise typer.BadParameter(f"{perturb!r}; choose one of: {', '.join(perturbations)}")
        perturbation = perturbations[perturb]
    table = Table(title=f"{backend}: {folder}")
    for column in COLUMNS:
        table.add_column(column, no_wrap=column != "verdict")
    verdicts = []
    with perturbation.applied():
        for verdict in Parity(backend, folder, perturbation.spoil).all_verdicts():
            verdicts.append(verdict)
            table.add_row(*cells(verdict))
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(table)
    failed = sorted({verdict.case for verdict in verdicts if verdict.fault})
    console.print(f"{len(verdicts)} values, failed cases: {', '.join(failed) or 'none'}", soft_wrap=True)
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    app()
