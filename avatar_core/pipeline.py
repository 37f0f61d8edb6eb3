"""The whole way from a table to a dataset: the file to read first.

    from avatar_core.pipeline import render
    result = render({"table": "batch.csv"})

`render` opens the batch, drives it on a worker, here in this process, and publishes the dataset. Finished
work is found by its content and never done again.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import pyarrow as pa

from avatar_core.config import Config
from avatar_core.errors import StoreError
from avatar_core.execution.batch_run import MAX_PASSES, BatchRun
from avatar_core.execution.coordinator import Coordinator
from avatar_core.execution.settings import check_gpus, has_gpu, run_settings
from avatar_core.execution.shard_call import Submit, in_a_thread, in_this_thread
from avatar_core.execution.worker import InProcess
from avatar_core.origins import check_origin, is_undecided, origin_of
from avatar_core.planning.batch import Batch, open_batch
from avatar_core.planning.rerun import rerun_config
from avatar_core.planning.runs import RunRecord, resumed_run, write_run
from avatar_core.progress import Observer, Silent
from avatar_core.publish import Published, publish
from avatar_core.result import Result
from avatar_core.store.attempts import compact


def render(
    config: Config | Mapping[str, Any],
    observer: Observer | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Result:
    """Render a batch and publish its dataset. Bad rows are in `Result.failures`; the rest goes on.

    Raises `ConfigError` or `InputError` where the batch as a whole cannot be read, `StoreError` where
    results cannot be kept, `Cancelled` soon after `cancelled()` turns true.
    """
    observer = observer or Silent()
    batch = open_batch(config, observer)
    with InProcess(gpu=has_gpu(batch.config)) as here:
        coordinator = Coordinator({"here": here})
        if is_undecided(batch):
            take_in(batch, coordinator, observer, cancelled, in_this_thread)
        record = begin_run(batch)
        run = batch_run(batch, record, observer, cancelled, in_this_thread)
        return finish_run(batch, record, partial(coordinator.drive, run), observer)


def rerun(
    config: Config,
    run: str,
    *,
    stage: str | None = None,
    only_failed: bool = False,
    observer: Observer | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Result:
    """Run a recorded batch again, trying its failed items anew, as `rerun_config` says."""
    return render(rerun_config(config, run, stage=stage, only_failed=only_failed), observer, cancelled)


def begin_run(batch: Batch, *, elsewhere: bool = False, resume: str | None = None) -> RunRecord:
    """Write down what is asked, before any work, unless the run `resume` was asked the same. Raises
    `ConfigError` where the work cannot be done on this machine, unless it is done `elsewhere`, or clips of
    another table would be lost."""
    if not elsewhere:
        check_gpus(batch)
    if not is_undecided(batch):
        check_origin(batch)
    record = resumed_run(batch.storage, resume, batch.clips.rows) if resume else None
    if record is None:
        backend = {"name": batch.backend.name, **asdict(batch.backend.config)}
        record = write_run(batch.storage, batch.name, batch.config, backend, batch.clips.rows)
    if batch.is_complete:
        record.write_plan(batch.clips)
    return record


def take_in(
    batch: Batch,
    coordinator: Coordinator,
    observer: Observer,
    cancelled: Callable[[], bool],
    submit: Submit = in_a_thread,
) -> None:
    """Have only what the rows name taken into the store, so that all clips are known."""
    settings = run_settings(batch.config)
    coordinator.drive(BatchRun(batch, settings, observer, cancelled, submit, sources_only=True))


def batch_run(
    batch: Batch,
    record: RunRecord,
    observer: Observer,
    cancelled: Callable[[], bool],
    submit: Submit = in_a_thread,
) -> BatchRun:
    """What a coordinator drives."""

    def complete() -> None:
        check_origin(batch)
        record.write_plan(batch.clips)

    return BatchRun(batch, run_settings(batch.config), observer, cancelled, submit, on_complete=complete)


def finish_run(batch: Batch, record: RunRecord, drive: Callable[[], None], observer: Observer) -> Result:
    """Have `drive` compute what is missing, then publish; again if a stored video turns out damaged."""
    for _ in range(MAX_PASSES):
        drive()
        pa.default_memory_pool().release_unused()
        for stage in batch.stages:
            compact(batch.storage, stage)
        try:
            published = publish_batch(batch, record.id, observer)
        except StoreError as error:
            if not error.keys:
                raise
            observer.warning(f"{error}: computing it again")
            batch.forget(error.keys)
            continue
        return Result(published.uri, published.metadata, record.id, batch.config.max_failed_fraction)
    raise StoreError(
        f"results in {batch.storage.uri} are damaged again after being recomputed {MAX_PASSES} times; "
        "check the disk or bucket"
    )


def publish_batch(batch: Batch, run_id: str, observer: Observer) -> Published:
    if warning := check_origin(batch):  # once more: another run may have published meanwhile
        observer.warning(warning)
    return publish(
        batch.storage,
        batch.name,
        batch.clips,
        batch.results,
        backend=batch.backend.name,
        complete=not (batch.config.limit or batch.config.only),
        origin=origin_of(batch.config),
        run_id=run_id,
        observer=observer,
    )
