"""What it costs to run stages as a flow: overhead, what a kill repeats, how busy a GPU is, large tables,
and what a server costs.

    python bench/orchestration.py [--quick] [--only A B C D E] [--save] [--folder DIR]

The stages are stubs (stub_backend.py) on small real pictures and recordings, one pretend GPU queue beside
the CPU queues; a bare loop and a Prefect flow with a task per row and stage (yardsticks.py) run beside them.
CPU seconds are those of the whole process tree. `--save` adds the table to bench/results/orchestration.md.
"""

import argparse
import ctypes
import os
import resource
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import wave
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from figures import Figure, about, add_section, as_table
from PIL import Image
from rich.console import Console
from with_server import ServedSizes, with_server
from yardsticks import assets, pairs

from avatar_core.planning.runs import list_runs, plan_stages, read_plan
from avatar_core.store.catalog import load_catalog
from avatar_core.store.storage import Storage
from flows.server import start_server, stop_server

HERE = Path(__file__).resolve().parent
AVATAR = [sys.executable, "-c", "import stub_backend; from flows.cli import main; main()"]
YARDSTICK = [sys.executable, str(HERE / "yardsticks.py")]
OPTIONS = [
    "backend=stub",
    "face.required=false",
    "runtime.gpus=[0]",
    "runtime.pretend=true",
    "runtime.cpus=2",
]
MILLISECONDS_C = (20, 40, 20)

POLL_S = 0.05
END_TIMEOUT_S = 30.0
SIDE, SAMPLE_RATE, DURATION_S = 64, 16_000, 0.2
_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

Seconds = tuple[float, float, float]
"""Of a call of prep (audio, reference), denoise, decode."""


@dataclass(frozen=True)
class Usage:
    """`cpu_s` of a process and all that it started, `peak_bytes` of the process alone."""

    cpu_s: float
    wall_s: float
    peak_bytes: int
    started_s: float


@dataclass(frozen=True)
class Sizes:
    """Numbers of rows."""

    overhead: tuple[int, int] = (500, 10_000)
    prefect: tuple[int, int] = (50, 200)
    crash: int = 200
    pipelining: int = 200
    pipelining_runs: int = 3
    large: int = 100_000
    served: ServedSizes = field(default_factory=ServedSizes)


QUICK = Sizes((20, 200), (10, 40), 40, 40, 1, 2000, ServedSizes(((5.0, 12),), 1))


# --- processes


