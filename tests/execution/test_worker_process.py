"""Children of the queues are real processes; faults are real signals."""

import dataclasses
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from avatar_core.backends.base import create_backend
from avatar_core.config import Config, parse
from avatar_core.errors import ConfigError
from avatar_core.execution.device import Device
from avatar_core.execution.shard import run_shard
from avatar_core.execution.worker import Cancellation, Job, JobResult, StoreAddress
from avatar_core.execution.worker_process import WorkerProcess, WorkerProcesses
from avatar_core.planning.batch import Batch, open_batch
from avatar_core.planning.stages import create_stages
from avatar_core.stages.base import ItemSpec
from avatar_core.store.storage import Storage
from avatar_core.store.tensors import open_item
from tests.execution import toy_backend as toy
from tests.execution.jobs import run_job as run
from tests.processes import exists, until
from tests.sample_rows import PREVIEW_STAGES, Rendered, attempts, data_files, flip_byte

pytestmark = pytest.mark.timeout(120)

SILENCE_S = toy.SILENCE_S


@pytest.fixture
def queue() -> Iterator[WorkerProcess]:
    queue = WorkerProcess("cpu-0")
    yield queue
    queue.stop()


def toy_job(root: Path, *acts: toy.Act) -> Job:
    items = tuple(toy.toy_item(f"item-{i}", act) for i, act in enumerate(acts))
    return Job(StoreAddress(str(root), {}, None, 2**20), {"name": "toy"}, "denoise", items, {})


def answer(root: Path, row: Mapping[str, Any]) -> Any:
    path = Storage(str(root)).local_path(row["data"], row["sha256"])
    return json.loads(open_item(path, row["key"])["answer"].tobytes())


def ask(queue: WorkerProcess, root: Path, act: toy.Act = toy.describe) -> Any:
    result = run(queue, toy_job(root, act))
    assert result.error is None
    return answer(root, result.rows[0])


def pid_of(queue: WorkerProcess) -> int:
    assert queue.pid is not None
    return queue.pid


# --- the same as in one process


@pytest.fixture
def batch(rendered: Rendered, store: Path) -> Batch:
    """Everything but the ingested sources is to do."""
    for stage in PREVIEW_STAGES:
        for path in (store / "stages" / stage).rglob("*.*"):
            path.unlink()
    return open_batch(parse(Config, {"table": str(rendered.table), "storage": {"root": str(store)}}))


def job_of(batch: Batch, stage: str, wanted: Sequence[ItemSpec]) -> Job:
    items = tuple(wanted)
    inputs = {
        upstream: {
            key: batch.results[upstream].ok(key) or {} for item in items for key in item.inputs[upstream]
        }
        for upstream in items[0].inputs
    }
    backend = {"name": batch.backend.name, **asdict(batch.backend.config)}
    return Job(StoreAddress(batch.storage.uri, {}, None, 2**20), backend, stage, items, inputs)


def untimed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {column: value for column, value in row.items() if column != "seconds"}


def test_rows_and_files_are_those_of_the_own_process(
    batch: Batch, queue: WorkerProcess, tmp_path: Path
) -> None:
    store = Path(batch.storage.uri)
    assert data_files(store, "decode") == []
    for stage, plan in batch.plan().items():
        if stage == "ingest":
            continue
        job = job_of(batch, stage, plan.to_do)
        shown: list[dict[str, Any]] = []
        result = run(queue, job, on_row=shown.append)
        assert result.error is None
        assert [row["key"] for row in shown] == [item.key for item in plan.to_do]
        files = {path: path.read_bytes() for path in data_files(store, stage)}
        for path in files:
            path.unlink()
        expected = run_shard(batch.storage, batch.stages[stage], job.items, job.inputs)
        assert [untimed(row) for row in result.rows] == [untimed(row) for row in expected]
        assert {path: path.read_bytes() for path in data_files(store, stage)} == files
        for row in result.rows:
            batch.results[stage].add(row)
    assert len(data_files(store, "decode")) == 4
    assert set(attempts(store, "decode")["status"]) == {"ok"}


