"""What a drill reads: processes, flow runs of the server, calls in a batch's log, commits in a store."""

import ctypes
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from avatar_core.store.manifest import manifest_folder, read_parquet
from avatar_core.store.storage import Storage
from flows.names import items_in
from tests.flows.conftest import free_port
from tests.flows.fleet import StubBatch
from tests.processes import descendants, exists, until

TICKS = os.sysconf("SC_CLK_TCK")
COMMIT_S = 0.3
"""A manifest has its name, which tells the time, before it is written."""
_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_BUCKET = "drill"


# --- processes


def adopt_orphans() -> None:
    """What loses its parent becomes ours, so that it can be ended."""
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1)


def reap(kept: Iterable["subprocess.Popen[Any]"]) -> None:
    """Orphans that have ended; a drill would take them for processes else."""
    ours = {process.pid for process in kept}
    for path in Path("/proc/self/task").glob("*/children"):
        for pid in map(int, path.read_text().split()):
            if pid not in ours and not exists(pid):
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)


def end_all() -> list[int]:
    """Kills whatever is left of what this process started."""
    left = [pid for pid in descendants(os.getpid()) if exists(pid)]
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return left


def cpu_s(pid: int | None, *, with_children: bool = True) -> float:
    """Of a process, and of all that it started."""
    if pid is None:
        return 0.0
    tree = [pid, *descendants(pid)] if with_children else [pid]
    ticks = 0
    for each in tree:
        with suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11 : 15 if with_children else 13]))
    return ticks / TICKS


def waited_for_cpu_s() -> float:
    """For how long something on this machine has wanted to run and could not; 0 where the kernel does not
    tell. Where that is most of the time, seconds say little."""
    with suppress(OSError):
        line = Path("/proc/pressure/cpu").read_text().partition("\n")[0]
        return int(line.rpartition("total=")[2]) / 1e6
    return 0.0


def rss_mb(pid: int | None) -> float:
    with suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024
    return float("nan")


# --- the store


class ObjectStore:
    """An S3 that keeps its objects in memory, in a process of its own; clients find it by the environment."""

    def __init__(self, log: Path) -> None:
        self.endpoint = f"http://127.0.0.1:{free_port()}"
        credentials = {"AWS_ACCESS_KEY_ID": "drill", "AWS_SECRET_ACCESS_KEY": "drill"}
        place = {"AWS_ENDPOINT_URL": self.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ.update({**credentials, **place})
        words = [
            sys.executable,
            "-m",
            "moto.server",
            "-H",
            "127.0.0.1",
            "-p",
            self.endpoint.rpartition(":")[2],
        ]
        with log.open("wb") as file:
            self.process = subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True)
        until(self._has_bucket, [self.process], every_s=0.2)

    def root(self, name: str) -> str:
        return f"s3://{_BUCKET}/{name}"

    def _has_bucket(self) -> bool:
        import boto3

        with suppress(Exception):  # not up yet
            boto3.client("s3").create_bucket(Bucket=_BUCKET)
            return True
        return False


def commits(root: str) -> dict[str, float]:
    """When each clip was first committed by the GPU stage, by its seed."""
    storage, found = Storage(root), dict[str, float]()
    for path in storage.list(manifest_folder("denoise")):
        attempt = path.rpartition("/")[2].replace("-", "")
        committed_s = int(attempt[:12], 16) / 1000  # a UUIDv7
        for row in read_parquet(storage.read_bytes(path)).to_pylist():
            if row["status"] == "ok":
                seed = str(row["seed"])
                found[seed] = min(found.get(seed, committed_s), committed_s)
    return found


def published(root: str, name: str) -> int:
    """Clips that are well in the dataset."""
    storage = Storage(root)
    path = f"datasets/{name}/metadata.parquet"
    if not storage.exists(path):
        return 0
    return int((pd.read_parquet(BytesIO(storage.read_bytes(path)))["status"] == "ok").sum())


def begun_after_commit(batch: StubBatch) -> list[str]:
    """Items that a child began although the store had them."""
    known = commits(batch.store)
    begun = batch.calls("begin")
    return [call.item for call in begun if call.start_s > known.get(call.item, float("inf")) + COMMIT_S]


def loads(batches: Iterable[StubBatch]) -> Counter[str]:
    """Of models, by the process that did it."""
    return Counter(call.item for batch in batches for call in batch.calls("load"))


# --- flow runs


@dataclass(frozen=True)
class ShardRun:
    queue: str
    state: str
    items: int
    created_s: float
    start_s: float
    end_s: float


def shard_runs(runs: Sequence[Mapping[str, Any]]) -> list[ShardRun]:
    """Those that began, in the order in which they did."""
    found = [
        ShardRun(
            run["work_queue_name"],
            run["state_type"],
            items_in(run["name"]),
            _epoch(run["created"]),
            _epoch(run["start_time"]),
            _epoch(run["end_time"]),
        )
        for run in runs
        if run["start_time"] and run["start_time"] != run["end_time"]  # else taken back before it began
    ]
    return sorted(found, key=lambda run: run.start_s)


def gaps(runs: Sequence[ShardRun]) -> list[float]:
    """Between a shard and the next one of its queue, where that was waiting already."""
    by_queue = defaultdict(list)
    for run in runs:
        by_queue[run.queue].append(run)
    return [
        later.start_s - earlier.end_s
        for queue in by_queue.values()
        for earlier, later in pairwise(queue)
        if later.created_s < earlier.end_s and earlier.state == "COMPLETED"
    ]


def busy_shares(runs: Sequence[ShardRun]) -> dict[str, float]:
    """Of each queue, the part of the time from its first shard to its last one's end that shards take."""
    by_queue = defaultdict(list)
    for run in runs:
        by_queue[run.queue].append(run)
    return {
        name: sum(run.end_s - run.start_s for run in queue) / (queue[-1].end_s - queue[0].start_s)
        for name, queue in sorted(by_queue.items())
    }


def spread(values: Sequence[float]) -> str:
    if not values:
        return "none"
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return f"median {statistics.median(ordered):.2f} s, p95 {p95:.2f} s (of {len(ordered)})"


def _epoch(stamp: str | None) -> float:
    return datetime.fromisoformat(stamp).timestamp() if stamp else time.time()
