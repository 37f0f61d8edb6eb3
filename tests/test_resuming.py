"""Whatever is lost, damaged or interrupted: the same command ends well, with the same videos."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from avatar_core.errors import Cancelled
from avatar_core.maintenance import verify_run
from avatar_core.pipeline import render
from avatar_core.planning.runs import find_run, list_runs, read_plan
from avatar_core.result import Result
from avatar_core.store.storage import Storage
from tests.sample_rows import (
    Rendered,
    Watcher,
    attempts,
    data_files,
    expect_same,
    flip_byte,
    render_table,
    videos,
)
from tests.watch import Watch

pytestmark = pytest.mark.timeout(120)


# --- losses and damage


@pytest.mark.parametrize("parts", [("data",), ("data", "manifests")])
def test_motion_that_was_cleaned_away_costs_nothing(
    rendered: Rendered, store: Path, parts: tuple[str, ...]
) -> None:
    for part in parts:
        shutil.rmtree(store / "stages" / "denoise" / part)
    watcher = Watcher()
    expect_same(render_table(rendered.table, store, watcher), rendered)
    assert watcher.counts == {}


def test_a_lost_stored_video_is_rendered_again_alone(rendered: Rendered, store: Path) -> None:
    data_files(store, "decode")[0].unlink()
    watcher = Watcher()
    expect_same(render_table(rendered.table, store, watcher), rendered)
    assert watcher.counts == {"decode": 1}


def test_a_lost_published_video_is_copied_again(rendered: Rendered, store: Path) -> None:
    (store / "datasets/batch/videos/closeup-again.mp4").unlink()
    watcher = Watcher()
    expect_same(render_table(rendered.table, store, watcher), rendered)
    assert watcher.counts == {}


@pytest.mark.parametrize("stage", ["audio", "reference", "denoise"])
def test_a_damaged_input_of_a_needed_item_is_made_again(rendered: Rendered, store: Path, stage: str) -> None:
    for path in data_files(store, stage):
        flip_byte(path)
    shutil.rmtree(store / "stages/decode")
    if stage != "denoise":
        shutil.rmtree(store / "stages/denoise")
    watcher = Watcher()
    expect_same(render_table(rendered.table, store, watcher), rendered)
    assert watcher.counts[stage] == len(attempts(rendered.store, stage))
    assert any("damaged" in warning for warning in watcher.warnings)
    assert "dropped" in set(attempts(store, stage)["status"])


def test_a_damaged_asset_is_taken_in_again(rendered: Rendered, store: Path) -> None:
    for path in (store / "assets").rglob("*.wav"):
        flip_byte(path)
    shutil.rmtree(store / "stages/decode")
    watcher = Watcher()
    expect_same(render_table(rendered.table, store, watcher), rendered)
    assert any("damaged" in warning for warning in watcher.warnings)


def test_an_unreadable_manifest_counts_as_absent(rendered: Rendered, store: Path) -> None:
    shutil.rmtree(store / "stages/decode")
    for path in (store / "stages/denoise/manifests").iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    watcher = Watcher()
    expect_same(render_table(rendered.table, store, watcher), rendered)
    assert watcher.counts == {"denoise": 4, "decode": 4}


def test_a_damaged_video_that_must_be_published_is_rendered_again(rendered: Rendered, store: Path) -> None:
    flip_byte(data_files(store, "decode")[0])
    shutil.rmtree(store / "datasets")
    watcher = Watcher()
    expect_same(render_table(rendered.table, store, watcher), rendered)
    assert watcher.counts == {"decode": 1}


# --- stopping


@pytest.mark.drill
@pytest.mark.parametrize("items", [3, 9, 14])
def test_a_cancelled_run_keeps_what_is_finished(rendered: Rendered, tmp_path: Path, items: int) -> None:
    config = {"table": str(rendered.table), "storage": {"root": str(tmp_path)}}
    watcher = Watcher()
    with pytest.raises(Cancelled):
        render(config, watcher, lambda: len(watcher.ended) >= items)
    assert len(watcher.ended) == items
    rest = Watcher()
    expect_same(render(config, rest), rendered)
    ended = [row["key"] for _, row in watcher.ended + rest.ended]
    assert len(ended) == len(set(ended)) == 18


@pytest.fixture(scope="module")
def takes(rendered: Rendered, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The videos of a run that is long enough to be killed in the middle, in three takes each."""
    store = Path(shutil.copytree(rendered.store, tmp_path_factory.mktemp("takes") / "store"))
    return videos(render_table(rendered.table, store, takes=3).dataset)