def test_a_damaged_input_names_what_to_compute_again(batch: Batch, queue: WorkerProcess) -> None:
    items = batch.plan()["audio"].to_do
    damaged = items[1].assets["audio"][0]
    flip_byte(Path(batch.storage.uri) / damaged.path)
    result = run(queue, job_of(batch, "audio", items))
    assert result.error_type == "StoreError"
    assert result.error is not None
    assert "altered" in result.error
    assert result.keys == (f"ingest:{damaged.key}",)
    assert [row["key"] for row in result.rows] == [items[0].key]
    assert result.unfinished == tuple(item.key for item in items[1:])
    committed = attempts(Path(batch.storage.uri), "audio")
    assert committed["sha256"].tolist() == [row["sha256"] for row in result.rows]


# --- a child


def test_a_child_has_neither_flow_engine_nor_composer_nor_model_library(
    queue: WorkerProcess, tmp_path: Path
) -> None:
    modules = {name.split(".")[0] for name in ask(queue, tmp_path)["modules"]}
    assert "avatar_core" in modules
    assert not modules & {
        "prefect",
        "hydra",
        "omegaconf",
        "typer",
        "torch",
        "transformers",
        "diffusers",
        "pytest",
    }


def test_the_preview_backend_needs_no_model_library(
    batch: Batch, queue: WorkerProcess, tmp_path: Path
) -> None:
    run(queue, job_of(batch, "audio", batch.plan()["audio"].to_do))
    run(queue, job_of(batch, "face", batch.plan()["face"].to_do))
    modules = ask(queue, tmp_path)["modules"]
    assert "avatar_core.backends.preview.backend" in modules
    assert not {"torch", "transformers", "diffusers", "tensorflow"} & set(modules)


def test_the_environment_is_set_before_anything_is_imported(tmp_path: Path) -> None:
    with WorkerProcesses(gpus=[3], pretend=True, cpus=1) as queues:
        for name, device in (("gpu-3", "3"), ("cpu-0", "")):
            assert ask(queues[name], tmp_path)["environment"]["CUDA_VISIBLE_DEVICES"] == device
            started_with = Path(f"/proc/{queues[name].pid}/environ").read_text().split("\0")
            assert f"CUDA_VISIBLE_DEVICES={device}" in started_with


def test_models_stay_loaded_between_shards(queue: WorkerProcess, tmp_path: Path) -> None:
    told = [ask(queue, tmp_path / "a"), ask(queue, tmp_path / "b"), ask(queue, tmp_path / "a")]
    assert [each["loads"] for each in told] == [["cpu"]] * 3
    assert [each["backends"] for each in told] == [1, 2, 2]  # one for each store
    assert len({each["pid"] for each in told}) == 1


def test_a_question_to_the_terminal_gets_no_answer(queue: WorkerProcess, tmp_path: Path) -> None:
    assert ask(queue, tmp_path)["stdin"] == ""


@pytest.mark.parametrize(
    ("gpu", "pretended", "device"), [(True, None, "cuda"), (False, "0", "cpu"), (False, None, "cpu")]
)
def test_a_gpu_stage_computes_on_the_gpu_unless_it_is_pretended(
    gpu: bool, pretended: str | None, device: str
) -> None:
    stage = create_stages(create_backend({"name": "preview"}))["denoise"]
    assert Device(gpu=gpu, pretended=pretended).of(stage) == "cpu"
    stage.device_kind = "gpu"
    assert Device(gpu=gpu, pretended=pretended).of(stage) == device


def test_gpus_are_counted_among_the_visible_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-7f")
    with pytest.raises(ConfigError, match="no GPU 2: CUDA_VISIBLE_DEVICES=5, GPU-7f allows 0 to 1"):
        WorkerProcesses(gpus=[2])
    with WorkerProcesses(gpus=[0, 1], cpus=0) as queues:
        for name, device in (("gpu-0", "5"), ("gpu-1", "GPU-7f")):
            until(Path(f"/proc/{queues[name].pid}/environ").read_text)
            started_with = Path(f"/proc/{queues[name].pid}/environ").read_text().split("\0")
            assert f"CUDA_VISIBLE_DEVICES={device}" in started_with


