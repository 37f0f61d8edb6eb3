"""Clips that are denoised window by window, in a straight line and by the coordinator with its queues."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from avatar_core.config import Config, parse
from avatar_core.errors import Cancelled
from avatar_core.execution.batch_run import BatchRun
from avatar_core.execution.coordinator import Coordinator
from avatar_core.execution.settings import RunSettings
from avatar_core.execution.shard_call import ShardCall
from avatar_core.execution.worker_process import WorkerProcesses
from avatar_core.maintenance import collect_garbage, verify_run
from avatar_core.pipeline import begin_run, finish_run, render, rerun
from avatar_core.planning.batch import Batch
from avatar_core.planning.runs import read_plan
from avatar_core.result import Result
from avatar_core.status import StageStatus, read_status
from avatar_core.store.catalog import load_catalog
from avatar_core.store.claims import Claims
from avatar_core.store.manifest import write_manifest
from avatar_core.store.storage import Storage
from tests.execution.windowed_backend import WindowedDenoise
from tests.sample_rows import Watcher, attempts, flip_byte, open_known, videos, write_recording, write_table
from tests.watch import Watch

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).parents[2]
SETTINGS = RunSettings(
    gpus=(), pretend=False, cpus=2, item_timeout_s=60.0, idle_s=60.0, retries=2, budget_hours=None
)
DURATIONS_S = {"short": 0.24, "long": 0.6, "middle": 0.44}
WINDOWS = {"short": 1, "long": 3, "middle": 2}
ALL = {"face": 1, "audio": 3, "reference": 1, "denoise": 6, "decode": 3}

Way = Callable[..., tuple[Result, Watcher]]
"""Renders a batch."""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windows")
    Image.new("RGB", (64, 64), (200, 128, 60)).save(folder / "face.png")
    for name, duration_s in DURATIONS_S.items():
        write_recording(folder / f"{name}.wav", duration_s=duration_s)
    rows = [{"name": name, "image": "face.png", "audio": f"{name}.wav"} for name in DURATIONS_S]
    return write_table(folder / "batch.csv", rows)


@dataclass(frozen=True)
class Make:
    """Values of a batch of this table; `denoise` are options of the backend."""

    table: Path

    def __call__(self, store: Path, denoise: Mapping[str, int] = {}, **options: Any) -> dict[str, Any]:
        return {
            "table": str(self.table),
            "storage": {"root": str(store)},
            "backend": {"name": "windowed", "denoise": dict(denoise)},
            "face": {"required": False},
            "runtime": {"gpus": []},
            **options,
        }


@pytest.fixture(scope="module")
def values(table: Path) -> Make:
    return Make(table)


@pytest.fixture(scope="module")
def finished(values: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the whole batch; tests that change it take the copy from `store`."""
    store = tmp_path_factory.mktemp("finished") / "store"
    assert render(values(store)).failures.empty
    return store


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "store"))


def straight(values: Mapping[str, Any], watcher: Watcher | None = None) -> tuple[Result, Watcher]:
    watcher = watcher or Watcher()
    return render(values, watcher), watcher


class Coordinated(Watcher):
    """`submitted` has stage, queue and label of the shards."""

    def __init__(self) -> None:
        super().__init__()
        self.submitted: list[tuple[str, str, str]] = []


def by_queues(
    queues: WorkerProcesses, values: Mapping[str, Any], watcher: Coordinated | None = None
) -> tuple[Result, Coordinated]:
    watcher = watcher or Coordinated()
    batch = open_known(values)
    with ThreadPoolExecutor(8) as pool:

        def submit(call: ShardCall) -> None:
            watcher.submitted.append((call.stage, call.worker_name, call.label))
            pool.submit(call)

        run = BatchRun(batch, SETTINGS, watcher, submit=submit)
        drive = partial(Coordinator(queues).drive, run)
        return finish_run(batch, begin_run(batch), drive, watcher), watcher


