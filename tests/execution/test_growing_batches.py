"""Batches that come while another is rendered, and rows that become known while others are."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from avatar_core.execution.batch_run import BatchRun
from avatar_core.execution.coordinator import Coordinator
from avatar_core.execution.worker_process import WorkerProcesses
from avatar_core.pipeline import batch_run, begin_run, finish_run, render
from avatar_core.planning.batch import Batch, open_batch
from avatar_core.planning.runs import read_plan
from avatar_core.result import Result
from avatar_core.status import read_status
from tests.execution.runs import SETTINGS, Run
from tests.processes import kill_tree, until
from tests.sample_rows import Rendered, Watcher, attempts, open_known, videos, write_recording, write_table
from tests.watch import Watch

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).parents[2]


# --- several batches on one set of workers


def test_a_batch_that_comes_later_has_its_share(
    threads: ThreadPoolExecutor, rendered: Rendered, tmp_path: Path
) -> None:
    """A short one is done long before the one that it found at work."""
    long = open_known({**table_of(rendered, tmp_path / "long"), "takes": 12})
    short = open_known({**table_of(rendered, tmp_path / "short"), "limit": 1})
    order: list[str] = []

    class Noting(Watcher):
        def __init__(self, name: str) -> None:
            super().__init__()
            self._name = name

        def item_ended(self, stage: str, row: dict[str, Any]) -> None:
            super().item_ended(stage, row)
            order.append(self._name)

    with WorkerProcesses(cpus=1) as workers:
        coordinator = Coordinator(workers)

        def drive(batch: Batch, name: str) -> Result:
            watcher = Noting(name)
            work = BatchRun(batch, SETTINGS, watcher)
            return finish_run(batch, begin_run(batch), partial(coordinator.drive, work), watcher)

        first = threads.submit(drive, long, "long")
        until(lambda: len(order) >= 4)
        second = threads.submit(drive, short, "short")
        assert len(videos(second.result().dataset)) == 1
        done = order.index("short"), len(order) - order[::-1].index("short")
        assert not first.done()
        assert len(videos(first.result().dataset)) == 48
    between = order[done[0] : done[1]].count("long")
    assert order.count("short") == 5
    assert between <= 30  # of more than a hundred that waited


def table_of(rendered: Rendered, root: Path) -> dict[str, Any]:
    runtime = {"shard_seconds": 0.5}
    return {"table": str(rendered.table), "storage": {"root": str(root)}, "runtime": runtime}


@pytest.mark.drill
def test_many_batches_at_once_end_each_by_itself(rendered: Rendered, tmp_path: Path) -> None:
    """Each in a thread of its own: whoever waits turns the crank, and all come and go meanwhile."""
    with WorkerProcesses(cpus=2) as workers, ThreadPoolExecutor(6) as pool:
        coordinator = Coordinator(workers)

        def drive(number: int) -> Result:
            batch = open_batch({**table_of(rendered, tmp_path / str(number)), "limit": 1 + number % 2})
            work = BatchRun(batch, SETTINGS, Watcher())
            return finish_run(batch, begin_run(batch), partial(coordinator.drive, work), Watcher())

        results = list(pool.map(drive, range(6)))
    assert [len(result.failures) for result in results] == [0] * 6
    expected = videos(rendered.result.dataset)
    for result in results:
        assert videos(result.dataset).items() <= expected.items()
        assert len(videos(result.dataset)) == len(result.clips)
    assert [len(videos(result.dataset)) for result in results] == [1, 2] * 3


# --- rows that become known while others are rendered


@pytest.fixture
def many(inputs: Path, tmp_path: Path) -> Path:
    """Twelve rows of different recordings, of which one is none."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(12):
        write_recording(folder / f"{number}.wav", 0.2 + 0.02 * number)
    (folder / "7.wav").write_bytes(b"no recording")
    rows = [{"image": str(inputs / "portrait.jpg"), "audio": f"{number}.wav"} for number in range(12)]
    return write_table(folder / "many.csv", rows)


