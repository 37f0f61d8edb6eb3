"""What the pages of a run show: its name, progress, stages, failures and dataset, and its log."""

import contextvars
import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import pyarrow.compute as pc
from prefect import get_client, runtime
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, create_table_artifact
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from slugify import slugify

from avatar_core.execution.batch_run import BatchRun
from avatar_core.progress import Silent
from avatar_core.result import Result
from flows.alive import crash_lost_runs
from flows.work import Work

log = logging.getLogger(__name__)

UPDATE_INTERVAL_S = 2.0
FAILURES_SHOWN = 500


class LogObserver(Silent):
    """Where no terminal looks on, the log tells what the tables do not; failures are logged in any case."""

    def __init__(self) -> None:
        self._logger = get_run_logger()

    def warning(self, message: str) -> None:
        self._logger.warning("%s", message)


@contextmanager
def logs_shown(run: BatchRun) -> Iterator[None]:
    """What is logged goes to the page of the task, or the flow, in whose thread it is."""
    handler = _RunLog(run.name_of)
    loggers = [logging.getLogger(name) for name in ("avatar_core", "flows", "tasks")]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.propagate = False
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    engine = logging.getLogger("prefect.task_runs")
    engine.addFilter(_is_said_once)
    try:
        yield
    finally:
        engine.removeFilter(_is_said_once)
        for logger, level, propagate in before:
            logger.setLevel(level)
            logger.propagate = propagate
            logger.removeHandler(handler)


def _is_said_once(record: logging.LogRecord) -> bool:
    """Prefect tells of a failed task, and then again of the state that it ended in."""
    return not str(record.msg).startswith("Task run failed with state")


class _RunLog(logging.Handler):
    """Records of the work, with the clip that each is about."""

    def __init__(self, name_of: Callable[[str], str | None]) -> None:
        super().__init__()
        self._name_of = name_of
        self._of_flow = get_run_logger()

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "is_of_item", False):
            return  # the task that it belongs to ends in a state that says so, which Prefect logs
        try:
            key = getattr(record, "item_key", None)
            name = key and self._name_of(key)
            text = f"{name}: {self.format(record)}" if name else self.format(record)
            self._logger().log(record.levelno, "%s", text)
        except Exception:
            self.handleError(record)

    def _logger(self) -> Any:
        try:
            return get_run_logger()
        except MissingContextError:
            return self._of_flow


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


class RunPages:
    """Beside the run: gives it its name, shows its progress and hears of a cancellation.

    In a thread of its own, so that a slow or absent server keeps nothing else waiting.
    """

    def __init__(self, work: Work, run: BatchRun, stop: Callable[[], None]) -> None:
        self._run_id, self._name = work.record.id, work.batch.name
        self._run, self._stop = run, stop
        self._over = threading.Event()
        self._flow_run_id = UUID(runtime.flow_run.id)
        self._progress_id: Any = None
        self._table_id: Any = None
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._watch,), daemon=True)

    def __enter__(self) -> "RunPages":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def show(self, result: Result) -> None:
        """What came of it."""
        with _not_vital():
            _show_result(self._name, result)

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
        client.update_flow_run(self._flow_run_id, name=self._run_id)
        self._progress_id = create_progress_artifact(
            0.0, f"{_key(self._name)}-progress", "percent of the expected time"
        )
        self._table_id = create_table_artifact(self._table(), f"{_key(self._name)}-stages", "items by stage")

    def _update(self, client: SyncPrefectClient) -> None:
        state = client.read_flow_run(self._flow_run_id).state
        if state and (state.is_cancelling() or state.is_cancelled()):
            self._stop()
        percent = round(100 * self._run.progress, 1)
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
            for stage, tally in list(self._run.tallies.items())
        ]
