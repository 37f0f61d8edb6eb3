"""What an operator does in a day, on a real server: `python -m tests.flows.walk` says each step."""

import os
import signal
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from flows.server import process_start
from tests.flows.fleet import Fleet, StubBatch, fleet_in
from tests.processes import descendants, kill_tree, until

ROWS, LATE_ROW = 48, "walk-late"
LONG_S = 240.0
SETTLE_S = 5.0
"""In which a queue that was paused may still begin what it was given before."""
ZERO, ONE = "alpha-gpu-0", "alpha-gpu-1"


_BEGIN_S = time.monotonic()


def say(text: str) -> None:
    print(f"ok: {text} ({time.monotonic() - _BEGIN_S:.0f} s)", flush=True)  # noqa: T201


class Walk:
    """`run_id` is that of the flow run on the server, `run` its name, which is that of the recorded run."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.api, self.here = fleet, fleet.api, fleet.here
        self.batch: StubBatch = fleet.batch("walk", ROWS, denoise=0.5)
        self.late_picture = fleet.folder / "late.png"
        with self.batch.table.open("a") as table:
            table.write(f"{LATE_ROW},{self.late_picture},{fleet.folder / 'sound.wav'},7\n")
        self.run_id = self.run = ""

    def go(self) -> None:
        say(f"up: {ZERO} and {ONE} are served")
        self.lose_a_machine()
        self.deploy()
        self.trigger()
        self.pause()
        self.resume()
        self.kill_a_lane()
        self.fail_a_row()
        self.retry()
        self.look()
        self.read_the_log()
        self.remove()
        self.down()

    def lose_a_machine(self) -> None:
        """Early, since it takes a minute until it counts as gone."""
        self.fleet.join("beta", 1)
        output = self.here.run("worker", "--remove", "beta", code=2)
        assert not output
        kill_tree(self.fleet.workers[-1])
        say("the machine beta joined, could not be removed while it served, and was lost")

    def deploy(self) -> None:
        words = [*self.batch.words[1:], "runtime.shard_seconds=1"]
        output = self.here.run("deploy", *words, "--cron", "0 3 * * *", "--timezone", "UTC")
        assert "next: " in output
        deployment = self.api.get("deployments/name/render-dataset/walk")
        assert [each["schedule"]["cron"] for each in deployment["schedules"]] == ["0 3 * * *"]
        assert deployment["work_queue_name"] == "alpha-render"
        self.deployment = deployment["id"]
        say("deployed with a schedule, on alpha's queue of renders")

    def trigger(self) -> None:
        made = self.api.post(f"deployments/{self.deployment}/create_flow_run", state={"type": "SCHEDULED"})
        self.run_id = made["id"]
        until(lambda: len(self.batch.calls("denoise")) >= 4, patience_s=LONG_S, every_s=0.2)
        self.run = self.flow_run["name"]
        assert self.flow_run["state_type"] == "RUNNING"
        assert {shard["work_queue_name"] for shard in self.shards()} == {ZERO, ONE}
        say(f"triggered by the API: {self.run} computes on both queues")

    def pause(self) -> None:
        self.api.pause(ZERO)
        paused_s = time.time()
        until(lambda: self.begun(ONE, paused_s + SETTLE_S) >= 3, patience_s=LONG_S, every_s=0.5)
        assert not self.begun(ZERO, paused_s + SETTLE_S)
        (line,) = [line for line in self.here.run("status").splitlines() if line.startswith(ZERO)]
        assert "paused, idle" in line
        say(f"{ZERO} is paused: only {ONE} begins shards, and `avatar status` says so")

    def resume(self) -> None:
        self.api.pause(ZERO, paused=False)
        resumed_s = time.time()
        until(lambda: self.begun(ZERO, resumed_s) >= 1, patience_s=LONG_S, every_s=0.2)
        say(f"{ZERO} is resumed, and begins shards again after {time.time() - resumed_s:.1f} s")

    def kill_a_lane(self) -> None:
        lane = self.fleet.halt(1)
        os.kill(lane, signal.SIGKILL)
        killed_s = time.time()
        until(lambda: any(s["state_type"] == "CRASHED" for s in self.shards(ONE)), every_s=0.2)
        until(lambda: self.here.lane(1) not in (None, lane), every_s=0.1)
        until(lambda: self.begun(ONE, killed_s) >= 1, patience_s=LONG_S, every_s=0.2)
        say(
            f"the lane of {ONE} was killed: its shard crashed, and it computes again {_since(killed_s)} later"
        )

    def fail_a_row(self) -> None:
        until(self.ended, patience_s=LONG_S, every_s=0.5)
        assert self.flow_run["state_type"] == "FAILED"
        assert f"1 of {ROWS + 1} clips failed" in self.flow_run["state"]["message"]
        assert len({call.item for call in self.batch.calls("denoise")}) == ROWS
        say(f"all but one row are rendered, and the run says: {self.flow_run['state']['message']}")

    def retry(self) -> None:
        done = len(self.batch.calls("denoise"))
        Image.new("RGB", (64, 64), (199, 99, 9)).save(self.late_picture)
        self.api.set_state(self.run_id, "SCHEDULED", name="AwaitingRetry")
        until(lambda: self.flow_run["run_count"] > 1 and self.ended(), patience_s=LONG_S, every_s=0.5)
        assert self.flow_run["state_type"] == "COMPLETED", self.flow_run["state"]
        assert len(self.batch.calls("denoise")) == done + 1
        say("its picture is there now: a retry from the API renders that row, and nothing else")

    def look(self) -> None:
        store = f"storage.root={self.batch.store}"
        every = self.here.run("status", store)
        lines = {line.split()[0]: line for line in every.splitlines() if line.strip()}
        assert lines[self.run].split()[-4:] == [str(ROWS + 1), str(ROWS + 1), "0", "0"]
        assert "idle" in lines[ZERO]
        assert "%" in lines[ONE]
        one = self.here.run("status", "walk", store)
        assert f"{self.run}: {ROWS + 1} of {ROWS + 1} clips ok, 0 failed, 0 to do" in one
        assert "flow run: Completed, " in one
        assert "took 0:0" in one
        assert ZERO in one
        say("`avatar status` knows the run, both queues and the last death")

    def read_the_log(self) -> None:
        said = self.here.run("logs", self.run)
        assert f"Beginning flow run '{self.run}'" in said
        assert LATE_ROW in said
        assert f"{ONE}, denoise · " in said
        until(lambda: self.here.run("logs", "walk") == self.here.run("logs", self.run), every_s=1.0)
        say(f"`avatar logs` has {len(said.splitlines())} lines of the run and of its shards")

    def remove(self) -> None:
        hint = "nothing is heard of the machine beta"
        until(lambda: hint in self.here.run("status"), patience_s=LONG_S, every_s=2.0)
        assert "removed beta-gpu-0, beta-render" in self.here.run("worker", "--remove", "beta")
        assert hint not in self.here.run("status")
        queues = self.api.post("work_pools/avatar/queues/filter")
        assert not [queue["name"] for queue in queues if queue["name"].startswith("beta")]
        workers = self.api.post("work_pools/avatar/workers/filter")
        assert not [worker["name"] for worker in workers if worker["name"].startswith("beta")]
        assert _status_code(self.api, "deployments/name/render-dataset/beta") == httpx.codes.NOT_FOUND
        say("`avatar status` named beta as gone, and `avatar worker --remove beta` forgot it")

    def down(self) -> None:
        supervisor = self.here.supervisor
        tree = {pid: process_start(pid) for pid in [supervisor, *descendants(supervisor)]}
        self.here.run("down")
        assert not [pid for pid, start in tree.items() if start and process_start(pid) == start]
        assert "no server runs" in self.here.run("status")
        say("down: nothing of it runs any more")

    # --- what the server says

    @property
    def flow_run(self) -> Any:
        return self.api.get(f"flow_runs/{self.run_id}")

    def ended(self) -> bool:
        return self.flow_run["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

    def shards(self, queue: str = "") -> list[Any]:
        of_queue = {"work_pool_queues": {"name": {"any_": [queue]}}} if queue else {}
        return self.api.shards(**of_queue)

    def begun(self, queue: str, after_s: float) -> int:
        return sum(_epoch(s["start_time"]) > after_s for s in self.shards(queue) if s["start_time"])


def _epoch(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def _since(moment_s: float) -> str:
    return f"{time.time() - moment_s:.1f} s"


def _status_code(api: Any, path: str) -> int:
    return httpx.get(f"{api.url}/{path}", timeout=90).status_code


def walk_in(folder: Path) -> None:
    with fleet_in(folder, 2, "--postgres") as fleet:
        Walk(fleet).go()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="avatar-walk-") as folder:
        walk_in(Path(folder))
    sys.exit()
