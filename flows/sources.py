"""Taking in what the rows of a table name, for a command that must know all clips first."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from avatar_core.execution.coordinator import Coordinator
from avatar_core.execution.settings import run_settings, workers_for
from avatar_core.execution.shard_call import in_this_thread
from avatar_core.execution.worker import InProcess
from avatar_core.pipeline import take_in
from avatar_core.planning.batch import Batch
from avatar_core.progress import Observer

FEW_ROWS = 8
"""For so many it does not pay to start processes that take in what they name."""


def take_in_sources(batch: Batch, observer: Observer, cancelled: Callable[[], bool]) -> None:
    """What the rows name, so that all clips are known. Nothing is rendered."""
    if batch.is_complete:
        return
    with told_once():
        if len(batch.clips.rows) - batch.num_planned <= FEW_ROWS:
            here = Coordinator({"here": InProcess(gpu=False)})
            take_in(batch, here, observer, cancelled, in_this_thread)
            return
        with workers_for(batch, replace(run_settings(batch.config), gpus=())) as workers:
            take_in(batch, Coordinator(workers), observer, cancelled)


@contextmanager
def told_once() -> Iterator[None]:
    """Who looks at a terminal is told of failures there; the log repeats them where all of it is wanted."""
    logger = logging.getLogger("avatar_core.execution")
    before = logger.level
    if not logging.getLogger().isEnabledFor(logging.INFO):
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
