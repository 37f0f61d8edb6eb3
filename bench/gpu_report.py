"""A machine with a GPU, clocks and memory meters on it, and tables that are printed line by line."""

import importlib.metadata
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import torch
from processor import processor
from rich.console import Console

from avatar_core.memory import ATTENTION_KERNELS, GIB, attention_kernel, free_device_memory, kernel_problem

console = Console(width=160, highlight=False)

GOAL = 0.60  # of the measured rate, without approximation
NAMED_SHARE = 0.95  # of the memory in a card's name is there for us


class Size(Protocol):
    """Of what is measured."""

    @property
    def head_dim(self) -> int: ...

    @property
    def gemm_sides(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Machine:
    device: str
    size: Size
    repeats: int

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def attention_kernel(self) -> str:
        return attention_kernel(self.device, self.dtype, self.size.head_dim)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object], repeats: int | None = None) -> float:
        """Median, after a call that is not counted."""
        (times,) = self.seconds_in_turn(call, repeats=repeats)
        return statistics.median(times)

    def seconds_in_turn(
        self, *calls: Callable[[], object], repeats: int | None = None
    ) -> list[tuple[float, ...]]:
        """Of each call, in rounds that make all of them, since machines change their speed; one round before
        is not counted."""
        for call in calls:
            call()
        rounds = [[self._timed(call) for call in calls] for _ in range(repeats or self.repeats)]
        return list(zip(*rounds, strict=True))

    def _timed(self, call: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    @property
    def memory_gib(self) -> float:
        return torch.cuda.get_device_properties(self.device).total_memory / GIB if self.on_gpu else 0.0

    def forget_peak(self) -> None:
        free_device_memory(self.device)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> str:
        """Allocated, and what torch holds for it."""
        if not self.on_gpu:
            return "-"
        gib = (torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device))
        return " / ".join(f"{each / GIB:.1f}" for each in gib)


@dataclass
class Report:
    """Tables by title; lines are printed as they come."""

    deadline: float
    tables: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)
    _title: str = ""

    def begin(self, title: str, *columns: str) -> None:
        self._title = title
        self.tables[title] = [columns]
        console.print(f"\n[bold]{title}[/]\n{_line(columns)}")

    def add(self, *cells: str) -> None:
        self.tables[self._title].append(cells)
        console.print(_line(cells), markup=False)

    def measure(self, name: str, cells: Callable[[], Sequence[str]], machine: Machine) -> None:
        """One line, whatever happens."""
        if time.monotonic() > self.deadline:
            self.add(name, "left out: time is up (--minutes)")
            return
        machine.forget_peak()
        try:
            self.add(name, *cells())
        except torch.OutOfMemoryError:
            self.add(name, "does not fit into memory")
        except Exception as error:  # one variant's failure is not that of the others
            self.add(name, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}")


def _line(cells: Sequence[str]) -> str:
    return "  ".join([f"{cells[0]:44}", *(f"{cell:>18}" for cell in cells[1:])])


def lazily(build: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """A call that builds what it needs when it is first called, so that a failure is its own."""
    built: list[Callable[[], object]] = []

    def call() -> object:
        if not built:
            built.append(build())
        return built[0]()

    return call


def gemm_rate(machine: Machine, report: Report) -> float:
    """FLOP per second of the fastest square product, of normal random numbers."""
    report.begin("Dense bfloat16 product", "side", "TFLOP/s")
    rates = [0.0]
    for side in machine.size.gemm_sides:

        def cells(side: int = side) -> list[str]:
            one, other = torch.randn(2, side, side, device=machine.device, dtype=torch.bfloat16)
            product, calls = torch.empty_like(one), 10
            seconds = machine.seconds(
                lambda: [torch.mm(one, other, out=product) for _ in range(calls)], repeats=7
            )
            seconds /= calls
            rates.append(2 * side**3 / seconds)
            return [f"{rates[-1] / 1e12:.4g}"]

        report.measure(str(side), cells, machine)
    return max(rates)


@dataclass(frozen=True)
class Speeds:
    """How a step's seconds become cells: seconds, share of the rate, times the yardstick, peak memory."""

    machine: Machine
    report: Report
    rate: float
    flops: float
    plain_s: float | None = None

    def measure(self, name: str, step: Callable[[], object], *, in_full: bool = True) -> float | None:
        found: list[float] = []

        def cells() -> list[str]:
            found.append(self.machine.seconds(step))
            return self.cells(found[0], in_full=in_full)

        self.report.measure(name, cells, self.machine)
        return found[0] if found else None

    def cells(self, seconds: float, *, in_full: bool = True) -> list[str]:
        share = f"{self.flops / seconds / self.rate:.1%}" if in_full and self.rate else "-"
        faster = f"{self.plain_s / seconds:.2f}" if self.plain_s else "-"
        return [f"{seconds:.3f}", share, faster, self.machine.peak()]


def kernels_of(machine: Machine) -> Iterator[tuple[str, str]]:
    """Every attention kernel and what keeps it from working here, if anything."""
    names = ATTENTION_KERNELS if machine.on_gpu else ("native", "_native_math")
    for name in names:
        yield (
            name,
            kernel_problem(name, machine.device, machine.dtype, machine.size.head_dim),
        )


@contextmanager
def limited_to(machine: Machine, gib: float) -> Iterator[None]:
    """The device as if it had no more than so much memory."""
    if not machine.on_gpu:
        yield
        return
    fraction = min(1.0, NAMED_SHARE * gib / machine.memory_gib)
    torch.cuda.set_per_process_memory_fraction(fraction, machine.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, machine.device)


def as_markdown(title: str, machine: Machine, report: Report) -> str:
    lines = [f"# {title}", "", *(f"- {line}" for line in about(machine))]
    for title, (columns, *rows) in report.tables.items():
        lines += ["", f"## {title}", "", _markdown_row(columns), _markdown_row(["---"] * len(columns))]
        lines += [_markdown_row([*cells, *[""] * (len(columns) - len(cells))]) for cells in rows]
    return "\n".join([*lines, ""])


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def about(machine: Machine) -> list[str]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers"))
    return [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        _gpu(machine),
        f"Python {platform.python_version()}, {versions}",
        f"`{shlex.join(['python', f'bench/{Path(sys.argv[0]).name}', *sys.argv[1:]])}`",
    ]


def _gpu(machine: Machine) -> str:
    if not machine.on_gpu:
        return f"CPU: {torch.get_num_threads()} threads, {processor()}; figures at toy size say nothing"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    cuda, cudnn = torch.version.cuda, torch.backends.cudnn.version()
    name = torch.cuda.get_device_name(machine.device)
    return f"{name}, {machine.memory_gib:.0f} GiB, driver {driver}, CUDA {cuda}, cuDNN {cudnn}"
