"""Waiting for processes, and ending them."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

PATIENCE_S = 60.0
"""Far more than what a test waits for takes, even on a busy machine."""

T = TypeVar("T")


def until(
    condition: Callable[[], T],
    processes: "Sequence[subprocess.Popen[Any]]" = (),
    patience_s: float = PATIENCE_S,
    every_s: float = 0.01,
) -> T:
    """The first answer that is true. The test fails where there is none in time, or where one of the
    `processes` ends before."""
    deadline_s = time.monotonic() + patience_s
    while not (answer := condition()):
        for process in processes:
            assert process.poll() is None, f"ended with {process.returncode} before what was waited for"
        assert time.monotonic() < deadline_s, f"waited {patience_s:g} s in vain"
        time.sleep(every_s)
    return answer


def exists(pid: int) -> bool:
    """Whether it runs; one that only waits to be waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    children: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            children += map(int, path.read_text().split())
    return [*children, *(further for child in children for further in descendants(child))]


def kill_tree(process: "subprocess.Popen[Any]") -> None:
    """At once, with all that it started."""
    process.send_signal(signal.SIGSTOP)  # it must not start another process meanwhile
    tree = [process.pid, *descendants(process.pid)]
    for pid in tree:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    until(lambda: not any(map(exists, tree)))
