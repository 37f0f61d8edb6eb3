"""The flow that renders a batch: `avatar render` runs it, and so does every Prefect deployment."""

import contextvars
import json
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow.compute as pc
from prefect import flow, get_client, runtime
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, create_table_artifact
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture, wait
from prefect.logging import get_run_logger
from prefect.states import Cancelled as CancelledState
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner
from slugify import slugify

from avatar_core.config import Config
from avatar_core.errors import Cancelled
from avatar_core.execution.tally import counted
from avatar_core.execution.worker import JobResult
from avatar_core.origins import is_undecided
from avatar_core.pipeline import begin_run
from avatar_core.planning.batch import Batch, open_batch
from avatar_core.progress import Silent
from avatar_core.result import Result
from flows import run_form
from flows.alive import crash_lost_runs, mark_alive
from flows.compose import quoted
from flows.execution import Execution, Line, ShardRun, take_in_sources
from flows.run_form import RunForm, run_config
from flows.stopping import stoppable
from tasks.shards import reuse, show_shard

log = logging.getLogger(__name__)

UPDATE_INTERVAL_S = 2.0
MAX_SHOWN_AT_ONCE = 32  # task runs; each takes a thread until its shard has ended
SETTLE_S = 15.0  # without a word from the last task runs
FAILURES_SHOWN = 500

_handed_over: ContextVar[Execution | None] = ContextVar("handed_over", default=None)


@contextmanager
def handed_over(execution: Execution) -> Iterator[None]:
    """`render_dataset` within shows this work, whatever its parameters say."""
    token = _handed_over.set(execution)
    try:
        yield
    finally:
        _handed_over.reset(token)


