"""The flow against a real Prefect server, and the command with a server and without."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from avatar_core.store.catalog import load_catalog
from avatar_core.store.storage import Storage
from avatar_core.store.tensors import open_item
from tests.flows.conftest import PrefectServer, serverless
from tests.processes import until
from tests.sample_rows import (
    Rendered,
    attempts,
    data_files,
    videos,
    write_picture,
    write_table,
)
from tests.watch import Watch

pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).parents[2]
ENTRYPOINT = "flows.render.render_dataset"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")


@pytest.fixture
def flow(prefect_server: PrefectServer) -> Iterator[Callable[..., Any]]:
    """Runs the flow in this process against the server; gives its final state."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.render import render_dataset

    def run(table: Path, root: Path, *overrides: str) -> Any:
        return render_dataset(str(table), overrides=[f"storage.root={root}", *overrides], return_state=True)

    with temporary_settings({PREFECT_API_URL: f"{prefect_server.address}/api"}):
        yield run
        for worker in (EventsWorker, APILogWorker):  # they send in the background
            worker.drain_all(timeout=10)


class Seen:
    """What the server knows of a flow run."""

    def __init__(self, server: PrefectServer, state: Any) -> None:
        self.server = server
        self.id = str(state.state_details.flow_run_id)

    @property
    def flow_run(self) -> Any:
        return self.server.get(f"flow_runs/{self.id}")

    def task_runs_of(self, items: int) -> list[Any]:
        """The ended ones, once they name so many items together: states are recorded after they happen."""

        def ended() -> list[Any]:
            found = self._filter("task_runs")
            runs = [run for run in found if run["state_type"] in ENDED]
            return runs if sum(map(items_of, runs)) >= items else []

        return until(ended, every_s=0.2)

    def artifacts(self) -> dict[str, Any]:
        """By the part of the key that follows the dataset's name."""
        return {found["key"].rpartition("-")[2]: found for found in self._filter("artifacts")}

    def logs(self) -> list[str]:
        wanted = {"logs": {"flow_run_id": {"any_": [self.id]}}, "limit": 200}
        return [line["message"] for line in self.server.post("logs/filter", wanted)]

    def _filter(self, kind: str) -> list[Any]:
        found = self.server.post(f"{kind}/filter", {"flow_runs": {"id": {"any_": [self.id]}}, "limit": 200})
        assert isinstance(found, list)
        return found


def items_of(run: Any) -> int:
    """What a task run tells of: in the name of what is reused, else in its state."""
    is_reused = " reused · " in run["name"]
    text = run["name"].split(" · ")[1] if is_reused else run["state"]["message"].replace("1 of ", "")
    return int(text.split()[0])


def table_of(artifact: Any) -> list[dict[str, Any]]:
    data = artifact["data"]
    rows = json.loads(data) if isinstance(data, str) else data
    assert isinstance(rows, list)
    return rows


def tensors(root: Path, stage: str) -> dict[str, dict[str, bytes]]:
    """Every item's tensors, wherever they lie."""
    storage = Storage(str(root))
    catalog = load_catalog(storage, stage)
    found = {}
    for key in catalog.ok_keys():
        row = catalog.get(key)
        assert row
        item = open_item(storage.local_path(row["data"], row["sha256"]), key)
        found[key] = {name: item[name].tobytes() for name in item}
    return found


# --- what a run leaves


def test_the_flow_gives_what_render_gives_and_the_server_shows_it(
    flow: Callable[..., Any], prefect_server: PrefectServer, rendered: Rendered, tmp_path: Path
) -> None:
    state = flow(rendered.table, tmp_path)
    assert state.is_completed(), state
    assert videos(tmp_path / "datasets/batch") == videos(rendered.result.dataset)
    for stage in ("face", "audio", "reference", "denoise"):
        assert tensors(tmp_path, stage) == tensors(rendered.store, stage)

    seen = Seen(prefect_server, state)
    assert re.fullmatch(r"batch-\d{8}T\d{6}Z-[0-9a-f]{6}", seen.flow_run["name"])
    assert (tmp_path / "runs" / seen.flow_run["name"] / "config.yaml").exists()
    assert seen.flow_run["state"]["message"] == f"4 of 4 clips in {tmp_path}/datasets/batch"
    runs = seen.task_runs_of(18)
    assert {run["state_name"] for run in runs} == {"Completed"}
    items: Counter[str] = Counter()
    for run in runs:
        shard = re.fullmatch(r"(\w+) \d{4} · \S.*", run["name"])
        assert shard, run["name"]
        items[shard[1]] += items_of(run)
        assert run["tags"] == []  # with tags it would wait for the server before it begins
    assert items == {"ingest": 4, "face": 2, "audio": 2, "reference": 2, "denoise": 4, "decode": 4}

    artifacts = seen.artifacts()
    assert {name: found["type"] for name, found in artifacts.items()} == {
        "progress": "progress",
        "stages": "table",
        "dataset": "markdown",
        "clips": "markdown",
    }
    assert artifacts["progress"]["description"] == "all is done"
    assert float(artifacts["progress"]["data"]) == 100.0
    assert f"{tmp_path}/datasets/batch" in artifacts["dataset"]["data"]
    rows = {row["stage"]: row for row in table_of(artifacts["stages"])}
    assert list(rows) == ["ingest", "face", "audio", "reference", "denoise", "decode"]
    assert (rows["decode"]["items"], rows["decode"]["cached"], rows["decode"]["done"]) == (4, 0, 4)