@pytest.fixture(scope="module")
def queues() -> Iterator[WorkerProcesses]:
    with WorkerProcesses(cpus=2) as local:
        yield local


@pytest.fixture(params=["straight", "by queues"])
def way(request: pytest.FixtureRequest, queues: WorkerProcesses) -> Way:
    return straight if request.param == "straight" else partial(by_queues, queues)


def expect_one_attempt(store: Path, result: Result) -> None:
    """What counts for each window continues what counts for the one before."""
    catalog = load_catalog(Storage(str(store)), "denoise")
    plan = read_plan(Storage(str(store)), result.run_id)
    assert {
        name: len(keys) for name, keys in zip(plan["name"], plan["denoise_window_keys"], strict=True)
    } == WINDOWS
    for keys in plan["denoise_window_keys"]:
        rows = catalog.select(keys).to_pylist()
        assert [row["window"] for row in rows] == list(range(len(rows)))
        assert [row["previous_sha256"] for row in rows] == [None, *(row["sha256"] for row in rows[:-1])]
        assert [row["previous_key"] for row in rows] == [None, *keys[:-1]]


def window_files(store: Path, name: str) -> list[Path]:
    """The data of each window of a clip."""
    storage = Storage(str(store))
    catalog = load_catalog(storage, "denoise")
    return [store / path for path in catalog.select(window_keys(store)[name])["data"].to_pylist()]


def window_keys(store: Path) -> dict[str, list[str]]:
    storage = Storage(str(store))
    run = read_status(storage, "batch").summary
    plan = read_plan(storage, run.id)
    return {name: list(keys) for name, keys in zip(plan["name"], plan["denoise_window_keys"], strict=True)}


# --- whole runs


def test_the_coordinator_gives_the_videos_of_render(
    values: Make, queues: WorkerProcesses, finished: Path, tmp_path: Path
) -> None:
    result, watcher = by_queues(queues, values(tmp_path))
    assert watcher.counts == +watcher.to_do == ALL
    assert videos(result.dataset) == videos(finished / "datasets/batch")
    assert len(videos(result.dataset)) == 3
    assert dict(result.metadata[["name", "num_frames"]].values) == {"short": 6, "long": 15, "middle": 11}
    expect_one_attempt(tmp_path, result)
    assert len(list((tmp_path / "stages/denoise/manifests").iterdir())) == 6
    windows = [(queue, label) for stage, queue, label in watcher.submitted if stage == "denoise"]
    assert {queue for queue, _ in windows} == {"cpu-0", "cpu-1"}
    # Which clip is ready first hangs on how fast the workers are.
    assert sorted(label.partition(" · ")[2] for _, label in windows) == [
        "long, window 1 of 3",
        "long, window 2 of 3",
        "long, window 3 of 3",
        "middle, window 1 of 2",
        "middle, window 2 of 2",
        "short",
    ]
    ended = [row["key"] for stage, row in watcher.ended if stage == "denoise"]
    for keys in window_keys(tmp_path).values():
        assert [key for key in ended if key in keys] == keys


def test_nothing_to_do_afterwards(values: Make, store: Path, way: Way) -> None:
    _, watcher = way(values(store))
    assert watcher.counts == {}
    assert watcher.cached["denoise"] == 6


def test_videos_that_are_there_need_no_window(values: Make, store: Path) -> None:
    shutil.rmtree(store / "stages/denoise")
    _, watcher = straight(values(store))
    assert watcher.counts == {}