def test_storage_options_reach_the_child_and_nobody_else(
    queue: WorkerProcess, s3_root: str, s3_options: dict[str, Any], tmp_path: Path
) -> None:
    items = (toy.toy_item("a", toy.nothing), toy.toy_item("b", toy.break_unexpectedly))
    job = Job(StoreAddress(s3_root, s3_options, str(tmp_path), 2**20), {"name": "toy"}, "denoise", items, {})
    rows = run(queue, job).rows
    assert [row["status"] for row in rows] == ["ok", "failed"]
    assert Storage(s3_root, s3_options, tmp_path).exists(rows[0]["data"])
    shown = [repr(job), *(Path(f"/proc/{queue.pid}/{file}").read_text() for file in ("cmdline", "environ"))]
    assert not any(s3_options["secret"] in text for text in shown)


# --- what the parent hears


def test_log_records_arrive_with_their_item(
    queue: WorkerProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run(queue, toy_job(tmp_path, toy.nothing, toy.log_levels, toy.break_unexpectedly))
    told = [
        (each.name, each.levelname, each.processName, each.__dict__["item_key"]) for each in caplog.records
    ]
    assert told == [
        ("avatar_core.toy", "INFO", "cpu-0", "item-1"),
        ("avatar_core.execution.shard", "WARNING", "cpu-0", "item-2"),
    ]
    assert caplog.messages[0] == "all of it"
    assert "ZeroDivisionError: by zero" in caplog.messages[1]


def test_records_below_the_level_of_the_parent_are_left_out(
    queue: WorkerProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        caplog.handler.setLevel(logging.NOTSET)  # so that only the logger can leave them out
        run(queue, toy_job(tmp_path, toy.log_levels))
    assert caplog.messages == []


def test_progress_is_thinned_out(queue: WorkerProcess, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    job = toy_job(tmp_path, toy.report_often)
    result = run(queue, job, on_progress=lambda *progress: heard.append(progress))
    assert heard[0] == ("item-0", 0, 1)
    assert [done for _, done, _ in heard] == sorted({done for _, done, _ in heard})
    assert len(heard) <= 1 + 10 * result.rows[0]["seconds"]
    assert answer(tmp_path, result.rows[0]) > 100


def test_a_failed_item_is_a_row_and_the_rest_goes_on(queue: WorkerProcess, tmp_path: Path) -> None:
    result = run(queue, toy_job(tmp_path, toy.break_unexpectedly, toy.nothing))
    assert [row["status"] for row in result.rows] == ["failed", "ok"]
    assert (result.error, result.unfinished) == (None, ())


@pytest.mark.parametrize(
    ("act", "error_type"), [(toy.lack_weights, "WeightsError"), (toy.cancel_itself, "Cancelled")]
)
def test_what_ends_a_shard_leaves_the_finished_items_committed(
    queue: WorkerProcess, tmp_path: Path, act: toy.Act, error_type: str
) -> None:
    result = run(queue, toy_job(tmp_path, toy.nothing, act, toy.nothing))
    assert (result.error_type, result.cancelled) == (error_type, error_type == "Cancelled")
    manifests = Path(tmp_path / "stages/denoise/manifests").iterdir()
    assert [path.stem for path in manifests] == list(result.attempts)
    assert attempts(tmp_path, "denoise")["sha256"].tolist() == [row["sha256"] for row in result.rows]
    assert [row["key"] for row in result.rows] == ["item-0"]
    assert result.unfinished == ("item-1", "item-2")


def test_rows_that_could_not_be_committed_are_unfinished(queue: WorkerProcess, tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "denoise").write_text("in the way")
    result = run(queue, toy_job(tmp_path, toy.nothing))
    assert result.error_type == "StoreError"
    assert (result.rows, result.unfinished) == ((), ("item-0",))


def test_a_job_that_cannot_be_set_up_is_an_error_of_the_job(queue: WorkerProcess, tmp_path: Path) -> None:
    result = run(queue, Job(StoreAddress(str(tmp_path), {}, None, 1), {"name": "no such"}, "denoise", (), {}))
    assert result.error is not None
    assert result.error.startswith("unknown backend `no such`")
    pid = queue.pid
    ask(queue, tmp_path)
    assert queue.pid == pid


# --- children that are lost


@pytest.mark.drill
@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (toy.crash, "ended by signal 11 (Segmentation fault) while it worked on item item-1"),
        (toy.exit_with_status, "exited with status 3 while it worked on item item-1"),
    ],
)
def test_a_child_that_dies_is_replaced(
    queue: WorkerProcess, tmp_path: Path, act: toy.Act, reason: str
) -> None:
    result = run(queue, toy_job(tmp_path, toy.nothing, act, toy.nothing))
    assert (result.died, result.hung, result.cancelled, result.last_item) == (True, False, False, "item-1")
    assert result.error is not None
    assert reason in result.error
    assert (result.rows, result.unfinished) == ((), ("item-0", "item-1", "item-2"))
    assert ask(queue, tmp_path)["loads"] == ["cpu"]


def test_a_child_killed_amid_a_real_shard_is_replaced(batch: Batch, queue: WorkerProcess) -> None:
    items = batch.plan()["audio"].to_do
    job = job_of(batch, "audio", items)
    result = run(queue, job, on_row=lambda row: os.kill(pid_of(queue), signal.SIGKILL))
    assert (result.died, result.rows) == (True, ())
    assert result.unfinished == tuple(item.key for item in items)
    assert "signal 9" in (result.error or "")
    again = run(queue, job)
    assert [row["status"] for row in again.rows] == ["ok"] * len(items)


def test_a_child_killed_while_idle_costs_no_job(queue: WorkerProcess, tmp_path: Path) -> None:
    killed = ask(queue, tmp_path)["pid"]
    os.kill(killed, signal.SIGKILL)
    os.waitid(os.P_PID, killed, os.WEXITED | os.WNOWAIT)
    assert ask(queue, tmp_path)["pid"] != killed


def test_a_child_that_dies_takes_the_blame_for_one_shard_only(queue: WorkerProcess, tmp_path: Path) -> None:
    """The second is with the child already, since the first is at its last item."""
    with ThreadPoolExecutor() as pool:
        first = pool.submit(run, queue, toy_job(tmp_path, toy.nothing, toy.sleep_for_ever))
        until(lambda: queue.in_flight == 1)
        second = pool.submit(run, queue, toy_job(tmp_path, toy.nothing))
        until(lambda: queue.in_flight == 2)
        os.kill(pid_of(queue), signal.SIGKILL)
        assert (first.result().died, first.result().last_item) == (True, "item-1")
        assert second.result() == JobResult(cancelled=True, unfinished=("item-0",))
    assert run(queue, toy_job(tmp_path, toy.nothing)).unfinished == ()


def test_shards_that_follow_each_other_end_with_their_own_rows(queue: WorkerProcess, tmp_path: Path) -> None:
    """While one is committed, the next one is worked on."""
    items = [toy.toy_item(f"item-{number:02d}", toy.nothing) for number in range(24)]
    jobs = [dataclasses.replace(toy_job(tmp_path), items=tuple(items[n : n + 3])) for n in range(0, 24, 3)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda job: run(queue, job), jobs))
    assert [[row["key"] for row in r.rows] for r in results] == [[i.key for i in job.items] for job in jobs]
    assert sorted(attempts(tmp_path, "denoise")["key"]) == [item.key for item in items]


