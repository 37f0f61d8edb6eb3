"""A server with lanes of pretended GPUs, and renders of stubs on them: all in processes of their own."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
import wave
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from PIL import Image

from tests.flows.conftest import free_port
from tests.processes import descendants, exists, until

ROOT = Path(__file__).resolve().parents[2]
AVATAR = (sys.executable, "-P", "-m", "flows.cli")
STAGES = ("audio", "reference", "denoise", "decode")
START_S = 180.0


class Call(NamedTuple):
    stage: str
    item: str
    start_s: float
    end_s: float


@dataclass
class Machine:
    """One that serves GPUs under a `name`; several may be pretended on one computer."""

    folder: Path
    name: str
    environment: Mapping[str, str]

    def avatar(self, *words: str, output: Any = subprocess.PIPE) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*AVATAR, *words],
            env=self.environment,
            cwd=self.folder,
            text=True,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            [*AVATAR, *words],
            env=self.environment,
            cwd=self.folder,
            text=True,
            capture_output=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    @property
    def supervisor(self) -> int:
        return int(json.loads((self.folder / "state" / "worker.json").read_text())["pid"])

    def lane(self, number: int) -> int | None:
        """The process of the lane of a GPU."""
        path = self.folder / "state" / "lanes" / f"{self.name}-gpu-{number}"
        with suppress(OSError, ValueError):
            pid = int(path.read_text())
            return pid if exists(pid) else None
        return None

    def child(self, number: int) -> int | None:
        """The process that computes for that lane."""
        lane = self.lane(number)
        return next(iter(descendants(lane)), None) if lane else None


class Api:
    """What a server says."""

    def __init__(self, address: str) -> None:
        self.url = f"{address}/api"

    def post(self, path: str, **body: Any) -> Any:
        for _ in range(40):  # a busy SQLite answers 503
            response = httpx.post(f"{self.url}/{path}", json=body, timeout=90)
            if response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
        response.raise_for_status()
        return response.json() if response.content else None

    def get(self, path: str) -> Any:
        response = httpx.get(f"{self.url}/{path}", timeout=90)
        response.raise_for_status()
        return response.json()

    def runs(self, flow: str, **wanted: Any) -> list[Any]:
        return self._all(
            "flow_runs/filter", flows={"name": {"any_": [flow]}}, sort="START_TIME_ASC", **wanted
        )

    def shards(self, **wanted: Any) -> list[Any]:
        return self.runs("shard", **wanted)

    def run(self, name: str) -> Any:
        found = self.runs("render-dataset", flow_runs={"name": {"like_": name}})
        return found[-1] if found else None

    def tasks(self, run_id: str) -> list[Any]:
        return self._all("task_runs/filter", flow_runs={"id": {"any_": [run_id]}})

    def logs(self, run_id: str) -> list[Any]:
        return self._all("logs/filter", logs={"flow_run_id": {"any_": [run_id]}}, sort="TIMESTAMP_ASC")

    def graph(self, run_id: str) -> dict[str, Any]:
        """By the label of a node those of its parents."""
        nodes = self.get(f"flow_runs/{run_id}/graph-v2")["nodes"]
        label = {number: node["label"] for number, node in nodes}
        return {node["label"]: {label[p["id"]] for p in node["parents"]} for _, node in nodes}

    def queue(self, name: str) -> Any:
        return self.get(f"work_pools/avatar/queues/{name}")

    def pause(self, name: str, paused: bool = True) -> None:
        response = httpx.patch(
            f"{self.url}/work_pools/avatar/queues/{name}", json={"is_paused": paused}, timeout=90
        )
        response.raise_for_status()

    def set_state(self, run_id: str, kind: str, **values: Any) -> Any:
        return self.post(f"flow_runs/{run_id}/set_state", state={"type": kind, **values})

    def _all(self, path: str, **body: Any) -> list[Any]:
        found: list[Any] = []
        while page := self.post(path, **body, limit=200, offset=len(found)):
            found += page
        return found


class Fleet:
    """`here` runs the server and the renders; further machines may `join`."""

    def __init__(self, folder: Path, here: str = "alpha") -> None:
        self.folder = folder
        self.port = free_port()
        options = folder / "conf" / "backend" / "stub.yaml"
        options.parent.mkdir(parents=True)
        lines = ["name: stub", f"log: {os.devnull}", *(f"{stage}: {{seconds: 0}}" for stage in STAGES)]
        options.write_text("\n".join(lines))
        self.here = self.machine(here)
        self.machines = [self.here]
        self.api = Api(f"http://127.0.0.1:{self.port}")
        self.workers: list[subprocess.Popen[str]] = []

    def machine(self, name: str, **more: str) -> Machine:
        folder = self.folder / name
        folder.mkdir()
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "AVATAR_"))}
        paths = [str(ROOT / "bench" / "stub_site"), str(ROOT / "bench"), str(ROOT)]
        ours = {
            "AVATAR_STATE_DIR": str(folder / "state"),
            "AVATAR_LOCK_DIR": str(folder / "locks"),
            "AVATAR_CONFIG_DIR": str(self.folder / "conf"),
            "AVATAR_HOST": name,
            "AVATAR_WEIGHTS": os.environ.get("AVATAR_WEIGHTS", str(self.folder / "weights")),
            "PREFECT_HOME": str(folder / "prefect"),
            "PYTHONPATH": os.pathsep.join(paths),
        }
        return Machine(folder, name, {**clean, **ours, **more})

    def up(self, gpus: int = 2, *options: str) -> None:
        self.here.run("up", "--port", str(self.port), "--pretend-gpus", str(gpus), *options)
        self.wait_for_lanes(self.here, range(gpus))

    def join(self, name: str, gpus: int, **environment: str) -> Machine:
        machine = self.machine(name, PREFECT_API_URL=self.api.url, **environment)
        self.machines.append(machine)
        with (machine.folder / "worker.log").open("ab") as log:  # a pipe that nobody reads would fill up
            self.workers.append(machine.avatar("worker", "--pretend-gpus", str(gpus), output=log))
        self.wait_for_lanes(machine, range(gpus))
        return machine

    def leave(self, name: str) -> None:
        """A machine that joined stops, and is forgotten."""
        machine = next(each for each in self.machines if each.name == name)
        machine.run("down")
        self.here.run("worker", "--remove", name)

    def wait_for_lanes(self, machine: Machine, numbers: Iterator[int] | range) -> None:
        """Until each has said what it is."""
        for number in numbers:
            until(
                lambda n=number: self._is_served(f"{machine.name}-gpu-{n}"), patience_s=START_S, every_s=0.2
            )

    def _is_served(self, queue: str) -> bool:
        with suppress(httpx.HTTPError):
            info = self.api.queue(queue)["description"] or ""
            beats = self.api.post("work_pools/avatar/workers/filter")
            return any(worker["name"] in info for worker in beats)
        return False

    def halt(self, number: int, processes: "Sequence[subprocess.Popen[Any]]" = ()) -> int:
        """The lane of that GPU here, halted (SIGSTOP) with a shard at work, which might else end before what
        is done to it."""
        return until(lambda: self._halted(number), processes, patience_s=START_S, every_s=0.3)

    def _halted(self, number: int) -> int | None:
        if lane := self.here.lane(number):
            os.kill(lane, signal.SIGSTOP)
            time.sleep(0.5)  # for what it has just told the server
            running = {"state": {"type": {"any_": ["RUNNING"]}}}
            queue = {"name": {"any_": [f"{self.here.name}-gpu-{number}"]}}
            if self.api.shards(flow_runs=running, work_pool_queues=queue):
                return lane
            os.kill(lane, signal.SIGCONT)
        return None

    def close(self) -> None:
        for machine in self.machines:
            for number in range(16):
                if pid := machine.lane(number):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
        for worker in self.workers:
            with suppress(ProcessLookupError):
                worker.terminate()
                worker.terminate()
        self.here.run("down", "--now")
        for worker in self.workers:
            try:
                worker.wait(30)
            except subprocess.TimeoutExpired:
                worker.kill()

    # --- batches of stubs

    def batch(self, name: str, rows: int, *, store: str = "", log: str = "", **seconds: float) -> "StubBatch":
        root = store or str(self.folder / "store")
        return StubBatch(self, name, rows, root, self.folder / f"{log or name}.log", seconds)


class StubBatch:
    """A table of `rows` rows, of which each has a clip of its own; `seconds` are those of each stage."""

    def __init__(
        self, fleet: Fleet, name: str, rows: int, store: str, log: Path, seconds: Mapping[str, float]
    ) -> None:
        self.fleet, self.name, self.rows, self.store, self.log = fleet, name, rows, store, log
        self.table = fleet.folder / f"{name}.csv"
        picture, sound = fleet.folder / "picture.png", fleet.folder / "sound.wav"
        if not picture.exists():
            Image.new("RGB", (64, 64), (9, 99, 199)).save(picture)
            _write_sound(sound)
        with self.table.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["name", "image", "audio", "seed"])
            first = zlib.crc32(name.encode()) * 1000  # no two batches share a clip
            table.writerows([f"{name}-{n}", picture, sound, first + n] for n in range(rows))
        self._options = [f"backend.{stage}.seconds={value}" for stage, value in seconds.items()]

    @property
    def words(self) -> list[str]:
        options = [
            f"storage.root={self.store}",
            f"backend.log={self.log}",
            "face.required=false",
            *self._options,
        ]
        return ["render", str(self.table), "backend=stub", *options]

    def start(self, *options: str) -> "subprocess.Popen[str]":
        return self.fleet.here.avatar(*self.words, *options)

    def render(self, *options: str, code: int = 0) -> str:
        return self.fleet.here.run(*self.words, *options, code=code)

    def calls(self, stage: str) -> list[Call]:
        if not self.log.exists():
            return []
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return [Call(s, item, float(a), float(b)) for s, item, a, b in lines if s == stage]

    def repeated(self, stage: str = "denoise") -> dict[str, int]:
        """Items that were computed more than once, and how often."""
        return {item: n for item, n in Counter(call.item for call in self.calls(stage)).items() if n > 1}

    @property
    def run(self) -> Any:
        return self.fleet.api.run(self.name)


def _write_sound(path: Path) -> None:
    phase = 2 * np.pi * 220 * np.arange(8000) / 16000
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((np.sin(phase) * 12000).astype("<i2").tobytes())


@contextmanager
def fleet_in(folder: Path, gpus: int = 2, *options: str) -> Iterator[Fleet]:
    fleet = Fleet(folder)
    try:
        fleet.up(gpus, *options)
        yield fleet
    finally:
        fleet.close()