class Machine:
    """Runs commands in `folder`, each in an environment of their own with one Prefect database for all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.finished: dict[int, tuple[StubBatch, Usage]] = {}
        """Batches of stubs without work and what they took, by number of rows."""
        self._kept: set[int] = set()
        paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        self.environment = {
            **clean,
            "PREFECT_HOME": str(folder / "prefect"),
            "AVATAR_STATE_DIR": str(folder / "state"),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        # What loses its parent becomes our child: so its time is counted, and it can be ended.
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1)
        if (
            sys.dont_write_bytecode
        ):  # an installed package has its bytecode: every start would compile it anew
            self.environment["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
            del self.environment["PYTHONDONTWRITEBYTECODE"]
            modules = "stub_backend, avatar_core.execution.child, flows.render"
            self.run([sys.executable, "-c", f"import {modules}"])

    def run(self, command: Sequence[str], kill_when: Callable[[], bool] = lambda: False) -> Usage:
        """Raises `RuntimeError` with the end of the output unless it ends well or is killed on purpose."""
        output = self.folder / "output.txt"
        before, started_s, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.time(), 0
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, env=self.environment, cwd=self.folder, stdout=file, stderr=subprocess.STDOUT
            )
        killed = False
        while process.poll() is None:
            peak = max(peak, _peak_bytes(process.pid))
            if not killed and kill_when():
                killed = True
                _kill(_descendants(process.pid) | {process.pid})
            time.sleep(POLL_S)
        wall_s = time.time() - started_s
        self._reap()
        if process.returncode and not killed:
            text = output.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{shlex.join(command)} ended with {process.returncode}:\n{text}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Usage(cpu_s, wall_s, peak, started_s)

    def _reap(self) -> None:
        """Waits for what the command left behind."""
        deadline_s = time.monotonic() + END_TIMEOUT_S
        while left := _children(os.getpid()) - self._kept:
            if time.monotonic() > deadline_s:
                _kill(left)
            for pid in left:
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(POLL_S)

    @contextmanager
    def server(self) -> Iterator[None]:
        """A Prefect server that the commands within use."""
        os.environ["AVATAR_STATE_DIR"] = self.environment["AVATAR_STATE_DIR"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server, _ = start_server(port=port)
        self._kept.add(server.pid)
        self.environment["PREFECT_API_URL"] = server.api_url
        try:
            yield
        finally:
            del self.environment["PREFECT_API_URL"]
            reaper = threading.Thread(target=os.waitpid, args=(server.pid, 0))
            reaper.start()
            stop_server()
            reaper.join()
            self._kept.clear()


def _peak_bytes(pid: int) -> int:
    with suppress(OSError, IndexError):
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return 0


def _children(pid: int) -> set[int]:
    found: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found.update(map(int, path.read_text().split()))
    return found


def _descendants(pid: int) -> set[int]:
    children = _children(pid)
    return children.union(*map(_descendants, children))


def _kill(pids: set[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# --- batches


class StubBatch:
    """A table of `rows` rows with its store, its options and the log of its calls."""

    def __init__(
        self, machine: Machine, name: str, rows: int, seconds: Seconds = (0, 0, 0), *options: str
    ) -> None:
        self.machine = machine
        self.folder = machine.folder / name
        self.folder.mkdir()
        self.rows, self.seconds = rows, seconds
        self.storage = Storage(str(self.folder / "store"))
        self._options = options
        self._write_table()
        self._write_config()

    def render(self, kill_when: Callable[[], bool] = lambda: False) -> Usage:
        words = ["render", "table.csv", "--config-dir", "conf", *OPTIONS, *self._options]
        paths = [str(self.folder / word) if word in ("table.csv", "conf") else word for word in words]
        return self.machine.run([*AVATAR, *paths, f"storage.root={self.folder / 'store'}"], kill_when)

    def _write_table(self) -> None:
        pictures, recordings = assets(self.rows)
        for number in range(pictures):
            color = (number % 256, number // 256, 128)
            Image.new("RGB", (SIDE, SIDE), color).save(self.folder / f"{number}.png")
        for number in range(recordings):
            _write_recording(self.folder / f"{number}.wav", 200 + number)
        lines = [f"row-{n},{picture}.png,{sound}.wav" for n, (picture, sound) in enumerate(pairs(self.rows))]
        (self.folder / "table.csv").write_text("\n".join(["name,image,audio", *lines, ""]))

    def _write_config(self) -> None:
        prep, denoise, decode = self.seconds
        by_stage = {"audio": prep, "reference": prep, "denoise": denoise, "decode": decode}
        values = {stage: {"seconds": seconds} for stage, seconds in by_stage.items()}
        file = self.folder / "conf" / "backend" / "stub.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(yaml.safe_dump({"name": "stub", "log": str(self.folder / "calls.log"), **values}))


def read_calls(folder: Path, stage: str | None = None) -> pd.DataFrame:
    """Calls so far: item, start_s, end_s."""
    names = ["stage", "item", "start_s", "end_s"]
    (folder / "calls.log").touch()
    calls = pd.read_csv(folder / "calls.log", sep=" ", names=names, dtype={"item": str})
    return calls[calls["stage"] == stage] if stage else calls


def _write_recording(path: Path, frequency: float) -> None:
    phase = 2 * np.pi * frequency * np.arange(int(DURATION_S * SAMPLE_RATE)) / SAMPLE_RATE
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes((8000 * np.sin(phase)).astype(np.int16).tobytes())


def yardstick(machine: Machine, runner: str, name: str, rows: int, seconds: Seconds = (0, 0, 0)) -> Usage:
    folder = machine.folder / f"{runner}-{name}"
    words = [runner, str(folder), "--rows", str(rows), "--seconds", *map(str, seconds)]
    return machine.run([*YARDSTICK, *words])


# --- tests


def overhead(machine: Machine, sizes: Sizes) -> Iterator[Figure]:
    """A: what a row and stage costs, and what a run costs beside its rows."""
    first = StubBatch(machine, "first", 1)
    yield Figure("A", "one row, new Prefect database", _start(first, first.render()))
    again = StubBatch(machine, "again", 1)
    start = again.render()
    yield Figure("A", "one row, existing database", _start(again, start), "12 s", start.wall_s <= 12)

    flow, bare = [], []
    for rows in sizes.overhead:
        batch, usage = _rendered(machine, rows)
        flow.append(usage)
        yield Figure("A", f"{rows} rows", _usage(usage))
        yield Figure("A", f"{rows} rows again, nothing to do", _usage(batch.render()))
        bare.append(yardstick(machine, "bare", f"overhead-{rows}", rows))
        yield Figure("A", f"{rows} rows, bare loop", _usage(bare[-1]))
    steps = 2 * (sizes.overhead[1] - sizes.overhead[0])
    flow_ms, bare_ms = ((runs[1].cpu_s - runs[0].cpu_s) / steps * 1e3 for runs in (flow, bare))
    yield Figure("A", "CPU per row and stage, bare loop", f"{bare_ms:.2f} ms")
    above_ms = flow_ms - bare_ms
    yield Figure("A", "CPU per row and stage, above it", f"{above_ms:.2f} ms", "1 ms", above_ms <= 1)

    few, many = (yardstick(machine, "prefect", f"overhead-{rows}", rows) for rows in sizes.prefect)
    tasks = [2 * rows + sum(assets(rows)) for rows in sizes.prefect]
    prefect_ms = (many.cpu_s - few.cpu_s) / (tasks[1] - tasks[0]) * 1e3
    what = f"CPU per Prefect task, task per row and stage, {sizes.prefect[1]} rows"
    yield Figure("A", what, f"{prefect_ms:.1f} ms")


def crash(machine: Machine, sizes: Sizes) -> Iterator[Figure]:
    """B: what is done twice after a kill of everything in mid-run."""
    rows = sizes.crash
    batch = StubBatch(machine, "crash", rows, (0.005, 0.02, 0.005))
    batch.render(kill_when=lambda: len(read_calls(batch.folder, "denoise")) >= rows // 2)
    called = list(read_calls(batch.folder, "denoise")["item"])
    committed = set(load_catalog(batch.storage, "denoise").table["seed"].cast("string").to_pylist())
    batch.render()
    again = list(read_calls(batch.folder, "denoise")["item"])[len(called) :]
    yield Figure("B", f"gpu calls before the kill, of {rows}", f"{len(called)}, {len(committed)} committed")
    repeated = len(committed.intersection(again))
    yield Figure("B", "committed gpu calls repeated", str(repeated), "0", repeated == 0)
    in_flight = len(set(called).intersection(again)) - repeated
    yield Figure("B", "gpu calls in flight repeated", str(in_flight))
    complete = len(set(read_calls(batch.folder, "decode")["item"])) == rows
    yield Figure(
        "B",
        "clips in the end",
        str(len(set(read_calls(batch.folder, "decode")["item"]))),
        str(rows),
        complete,
    )


def pipelining(machine: Machine, sizes: Sizes) -> Iterator[Figure]:
    """C: how busy one pretend GPU is, and when the first clip is there."""
    rows, (prep_s, denoise_s, decode_s) = sizes.pipelining, (ms / 1e3 for ms in MILLISECONDS_C)
    seconds = (prep_s, denoise_s, decode_s)
    shares, firsts, limits = [], [], []
    # A call takes a little longer than it says, and a shard of 8 must hold 8.
    for number in range(sizes.pipelining_runs):
        batch = StubBatch(
            machine, f"pipe-{number}", rows, seconds, f"runtime.shard_seconds={8.8 * denoise_s}"
        )
        batch.render()
        shares.append(_busy_share(read_calls(batch.folder, "denoise")))
        first_s, own_s = _first_clip(batch)
        firsts.append(first_s)
        limits.append(1.1 * own_s + 0.5)
    share = statistics.median(shares)
    text = f"{share:.1%} (of {', '.join(f'{each:.1%}' for each in shares)})"
    yield Figure("C", f"GPU busy, {rows} rows, shards of 8", text, "97.5 %", share >= 0.975)
    first_s, limit_s = statistics.median(firsts), statistics.median(limits)
    yield Figure(
        "C", "first clip, after its files", f"{first_s:.2f} s", f"{limit_s:.2f} s", first_s <= limit_s
    )
    for runner in ("bare", "prefect"):
        usage = yardstick(machine, runner, "pipelining", rows, seconds)
        folder = machine.folder / f"{runner}-pipelining"
        denoised, decoded = read_calls(folder, "denoise"), read_calls(folder, "decode")
        begin_s, end_s = read_calls(folder, "prep")["start_s"].min(), decoded["end_s"].max()
        first = decoded["end_s"].min() - begin_s
        text = (
            f"GPU busy {_busy_share(denoised):.1%}, first clip after {first:.2f} of {end_s - begin_s:.1f} s"
        )
        name = {"bare": "bare loop", "prefect": "Prefect, task per row and stage"}[runner]
        yield Figure("C", f"{name} ({usage.cpu_s:.1f} CPU s)", text)


def large(machine: Machine, sizes: Sizes) -> Iterator[Figure]:
    """D: a large table, and finding that nothing is left to do."""
    peaks = {}
    for rows in (sizes.large // 10, sizes.large):
        batch, usage = _rendered(machine, rows)
        peaks[rows] = usage.peak_bytes
        yield Figure("D", f"{rows} rows", _usage(usage))
    peak = peaks[sizes.large]
    yield Figure("D", "peak memory of the coordinator", f"{peak / 1e6:.0f} MB", "500 MB", peak <= 500e6)
    per_row = (peak - peaks[sizes.large // 10]) / (sizes.large * 0.9)
    yield Figure("D", "memory per row between the two", f"{per_row:.0f} B", "1000 B", per_row <= 1000)
    again = batch.render()
    yield Figure("D", f"{sizes.large} rows again, nothing to do", _usage(again), "10 s", again.wall_s < 10)


def served(machine: Machine, sizes: Sizes) -> Iterator[Figure]:
    """E: what a server and its queues cost."""
    yield from with_server(machine.folder / "served", sizes.served)


def _rendered(machine: Machine, rows: int) -> tuple[StubBatch, Usage]:
    if rows not in machine.finished:
        batch = StubBatch(machine, f"rows-{rows}", rows)
        machine.finished[rows] = batch, batch.render()
    return machine.finished[rows]


def _busy_share(calls: pd.DataFrame) -> float:
    """The part of the time from the first call's start to the last one's end that calls take."""
    busy_s = (calls["end_s"] - calls["start_s"]).sum()
    return float(busy_s / (calls["end_s"].max() - calls["start_s"].min()))


def _first_clip(batch: StubBatch) -> tuple[float, float]:
    """Seconds from when its files were taken in to the first finished clip, and those of its own stages."""
    manifests = batch.storage.list("stages/ingest/manifests").values()
    ingested_s = sorted(info.mtime for info in manifests)[1]  # a picture and a recording
    first = read_calls(batch.folder, "decode").sort_values("end_s").iloc[0]
    clips = read_plan(batch.storage, list_runs(batch.storage)[-1]).set_index("decode_key", drop=False)
    clip = clips.loc[first["item"]]
    rows = [load_catalog(batch.storage, stage).get(clip[f"{stage}_key"]) for stage in plan_stages(clips)]
    return first["end_s"] - ingested_s, sum(row["seconds"] for row in rows if row)


def _start(batch: StubBatch, usage: Usage) -> str:
    called_s = read_calls(batch.folder)["start_s"].min() - usage.started_s
    return f"{usage.wall_s:.1f} s, first call after {called_s:.1f} s, {usage.cpu_s:.1f} CPU s"


def _usage(usage: Usage) -> str:
    return f"{usage.cpu_s:.1f} CPU s, {usage.wall_s:.1f} s, peak {usage.peak_bytes / 1e6:.0f} MB"


# --- results

TESTS = {"A": overhead, "B": crash, "C": pipelining, "D": large, "E": served}
WITH_SERVER = ("B", "C")
"""E has one of its own, the others run without."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="everything at small sizes, in two minutes")
    parser.add_argument("--only", nargs="+", choices=TESTS, default=list(TESTS), metavar="TEST")
    parser.add_argument("--save", action="store_true", help="add the table to bench/results")
    parser.add_argument("--folder", type=Path, help="work here and leave everything; must be absent or empty")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="orchestration-") as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        machine, figures = Machine(folder), []
        for name in options.only:
            with machine.server() if name in WITH_SERVER else nullcontext():
                for figure in TESTS[name](machine, QUICK if options.quick else Sizes()):
                    figures.append(figure)
                    console.print(
                        f"{figure.test}  {figure.what}: {figure.value}", style="dim", soft_wrap=True
                    )
    console.print(as_table(figures))
    console.print("\n".join(about()), highlight=False)
    if options.save:
        path = HERE / "results" / "orchestration.md"
        add_section(path, f"Tests {', '.join(options.only)}, {datetime.now(UTC):%Y-%m-%d}", figures, about())
        console.print(f"kept in {path}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