def test_edges_lead_to_every_manifest_that_a_shard_reads(
    flow: Callable[..., Any],
    prefect_server: PrefectServer,
    rendered: Rendered,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from avatar_core.execution.shard_call import ShardCall
    from flows.fan_out import FanOut

    calls: list[ShardCall] = []
    submit = FanOut.submit

    def overheard(fan_out: FanOut, call: ShardCall) -> None:
        calls.append(call)
        submit(fan_out, call)

    monkeypatch.setattr(FanOut, "submit", overheard)
    state = flow(rendered.table, tmp_path)
    assert state.is_completed(), state
    seen = Seen(prefect_server, state)
    runs = seen.task_runs_of(18)
    made = {run["name"]: keys_made(tmp_path, run) for run in runs}
    graph = prefect_server.get(f"flow_runs/{seen.id}/graph-v2")
    labels = {number: node["label"] for number, node in graph["nodes"]}
    above = {node["label"]: {labels[p["id"]] for p in node["parents"]} for _, node in graph["nodes"]}
    assert {call.label for call in calls} == set(above)
    edges = 0
    for call in calls:
        for job in call.jobs:
            read = {(stage, key) for stage, rows in job.inputs.items() for key in rows}
            for item in job.items:
                read |= {(asset.stage, asset.key) for each in item.assets.values() for asset in each}
            for stage, key in read:
                (maker,) = [name for name in made if name.split()[0] == stage and key in made[name]]
                assert maker in above[call.label], (call.label, maker)
                edges += 1
    assert edges >= 2 + 2 + 4 + 8 + 12  # of face, audio, reference, denoise and decode, at the least


def keys_made(root: Path, run: Any) -> set[str]:
    """By the manifests that the task's result names."""
    file = root / "tasks" / f"{Path(run['state']['data']['storage_key']).name}.json"
    manifests = json.loads(json.loads(file.read_text())["result"])["manifests"]
    return {key for uri in manifests for key in pq.read_table(uri, columns=["key"])["key"].to_pylist()}


@pytest.mark.drill
def test_reused_work_is_one_cached_task_per_stage(
    flow: Callable[..., Any], prefect_server: PrefectServer, rendered: Rendered, store: Path
) -> None:
    state = flow(rendered.table, store, "video.crf=30", "limit=3")
    assert state.is_completed(), state
    runs = Seen(prefect_server, state).task_runs_of(16)
    assert {run["name"] for run in runs if run["state_name"] == "Cached"} == {
        "ingest reused · 4 files",
        "face reused · 2 pictures",
        "audio reused · 2 recordings",
        "reference reused · 2 pictures",
        "denoise reused · 3 clips",
    }
    assert {run["name"].split()[0] for run in runs if run["state_name"] != "Cached"} == {"decode"}


@pytest.mark.drill
def test_a_failed_row_fails_the_flow_and_a_retry_does_what_is_missing(
    flow: Callable[..., Any], prefect_server: PrefectServer, inputs: Path, tmp_path: Path
) -> None:
    picture = write_picture(tmp_path / "late.jpg", "closeup")
    content = picture.read_bytes()
    (tmp_path / "late.jpg").write_bytes((inputs / "landscape.png").read_bytes())
    rows = [
        {"name": "good", "image": str(inputs / "portrait.jpg"), "audio": str(inputs / "hello.wav")},
        {"name": "bad", "image": str(picture), "audio": str(inputs / "hello.wav")},
    ]
    root = tmp_path / "store"
    state = flow(write_table(tmp_path / "late.csv", rows), root)
    assert state.is_failed()
    assert state.message == "1 of 2 clips failed; max_failed_fraction=0 allows fewer"
    assert list(videos(root / "datasets/late")) == ["good.mp4"]
    seen = Seen(prefect_server, state)
    failed = [run for run in seen.task_runs_of(10) if run["state_name"] == "RowsFailed"]
    assert len(failed) == 1
    assert failed[0]["name"].startswith("reference ")
    assert failed[0]["state"]["message"].startswith("1 of 1 failed: bad: no face found")
    failures = seen.artifacts()["failures"]["data"]
    assert f"1 of 2 clips failed, listed in `{root}/datasets/late/failures.csv`" in failures
    (row,) = (line for line in failures.splitlines() if line.startswith("| bad |"))
    assert row.startswith("| bad | 2 | reference | no face found")
    until(lambda: any("bad: no face found" in line for line in seen.logs()), every_s=0.2)
    assert sum("no face found" in line for line in seen.logs()) == 1

    picture.write_bytes(content)
    before = attempts(root, "decode")
    command = [sys.executable, "-m", "prefect", "flow-run", "retry", seen.id, "--entrypoint", ENTRYPOINT]
    done = subprocess.run(
        command, env=prefect_server.environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert seen.flow_run["state_type"] == "COMPLETED"
    assert sorted(videos(root / "datasets/late")) == ["bad.mp4", "good.mp4"]
    assert len(attempts(root, "decode")) == len(before) + 1


@pytest.mark.drill
def test_a_recorded_run_is_rendered_as_it_was(
    flow: Callable[..., Any], rendered: Rendered, store: Path
) -> None:
    """What a retry does after `avatar render`, whose options are in the record."""
    from flows.render import render_dataset

    data_files(store, "decode")[0].unlink()
    state = render_dataset(overrides=[f"storage.root={store}"], run=rendered.result.run_id, return_state=True)
    assert state.is_completed(), state
    assert len(attempts(store, "decode").query("status == 'ok'")) == 5
    assert videos(store / "datasets/batch") == videos(rendered.result.dataset)


def test_a_batch_file_of_ones_own(
    flow: Callable[..., Any], rendered: Rendered, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.render import render_dataset

    (tmp_path / "own/batch").mkdir(parents=True)
    settings = f"table: {rendered.table}\nname: night\nlimit: 1\nstorage: {{root: {store}}}\n"
    (tmp_path / "own/batch/night.yaml").write_text(settings)
    state = render_dataset(batch="night", config_dir=str(tmp_path / "own"), return_state=True)
    assert state.is_completed(), state
    assert len(videos(store / "datasets/night")) == 1
    monkeypatch.setenv("AVATAR_CONFIG_DIR", str(tmp_path / "own"))
    state = render_dataset(overrides=["batch=night", "limit=2"], return_state=True)
    assert state.is_completed(), state
    assert len(videos(store / "datasets/night")) == 2


@pytest.mark.drill
def test_a_failure_within_what_is_allowed_completes(
    flow: Callable[..., Any], inputs: Path, tmp_path: Path
) -> None:
    rows = [
        {"image": str(inputs / name), "audio": str(inputs / "hello.wav")}
        for name in ("portrait.jpg", "landscape.png")
    ]
    state = flow(write_table(tmp_path / "half.csv", rows), tmp_path, "max_failed_fraction=0.5")
    assert state.is_completed(), state


@pytest.mark.drill
def test_cancelling_through_the_server_stops_at_the_next_item(
    flow: Callable[..., Any],
    prefect_server: PrefectServer,
    rendered: Rendered,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = Watch(tmp_path / "watch")
    watch.hold_at("decode", 2)
    for name, value in watch.environment().items():  # the flow runs in this process, its items in children
        monkeypatch.setenv(name, value)
    root = tmp_path / "store"

    def cancel() -> None:
        watch.until_held()
        wanted = {"flow_runs": {"name": {"any_": [path.name for path in (root / "runs").iterdir()]}}}
        (found,) = until(lambda: prefect_server.post("flow_runs/filter", wanted), every_s=0.2)
        prefect_server.post(f"flow_runs/{found['id']}/set_state", {"state": {"type": "CANCELLING"}})
        watch.release()

    with ThreadPoolExecutor(1) as pool:
        cancelling = pool.submit(cancel)
        state = flow(rendered.table, root, "takes=100")
        cancelling.result()
    assert state.is_cancelled()
    assert Seen(prefect_server, state).flow_run["state_type"] == "CANCELLED"
    assert len(list(root.glob("stages/decode/data/*/*.mp4"))) < 400
    assert not [path for path in root.rglob("*") if "partial" in path.name]
    assert not (root / "datasets").exists()


def test_credentials_are_in_no_parameter(rendered: Rendered, tmp_path: Path) -> None:
    from flows.compose import compose_config
    from flows.render import flow_parameters

    words = ["storage.root=s3://bucket/a", "+storage.options.secret=hunter2"]
    config = compose_config([*words, "table='https://me:hunter2@host/t.csv'"])
    assert "hunter2" not in str(flow_parameters(config, "run"))
    config = compose_config([*words, "table='https://host/t.csv?signature=hunter2'"])
    assert "hunter2" not in str(flow_parameters(config, "run"))


# --- the command


def avatar(environment: dict[str, str], *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *map(str, words)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.drill
def test_the_command_appears_on_the_server(
    prefect_server: PrefectServer, rendered: Rendered, tmp_path: Path
) -> None:
    process = avatar(prefect_server.environment, "render", rendered.table, f"storage.root={tmp_path}")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "4 of 4 clips in" in output
    assert "flow run" not in output.lower()
    name = next((tmp_path / "runs").iterdir()).name
    found = prefect_server.post("flow_runs/filter", {"flow_runs": {"name": {"any_": [name]}}})
    assert [run["state_type"] for run in found] == ["COMPLETED"]
    given = {"table": str(rendered.table), "overrides": [f"storage.root='{tmp_path}'"], "run": name}
    assert {field: found[0]["parameters"][field] for field in given} == given


@pytest.mark.drill
def test_a_server_that_is_not_there_is_one_line(
    prefect_server: PrefectServer, rendered: Rendered, tmp_path: Path
) -> None:
    environment = prefect_server.environment | {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    process = avatar(environment, "render", rendered.table, f"storage.root={tmp_path}")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "error: the Prefect server at http://127.0.0.1:9/api does not answer" in output
    assert "Traceback" not in output


def renders_without_prefect(table: Path, root: Path, environment: dict[str, str]) -> str:
    """What the command printed."""
    code = (
        "import sys; from flows.cli import app; app(standalone_mode=False); print('prefect' in sys.modules)"
    )
    words = ["render", str(table), f"storage.root={root}"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "False"
    return done.stdout


@pytest.mark.drill
def test_nothing_to_do_does_without_prefect(
    prefect_server: PrefectServer, rendered: Rendered, store: Path
) -> None:
    assert "4 of 4 clips" in renders_without_prefect(rendered.table, store, prefect_server.environment)


def test_without_a_server_no_prefect_is_started(rendered: Rendered, tmp_path: Path) -> None:
    """Nor where Prefect's own settings name none."""
    (tmp_path / "prefect").mkdir()
    (tmp_path / "prefect/profiles.toml").write_text('active = "local"\n[profiles.local]\n')
    environment = serverless(os.environ, tmp_path)
    assert "4 of 4 clips" in renders_without_prefect(rendered.table, tmp_path / "store", environment)
    assert videos(tmp_path / "store/datasets/batch") == videos(rendered.result.dataset)


@pytest.mark.drill
def test_a_server_of_the_users_profile_shows_the_run(
    prefect_server: PrefectServer, rendered: Rendered, tmp_path: Path
) -> None:
    environment = serverless(prefect_server.environment, tmp_path)
    (tmp_path / "prefect").mkdir()
    profile = f'[profiles.mine]\nPREFECT_API_URL = "{prefect_server.address}/api"\n'
    (tmp_path / "prefect/profiles.toml").write_text(f'active = "mine"\n{profile}')
    process = avatar(environment, "render", rendered.table, f"storage.root={tmp_path / 'store'}")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    name = next((tmp_path / "store/runs").iterdir()).name
    found = prefect_server.post("flow_runs/filter", {"flow_runs": {"name": {"any_": [name]}}})
    assert [run["state_type"] for run in found] == ["COMPLETED"]


@pytest.mark.drill
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_stops_at_the_next_item_and_the_same_command_goes_on(
    prefect_server: PrefectServer, rendered: Rendered, tmp_path: Path, number: signal.Signals
) -> None:
    """The first without a server; its children get Ctrl-C as well, as in a terminal."""
    environment = prefect_server.environment
    if number == signal.SIGINT:
        environment = serverless(environment, tmp_path)
    words = ("render", rendered.table, f"storage.root={tmp_path / 'store'}")
    watch = Watch(tmp_path / "watch")
    watch.hold_at("reference")
    process = avatar(watch.environment(environment), *words, "takes=30")
    watch.until_held(process)
    until(lambda: list(tmp_path.glob("store/stages/face/manifests/*")), [process])
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    watch.release()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "what is finished is kept" in output
    assert "Traceback" not in output
    kept = attempts(tmp_path / "store", "face")["key"]
    process = avatar(prefect_server.environment, *words)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert attempts(tmp_path / "store", "face")["key"].tolist().count(kept[0]) == 1
    assert videos(tmp_path / "store/datasets/batch") == videos(rendered.result.dataset)
