"""Workers that come while a batch is worked on, and such as take no work for a while."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from avatar_core.execution.batch_run import BatchRun
from avatar_core.execution.coordinator import Coordinator
from avatar_core.execution.worker import Cancellation, Job, JobResult, Listener
from avatar_core.execution.worker_process import WorkerProcess
from avatar_core.pipeline import begin_run, finish_run
from tests.execution.runs import SETTINGS, opened
from tests.processes import until
from tests.sample_rows import Rendered, Watcher, videos


class Switched(WorkerProcess):
    """May be unavailable, and notes what it is given."""

    unavailable: str | None = None  # type: ignore[assignment]

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.given: list[str] = []

    def run(
        self, job: Job, item_timeout_s: float, cancellation: Cancellation, listener: Listener
    ) -> JobResult:
        self.given.append(job.stage)
        return super().run(job, item_timeout_s, cancellation, listener)


@pytest.fixture
def workers() -> Iterator[dict[str, Switched]]:
    made = {name: Switched(name) for name in ("first", "second")}
    yield made
    for worker in made.values():
        worker.stop()


def test_an_unavailable_worker_is_given_nothing(
    workers: dict[str, Switched], rendered: Rendered, tmp_path: Path
) -> None:
    workers["second"].unavailable = "is paused"
    watcher = Watcher()
    batch = opened(rendered, tmp_path)
    run = BatchRun(batch, SETTINGS, watcher)
    coordinator = Coordinator(workers)
    result = finish_run(batch, begin_run(batch), lambda: coordinator.drive(run), watcher)
    assert videos(result.dataset) == videos(rendered.result.dataset)
    assert workers["first"].given
    assert workers["second"].given == []
    assert [text for text in watcher.warnings if "second" in text] == ["second is paused"]


def test_where_all_are_unavailable_the_run_waits(
    workers: dict[str, Switched], rendered: Rendered, tmp_path: Path
) -> None:
    for worker in workers.values():
        worker.unavailable = "is paused"
    watcher = Watcher()
    batch = opened(rendered, tmp_path)
    run = BatchRun(batch, SETTINGS, watcher)
    coordinator = Coordinator(workers)
    driving = threading.Thread(target=coordinator.drive, args=(run,))
    driving.start()
    until(lambda: len([text for text in watcher.warnings if "paused" in text]) == 2)
    assert driving.is_alive()
    workers["second"].unavailable = None
    driving.join(60)
    assert not driving.is_alive()
    assert run.tallies["decode"].done == 4
    assert workers["first"].given == []


def test_a_worker_that_joins_takes_part(
    workers: dict[str, Switched], rendered: Rendered, tmp_path: Path
) -> None:
    first, second = workers.values()
    first.unavailable = "is paused"
    batch = opened(rendered, tmp_path)
    run = BatchRun(batch, SETTINGS, Watcher())
    coordinator = Coordinator({"first": first})
    driving = threading.Thread(target=coordinator.drive, args=(run,))
    driving.start()
    coordinator.join("second", second)
    driving.join(60)
    assert not driving.is_alive()
    assert run.tallies["decode"].done == 4
    assert second.given
