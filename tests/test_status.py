"""What is said of recorded runs."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from avatar_core.errors import StoreError
from avatar_core.pipeline import begin_run, render
from avatar_core.status import ClipFailure, StageStatus, read_status, summarise_runs
from avatar_core.store.catalog import drop, load_catalog
from avatar_core.store.storage import Storage
from tests.sample_rows import Rendered, data_files, open_known, write_landscape, write_table


@pytest.fixture
def mixed(inputs: Path, tmp_path: Path) -> tuple[Storage, str]:
    """A finished batch of two good clips, one without a face and one whose picture is missing."""
    write_landscape(tmp_path / "nobody.png")
    rows = [
        {"name": "good", "image": inputs / "portrait.jpg", "audio": inputs / "hello.wav"},
        {"name": "nobody", "image": tmp_path / "nobody.png", "audio": inputs / "hello.wav"},
        {"name": "gone", "image": tmp_path / "gone.png", "audio": inputs / "hello.wav"},
        {"name": "other", "image": inputs / "closeup.jpg", "audio": inputs / "hello.wav"},
    ]
    table = write_table(tmp_path / "mixed.csv", rows)
    root = str(tmp_path / "store")
    result = render({"table": str(table), "storage": {"root": root}})
    return Storage(root, None, tmp_path / "cache"), result.run_id


def record(rendered: Rendered, storage: Storage, **options: Any) -> str:
    """The run that `render` would begin, without any of its work."""
    batch = open_known({"table": str(rendered.table), "storage": {"root": storage.uri}, **options})
    return begin_run(batch).id


def stages(status: Any) -> dict[str, StageStatus]:
    return {stage.stage: stage for stage in status.stages}


def test_a_finished_run(rendered: Rendered) -> None:
    status = read_status(Storage(str(rendered.store)), "batch")
    run = status.summary
    assert (run.id, run.name) == (rendered.result.run_id, "batch")
    assert (run.clips, run.ok, run.failed, run.to_do) == (4, 4, 0, 0)
    assert timedelta(0) <= datetime.now(UTC) - run.started < timedelta(hours=1)
    assert status.dataset == rendered.result.dataset
    assert stages(status)["face"] == StageStatus("face", items=2, cached=2, to_do=0, failed=0)
    assert stages(status)["decode"] == StageStatus("decode", items=4, cached=4, to_do=0, failed=0)
    assert status.failures == ()


def test_failures_have_their_stage_and_reason(mixed: tuple[Storage, str]) -> None:
    storage, run_id = mixed
    status = read_status(storage, run_id)
    run = status.summary
    assert (run.clips, run.ok, run.failed, run.to_do) == (4, 2, 2, 0)
    nobody, gone = status.failures
    assert isinstance(nobody, ClipFailure)
    assert (nobody.name, nobody.row, gone.name, gone.row, gone.stage) == ("nobody", 1, "gone", 2, "ingest")
    assert re.search("no face", nobody.error)
    assert re.search(r"gone\.png", gone.error)
    assert stages(status)[nobody.stage].failed == 1
    assert {stage.to_do for stage in status.stages} == {0}


def test_a_run_that_was_cut_short(rendered: Rendered, store: Path) -> None:
    storage = Storage(str(store))
    run_id = record(rendered, storage, name="again", takes=2)
    status = read_status(storage, "again")
    run = status.summary
    assert run.id == run_id
    assert (run.clips, run.ok, run.failed, run.to_do) == (8, 4, 0, 4)
    assert status.dataset is None
    assert stages(status)["audio"] == StageStatus("audio", items=2, cached=2, to_do=0, failed=0)
    assert stages(status)["decode"] == StageStatus("decode", items=8, cached=4, to_do=4, failed=0)


def test_what_lies_before_a_finished_video_is_not_to_do(rendered: Rendered, store: Path) -> None:
    storage = Storage(str(store))
    catalog = load_catalog(storage, "denoise")
    drop(storage, "denoise", catalog.ok_keys(), catalog)
    denoise = stages(read_status(storage, "batch"))["denoise"]
    assert (denoise.cached, denoise.to_do) == (0, 0)


def test_all_runs_newest_first(rendered: Rendered, store: Path) -> None:
    storage = Storage(str(store))
    newest = record(rendered, storage, name="again", takes=2)
    # Both may have begun within one second, which is as fine as ids tell.
    runs = {run.id: run for run in summarise_runs(storage)}
    assert set(runs) == {newest, rendered.result.run_id}
    assert (runs[newest].ok, runs[newest].to_do) == (4, 4)
    assert (runs[rendered.result.run_id].ok, runs[rendered.result.run_id].to_do) == (4, 0)
    assert [run.started for run in runs.values()] == sorted((r.started for r in runs.values()), reverse=True)
    assert len(summarise_runs(storage, latest=1)) == 1


def test_an_empty_store(tmp_path: Path) -> None:
    assert summarise_runs(Storage(str(tmp_path))) == []


def test_an_unknown_run(rendered: Rendered) -> None:
    with pytest.raises(StoreError, match=r"no run `bath` in .*did you mean `batch`\?"):
        read_status(Storage(str(rendered.store)), "bath")


def test_reading_takes_nothing_in(rendered: Rendered, store: Path) -> None:
    before = sorted(path for path in store.rglob("*") if path.is_file())
    read_status(Storage(str(store)), "batch")
    summarise_runs(Storage(str(store)))
    assert sorted(path for path in store.rglob("*") if path.is_file()) == before
    assert data_files(store, "decode")
