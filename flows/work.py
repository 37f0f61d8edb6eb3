"""A batch that was opened before the flow that renders it. No Prefect here."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from avatar_core.planning.batch import Batch
from avatar_core.planning.runs import RunRecord
from avatar_core.progress import Observer
from avatar_core.result import Result


@dataclass
class Work:
    """`outcome` is there as soon as the dataset is, whatever a server still has to be told."""

    batch: Batch
    record: RunRecord
    observer: Observer
    cancelled: Callable[[], bool]
    outcome: Future[Result] = field(default_factory=Future)

    def fail(self, error: BaseException) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)


_handed_over: ContextVar[Work] = ContextVar("handed_over")


@contextmanager
def handed_over(work: Work) -> Iterator[None]:
    """The flow within renders this, whatever its parameters say."""
    token = _handed_over.set(work)
    try:
        yield
    finally:
        _handed_over.reset(token)


def work_at_hand() -> Work | None:
    return _handed_over.get(None)
