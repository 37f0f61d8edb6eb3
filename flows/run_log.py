"""What goes into the log of a run on its server."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

from avatar_core.execution.batch_run import BatchRun
from avatar_core.progress import Silent


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
