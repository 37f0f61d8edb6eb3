"""Ctrl-C and its like end a run after its current step."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flows import streams
from flows.environment import create_console


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether Ctrl-C or SIGTERM came, or nobody reads standard output any more; a
    second signal ends the process at once."""
    stop = threading.Event()
    errors = create_console(stderr=True)

    def on_signal(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        errors.print("\nstopping after the current step; press Ctrl-C again to stop at once")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: stop.is_set() or streams.reader_has_left()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
