"""The coordinator with real queues and without Prefect: shards are submitted to bare threads."""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from avatar_core.devices import visible_gpus
from avatar_core.errors import BackendError, Cancelled, StoreError
from avatar_core.execution import shard_call
from avatar_core.execution.settings import run_settings
from avatar_core.execution.work import Work
from avatar_core.execution.worker_process import WorkerProcesses
from avatar_core.pipeline import render
from avatar_core.planning.batch import open_batch
from avatar_core.store.claims import Claims
from avatar_core.store.manifest import write_manifest
from avatar_core.store.storage import Storage
from tests.execution.runs import Run, opened
from tests.sample_rows import (
    PREVIEW_STAGES,
    Rendered,
    Watcher,
    attempts,
    data_files,
    flip_byte,
    open_known,
    videos,
    write_recording,
    write_table,
)

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).parents[2]


class Interrupting(Watcher):
    """Calls `act` once, as soon as a stage is at work."""

    def __init__(self, stage: str, act: Callable[[], None]) -> None:
        super().__init__()
        self._stage, self._act = stage, act
        self._done = False

    def item_progress(self, stage: str, key: str, done: int, total: int) -> None:
        if stage == self._stage and not self._done:
            self._done = True
            self._act()


# --- a whole run


def test_videos_are_those_of_render(run: Run, rendered: Rendered, tmp_path: Path) -> None:
    result = run(opened(rendered, tmp_path))
    assert videos(result.dataset) == videos(rendered.result.dataset)
    assert run.watcher.counts == {"face": 2, "audio": 2, "reference": 2, "denoise": 4, "decode": 4}
    assert {queue for _, queue, _ in run.submitted} == {"cpu-0", "cpu-1"}
    labels = [label for stage, _, label in run.submitted if stage == "face"]
    assert labels[0] == "face 0001 · portrait-hello"
    tally = run.work.tallies["decode"]
    assert (tally.items, tally.cached, tally.to_do, tally.done, tally.failed) == (4, 0, 4, 4, 0)
    assert tally.seconds > 0
    assert run.work.progress == 1.0


def test_what_is_finished_is_not_done_again(run: Run, rendered: Rendered, store: Path) -> None:
    result = run(opened(rendered, store, video={"crf": 30}))
    assert run.watcher.counts == {"decode": 4}
    assert len(result.failures) == 0


def test_nothing_to_do_needs_no_queue(run: Run, rendered: Rendered, store: Path) -> None:
    run.queues = WorkerProcesses(cpus=0)
    assert videos(run(opened(rendered, store)).dataset) == videos(rendered.result.dataset)


def test_items_wait_for_what_they_consume(rendered: Rendered, tmp_path: Path) -> None:
    plan = opened(rendered, tmp_path).plan()
    work = Work(plan)
    keys = [spec.key for stage in work.stages for spec in plan[stage].to_do]
    specs = {spec.key: spec for stage in work.stages for spec in plan[stage].to_do}
    expected = {(key, consumed) for key in keys for ks in specs[key].inputs.values() for consumed in ks}
    assert {(keys[consumer], keys[producer]) for producer, consumer in work.edges} == expected
    assert [work.stages[s] for s in work.stage_of] == [s for s in work.stages for _ in plan[s].to_do]
    assert work.work.tolist() == [specs[key].work for key in keys]


@pytest.mark.drill
def test_gpu_stages_go_to_gpu_queues(threads: ThreadPoolExecutor, rendered: Rendered, tmp_path: Path) -> None:
    batch = opened(rendered, tmp_path, runtime={"gpus": [0, 1], "pretend": True})
    batch.stages["denoise"].device_kind = "gpu"
    with WorkerProcesses(gpus=[0, 1], pretend=True, cpus=1) as queues:
        run = Run(threads, queues)
        result = run(batch)
    assert videos(result.dataset) == videos(rendered.result.dataset)
    on_gpus = {queue for stage, queue, _ in run.submitted if stage == "denoise"}
    assert on_gpus
    assert on_gpus <= {"gpu-0", "gpu-1"}  # the quicker one may take all
    assert {queue for stage, queue, _ in run.submitted if stage != "denoise"} == {"cpu-0"}