def test_rendering_begins_before_all_files_are_read(many: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    render({"table": str(many), "storage": {"root": str(tmp_path / "store")}}, watcher)
    stages = [stage for stage, _ in watcher.ended]
    assert stages[:3].count("ingest") == 3
    assert stages[3:].index("decode") < stages[3:].index("ingest")


def test_what_becomes_known_is_rendered_and_counted_once(run: Run, many: Path, tmp_path: Path) -> None:
    result = run(open_batch({"table": str(many), "storage": {"root": str(tmp_path / "store")}}))
    assert run.watcher.counts == {
        "ingest": 13,
        "face": 1,
        "audio": 11,
        "reference": 1,
        "denoise": 11,
        "decode": 11,
    }
    assert run.watcher.to_do == run.watcher.counts
    tally = run.work.tallies["ingest"]
    assert (tally.items, tally.cached, tally.done, tally.failed) == (13, 0, 12, 1)
    assert result.metadata["row"].tolist() == list(range(12))
    assert result.failures["row"].tolist() == [7]
    assert result.failures["failed_stage"].tolist() == ["ingest"]
    assert run.work.progress == 1.0


def test_the_plan_is_written_once_all_is_known(run: Run, many: Path, tmp_path: Path) -> None:
    batch = open_batch({"table": str(many), "storage": {"root": str(tmp_path / "store")}})
    record = begin_run(batch)
    folder = tmp_path / "store/runs" / record.id
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "rows.parquet"]
    summary = read_status(batch.storage, record.id).summary
    assert (summary.clips, summary.ok, summary.failed, summary.to_do) == (12, 0, 0, 12)
    work = batch_run(batch, record, run.watcher, lambda: False, run.submit)
    finish_run(batch, record, partial(Coordinator(run.queues).drive, work), run.watcher)
    assert read_plan(batch.storage, record.id)["row"].tolist() == list(range(12))
    summary = read_status(batch.storage, record.id).summary
    assert (summary.clips, summary.ok, summary.failed) == (12, 11, 1)


def test_sources_alone_are_taken_in_by_all_workers(run: Run, many: Path, tmp_path: Path) -> None:
    batch = open_batch({"table": str(many), "storage": {"root": str(tmp_path / "store")}})
    work = BatchRun(batch, SETTINGS, run.watcher, submit=run.submit, sources_only=True)
    Coordinator(run.queues).drive(work)
    assert run.watcher.counts == {"ingest": 13}
    assert {worker for _, worker, _ in run.submitted} == {"cpu-0", "cpu-1"}
    assert batch.is_complete
    assert list(batch.clips.rejected) == [7]
    again = Watcher()
    assert open_batch(batch.config, again).num_planned == 11  # a file that is none may have been mended


def test_a_budget_still_finds_out_which_rows_there_are(run: Run, many: Path, tmp_path: Path) -> None:
    batch = open_batch({"table": str(many), "storage": {"root": str(tmp_path / "store")}})
    result = run(batch, budget_hours=1e-9)
    assert run.watcher.counts == {"ingest": 13}
    assert result.metadata["status"].value_counts().to_dict() == {"to do": 11, "failed": 1}
    assert run.work.undone == 11 * 3 + 2
    assert run.watcher.warnings.count("budget_hours=1e-09 is used up: the rest stays undone") == 1


@pytest.mark.drill
def test_a_run_killed_among_its_files_goes_on_there(many: Path, tmp_path: Path) -> None:
    watch = Watch(tmp_path / "watch")
    watch.hold_at("ingest", item=6)
    words = ["render", str(many), f"storage.root={tmp_path / 'store'}", "runtime.cpus=1"]
    command = [sys.executable, "-m", "flows.cli", *words]
    environment = watch.environment()
    first = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    watch.until_held(first)
    kill_tree(first)
    watch.release()
    done = set(attempts(tmp_path / "store", "ingest")["key"])
    assert done
    begun = len(watch.calls())
    second = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert "11 of 12 clips" in second.stdout
    again = {key for stage, key in watch.calls()[begun:] if stage == "ingest"}
    assert again.isdisjoint(done)
    assert len(again | done) == 13
