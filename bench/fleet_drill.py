"""Renders on a fleet of pretended GPUs to which everything happens, at random moments.

    python bench/fleet_drill.py [--postgres|--sqlite] [--clips 200] [--quick] [--only PHASE ...] [--soak N]

Two machines are pretended on this one: `alpha` with the server, and `beta`, whose GPUs are slower; the store
is an S3 in memory. Each phase renders a table of its own, so nothing is known of any clip. What counts: no
clip is missing, none is begun again once the store has it, and the lanes stay busy. `--save` adds the table
to bench/results/fleet.md.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))

import fleet_events as events  # noqa: E402
import fleet_meters as meters  # noqa: E402
import httpx  # noqa: E402
from figures import Figure, about, add_section, as_table  # noqa: E402
from fleet_soak import soak  # noqa: E402
from rich.console import Console  # noqa: E402

from flows.postgres import running_postgres  # noqa: E402
from tests.flows.fleet import AVATAR, Fleet, Machine, StubBatch  # noqa: E402
from tests.processes import kill_tree  # noqa: E402

PHASE_S = 900.0
"""After which a render that does not end is given up."""
REPEATS = 4
"""Of a command that ended badly."""
STEP_S = 0.2


@dataclass(frozen=True)
class Sizes:
    clips: int = 200
    denoise_s: float = 0.5
    shard_s: float = 2.0
    times: int = 3
    slowness: float = 1.6
    """Of the GPUs of beta."""


@dataclass(frozen=True)
class Phase:
    name: str
    acts: tuple[events.Act, ...] = ()
    once: bool = False
    renders: int = 1


PHASES = {
    phase.name: phase
    for phase in (
        Phase("calm"),
        Phase("lanes", (events.kill_lane,)),
        Phase("children", (events.kill_child,)),
        Phase("dispatcher", (events.kill_dispatcher,)),
        Phase("server", (events.kill_server,)),
        Phase("postgres", (events.kill_postgres,)),
        Phase("stopped", (events.stop_lane,), once=True),
        Phase("paused", (events.pause_queue,)),
        Phase("joined", (events.join_machine,), once=True),
        Phase("together", (events.kill_lane, events.kill_child), renders=2),
    )
}


class Course:
    """One command, repeated where it ends badly."""

    def __init__(self, drill: "Drill", batch: StubBatch) -> None:
        self.drill, self.batch = drill, batch
        self.starts = 0
        self.cpu_s = 0.0
        self.began_s = time.time()
        self.codes: list[int] = []
        self.start()

    def start(self) -> None:
        here = self.drill.fleet.here
        self.starts += 1
        with self.output.open("ab") as file:
            words = [*AVATAR, *self.batch.words, f"runtime.shard_seconds={self.drill.sizes.shard_s}"]
            self.process = subprocess.Popen(
                words,
                env=here.environment,
                cwd=here.folder,
                stdout=file,
                stderr=file,
                text=True,
                start_new_session=True,
            )
        self.drill.processes.append(self.process)

    @property
    def output(self) -> Path:
        return self.drill.fleet.folder / f"{self.batch.name}.txt"

    def goes_on(self) -> bool:
        """Until the command has ended well, or too often badly; one that ended badly is repeated."""
        code = self.process.poll()
        if code is None:
            self.cpu_s = max(self.cpu_s, meters.cpu_s(self.process.pid, with_children=False))
            return True
        if code == 0 or len(self.codes) >= REPEATS:
            return False
        self.codes.append(code)
        self.start()
        return True

    @property
    def done(self) -> int:
        return len({call.item for call in self.batch.calls("denoise")})

    def watch(self, seconds: float) -> None:
        deadline_s = time.monotonic() + seconds
        while True:
            self.goes_on()
            meters.reap(self.drill.processes)
            if time.monotonic() >= deadline_s:
                return
            time.sleep(min(STEP_S, seconds))


@dataclass
class Drill:
    fleet: Fleet
    store: meters.ObjectStore
    sizes: Sizes
    random: random.Random
    postgres: bool
    processes: "list[subprocess.Popen[str]]" = field(default_factory=list)
    batches: list[StubBatch] = field(default_factory=list)

    @property
    def server_pid(self) -> int:
        return int(json.loads((self.fleet.here.folder / "state" / "server.json").read_text())["pid"])

    @property
    def postgres_pid(self) -> int | None:
        return running_postgres(self.fleet.here.folder / "state")

    def gpus_of(self, machine: Machine) -> int:
        return 1 if machine.name == "gamma" else 2

    def phase(self, phase: Phase) -> Iterator[Figure]:
        """What it found; a render that does not end is one of its findings."""
        times = 1 if phase.once else self.sizes.times
        courses = [self._course(f"{phase.name}-{n}") for n in range(phase.renders)]
        before, waited_s = self._cpu(), meters.waited_for_cpu_s()
        acts = [phase.acts[n % len(phase.acts)] for n in range(times)] if phase.acts else []
        marks = events.moments(self.random, len(acts), self.sizes.clips)
        struck: list[events.Event] = []
        deadline_s = time.monotonic() + PHASE_S
        for mark, act in zip(marks, acts, strict=True):
            while courses[0].done < mark and time.monotonic() < deadline_s:
                for course in courses:
                    course.watch(STEP_S)
            struck.append(act(self, courses[0]))
        # Each is looked at: it may have to be repeated.
        while sum(course.goes_on() for course in courses) and time.monotonic() < deadline_s:
            courses[0].watch(STEP_S)
        wall_s = time.time() - courses[0].began_s
        share = (meters.waited_for_cpu_s() - waited_s) / wall_s
        yield Figure(phase.name, "part of the time in which something waited for a CPU", f"{share:.0%}")
        spent = {name: now - before[name] for name, now in self._cpu().items()}
        for course in courses:
            yield from self._outcome(phase, course, struck)
        yield from self._figures(phase, courses, struck, spent)

    def _course(self, name: str) -> Course:
        batch = self.fleet.batch(
            name, self.sizes.clips, store=self.store.root(name), denoise=self.sizes.denoise_s
        )
        self.batches.append(batch)
        return Course(self, batch)

    def _cpu(self) -> dict[str, float]:
        return {
            "server": meters.cpu_s(self.server_pid),
            "PostgreSQL": meters.cpu_s(self.postgres_pid),
        }

    def _outcome(self, phase: Phase, course: Course, struck: Sequence[events.Event]) -> Iterator[Figure]:
        batch, name = course.batch, course.batch.name
        code = course.process.poll()
        if code is None:
            kill_tree(course.process)
        wall_s = time.time() - course.began_s
        ended = {None: "does not end", 0: "ended well"}.get(code, f"ended with {code}")
        badly = f"; before that with {course.codes}" if course.codes else ""
        happened = ", ".join(f"{e.kind} {e.queue} {' '.join(e.notes)}".strip() for e in struck) or "nothing"
        text = f"{ended}, {course.starts} starts, {wall_s:.0f} s{badly} ({happened})"
        yield Figure(name, "command", text, "ends well", code == 0 and not course.codes)
        missing = batch.rows - meters.published(batch.store, name)
        yield Figure(name, "clips missing", str(missing), "0", missing == 0)
        again = meters.begun_after_commit(batch)
        yield Figure(name, "begun after they were committed", str(len(again)), "0", not again)
        yield Figure(name, "computed more than once", str(sum(n - 1 for n in batch.repeated().values())))

    def _figures(
        self, phase: Phase, courses: Sequence[Course], struck: Sequence[events.Event], spent: dict[str, float]
    ) -> Iterator[Figure]:
        since_s = min(course.began_s for course in courses)
        runs = [r for r in meters.shard_runs(self.fleet.api.shards()) if r.created_s >= since_s]
        found = meters.gaps(runs)
        goal = "0.6 s" if self.postgres else ""
        met = sorted(found)[len(found) // 2] <= 0.6 if found and goal else None
        yield Figure(phase.name, "gap between shards of a busy queue", meters.spread(found), goal, met)
        if phase.name in ("server", "postgres"):
            return  # their processes are others at the end
        ours = {**spent, "dispatcher": sum(course.cpu_s for course in courses)}
        each = ", ".join(f"{name} {seconds / len(runs):.3f}" for name, seconds in ours.items())
        yield Figure(phase.name, f"CPU seconds per shard, {len(runs)} shards", each)
        yield Figure(phase.name, "items by machine", self._split(runs))
        for event in struck:
            if event.queue:
                yield Figure(
                    phase.name, f"{event.kind}, {event.queue}", self._detection(event, runs, courses)
                )

    def _split(self, runs: Sequence[meters.ShardRun]) -> str:
        speeds = {"alpha": 2.0, "beta": 2.0 / self.sizes.slowness, "gamma": 1.0}
        here = {machine.name for machine in self.fleet.machines}
        total = sum(run.items for run in runs if run.state == "COMPLETED") or 1
        whole = sum(speed for name, speed in speeds.items() if name in here)
        parts = []
        for name in sorted(here):
            done = sum(r.items for r in runs if r.queue.startswith(name) and r.state == "COMPLETED")
            parts.append(f"{name} {done / total:.0%} (by speed {speeds[name] / whole:.0%})")
        return ", ".join(parts)

    def _detection(
        self, event: events.Event, runs: Sequence[meters.ShardRun], courses: Sequence[Course]
    ) -> str:
        """Of what was at work on the queue: when its run was closed, when its item was begun again."""
        mine = [r for r in runs if r.queue == event.queue]
        hit = next((r for r in mine if r.start_s < event.at_s <= r.end_s), None)
        closed = f"{hit.state} after {hit.end_s - event.at_s:.1f} s" if hit else "no shard at work"
        lost = [
            begin
            for course in courses
            for begin in course.batch.calls("begin")
            if event.at_s - 3 < begin.start_s <= event.at_s
            and not any(
                c.item == begin.item and c.start_s == begin.start_s for c in course.batch.calls("denoise")
            )
        ]
        later = [
            call.start_s - event.at_s
            for course in courses
            for call in course.batch.calls("begin")
            if call.start_s > event.at_s and call.item in {begin.item for begin in lost}
        ]
        back = [r.start_s - event.at_s for r in mine if r.start_s > event.at_s]
        words = [closed]
        words += [f"its item begun again after {min(later):.1f} s"] if later else []
        words += [f"the queue's next shard after {min(back):.1f} s"] if back else []
        return "; ".join(words)


@contextmanager
def drill_in(folder: Path, sizes: Sizes, seed: int, *, postgres: bool) -> Iterator[Drill]:
    store = meters.ObjectStore(folder / "moto.log")
    os.environ["STUB_GUESS_S"] = str(sizes.denoise_s)
    fleet = Fleet(folder)
    drill = Drill(fleet, store, sizes, random.Random(seed), postgres)
    try:
        fleet.up(2, *(["--postgres"] if postgres else []))
        fleet.join("beta", 2, STUB_SLOWNESS=str(sizes.slowness))
        yield drill
    finally:
        for process in drill.processes:
            if process.poll() is None:
                kill_tree(process)
        with suppress(Exception):
            fleet.close()
        store.process.kill()
        store.process.wait()


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    meters.adopt_orphans()
    console, figures = Console(width=180), list[Figure]()
    clips, times = (40, 2) if options.quick else (200, 3)
    sizes = Sizes(options.clips or clips, options.seconds_of_items, options.seconds_of_shards, times)
    with tempfile.TemporaryDirectory(prefix="fleet-") as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for figure in found(options, folder, sizes):
                figures.append(figure)
                console.print(f"{figure.test}  {figure.what}: {figure.value}", soft_wrap=True)
        finally:
            left = meters.end_all()
    if left:
        figures.append(Figure("end", "processes left", str(len(left)), "0", False))
    lines = about(f"seed {options.seed}, {sizes}")
    console.print(as_table(figures))
    console.print("\n".join(lines), highlight=False)
    if options.save:
        title = f"{'SQLite' if options.sqlite else 'PostgreSQL'}, {time.strftime('%Y-%m-%d %H:%M')}"
        add_section(ROOT / "bench" / "results" / "fleet.md", title, figures, lines)


def found(options: argparse.Namespace, folder: Path, sizes: Sizes) -> Iterator[Figure]:
    names = [name for name in options.only if not (options.sqlite and name == "postgres")]
    if names:
        drill_folder = folder / "drill"
        drill_folder.mkdir()
        with drill_in(drill_folder, sizes, options.seed, postgres=not options.sqlite) as drill:
            for name in names:
                try:
                    yield from drill.phase(PHASES[name])
                except (AssertionError, OSError, httpx.HTTPError, subprocess.SubprocessError) as error:
                    yield Figure(name, "the phase broke off", " ".join(str(error).split())[-300:], "", False)
            counts = meters.loads(drill.batches)
            most = max(counts.values(), default=0)
            yield Figure("all", "model loads per child process, at most", str(most), "1", most <= 1)
    if options.soak:
        yield from soak(folder / "soak", options.soak, postgres=not options.sqlite)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    database = parser.add_mutually_exclusive_group()
    database.add_argument("--postgres", action="store_true", help="the default")
    database.add_argument("--sqlite", action="store_true")
    parser.add_argument("--clips", type=int, help="of each phase")
    parser.add_argument("--seconds-of-items", type=float, default=Sizes.denoise_s)
    parser.add_argument("--seconds-of-shards", type=float, default=Sizes.shard_s)
    parser.add_argument("--quick", action="store_true", help="40 clips, two events of each kind, no soak")
    parser.add_argument("--only", nargs="*", choices=PHASES, default=list(PHASES), metavar="PHASE")
    parser.add_argument("--soak", type=int, help="GPU shards in a row on one lane; 2000 if not given")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="add the table to bench/results/fleet.md")
    parser.add_argument("--folder", type=Path, help="work here and leave everything; must be absent or empty")
    options = parser.parse_args()
    if options.soak is None:
        options.soak = 0 if options.quick else 2000
    return options


if __name__ == "__main__":
    main()