def test_gpus_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert list(visible_gpus()) == [0, 1]
    for nothing in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", nothing)
        assert list(visible_gpus()) == []


# --- other runs


def test_what_another_run_finished_meanwhile_is_taken_over(
    run: Run, rendered: Rendered, tmp_path: Path
) -> None:
    batch = opened(rendered, tmp_path)
    render(batch.config)
    result = run(batch)
    assert videos(result.dataset) == videos(rendered.result.dataset)
    for stage, items in {"face": 2, "audio": 2, "reference": 2, "denoise": 4, "decode": 4}.items():
        assert len(attempts(tmp_path, stage)) == items
        tally = run.work.tallies[stage]
        assert (tally.cached, tally.to_do, tally.done) == (items, 0, 0)


def test_what_another_run_failed_at_meanwhile_counts(run: Run, rendered: Rendered, tmp_path: Path) -> None:
    batch = opened(rendered, tmp_path)
    item = batch.plan()["reference"].to_do[0]
    row = {"key": item.key, "status": "failed", "error_type": "InputError", "error": "no face"}
    write_manifest(batch.storage, "reference", [row], batch.stages["reference"].columns)
    result = run(batch)
    assert list(result.failures["error"]) == ["no face"] * 2
    assert (len(attempts(tmp_path, "reference")), len(attempts(tmp_path, "decode"))) == (2, 2)
    assert run.work.tallies["reference"].failed == 1


def test_what_another_run_is_at_is_left_to_it_until_it_gives_up(
    threads: ThreadPoolExecutor, queues: WorkerProcesses, rendered: Rendered, tmp_path: Path
) -> None:
    batch = opened(rendered, tmp_path)
    others = Claims(Storage(str(tmp_path)), "another machine")
    held = batch.plan()["denoise"].to_do[0].key
    claim = others.claim("denoise", [held])

    class Releasing(Watcher):
        """Once nothing else is left to do."""

        def item_ended(self, stage: str, row: dict[str, Any]) -> None:
            super().item_ended(stage, row)
            if stage == "decode" and self.counts["decode"] == 3:
                others.release(claim)

    run = Run(threads, queues, Releasing())
    assert len(run(batch).failures) == 0
    denoised = [row["key"] for stage, row in run.watcher.ended if stage == "denoise"]
    assert denoised[-1] == held
    assert len(denoised) == 4
    assert not list(tmp_path.glob("stages/*/claims/*"))


def test_waiting_for_another_run_can_be_cancelled(run: Run, rendered: Rendered, tmp_path: Path) -> None:
    batch = opened(rendered, tmp_path)
    Claims(Storage(str(tmp_path)), "another machine").claim("denoise", [batch.plan()["denoise"].to_do[0].key])
    with pytest.raises(Cancelled):
        run(batch, lambda: run.watcher.counts.get("decode", 0) == 3)
    assert len(attempts(tmp_path, "decode")) == 3


def render_at_once(values: dict[str, Any], begin: Any) -> int:
    batch = open_batch(values)
    begin.wait()
    return len(render(batch.config).failures)