def test_a_window_knows_what_it_continues_and_not_how_many_there_are(
    values: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def long_clip() -> Any:
        batch = open_known(values(tmp_path, only=["long"]))
        return batch.clips, batch.clips[0]

    clips, clip = long_clip()
    keys = [item.key for item in clip.windows["denoise"]]
    assert len(set(keys)) == 3
    assert [item.inputs.get("denoise") for item in clip.windows["denoise"]] == [None, (keys[0],), (keys[1],)]
    assert clip.items["denoise"].key == keys[-1]
    assert clip.items["decode"].inputs["denoise"] == tuple(keys)
    assert sum(item.work for item in clip.windows["denoise"]) == pytest.approx(0.6, abs=1e-3)
    assert clips.name_of_item("denoise", keys[1]) == "long, window 2 of 3"
    assert clips.name_of_item("decode", clip.items["decode"].key) == "long"
    monkeypatch.setattr(WindowedDenoise, "num_windows", lambda self, subject: 4)
    assert [item.key for item in long_clip()[1].windows["denoise"]][:3] == keys


def test_the_plan_counts_windows(values: Make, tmp_path: Path) -> None:
    batch = open_known(values(tmp_path))
    denoise = batch.plan()["denoise"]
    assert (denoise.items, denoise.cached, len(denoise.to_do)) == (6, 0, 6)
    assert denoise.to_do.work.sum() == pytest.approx(sum(DURATIONS_S.values()), abs=1e-3)
    keys = [item.key for clip in batch.clips for item in clip.windows["denoise"]]
    assert [item.key for item in denoise.to_do] == keys
    for key in (keys[0], keys[1]):  # of `short` and the first of `long`
        batch.results["denoise"].add({"key": key, "status": "ok"})
    denoise = batch.plan()["denoise"]
    assert (denoise.cached, [item.key for item in denoise.to_do]) == (2, keys[2:])
    batch.results["decode"].add({"key": batch.clips[1].items["decode"].key, "status": "ok"})
    assert [item.key for item in batch.plan()["denoise"].to_do] == keys[4:]


def test_a_window_that_failed_is_the_reason_of_its_clip(values: Make, tmp_path: Path) -> None:
    batch = open_known(values(tmp_path))
    long = batch.clips[1]
    for window in (2, 1):
        row = {"status": "failed", "retryable": False, "error": f"window {window} is bad"}
        batch.results["denoise"].add({"key": long.windows["denoise"][window].key, **row})
    outlook = batch.outlook()
    assert (outlook.to_do, outlook.failed) == (2, 1)
    assert outlook.reasons == {("denoise", "window 1 is bad"): 1}


# --- stopping


@pytest.mark.drill
def test_a_kill_costs_the_window_in_flight(values: Make, finished: Path, tmp_path: Path) -> None:
    watch = Watch(tmp_path / "watch")
    watch.hold_at("denoise", 2)
    script = "import sys, json, tests.execution.windowed_backend; from avatar_core.pipeline import render; "
    words = [sys.executable, "-c", script + "render(json.loads(sys.argv[1]))"]
    store = tmp_path / "store"
    settings = json.dumps(values(store, only=["long"]))
    process = subprocess.Popen([*words, settings], env=watch.environment(), cwd=ROOT)
    watch.until_held(process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    killed = [key for stage, key in watch.calls() if stage == "denoise"]
    assert killed == window_keys(store)["long"][:2]
    result, watcher = straight(values(store, only=["long"]))
    assert [row["key"] for stage, row in watcher.ended if stage == "denoise"] == window_keys(store)["long"][
        1:
    ]
    assert videos(result.dataset) == {"long.mp4": videos(finished / "datasets/batch")["long.mp4"]}


@pytest.mark.parametrize("windows", [1, 4])
def test_a_cancelled_run_goes_on_with_the_next_window(
    values: Make, finished: Path, tmp_path: Path, windows: int
) -> None:
    watcher = stopped_after(windows, values(tmp_path))
    result, rest = straight(values(tmp_path))
    assert rest.counts["denoise"] == 6 - windows
    ended = [row["key"] for _, row in watcher.ended + rest.ended]
    assert len(ended) == len(set(ended))
    assert videos(result.dataset) == videos(finished / "datasets/batch")


def stopped_after(windows: int, values: Mapping[str, Any]) -> Watcher:
    watcher = Watcher()
    with pytest.raises(Cancelled):
        render(values, watcher, lambda: watcher.counts.get("denoise", 0) >= windows)
    assert watcher.counts["denoise"] == windows
    return watcher


# --- attempts that differ in bits


@pytest.mark.drill
def test_windows_of_two_attempts_are_never_mixed(
    values: Make, finished: Path, tmp_path: Path, way: Way
) -> None:
    """A store has the first window of `short` and `long`, a later one has all of them, from another GPU."""
    for name in ("short", "long"):
        stopped_after(1, values(tmp_path / "store", {"gpu": 1}, only=[name]))
    assert render(values(tmp_path / "other", {"gpu": 2})).failures.empty
    assert {path.name for path in window_files(tmp_path / "other", "long")}.isdisjoint(
        path.name for path in window_files(finished, "long")
    )
    shutil.copytree(tmp_path / "other/stages/denoise", tmp_path / "store/stages/denoise", dirs_exist_ok=True)
    result, watcher = way(values(tmp_path / "store", {"gpu": 3}))
    assert result.failures.empty
    recomputed = [row["key"] for stage, row in watcher.ended if stage == "denoise"]
    assert recomputed == window_keys(tmp_path / "store")["long"][1:]
    expect_one_attempt(tmp_path / "store", result)
    _, again = straight(values(tmp_path / "store", video={"crf": 30}))
    assert again.counts == {"decode": 3}


@pytest.mark.parametrize("gpu", [0, 1])
def test_a_damaged_window_and_those_after_it_are_made_again(
    values: Make, store: Path, way: Way, gpu: int
) -> None:
    flip_byte(window_files(store, "long")[1])
    shutil.rmtree(store / "stages/decode")
    before = videos(store / "datasets/batch")
    runtime = {"gpus": [], "cache_dir": str(store / "cache")}
    result, watcher = way(values(store, {"gpu": gpu}, runtime=runtime))
    assert result.failures.empty
    assert any("damaged" in warning for warning in watcher.warnings)
    recomputed = [row["key"] for stage, row in watcher.ended if stage == "denoise"]
    assert recomputed == window_keys(store)["long"][1:]
    expect_one_attempt(store, result)
    if gpu == 0:
        assert videos(result.dataset) == before


def foreign_row(batch: Batch, previous_sha256: str) -> dict[str, Any]:
    """Another run's second window of `long`, whose data nobody may read."""
    first, second, _ = batch.clips[1].windows["denoise"]
    return {
        "key": second.key,
        "status": "ok",
        "data": "stages/denoise/data/00/none.safetensors",
        "sha256": "0" * 64,
        "window": 1,
        "previous_key": first.key,
        "previous_sha256": previous_sha256,
    }


def test_what_another_run_made_of_another_window_is_not_taken_over(
    values: Make, finished: Path, tmp_path: Path, way: Way
) -> None:
    """It arrives after the run has looked at the store."""
    batch = open_known(values(tmp_path))
    columns, foreign = batch.stages["denoise"].columns, foreign_row(batch, "f" * 64)

    class Meanwhile(Coordinated):
        def stage_started(self, stage: str, *, items: int, cached: int, to_do: int) -> None:
            super().stage_started(stage, items=items, cached=cached, to_do=to_do)
            if stage == "denoise":
                write_manifest(batch.storage, "denoise", [foreign], columns)

    result, watcher = way(values(tmp_path), Meanwhile())
    assert watcher.counts["denoise"] == 6
    assert videos(result.dataset) == videos(finished / "datasets/batch")
    expect_one_attempt(tmp_path, result)


# --- failures


def test_a_failed_window_fails_its_clip_and_a_rerun_goes_on_there(
    values: Make, finished: Path, tmp_path: Path, way: Way
) -> None:
    result, watcher = way(values(tmp_path, {"bad": 1}))
    failures = result.failures.set_index("name")
    assert set(failures.index) == {"long", "middle"}
    assert set(failures["failed_stage"]) == {"denoise"}
    assert set(failures["error"]) == {"window 1 is bad"}
    assert watcher.counts["denoise"] == 5
    status = read_status(Storage(str(tmp_path)), "batch")
    assert (status.summary.ok, status.summary.failed) == (1, 2)
    assert {(f.stage, f.error) for f in status.failures} == {("denoise", "window 1 is bad")}
    (denoise,) = [stage for stage in status.stages if stage.stage == "denoise"]
    assert denoise == StageStatus("denoise", items=6, cached=3, to_do=0, failed=2)

    _, watcher = way(values(tmp_path))
    assert watcher.counts == {}
    result, watcher = way(values(tmp_path, retry_failed=True))
    assert watcher.counts == {"denoise": 3, "decode": 2}
    assert videos(result.dataset) == videos(finished / "datasets/batch")


# --- other runs at work


def test_a_window_that_another_run_is_at_is_waited_for(
    values: Make, finished: Path, tmp_path: Path, way: Way
) -> None:
    """And done, once its claim ends without a result; those that follow it come after."""
    batch = open_known(values(tmp_path))
    others = Claims(Storage(str(tmp_path)), "another machine")
    claim = others.claim("denoise", [batch.clips[1].windows["denoise"][1].key])

    class Releasing(Coordinated):
        """Once nothing else is left to do."""

        def item_ended(self, stage: str, row: dict[str, Any]) -> None:
            super().item_ended(stage, row)
            if stage == "denoise" and self.counts["denoise"] == 4:
                others.release(claim)

    result, watcher = way(values(tmp_path), Releasing())
    ended = [row["key"] for stage, row in watcher.ended if stage == "denoise"]
    assert ended[-2:] == window_keys(tmp_path)["long"][1:]
    assert videos(result.dataset) == videos(finished / "datasets/batch")


def test_a_second_run_inside_the_first_is_not_mixed_with_it(
    values: Make, finished: Path, tmp_path: Path
) -> None:
    """It begins before the first has committed its first window of `long`, and ends before the second one."""
    first_window = window_keys(finished)["long"][0]
    inner: list[Result] = []

    class Meanwhile(Watcher):
        def item_progress(self, stage: str, key: str, done: int, total: int) -> None:
            if key == first_window and not inner:
                inner.append(render(values(tmp_path, {"gpu": 2})))

    result, _ = straight(values(tmp_path, {"gpu": 1}), Meanwhile())
    keys = window_keys(tmp_path)
    rows = attempts(tmp_path, "denoise")
    assert rows["key"].value_counts().to_dict() == {
        key: 2 if name == "long" else 1 for name in keys for key in keys[name]
    }
    assert result.metadata["sha256"].tolist() == inner[0].metadata["sha256"].tolist()
    expect_one_attempt(tmp_path, result)


# --- care of a store


def test_rerunning_a_stage_makes_every_window_again(values: Make, store: Path) -> None:
    watcher = Watcher()
    config = parse(Config, values(store))
    result = rerun(config, "batch", stage="denoise", observer=watcher)
    assert watcher.counts == {"denoise": 6, "decode": 3}
    expect_one_attempt(store, result)


def test_verify_reads_every_window(store: Path) -> None:
    storage = Storage(str(store))
    checked = verify_run(storage, "batch").checked
    assert checked == len([path for path in store.rglob("*") if path.suffix in (".safetensors", ".mp4")]) + 4
    flip_byte(window_files(store, "long")[0])
    (problem,) = verify_run(storage, "batch", repair=True).problems
    assert "was altered" in problem
    assert len(load_catalog(storage, "denoise")) == 3  # those of the other clips


def test_gc_keeps_the_windows_of_an_unfinished_clip(values: Make, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    stopped_after(3, values(tmp_path))
    collect_garbage(storage, min_age_s=-60, delete=True)
    _, watcher = straight(values(tmp_path))
    assert watcher.counts["denoise"] == 3
