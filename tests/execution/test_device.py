"""Two renders of one machine, and one GPU."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from avatar_core.errors import Cancelled
from avatar_core.execution.device import DeviceLock
from avatar_core.execution.worker import Job, StoreAddress
from avatar_core.execution.worker_process import WorkerProcess, WorkerProcesses
from tests.execution import toy_backend as toy
from tests.execution.jobs import run_job
from tests.execution.runs import Run
from tests.processes import until
from tests.sample_rows import Rendered, Watcher, open_known, videos

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVATAR_LOCK_DIR", str(tmp_path / "locks"))


def hold(device: str, held: "multiprocessing.synchronize.Event") -> None:
    lock = DeviceLock(device)
    assert lock.take() is None
    held.set()
    signal.pause()


def test_a_device_is_held_until_it_is_released_or_its_holder_ends() -> None:
    ours = DeviceLock("GPU-1")
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=hold, args=("GPU-1", held))
    holder.start()
    assert held.wait(60)
    assert ours.take() == f"another render (process {holder.pid})"
    assert DeviceLock("GPU-2").take() is None
    holder.kill()
    holder.join()
    assert ours.take() is None
    assert ours.take() is None
    assert DeviceLock("GPU-1").take() == f"another render (process {os.getpid()})"
    ours.release()
    assert DeviceLock("GPU-1").take() is None


def job(root: Path, *acts: toy.Act) -> Job:
    items = tuple(toy.toy_item(f"item-{i}", act) for i, act in enumerate(acts))
    backend = {"name": "toy", "weights": ["mtcnn"]}
    return Job(StoreAddress(str(root), {}, None, 2**20), backend, "denoise", items, {})


def plain_job(root: Path, act: toy.Act) -> Job:
    address = StoreAddress(str(root), {}, None, 2**20)
    return Job(address, {"name": "toy"}, "denoise", (toy.toy_item("plain", act),), {})


@pytest.mark.drill
def test_a_worker_lets_its_gpu_go_once_it_was_idle(tmp_path: Path) -> None:
    # Longer than a busy machine may take between two jobs.
    first = WorkerProcess("gpu-0", "0", pretend=True, idle_s=8.0)
    second = WorkerProcess("gpu-0", "0", pretend=True, idle_s=60)
    other = WorkerProcess("gpu-1", "1", pretend=True)
    try:
        assert run_job(second, plain_job(tmp_path, toy.nothing)).busy is None  # has started by now
        assert run_job(first, job(tmp_path, toy.nothing)).busy is None
        loaded = run_job(first, job(tmp_path, toy.describe))
        assert loaded.error is None
        refused = run_job(second, job(tmp_path, toy.nothing))
        assert refused.rows == ()
        assert (refused.busy, refused.unfinished) == (f"another render (process {first.pid})", ("item-0",))
        assert run_job(other, job(tmp_path, toy.nothing)).busy is None
        until(lambda: run_job(second, job(tmp_path, toy.nothing)).busy is None, every_s=0.1)
        assert run_job(first, job(tmp_path, toy.nothing)).busy == f"another render (process {second.pid})"
    finally:
        for worker in (first, second, other):
            worker.stop()


def test_what_needs_no_weights_needs_no_device(tmp_path: Path) -> None:
    assert DeviceLock("pretended-0").take() is None
    worker = WorkerProcess("gpu-0", "0", pretend=True)
    try:
        assert run_job(worker, plain_job(tmp_path, toy.nothing)).rows[0]["status"] == "ok"
    finally:
        worker.stop()


def tiny(rendered: Rendered, root: Path) -> dict[str, object]:
    backend = {"name": "ditto", "checkpoint": "ditto-tiny", "denoise": {"num_inference_steps": 1}}
    return {"table": str(rendered.table), "storage": {"root": str(root)}, "backend": backend, "limit": 1}


def test_random_weights_are_computed_where_the_real_ones_would_be(
    monkeypatch: pytest.MonkeyPatch, threads: ThreadPoolExecutor, rendered: Rendered, tmp_path: Path
) -> None:
    monkeypatch.setenv("AVATAR_WEIGHTS", str(tmp_path / "weights"))
    with WorkerProcesses(gpus=[0, 1], pretend=True, cpus=1) as workers:
        run = Run(threads, workers)
        assert run(open_known(tiny(rendered, tmp_path / "store"))).failures.empty
    assert {(stage, worker.partition("-")[0]) for stage, worker, _ in run.submitted} == {
        ("face", "cpu"),
        ("audio", "cpu"),
        ("reference", "gpu"),
        ("denoise", "gpu"),
        ("decode", "gpu"),
    }


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> DeviceLock:
    """The first pretended GPU, which somebody else has; random weights are written below `tmp_path`."""
    monkeypatch.setenv("AVATAR_WEIGHTS", str(tmp_path / "weights"))
    lock = DeviceLock("pretended-0")
    assert lock.take() is None
    return lock


@pytest.mark.drill
def test_a_second_render_waits_for_the_gpu_and_says_so(
    held: DeviceLock, threads: ThreadPoolExecutor, rendered: Rendered, tmp_path: Path
) -> None:
    class Releasing(Watcher):
        def warning(self, message: str) -> None:
            super().warning(message)
            threading.Timer(3.0, held.release).start()

    with WorkerProcesses(gpus=[0], pretend=True, cpus=1) as workers:
        run = Run(threads, workers, Releasing())
        result = run(open_known(tiny(rendered, tmp_path / "store")))
    assert result.failures.empty
    assert len(videos(result.dataset)) == 1
    holder = f"another render (process {os.getpid()})"
    assert run.watcher.warnings == [f"gpu-0 is held by {holder}: waiting for it"]
    assert {worker for stage, worker, _ in run.submitted if stage == "denoise"} == {"gpu-0"}


@pytest.mark.drill
def test_a_render_that_waits_for_a_gpu_can_be_stopped(
    held: DeviceLock, threads: ThreadPoolExecutor, rendered: Rendered, tmp_path: Path
) -> None:
    with WorkerProcesses(gpus=[0], pretend=True, cpus=1) as workers:
        run = Run(threads, workers)
        with pytest.raises(Cancelled):
            run(open_known(tiny(rendered, tmp_path / "store")), lambda: bool(run.watcher.warnings))


@pytest.mark.drill
def test_of_two_gpus_the_free_one_does_all(
    held: DeviceLock, threads: ThreadPoolExecutor, rendered: Rendered, tmp_path: Path
) -> None:
    with WorkerProcesses(gpus=[0, 1], pretend=True, cpus=1) as workers:
        run = Run(threads, workers)
        assert run(open_known({**tiny(rendered, tmp_path / "store"), "limit": 4})).failures.empty
    assert len(run.watcher.warnings) == 1
