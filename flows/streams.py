"""Standard output and standard error that may fail: a full disk, a reader that has left, a narrow encoding.

What is shown is less than the work that it tells of: a write that fails is remembered and ends nothing by
itself.
"""

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

EXIT_NOT_SHOWN, EXIT_READER_LEFT = 2, 141
"""As a shell says it of a program that was ended by SIGPIPE."""


class _Remembering(io.FileIO):
    """Keeps the first error of writing and then swallows everything."""

    problem: OSError | None = None

    def write(self, data: Any, /) -> int:
        if self.problem is None:
            try:
                while (written := super().write(data)) is None:  # a pipe that does not wait by itself
                    select.select([], [self], [])
                return written
            except OSError as error:
                self.problem = error
        return memoryview(data).nbytes


@contextmanager
def failing_streams_kept() -> Iterator[None]:
    """Within, `sys.stdout` and `sys.stderr` raise nothing; characters that they cannot show are escaped.

    Streams that somebody has replaced stay as they are.
    """
    _fill_closed()
    before = sys.stdout, sys.stderr
    if sys.stdout is sys.__stdout__:
        sys.stdout = _guarded(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _guarded(2, sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def output_problem() -> OSError | None:
    """Why standard output takes no more, if it does not."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.problem if isinstance(raw, _Remembering) else None


def reader_has_left() -> bool:
    """As in `avatar ... | head -1`."""
    return isinstance(output_problem(), BrokenPipeError)


def output_is_closed() -> bool:
    """From the start, by `>&-`."""
    return sys.__stdout__ is None


@contextmanager
def output_for_bytes() -> Iterator[io.FileIO]:
    """Standard output for a file's content alone: text goes to standard error meanwhile, that of libraries
    and child processes too."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield io.FileIO(kept, "w", closefd=False)
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _guarded(descriptor: int, stream: TextIO | None) -> TextIO:
    if stream:
        stream.flush()
    raw = _Remembering(descriptor, "w", closefd=False)
    encoding = stream.encoding if stream else "utf-8"
    by_line = descriptor == 2 or raw.isatty()
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=by_line)


def _fill_closed() -> None:
    """So that no file of a store gets the number of standard output, where any library may write."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