@flow(
    name="render-dataset",
    task_runner=ThreadPoolTaskRunner(max_workers=MAX_SHOWN_AT_ONCE),  # type: ignore[arg-type]
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
            if execution := _handed_over.get():
                execution.stop_when(stopped)
                return _show(execution)
            with _opened(_config(form), stopped) as execution:
                return _show(execution)
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
    return {"table": table, "overrides": [f"storage.root={quoted(root)}"], "run": run_id}


def _opened(config: Config, cancelled: Callable[[], bool]) -> Execution:
    observer = LogObserver()
    batch = open_batch(config, observer)
    if is_undecided(batch):
        take_in_sources(batch, observer, cancelled)
    return Execution(batch, begin_run(batch), observer, cancelled)


def _show(execution: Execution) -> State[Any]:
    """Until the work has ended, and with what came of it."""
    shown = _TaskRuns(execution.batch)
    shown.add_reused(execution.reused)
    with _Monitor(execution):
        for news in execution.news():
            if isinstance(news, ShardRun):
                shown.add(news)
            else:
                _log_to_run([news])
        result = execution.result()
    shown.settle()
    with _not_vital():
        _show_result(execution.batch.name, result)
    return _final_state(result, execution.run.undone)


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


# --- what Prefect shows


class LogObserver(Silent):
    """Where no terminal looks on, the log tells what the tables do not; failures are logged in any case."""

    def __init__(self) -> None:
        self._logger = get_run_logger()

    def warning(self, message: str) -> None:
        self._logger.warning("%s", message)


def _log_to_run(lines: Iterable[Line]) -> None:
    logger = get_run_logger()
    for line in lines:
        logger.log(line.level, "%s", line.text)


class _TaskRuns:
    """Those still on their way to the server when the flow returns would be cancelled: `settle` first.

    They have no tags: before a task run with tags begins, Prefect asks the server whether these are limited.
    Where it is away, each waits a minute after the one before, long after the work has ended.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._open: set[PrefectFuture[Any]] = set()
        self._unread: set[ShardRun] = set()

    def add_reused(self, reused: Mapping[str, int]) -> None:
        for stage, count in reused.items():
            if count:
                label = f"{stage} reused · {counted(self._batch.stages[stage].noun, count)}"
                self._keep(reuse.submit(label, counted("item", count)))

    def add(self, shard: ShardRun) -> None:
        def until_it_ends() -> State[Any]:
            self._unread.discard(shard)
            _log_to_run(shard.lines())
            return self._state(shard.stage, shard.result())

        self._unread.add(shard)
        self._keep(show_shard.submit(f"{shard.label} · {shard.worker}", until_it_ends))

    def settle(self) -> None:
        before = 0
        while self._open and len(self._open) != before:
            before = len(self._open)
            wait(list(self._open), timeout=SETTLE_S)
        for shard in list(self._unread):  # the server was away
            _log_to_run(shard.lines())

    def _state(self, stage: str, result: JobResult) -> State[Any]:
        failed = [row for row in result.rows if row["status"] == "failed"]
        if result.cancelled:
            return CancelledState(message=f"{counted('item', len(result.rows))} kept")
        if result.error:
            return Failed(message=result.error)
        if failed:
            name, error = self._batch.label(stage, failed[0]["key"]), failed[0]["error"]
            return Failed(message=f"{name}: {error} ({len(failed)} of {len(result.rows)} items failed)")
        return Completed(message=counted("item", len(result.rows)))

    def _keep(self, future: PrefectFuture[Any]) -> None:
        self._open.add(future)
        future.add_done_callback(self._open.discard)


@contextmanager
def _not_vital() -> Iterator[None]:
    """A server that is away costs its pages, not the run."""
    try:
        yield
    except Exception as error:
        log.warning("the Prefect server was not told: %s", error)


def _show_result(name: str, result: Result) -> None:
    failures = result.failures.head(FAILURES_SHOWN)
    if len(failures):
        columns = ["name", "row", "failed_stage", "error"]
        shown = failures[columns].assign(row=failures["row"] + 1)  # as `avatar status` counts
        table = json.loads(shown.to_json(orient="records"))
        create_table_artifact(
            table, f"{_key(name)}-failures", f"{len(result.failures)} of {len(result.clips)} clips failed"
        )
    finished = pc.sum(pc.equal(result.clips["status"], "ok")).as_py() or 0
    text = f"{finished} of {len(result.clips)} clips are in\n\n`{result.dataset}`\n"
    create_markdown_artifact(text, f"{_key(name)}-dataset", f"dataset {name}")


def _key(name: str) -> str:
    """Artifact keys hold small ASCII letters, digits and dashes only."""
    return slugify(name) or "dataset"


class _Monitor:
    """Beside the run: gives it its name, shows its progress and hears of a cancellation.

    In a thread of its own, so that a slow or absent server keeps nothing else waiting.
    """

    def __init__(self, execution: Execution) -> None:
        self._execution = execution
        self._name = execution.batch.name
        self._over = threading.Event()
        self._flow_run_id = UUID(runtime.flow_run.id)
        self._progress_id: Any = None
        self._table_id: Any = None
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._watch,), daemon=True)

    def __enter__(self) -> "_Monitor":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        with get_client(sync_client=True) as client:
            over = False
            while not over:
                with _not_vital():
                    if self._table_id is None:
                        self._introduce(client)
                    else:
                        self._update(client)
                over = self._over.wait(UPDATE_INTERVAL_S)
            with _not_vital():
                self._update(client)

    def _introduce(self, client: SyncPrefectClient) -> None:
        crash_lost_runs()
        client.update_flow_run(self._flow_run_id, name=self._execution.run_id)
        self._progress_id = create_progress_artifact(
            0.0, f"{_key(self._name)}-progress", "percent of the expected time"
        )
        self._table_id = create_table_artifact(self._table(), f"{_key(self._name)}-stages", "items by stage")

    def _update(self, client: SyncPrefectClient) -> None:
        state = client.read_flow_run(self._flow_run_id).state
        if state and (state.is_cancelling() or state.is_cancelled()):
            self._execution.stop()
        percent = round(100 * self._execution.run.progress, 1)
        client.update_artifact(self._progress_id, ArtifactUpdate(data=percent))
        client.update_artifact(self._table_id, ArtifactUpdate(data=json.dumps(self._table())))

    def _table(self) -> list[dict[str, Any]]:
        return [
            {
                "stage": stage,
                "items": tally.items,
                "cached": tally.cached,
                "done": tally.done,
                "failed": tally.failed,
                "seconds": round(tally.seconds, 1),
            }
            for stage, tally in list(self._execution.run.tallies.items())
        ]
