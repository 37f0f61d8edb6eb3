"""Verifying, repairing and clearing a store, by the commands that a user types."""

from pathlib import Path
from typing import Any

import pytest

from avatar_core.maintenance import collect_garbage, verify_run
from avatar_core.pipeline import render
from avatar_core.planning.runs import list_runs
from avatar_core.store.storage import Storage
from tests.sample_rows import Rendered, RunAvatar, Watcher, data_files, flip_byte, videos, write_table


def opened(store: Path) -> Storage:
    return Storage(str(store))


def render_again(rendered: Rendered, store: Path) -> dict[str, int]:
    """What it cost; the videos are as they were."""
    watcher = Watcher()
    result = render({"table": str(rendered.table), "storage": {"root": str(store)}}, watcher)
    assert videos(result.dataset) == videos(rendered.result.dataset)
    return watcher.counts


# --- verify


def test_a_sound_store_has_no_problems(rendered: Rendered) -> None:
    report = verify_run(opened(rendered.store), "batch")
    assert report.problems == ()
    files = [*rendered.store.glob("assets/*/*"), *rendered.store.glob("datasets/batch/videos/*")]
    for stage in ("face", "audio", "reference", "denoise", "decode"):
        files += data_files(rendered.store, stage)
    assert report.checked == len(files)
    assert verify_run(opened(rendered.store), rendered.result.run_id).checked == report.checked


@pytest.mark.parametrize(
    ("pattern", "cost"),
    [
        ("stages/decode/data/*/*.mp4", {"decode": 1}),
        ("datasets/batch/videos/*.mp4", {}),
        ("stages/denoise/data/*/*", {}),
        ("assets/*/*.wav", {"ingest": 1}),
    ],
)
def test_a_flipped_byte_is_found_and_mended(
    avatar: RunAvatar, rendered: Rendered, store: Path, pattern: str, cost: dict[str, int]
) -> None:
    damaged = sorted(store.glob(pattern))[0]
    flip_byte(damaged)
    code, output = avatar("verify", "batch", f"storage.root={store}")
    assert code == 1
    assert output.count("was altered") == 1
    assert damaged.name in output
    assert "avatar verify batch --repair" in output
    code, output = avatar("verify", "batch", "--repair", f"storage.root={store}")
    assert code == 1
    assert "avatar rerun batch" in output
    assert render_again(rendered, store) == cost
    assert avatar("verify", "batch", f"storage.root={store}")[0] == 0


@pytest.mark.parametrize(
    "pattern", ["stages/decode/data/*/*.mp4", "datasets/batch/videos/*.mp4", "assets/*/*"]
)
def test_a_lost_file_is_found(avatar: RunAvatar, store: Path, pattern: str) -> None:
    lost = sorted(store.glob(pattern))[0]
    lost.unlink()
    code, output = avatar("verify", "batch", f"storage.root={store}")
    assert code == 1
    assert lost.name in output


def test_verify_names_the_nearest_run(avatar: RunAvatar, store: Path) -> None:
    code, output = avatar("verify", "bacth", f"storage.root={store}")
    assert code == 2
    assert "no run `bacth`" in output
    assert "did you mean `batch`?" in output


def test_damage_in_a_shared_file_is_repaired_for_every_owner(rendered: Rendered, store: Path) -> None:
    """Tensors of several items lie in one file."""
    for path in data_files(store, "face"):
        flip_byte(path)
    for stage in ("reference", "denoise", "decode"):
        for path in data_files(store, stage):
            path.unlink()
    verify_run(opened(store), "batch", repair=True)
    assert render_again(rendered, store) == {"face": 2, "reference": 2, "denoise": 4, "decode": 4}


# --- gc


@pytest.fixture
def second_run(inputs: Path, rendered: Rendered, store: Path) -> dict[str, Any]:
    """Beside the batch, a run that shares its picture with it and adds a clip of its own."""
    rows: list[dict[str, Any]] = [
        {"image": "portrait.jpg", "audio": "hello.wav", "seed": 99},
        {"image": "two_people.jpg", "audio": "hello.wav"},
    ]
    config = {"table": str(write_table(inputs / "second.csv", rows)), "storage": {"root": str(store)}}
    assert render(config).failures.empty
    return config


def stored(store: Path) -> set[str]:
    patterns = ("assets/*/*", "stages/*/data/*/*")
    return {str(path.relative_to(store)) for pattern in patterns for path in store.glob(pattern)}


def test_nothing_goes_while_every_run_is_recorded(second_run: dict[str, Any], store: Path) -> None:
    before = stored(store)
    report = collect_garbage(opened(store), min_age_s=0, delete=True)
    assert not report.files["data"]
    assert not report.files["assets"]
    assert stored(store) == before


def test_a_dry_run_deletes_nothing(avatar: RunAvatar, second_run: dict[str, Any], store: Path) -> None:
    before = stored(store)
    code, output = avatar("gc", f"storage.root={store}", "--forget", "second", "--min-age-days", 0)
    assert code == 0
    assert "run again with --delete" in output
    assert "data:" in output
    assert stored(store) == before
    assert len(list_runs(opened(store))) == 2


def test_only_what_the_forgotten_run_alone_needed_goes(
    avatar: RunAvatar, rendered: Rendered, second_run: dict[str, Any], store: Path
) -> None:
    code, output = avatar(
        "gc", f"storage.root={store}", "--delete", "--forget", "second", "--min-age-days", 0
    )
    assert code == 0
    assert "MB deleted" in output
    assert stored(store) == stored(rendered.store)
    assert [run.rsplit("-", 2)[0] for run in list_runs(opened(store))] == ["batch"]
    assert verify_run(opened(store), "batch").problems == ()
    assert render_again(rendered, store) == {}


def test_what_was_deleted_is_made_again_when_it_is_wanted(second_run: dict[str, Any], store: Path) -> None:
    before = videos(store / "datasets/second")
    collect_garbage(opened(store), forget=["second"], min_age_s=0, delete=True)
    watcher = Watcher()
    result = render(second_run, watcher)
    assert result.failures.empty
    assert videos(result.dataset) == before
    assert watcher.counts["decode"] == 2


def test_young_files_stay(second_run: dict[str, Any], store: Path) -> None:
    before = stored(store)
    report = collect_garbage(opened(store), forget=["second"], min_age_s=3600, delete=True)
    assert report.paths == []
    assert stored(store) == before


def test_gc_names_an_unknown_run(avatar: RunAvatar, store: Path) -> None:
    code, output = avatar("gc", f"storage.root={store}", "--forget", "batsh")
    assert code == 2
    assert "did you mean `batch`?" in output
