"""What a server with its queues costs: how busy pretended GPUs are, how much longer a small batch takes."""

import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from figures import Figure

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from tests.flows.fleet import Fleet, StubBatch, fleet_in

GPUS = 2
GOALS = {60.0: 0.99, 5.0: 0.88}
"""Of the time that a GPU is busy, by the seconds of a shard."""
MORE_S = 6.0
SMALL = 8
"""Rows."""


@dataclass(frozen=True)
class ServedSizes:
    """`busy`: seconds of each shard, which is an item, and how many of them."""

    busy: tuple[tuple[float, int], ...] = ((60.0, 8), (5.0, 40))
    repeats: int = 3


def with_server(folder: Path, sizes: ServedSizes) -> Iterator[Figure]:
    folder.mkdir()
    for seconds, shards in sizes.busy:
        os.environ["STUB_GUESS_S"] = str(seconds)  # else the first shards would hold many items
        try:
            yield _busy(folder / f"busy-{seconds:g}", seconds, shards)
        finally:
            del os.environ["STUB_GUESS_S"]
    with fleet_in(folder / "small", GPUS, "--postgres") as fleet:
        yield from _small(fleet, sizes.repeats)


def _busy(folder: Path, seconds: float, shards: int) -> Figure:
    with fleet_in(folder, GPUS, "--postgres") as fleet:
        batch = fleet.batch("busy", shards, denoise=seconds)
        batch.render(f"runtime.shard_seconds={seconds}")
    share = _busy_share(batch)
    goal = GOALS.get(seconds)
    what = f"GPUs busy, {shards} shards of {seconds:g} s on {GPUS} queues"
    return Figure("E", what, f"{share:.1%}", f"{goal:.0%}" if goal else "", share >= goal if goal else None)


def _busy_share(batch: StubBatch) -> float:
    """From the first call of each GPU to its last: which call was on which does not matter for that."""
    calls = batch.calls("denoise")
    starts, ends = sorted(call.start_s for call in calls), sorted(call.end_s for call in calls)
    return sum(call.end_s - call.start_s for call in calls) / (sum(ends[-GPUS:]) - sum(starts[:GPUS]))


def _small(fleet: Fleet, repeats: int) -> Iterator[Figure]:
    """In turn, so that whatever else slows the machine slows both."""
    served = fleet.here
    state = {"AVATAR_STATE_DIR": str(fleet.folder / "nobody")}
    alone = replace(served, environment={**served.environment, **state})
    took: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(repeats + 1):  # the first warms up
        for kind, machine in (("with", served), ("without", alone)):
            batch = fleet.batch(f"{kind}-{number}", SMALL)
            options = ["runtime.gpus=[0,1]", "runtime.pretend=true"] if kind == "without" else []
            began_s = time.monotonic()
            machine.run(*batch.words, *options, "runtime.cpus=2")
            took[kind].append(time.monotonic() - began_s)
    medians = {kind: statistics.median(times[1:]) for kind, times in took.items()}
    more_s = medians["with"] - medians["without"]
    text = f"{medians['with']:.1f} s, without {medians['without']:.1f} s: {more_s:.1f} s more"
    yield Figure("E", f"{SMALL} rows with a server", text, f"{MORE_S:g} s more", more_s <= MORE_S)
