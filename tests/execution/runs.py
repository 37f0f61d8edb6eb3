"""Batches on real workers, without Prefect: shards are submitted to bare threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from avatar_core.execution.batch_run import BatchRun
from avatar_core.execution.coordinator import Coordinator
from avatar_core.execution.settings import RunSettings
from avatar_core.execution.shard_call import ShardCall
from avatar_core.execution.worker_process import WorkerProcesses
from avatar_core.pipeline import begin_run, finish_run
from avatar_core.planning.batch import Batch
from avatar_core.result import Result
from tests.sample_rows import Rendered, Watcher, open_known

SETTINGS = RunSettings(
    gpus=(), pretend=False, cpus=2, item_timeout_s=60.0, idle_s=60.0, retries=2, budget_hours=None
)


class Run:
    """One run of a batch; `submitted` has stage, queue and label of its shards."""

    def __init__(
        self, pool: ThreadPoolExecutor, queues: WorkerProcesses, watcher: Watcher | None = None
    ) -> None:
        self.pool, self.queues = pool, queues
        self.watcher = watcher or Watcher()
        self.submitted: list[tuple[str, str, str]] = []
        self.work: BatchRun

    def __call__(
        self, batch: Batch, cancelled: Callable[[], bool] = lambda: False, **settings: Any
    ) -> Result:
        values = replace(SETTINGS, **settings)
        self.work = BatchRun(batch, values, self.watcher, cancelled, self.submit)
        drive = partial(Coordinator(self.queues).drive, self.work)
        return finish_run(batch, begin_run(batch), drive, self.watcher)

    def submit(self, call: ShardCall) -> None:
        self.submitted.append((call.stage, call.worker_name, call.label))
        self.pool.submit(call)


def opened(rendered: Rendered, root: Path, **options: Any) -> Batch:
    return open_known({"table": str(rendered.table), "storage": {"root": str(root)}, **options})
