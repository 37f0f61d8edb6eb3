"""Renders on the queues of a real server, with lanes of pretended GPUs, and what may happen to them."""

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from tests.flows.fleet import Fleet, StubBatch, fleet_in
from tests.processes import kill_tree, until

pytestmark = [pytest.mark.drill, pytest.mark.timeout(900)]

QUEUES = ["alpha-gpu-0", "alpha-gpu-1"]
LONG_S = 180.0


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet_in(tmp_path_factory.mktemp("fleet"), 2, "--postgres") as fleet:
        yield fleet


def ended(process: "subprocess.Popen[str]", batch: StubBatch, code: int = 0) -> str:
    output, _ = process.communicate(timeout=LONG_S)
    assert process.returncode == code, output
    return output


def under_way(batch: StubBatch, count: int, process: "subprocess.Popen[str]") -> None:
    """Until so many clips are through the GPU stage."""
    until(lambda: len(batch.calls("denoise")) >= count, [process], patience_s=LONG_S)


def shards_of(fleet: Fleet, batch: StubBatch) -> list[Any]:
    return fleet.api.shards(flow_runs={"tags": {"all_": [batch.run["name"]]}})


def test_the_server_shows_served_queues_as_ready(fleet: Fleet) -> None:
    for name in QUEUES:
        until(lambda name=name: fleet.api.queue(name)["status"] == "READY", patience_s=LONG_S, every_s=1)


def test_the_graph_shows_how_the_videos_came_about(fleet: Fleet) -> None:
    batch = fleet.batch("graph", 8, denoise=0.05)
    batch.render()
    run = batch.run
    assert run["work_queue_name"] == "alpha-render"
    assert run["state_type"] == "COMPLETED"
    graph = until(lambda: len(g := fleet.api.graph(run["id"])) >= 6 and g, every_s=0.5)
    of_stage = {
        stage: [n for n in graph if n.startswith(f"{stage} ")] for stage in ("ingest", "face", "audio")
    }
    assert len(of_stage["ingest"]) == 2
    above = {
        "face": {"ingest"},
        "audio": {"ingest"},
        "reference": {"face", "ingest"},
        "denoise": {"audio", "reference"},
    }
    above["decode"] = {"ingest", "reference", "denoise"}
    for node, parents in graph.items():
        stage = node.split()[0]
        assert {parent.split()[0] for parent in parents} == above.get(stage, set()), (node, parents)
    tasks = fleet.api.tasks(run["id"])
    assert {task["name"].split()[0] for task in tasks} == {"ingest", *above}
    shards = shards_of(fleet, batch)
    assert {shard["work_queue_name"] for shard in shards} <= set(QUEUES)
    assert {shard["state_type"] for shard in shards} == {"COMPLETED"}


def test_a_model_is_loaded_once_per_lane(fleet: Fleet) -> None:
    first = fleet.batch("warm-1", 6, log="warm", denoise=0.2)
    first.render()
    fleet.batch("warm-2", 6, log="warm", denoise=0.2).render()
    assert len(first.calls("denoise")) == 12
    lines = [line.split() for log in fleet.folder.glob("*.log") for line in log.read_text().splitlines()]
    loads = Counter(item for stage, item, *_ in lines if stage == "load")  # of each process, by all batches
    assert set(loads.values()) == {1}


def test_a_paused_queue_gets_nothing_and_gives_back_what_waits(fleet: Fleet) -> None:
    batch = fleet.batch("paused", 24, denoise=0.5)
    process = batch.start("runtime.shard_seconds=1")
    under_way(batch, 4, process)
    fleet.api.pause(QUEUES[0])
    paused_s = time.time()
    try:
        ended(process, batch)
    finally:
        fleet.api.pause(QUEUES[0], paused=False)
    began = [
        shard
        for shard in shards_of(fleet, batch)
        if shard["work_queue_name"] == QUEUES[0] and shard["start_time"]
    ]
    assert began
    late = [
        shard for shard in began if datetime.fromisoformat(shard["start_time"]).timestamp() > paused_s + 5
    ]
    assert not late
    assert batch.repeated() == {}
    assert len(batch.calls("denoise")) == 24


def test_a_killed_lane_loses_nothing(fleet: Fleet) -> None:
    batch = fleet.batch("killed-lane", 24, denoise=0.5)
    process = batch.start("runtime.shard_seconds=1")
    under_way(batch, 4, process)
    os.kill(fleet.halt(0, [process]), signal.SIGKILL)
    killed_s = time.time()
    until(lambda: any(s["state_type"] == "CRASHED" for s in shards_of(fleet, batch)), every_s=0.2)
    assert time.time() - killed_s < 10
    ended(process, batch)
    assert len({call.item for call in batch.calls("denoise")}) == 24
    assert len(batch.repeated()) <= 4  # the shard that it had at hand
    fleet.wait_for_lanes(fleet.here, range(2))


