"""The flow that renders a batch: it opens the batch, fans its shards out as tasks, and publishes the dataset.

`avatar render` runs it where there is a server, and so does every deployment. What there is to do is decided
by the one coordinator; who does it are the lanes of the server's GPU queues, and children of this machine.
"""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from prefect import flow, runtime
from prefect.client.schemas.objects import State
from prefect.states import Cancelled as CancelledState
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from avatar_core.config import Config
from avatar_core.errors import Cancelled
from avatar_core.execution.coordinator import Coordinator
from avatar_core.execution.settings import check_gpus, run_settings, workers_for
from avatar_core.execution.worker import Worker
from avatar_core.origins import is_undecided
from avatar_core.pipeline import batch_run, begin_run, finish_run
from avatar_core.planning.batch import open_batch
from avatar_core.result import Result
from flows import run_form
from flows.alive import mark_alive
from flows.compose import quoted
from flows.fan_out import FanOut, results_in
from flows.placement import lanes_for
from flows.run_form import RunForm, run_config
from flows.run_log import LogObserver, logs_shown
from flows.run_pages import RunPages
from flows.sources import take_in_sources
from flows.stopping import stoppable
from flows.work import Work, work_at_hand
from tasks.shard import StoreFiles

MAX_AT_ONCE = 1000
"""Tasks; each takes a thread until its shard has ended."""


@flow(
    name="render-dataset",
    task_runner=ThreadPoolTaskRunner(max_workers=MAX_AT_ONCE),  # type: ignore[arg-type]
    persist_result=False,
)
def render_dataset(
    table: run_form.Table = "",
    batch: run_form.BatchFile = "",
    backend: run_form.BackendChoice = "as configured",
    preset: run_form.PresetChoice = "as configured",
    limit: run_form.Limit = None,
    only: run_form.Only = (),
    stage: run_form.StageChoice = "none",
    retry_failed: run_form.RetryFailed = False,
    max_failed_fraction: run_form.MaxFailedFraction = None,
    budget_hours: run_form.BudgetHours = None,
    overrides: run_form.Overrides = (),
    run: run_form.RecordedRun = "",
    config_dir: run_form.ConfigDir = "",
) -> State[Any]:
    """Render a table to a dataset; a retry does what is missing and tries anew what failed.

    The parameters are those of `flows.run_form.RunForm`, which says of each what it is.
    """
    form = RunForm(
        table,
        batch,
        backend,
        preset,
        limit,
        only,
        stage,
        retry_failed,
        max_failed_fraction,
        budget_hours,
        overrides,
        run,
        config_dir,
    )
    mark_alive(runtime.flow_run.id, runtime.flow_run.run_count)
    with _stop_signals() as stopped:
        try:
            work = work_at_hand() or _opened(_config(form), stopped)
            return _render(work)
        except Cancelled as ending:
            return CancelledState(message=f"{ending}; what is finished is kept, a retry goes on from here")


def _config(form: RunForm) -> Config:
    return run_config(form, again=runtime.flow_run.run_count > 1)


def flow_parameters(config: Config, run_id: str) -> dict[str, Any]:
    """What a retry needs of a run that was handed over; its record has the rest, credentials excepted."""
    table, root = config.table, config.storage.root
    if table and "://" in table and re.search("[@?]", table):
        table = None  # may hold credentials
    if "://" not in root:
        root = str(Path(root).expanduser().resolve())
    parameters = {"overrides": [f"storage.root={quoted(root)}"], "run": run_id}
    return {**parameters, "table": table} if table else parameters


def _opened(config: Config, cancelled: Callable[[], bool]) -> Work:
    observer = LogObserver()
    batch = open_batch(config, observer)
    if is_undecided(batch):
        take_in_sources(batch, observer, cancelled)
    resume = runtime.flow_run.name if runtime.flow_run.run_count > 1 else None
    return Work(batch, begin_run(batch, elsewhere=True, resume=resume), observer, cancelled)


def _render(work: Work) -> State[Any]:
    batch = work.batch
    stopped = threading.Event()
    fan_out = FanOut(batch)
    run = batch_run(
        batch, work.record, work.observer, lambda: stopped.is_set() or work.cancelled(), fan_out.submit
    )
    try:
        with (
            logs_shown(run),
            RunPages(work, run, stopped.set) as pages,
            results_in(StoreFiles(storage=batch.storage)),
        ):
            fan_out.reuse({stage: plan.cached for stage, plan in batch.plan().items()})
            with _workers(work, pages) as coordinator:
                result = finish_run(batch, work.record, lambda: coordinator.drive(run), work.observer)
            work.outcome.set_result(result)
            fan_out.settle()
            pages.show(result)
    except BaseException as error:
        work.fail(error)
        raise
    return _final_state(result, run.undone)


@contextmanager
def _workers(work: Work, pages: RunPages) -> Iterator[Coordinator]:
    """The lanes of the server's GPU queues, if any serves this batch, and children of this machine."""
    batch, settings = work.batch, run_settings(work.batch.config)
    joining: list[tuple[str, Worker]] = []
    coordinator: Coordinator | None = None

    def join(name: str, lane: Worker) -> None:
        if coordinator is None:
            joining.append((name, lane))
        else:
            coordinator.join(name, lane)

    with lanes_for(work, join) as lanes:
        pages.lanes = lanes
        if lanes is not None:
            settings = replace(settings, gpus=())
        else:
            check_gpus(batch)
        with workers_for(batch, settings) as children:
            coordinator = Coordinator({**children, **dict(joining)})
            yield coordinator


def _final_state(result: Result, undone: int) -> State[Any]:
    failed, total = len(result.failures), len(result.clips)
    finished = pc.sum(pc.equal(result.clips["status"], "ok")).as_py() or 0
    if not result.ok:
        limit = result.max_failed_fraction
        return Failed(message=f"{failed} of {total} clips failed; max_failed_fraction={limit:g} allows fewer")
    left = f"; the budget left {undone} items undone" if undone else ""
    return Completed(message=f"{finished} of {total} clips in {result.dataset}{left}")


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """As on the command line; Prefect's own handler would break off in mid-shard."""
    if threading.current_thread() is threading.main_thread():
        with stoppable() as stopped:
            yield stopped
    else:
        yield lambda: False
