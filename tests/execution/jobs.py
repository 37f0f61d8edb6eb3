"""Running a job on a worker, and hearing of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from avatar_core.execution.worker import Cancellation, Job, JobResult, Row, Worker
from tests.processes import PATIENCE_S


@dataclass
class Heard:
    on_start: Callable[[], Any] = lambda: None
    on_progress: Callable[[str, int, int], Any] = lambda key, done, total: None
    on_row: Callable[[Row], Any] = lambda row: None


def run_job(
    worker: Worker,
    job: Job,
    *,
    item_timeout_s: float = PATIENCE_S,
    cancellation: Cancellation | None = None,
    **heard: Callable[..., Any],
) -> JobResult:
    return worker.run(job, item_timeout_s, cancellation or Cancellation(), Heard(**heard))