@pytest.mark.drill
def test_a_stopped_child_is_replaced_after_the_time_limit(queue: WorkerProcess, tmp_path: Path) -> None:
    stopped = ask(queue, tmp_path)["pid"]
    job = toy_job(tmp_path, toy.nothing, toy.sleep_for_ever)
    result = run(queue, job, item_timeout_s=SILENCE_S, on_row=lambda row: os.kill(stopped, signal.SIGSTOP))
    assert (result.died, result.hung, result.last_item) == (False, True, "item-1")
    assert f"said nothing for {SILENCE_S:g} s" in (result.error or "")
    assert result.unfinished == ("item-0", "item-1")
    assert not exists(stopped)
    assert ask(queue, tmp_path)["pid"] != stopped


@pytest.mark.drill
def test_a_child_that_stopped_before_it_took_a_large_job_is_replaced(
    queue: WorkerProcess, tmp_path: Path
) -> None:
    stopped = ask(queue, tmp_path)["pid"]
    os.kill(stopped, signal.SIGSTOP)
    result = run(queue, toy_job(tmp_path, *[toy.nothing] * 50_000), item_timeout_s=SILENCE_S)
    assert (result.hung, result.last_item) == (True, None)
    assert not exists(stopped)


@pytest.mark.drill
def test_an_item_that_reports_may_take_longer_than_the_limit(queue: WorkerProcess, tmp_path: Path) -> None:
    ask(queue, tmp_path)
    result = run(queue, toy_job(tmp_path, toy.report_for_longer), item_timeout_s=SILENCE_S)
    assert (result.hung, result.error) == (False, None)


