"""Shard after shard on one lane: whether the processes grow."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import fleet_meters as meters
from figures import Figure

from flows.postgres import running_postgres
from tests.flows.fleet import Fleet, fleet_in
from tests.processes import kill_tree

EVERY_S = 1.0
PATIENCE_S = 3.0
"""For each shard."""
GROWTH_MB = 10.0
"""Per thousand shards, in the second half: more is no noise."""

Sample = tuple[int, dict[str, float]]
"""Shards done so far, and megabytes of each process."""


def soak(folder: Path, shards: int, *, postgres: bool) -> Iterator[Figure]:
    folder.mkdir()
    with fleet_in(folder, 1, *(["--postgres"] if postgres else [])) as fleet:
        began_s = time.time()
        code, samples = _rendered(fleet, shards)
        runs = meters.shard_runs(fleet.api.shards())
        wall_s = time.time() - began_s
        text = f"ended with {code}, {len(runs)} shards in {wall_s:.0f} s"
        yield Figure("soak", f"one lane, {shards} items of no work, each a shard", text, "0", code == 0)
        yield Figure("soak", "gap between shards", meters.spread(meters.gaps(runs)))
        for name in samples[-1][1] if samples else ():
            yield _growth(name, samples)


def _rendered(fleet: Fleet, shards: int) -> tuple[int | None, list[Sample]]:
    batch = fleet.batch("soak", shards, denoise=0)
    samples: list[Sample] = []
    with (fleet.folder / "soak.txt").open("wb") as output:
        process = fleet.here.avatar(
            *batch.words[0:], "runtime.shard_seconds=0.0001", "runtime.cpus=1", output=output
        )
    deadline_s = time.monotonic() + 60 + PATIENCE_S * shards
    try:
        while process.poll() is None and time.monotonic() < deadline_s:
            samples.append((len(batch.calls("denoise")), _sizes(fleet, process)))
            time.sleep(EVERY_S)
        return process.poll(), samples[:-1]
    finally:
        if process.poll() is None:
            kill_tree(process)


def _sizes(fleet: Fleet, process: "subprocess.Popen[str]") -> dict[str, float]:
    state = fleet.here.folder / "state"
    pids = {
        "lane": fleet.here.lane(0),
        "child": fleet.here.child(0),
        "dispatcher": process.pid,
        "server": int(json.loads((state / "server.json").read_text())["pid"]),
        "PostgreSQL": running_postgres(state),
    }
    return {name: meters.rss_mb(pid) for name, pid in pids.items() if pid}


def _growth(name: str, samples: list[Sample]) -> Figure:
    """From the middle to the end, when all that is loaded once has been."""
    at_work = [(done, sizes[name]) for done, sizes in samples if done and name in sizes]
    first, middle, last = at_work[0], at_work[len(at_work) // 2], at_work[-1]
    per_thousand = (last[1] - middle[1]) / max(last[0] - middle[0], 1) * 1000
    text = " -> ".join(f"{mb:.0f} MB ({done})" for done, mb in (first, middle, last))
    return Figure(
        "soak",
        f"memory of the {name} (after so many shards)",
        f"{text}; {per_thousand:+.1f} MB per 1000 shards in the second half",
        f"{GROWTH_MB:g} MB",
        per_thousand <= GROWTH_MB,
    )