@pytest.mark.drill
@pytest.mark.parametrize(("stage", "item"), [("ingest", 2), ("denoise", 1), ("decode", 5)])
def test_a_killed_run_is_finished_by_the_same_command(
    rendered: Rendered, takes: dict[str, bytes], tmp_path: Path, stage: str, item: int
) -> None:
    words = ["render", str(rendered.table), f"storage.root={tmp_path / 'store'}", "takes=3"]
    watch = Watch(tmp_path / "watch")
    watch.hold_at(stage, item)
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *words],
        env=watch.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[1],
    )
    watch.until_held(process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "store/datasets/batch/metadata.parquet").exists()
    result = render_table(rendered.table, tmp_path / "store", takes=3)
    assert result.failures.empty
    assert videos(result.dataset) == takes
    assert verify_run(Storage(str(tmp_path / "store")), "batch").problems == ()


class Meanwhile(Watcher):
    """Lets a second run of the same batch happen inside the first, at one moment of it."""

    def __init__(self, moment: str, second_run: Callable[[], object]) -> None:
        super().__init__()
        self.moment = moment
        self.second_run = second_run

    def item_ended(self, stage: str, row: dict[str, Any]) -> None:
        super().item_ended(stage, row)
        if stage == self.moment and self.counts[stage] == 1:
            self.second_run()

    def clip_published(self, name: str, path: str) -> None:
        super().clip_published(name, path)
        if self.moment == "publish" and len(self.published) == 1:
            self.second_run()


@pytest.mark.parametrize("moment", ["ingest", "audio", "decode", "publish"])
def test_two_runs_at_once_do_no_harm(rendered: Rendered, tmp_path: Path, moment: str) -> None:
    seconds: list[Result] = []
    watcher = Meanwhile(moment, lambda: seconds.append(render_table(rendered.table, tmp_path)))
    expect_same(render_table(rendered.table, tmp_path, watcher), rendered)
    assert len(seconds) == 1
    last = Watcher()
    expect_same(render_table(rendered.table, tmp_path, last), rendered)
    assert last.counts == {}


def test_a_run_is_on_record_before_its_work(rendered: Rendered, tmp_path: Path) -> None:
    config = {"table": str(rendered.table), "storage": {"root": str(tmp_path)}, "seed": 3}
    watcher = Watcher()
    with pytest.raises(Cancelled):
        render(config, watcher, lambda: "face" in watcher.to_do)
    (run_id,) = list_runs(Storage(str(tmp_path)))
    recorded = find_run(Storage(str(tmp_path)), "batch")
    assert (recorded.id, recorded.config["seed"]) == (run_id, 3)
    assert recorded.config["backend"]["reference"]["landmarks"] in ("mesh", "points")
    plan = read_plan(Storage(str(tmp_path)), run_id)
    result = render(config)
    assert plan["decode_key"].tolist() == result.metadata["decode_key"].tolist()


def test_the_latest_of_several_runs_in_a_second(rendered: Rendered, tmp_path: Path) -> None:
    config = {"table": str(rendered.table), "storage": {"root": str(tmp_path)}}
    for seed in range(5):
        with pytest.raises(Cancelled):
            render({**config, "seed": seed}, cancelled=lambda: True)
        assert find_run(Storage(str(tmp_path)), "batch").config["seed"] == seed