@pytest.mark.drill
def test_an_error_of_the_listener_leaves_a_usable_queue(queue: WorkerProcess, tmp_path: Path) -> None:
    def fail(row: Mapping[str, Any]) -> None:
        raise OSError("nobody listens")

    with pytest.raises(OSError, match="nobody listens"):
        run(queue, toy_job(tmp_path, toy.nothing, toy.wait_for_cancel), on_row=fail)
    assert ask(queue, tmp_path)["loads"] == ["cpu"]


# --- cancelling and stopping


def test_cancel_commits_what_is_finished_and_takes_the_waiting_shard_along(
    queue: WorkerProcess, tmp_path: Path
) -> None:
    with ThreadPoolExecutor() as pool:
        ended = threading.Event()
        cancellation = Cancellation()
        job = toy_job(tmp_path, toy.nothing, toy.wait_for_cancel)
        first = pool.submit(run, queue, job, on_row=lambda row: ended.set(), cancellation=cancellation)
        until(ended.is_set)
        pid = queue.pid
        waiting = toy_job(tmp_path, toy.wait_for_cancel)
        second = pool.submit(run, queue, waiting, cancellation=cancellation)
        until(second.running)
        until(lambda: queue._numbers == 2)
        cancellation.ask()
        assert [row["key"] for row in first.result().rows] == ["item-0"]
        assert (second.result().cancelled, second.result().unfinished) == (True, ("item-0",))
    assert first.result().cancelled
    assert first.result().unfinished == ("item-1",)
    assert attempts(tmp_path, "denoise")["key"].tolist() == ["item-0"]
    assert ask(queue, tmp_path)["pid"] == pid


def test_stop_amid_a_shard_leaves_no_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ThreadPoolExecutor() as pool, WorkerProcesses(gpus=[0], pretend=True, cpus=1) as queues:
        pids = [pid_of(queue) for queue in queues.values()]
        with caplog.at_level(logging.INFO):
            running = pool.submit(run, queues["gpu-0"], toy_job(tmp_path, toy.start_helper))
            until(lambda: caplog.messages)
        helper = int(caplog.messages[0].removeprefix("helper "))
        queues.stop()
        assert running.result() == JobResult(cancelled=True, unfinished=("item-0",))
        until(lambda: not exists(helper))
        assert not any(map(exists, pids))
        assert run(queues["cpu-0"], toy_job(tmp_path, toy.nothing)).cancelled


def test_two_queues_work_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEETING", str(tmp_path / "meeting"))
    with WorkerProcesses(cpus=2) as queues, ThreadPoolExecutor() as pool:
        job = toy_job(tmp_path, toy.be_in_two_places)
        results = list(pool.map(lambda queue: run(queue, job), queues.values()))
    assert [result.rows[0]["status"] for result in results] == ["ok", "ok"]


def test_an_interrupt_does_not_disturb_a_child(queue: WorkerProcess, tmp_path: Path) -> None:
    job = toy_job(tmp_path, toy.nothing, toy.report_often)
    result = run(queue, job, on_row=lambda row: os.kill(pid_of(queue), signal.SIGINT))
    assert [row["status"] for row in result.rows] == ["ok", "ok"]