def test_a_killed_child_is_replaced_by_its_lane(fleet: Fleet) -> None:
    batch = fleet.batch("killed-child", 12, denoise=0.5)
    process = batch.start("runtime.shard_seconds=1")
    under_way(batch, 3, process)
    lane = fleet.here.lane(1)
    child = fleet.here.child(1)
    assert child
    os.kill(child, signal.SIGKILL)
    ended(process, batch)
    assert fleet.here.lane(1) == lane
    assert len({call.item for call in batch.calls("denoise")}) == 12


def test_after_a_killed_render_the_same_command_goes_on(fleet: Fleet) -> None:
    batch = fleet.batch("killed-render", 12, denoise=1.5)
    process = batch.start("runtime.shard_seconds=6")
    under_way(batch, 3, process)
    kill_tree(process)
    output = batch.render("runtime.shard_seconds=6")
    assert "12 of 12 clips" in output
    assert batch.repeated() == {}  # what lanes were at was waited for
    old = fleet.api.runs("render-dataset", flow_runs={"name": {"like_": "killed-render"}})
    assert [run["state_type"] for run in old] == ["CRASHED", "COMPLETED"]


def test_two_renders_share_the_queues(fleet: Fleet) -> None:
    batches = [fleet.batch("share-1", 12, denoise=0.4), fleet.batch("share-2", 12, denoise=0.4)]
    processes = [batch.start("runtime.shard_seconds=1") for batch in batches]
    for process, batch in zip(processes, batches, strict=True):
        ended(process, batch)
    first, second = (batch.calls("denoise") for batch in batches)
    assert len(first) == len(second) == 12
    # Each began before the other had ended, and no two were on one GPU at once.
    assert first[0].start_s < second[-1].end_s
    assert second[0].start_s < first[-1].end_s
    every = sorted([*first, *second], key=lambda call: call.start_s)
    for one, two, three in zip(every, every[1:], every[2:], strict=False):
        assert three.start_s >= min(one.end_s, two.end_s) - 0.05


def test_cancelling_in_the_browser_stops_the_run_and_its_shards(fleet: Fleet) -> None:
    batch = fleet.batch("cancelled", 40, denoise=0.5)
    process = batch.start("runtime.shard_seconds=1")
    under_way(batch, 3, process)
    asked_s = time.time()
    fleet.api.set_state(batch.run["id"], "CANCELLING")
    output = ended(process, batch, code=130)
    assert time.time() - asked_s < 25
    assert "Traceback" not in output
    assert until(lambda: batch.run["state_type"] == "CANCELLED", every_s=0.3)
    assert not any("Traceback" in line["message"] for line in fleet.api.logs(batch.run["id"]))
    until(
        lambda: all(s["state_type"] in ("COMPLETED", "CANCELLED") for s in shards_of(fleet, batch)),
        every_s=0.3,
    )
    kept = len({call.item for call in batch.calls("denoise")})
    assert kept < 40
    assert "40 of 40" in batch.render()


def test_a_run_of_the_command_is_tried_again_from_the_browser(fleet: Fleet) -> None:
    batch = fleet.batch("retried", 3, denoise=0.1)
    broken = fleet.folder / "retried-broken.png"
    broken.write_text("no picture")
    with batch.table.open("a") as table:
        table.write(f"retried-bad,{broken},{fleet.folder / 'sound.wav'},9\n")
    batch.render(code=1)
    run = batch.run
    assert run["state_type"] == "FAILED"
    task = next(t for t in fleet.api.tasks(run["id"]) if t["state_name"] == "RowsFailed")
    assert "retried-bad: image" in task["state"]["message"]
    said = [line["message"] for line in fleet.api.logs(run["id"]) if "is a text" in line["message"]]
    assert len(said) == 1
    broken.write_bytes((fleet.folder / "picture.png").read_bytes() + b" ")
    fleet.api.set_state(run["id"], "SCHEDULED", name="AwaitingRetry")
    again = until(
        lambda: (r := fleet.api.get(f"flow_runs/{run['id']}"))["state_type"] == "COMPLETED" and r,
        patience_s=LONG_S,
        every_s=1,
    )
    assert again["run_count"] == 2
    assert again["name"] == run["name"]


def test_a_machine_of_the_same_name_is_refused(fleet: Fleet) -> None:
    twin = fleet.machine("twin", AVATAR_HOST="alpha", PREFECT_API_URL=fleet.api.url)
    assert "another one is called alpha too" in refused(twin.avatar("lane", "0", "--pretend"))


def refused(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=LONG_S)
    assert process.returncode == 2, output
    return output


def test_lanes_end_with_a_killed_supervisor_and_the_next_one_starts_others(fleet: Fleet) -> None:
    before = [fleet.here.lane(number) for number in range(2)]
    os.kill(fleet.here.supervisor, signal.SIGKILL)
    until(lambda: not any(fleet.here.lane(number) for number in range(2)), every_s=0.2)
    fleet.up(2, "--postgres")
    assert not {fleet.here.lane(number) for number in range(2)} & {None, *before}
