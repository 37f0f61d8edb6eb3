"""What a machine runs for a Prefect server: a lane for each of its GPUs, and the worker of its renders.

Each is a process of its own, started again whenever it ends, sooner after the first time than after the
tenth. No Prefect here, and nothing of the work, so that little can go wrong.
"""

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from flows.names import gpu_queue
from flows.server import process_start

log = logging.getLogger(__name__)

FIRST_DELAY_S, LONGEST_DELAY_S = 0.2, 30.0
STEADY_S = 60.0
"""A process that lived for so long is no longer counted as failing."""
_TICK_S = 0.1


@dataclass(frozen=True)
class Post:
    """What one process is there for."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """Of the supervisor of this machine, in the state folder."""

    pid: int
    started: str
    host: str
    queues: tuple[str, ...]

    @property
    def alive(self) -> bool:
        return process_start(self.pid) == self.started


@dataclass
class _Manned:
    post: Post
    process: subprocess.Popen[bytes]
    since_s: float
    failures: int = 0
    due_s: float = 0.0


@dataclass
class Supervisor:
    """Serves until a signal: the first lets what is at hand finish, the second breaks it off."""

    posts: Sequence[Post]
    environment: Mapping[str, str]
    _manned: list[_Manned] = field(default_factory=list)
    _signals: int = 0

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._manned = [_Manned(post, self._start(post), time.monotonic()) for post in self.posts]
        while not self._signals:
            for manned in self._manned:
                self._look_after(manned)
            time.sleep(_TICK_S)
        self._wait_for_the_end()

    def _start(self, post: Post) -> "subprocess.Popen[bytes]":
        # A group of its own: Ctrl-C is for this process, which asks the others in turn.
        return subprocess.Popen(post.command, env=dict(self.environment), start_new_session=True)

    def _look_after(self, manned: _Manned) -> None:
        status, now_s = manned.process.poll(), time.monotonic()
        if status is None:
            return
        if not manned.due_s:
            manned.failures = 0 if now_s - manned.since_s > STEADY_S else manned.failures + 1
            delay_s = min(FIRST_DELAY_S * 2 ** max(manned.failures - 1, 0), LONGEST_DELAY_S)
            manned.due_s = now_s + delay_s
            log.warning("%s ended with %d; started again in %.1f s", manned.post.name, status, delay_s)
        if now_s >= manned.due_s:
            manned.process, manned.since_s, manned.due_s = self._start(manned.post), now_s, 0.0

    def _on_signal(self, number: int, frame: object) -> None:
        self._signals += 1
        self._pass_on(signal.SIGTERM)

    def _pass_on(self, number: int) -> None:
        for manned in self._manned:
            with suppress(ProcessLookupError):
                manned.process.send_signal(number)

    def _wait_for_the_end(self) -> None:
        while any(manned.process.poll() is None for manned in self._manned):
            time.sleep(_TICK_S)


def posts_for(
    gpus: Sequence[int], *, host: str, pretend: bool, renders: int, limit_to: str = ""
) -> list[Post]:
    """A lane for each of the `gpus`, and unless `renders` is 0 what runs so many renders at once."""
    avatar = (sys.executable, "-P", "-m", "flows.cli")
    flags = ("--pretend",) if pretend else ()
    posts = [Post(gpu_queue(host, gpu), (*avatar, "lane", str(gpu), *flags)) for gpu in gpus]
    if renders:
        posts.append(Post("renders", (*avatar, "renders", "--limit", str(renders))))
    return posts