@pytest.mark.drill
def test_two_renders_in_lockstep_do_each_item_once(rendered: Rendered, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager, ProcessPoolExecutor(2, spawn) as pool:
        begin = manager.Barrier(2)
        values = {"table": str(rendered.table), "storage": {"root": str(tmp_path)}}
        assert list(pool.map(render_at_once, [values] * 2, [begin] * 2)) == [0, 0]
    for stage in ("ingest", *PREVIEW_STAGES):
        assert attempts(tmp_path, stage)["key"].is_unique
    assert videos(tmp_path / "datasets/batch") == videos(rendered.result.dataset)


# --- rows and stores that go wrong


def test_a_failed_item_blocks_only_its_clips(run: Run, inputs: Path, tmp_path: Path) -> None:
    rows = [
        {"name": name, "image": str(inputs / image), "audio": str(inputs / "hello.wav")}
        for name, image in (("good", "portrait.jpg"), ("bad", "landscape.png"))
    ]
    batch = open_known({"rows": rows, "storage": {"root": str(tmp_path)}})
    result = run(batch)
    assert list(result.failures["name"]) == ["bad"]
    assert list(result.failures["failed_stage"]) == ["reference"]
    assert run.work.tallies["reference"].failed == 1
    assert run.watcher.counts["decode"] == 1


@pytest.mark.parametrize("stage", ["reference", "denoise"])
def test_damaged_results_are_computed_again(run: Run, rendered: Rendered, store: Path, stage: str) -> None:
    for path in data_files(store, stage):
        flip_byte(path)
    result = run(opened(rendered, store, video={"crf": 30}, runtime={"cache_dir": str(store / "cache")}))
    assert len(result.failures) == 0
    assert run.watcher.counts["decode"] == 4
    assert run.watcher.counts[stage] == {"reference": 2, "denoise": 4}[stage]
    assert any("damaged or missing: computing them again" in text for text in run.watcher.warnings)


def test_damaged_inputs_are_taken_in_again(run: Run, rendered: Rendered, store: Path) -> None:
    for path in (store / "assets").rglob("*.jpeg"):
        flip_byte(path)
    result = run(opened(rendered, store, face={"min_face": 41}))
    assert len(result.failures) == 0
    assert run.watcher.counts["ingest"] == 2


def test_a_store_that_damages_everything_ends_the_run(
    threads: ThreadPoolExecutor, queues: WorkerProcesses, rendered: Rendered, store: Path
) -> None:
    class Damaging(Watcher):
        """Sees to it that no `denoise` result can be read."""

        def stage_started(self, stage: str, *, items: int, cached: int, to_do: int) -> None:
            if stage == "decode":
                for path in data_files(store, "denoise"):
                    flip_byte(path)

        def item_ended(self, stage: str, row: dict[str, Any]) -> None:
            if stage == "denoise":
                flip_byte(store / row["data"])

    run = Run(threads, queues, Damaging())
    with pytest.raises(StoreError, match="damaged again after being recomputed 3 times"):
        run(opened(rendered, store, limit=1, video={"crf": 30}))


def test_a_store_that_cannot_be_written_ends_the_run(
    run: Run, rendered: Rendered, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_call, "RETRY_DELAY_S", 0.01)
    batch = opened(rendered, store, video={"crf": 30})
    (store / "stages/decode/data").rename(store / "away")
    (store / "stages/decode/data").write_text("in the way")
    with pytest.raises(StoreError, match="is a file, not a folder"):
        run(batch)


def test_trouble_that_passes_is_waited_for(
    run: Run,
    rendered: Rendered,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shard_call, "RETRY_DELAY_S", 0.05)
    batch = opened(rendered, store, video={"crf": 30})
    data = store / "stages/decode/data"
    data.rename(store / "away")
    data.write_text("in the way")
    mending = threading.Lock()

    class Mending(logging.Handler):
        """At the first word of a retry."""

        def emit(self, record: logging.LogRecord) -> None:
            with mending:
                if record.getMessage().endswith("; trying again") and (store / "away").exists():
                    data.unlink()
                    (store / "away").rename(data)

    logger, handler = logging.getLogger("avatar_core.execution.shard_call"), Mending()
    logger.addHandler(handler)
    try:
        result = run(batch, retries=2)
    finally:
        logger.removeHandler(handler)
    assert not (store / "away").exists()
    assert len(result.failures) == 0
    assert (attempts(store, "decode")["status"] == "failed").sum() == 0


# --- queues that go wrong


@pytest.fixture(scope="module")
def long_table(inputs: Path) -> Path:
    """Two clips whose items take long enough for a signal to meet them at work."""
    recording = write_recording(inputs / "long.wav", 0.2, 3.0)
    rows = [{"image": image, "audio": str(recording)} for image in ("portrait.jpg", "closeup.jpg")]
    return write_table(inputs / "long.csv", rows)


class Signalling(Watcher):
    """Sends a signal to the queue that works on an item of the stage, always the same one."""

    def __init__(self, queues: WorkerProcesses, stage: str, number: signal.Signals, times: int) -> None:
        super().__init__()
        self._queues, self._stage, self._number, self._times = queues, stage, number, times
        self.victim: str | None = None
        self.pids: list[int] = []

    def item_progress(self, stage: str, key: str, done: int, total: int) -> None:
        if stage != self._stage or key != (self.victim or key) or len(self.pids) == self._times:
            return
        self.victim = key
        [queue] = self._queues.values()
        if queue.pid and queue.pid not in self.pids:
            self.pids.append(queue.pid)
            os.kill(queue.pid, self._number)


@pytest.fixture
def queue() -> Iterator[WorkerProcesses]:
    with WorkerProcesses(cpus=1) as local:
        yield local


@pytest.mark.drill
@pytest.mark.parametrize("stage", ["denoise", "decode"])
def test_a_killed_queue_is_replaced(
    threads: ThreadPoolExecutor, queue: WorkerProcesses, long_table: Path, tmp_path: Path, stage: str
) -> None:
    watcher = Signalling(queue, stage, signal.SIGKILL, times=1)
    result = Run(threads, queue, watcher)(open_known(batch_values(long_table, tmp_path)))
    assert len(watcher.pids) == 1
    assert len(result.failures) == 0
    assert watcher.counts[stage] == 2
    assert queue["cpu-0"].pid not in watcher.pids


@pytest.mark.drill
@pytest.mark.parametrize(
    ("number", "times", "reason"),
    [(signal.SIGKILL, 3, "ended by signal 9"), (signal.SIGSTOP, 1, "said nothing for 8 s")],
    ids=["dies", "hangs"],
)
def test_an_item_that_takes_its_queue_down_becomes_a_row(
    threads: ThreadPoolExecutor,
    queue: WorkerProcesses,
    long_table: Path,
    tmp_path: Path,
    number: signal.Signals,
    times: int,
    reason: str,
) -> None:
    watcher = Signalling(queue, "decode", number, times)
    result = Run(threads, queue, watcher)(open_known(batch_values(long_table, tmp_path)), item_timeout_s=8.0)
    assert len(watcher.pids) == times
    assert list(result.failures["failed_stage"]) == ["decode"]
    assert reason in result.failures["error"].iloc[0]
    rows = attempts(tmp_path, "decode").set_index("key")
    assert list(rows["status"].sort_values()) == ["failed", "ok"]
    assert rows["retryable"].tolist() == [key == watcher.victim or None for key in rows.index]
    again = Watcher()
    assert len(render(batch_values(long_table, tmp_path), again).failures) == 0
    assert again.counts == {"decode": 1}


def batch_values(table: Path, root: Path) -> dict[str, Any]:
    return {"table": str(table), "storage": {"root": str(root)}}


def test_cancelling_keeps_what_is_finished(
    threads: ThreadPoolExecutor, queues: WorkerProcesses, rendered: Rendered, tmp_path: Path
) -> None:
    stop = threading.Event()
    run = Run(threads, queues, Interrupting("decode", stop.set))
    with pytest.raises(Cancelled):
        run(opened(rendered, tmp_path, takes=4), stop.is_set)
    done = run.watcher.counts
    assert done.get("decode", 0) < 16
    watcher = Watcher()
    result = render({"table": str(rendered.table), "takes": 4, "storage": {"root": str(tmp_path)}}, watcher)
    assert len(result.failures) == 0
    assert watcher.counts["decode"] == 16 - done.get("decode", 0)
    assert watcher.counts.get("denoise", 0) == 16 - done.get("denoise", 0)


def test_a_budget_leaves_the_rest(run: Run, rendered: Rendered, store: Path) -> None:
    batch = opened(rendered, store, video={"crf": 30})
    result = run(batch, budget_hours=1e-9)
    assert run.submitted == []
    assert run.work.undone == 4
    assert any("is used up: the rest stays undone" in text for text in run.watcher.warnings)
    assert result.failures.empty
    assert result.metadata["status"].tolist() == ["to do"] * 4
    assert len(run(opened(rendered, store, video={"crf": 30}), budget_hours=1.0).failures) == 0


def test_without_any_queue_the_run_says_so(run: Run, rendered: Rendered, tmp_path: Path) -> None:
    run.queues = WorkerProcesses(cpus=0)
    with pytest.raises(BackendError, match="no worker is left"):
        run(opened(rendered, tmp_path))


def test_settings_have_defaults(rendered: Rendered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    settings = run_settings(opened(rendered, tmp_path).config)
    assert settings.gpus == ()
    assert settings.cpus == len(os.sched_getaffinity(0))
