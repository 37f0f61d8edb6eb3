"""One lane per queue, and whether there is one on this machine: the kernel tells of its end at once."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import IO

from avatar_core.errors import ConfigError
from flows.server import state_folder


class LaneLock:
    """Held while the context is entered, and by this process alone; `former` is the process that had it
    last. Raises `ConfigError` where another one has it."""

    def __init__(self, queue: str) -> None:
        self.former = ""
        self._queue = queue
        self._file: IO[str] | None = None

    def __enter__(self) -> "LaneLock":
        _folder().mkdir(parents=True, exist_ok=True)
        self._file = (_folder() / self._queue).open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(
                f"the queue {self._queue} has a lane already; stop that, or call this machine something else "
                "with --name"
            ) from None
        self._file.seek(0)
        self.former = self._file.read()
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file:
            self._file.close()


def is_served_here(queue: str) -> bool | None:
    """Whether a lane of this machine serves the queue; None where none ever has."""
    with suppress(FileNotFoundError), (_folder() / queue).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
    return None


def _folder() -> Path:
    return state_folder() / "lanes"
