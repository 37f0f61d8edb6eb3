"""What a machine runs for a Prefect server: a lane for each of its GPUs, and the worker of its renders. Where
`avatar up` started the server, that is started again too.

Each is a process of its own, started again whenever it ends, sooner after the first time than after the
tenth. No Prefect here, and nothing of the work, so that little can go wrong.
"""

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from avatar_core.devices import visible_gpus
from avatar_core.errors import AvatarError, ConfigError
from flows.database import without_address
from flows.names import HOST, gpu_queue, host_name, render_queue
from flows.server import process_start, revive_server, state_folder

log = logging.getLogger(__name__)

FIRST_DELAY_S, LONGEST_DELAY_S = 0.2, 30.0
STEADY_S = 60.0
"""A process that lived for so long is no longer counted as failing."""
START_TIMEOUT_S = 30.0
PATIENCE_S = 10.0
SERVER_S = 2.0
"""Between two looks at the server."""
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
class _ServerKeeper:
    """Has the server of this machine started again where it died, or its PostgreSQL."""

    failures: int = 0
    due_s: float = 0.0
    since_s: float = 0.0

    def look(self) -> None:
        now_s = time.monotonic()
        if now_s < self.due_s:
            return
        try:
            revived = revive_server()
            problem = f"{revived} had ended, and was started again" if revived else None
        except (AvatarError, OSError) as error:
            problem = f"the server had ended, and cannot be started again: {error}"
        if problem:
            log.warning("%s", problem)
            self.failures, self.since_s = self.failures + 1, now_s
        elif now_s - self.since_s > STEADY_S:
            self.failures = 0
        self.due_s = now_s + min(SERVER_S * 2**self.failures, LONGEST_DELAY_S)


@dataclass
class Supervisor:
    """Serves until a signal: the first lets what is at hand finish, the second breaks it off."""

    posts: Sequence[Post]
    environment: Mapping[str, str]
    keeper: _ServerKeeper | None = None
    _manned: list[_Manned] = field(default_factory=list)
    _signals: int = 0

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._manned = [_Manned(post, self._start(post), time.monotonic()) for post in self.posts]
        while not self._signals:
            for manned in self._manned:
                self._look_after(manned)
            if self.keeper:
                self.keeper.look()
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


@dataclass(frozen=True)
class Crew:
    """Who serves a machine: lanes for these `gpus`, and so many `renders` at once."""

    host: str
    gpus: tuple[int, ...]
    pretend: bool
    renders: int

    @classmethod
    def of(cls, gpus: str | None, pretended: int, name: str | None, renders: int) -> "Crew":
        """As the command line gives it. Raises `ConfigError`."""
        if name is not None:
            os.environ[HOST] = name
        if pretended and gpus is not None:
            raise ConfigError("--gpus and --pretend-gpus exclude each other: give one of them")
        numbers = range(pretended) if pretended else _numbers(gpus) if gpus is not None else visible_gpus()
        return cls(host_name(), tuple(numbers), bool(pretended), renders)

    @property
    def posts(self) -> list[Post]:
        avatar = (sys.executable, "-P", "-m", "flows.cli")
        flags = ("--pretend",) if self.pretend else ()
        posts = [Post(gpu_queue(self.host, gpu), (*avatar, "lane", str(gpu), *flags)) for gpu in self.gpus]
        if self.renders:
            command = (*avatar, "renders", "--limit", str(self.renders))
            posts.append(Post(render_queue(self.host), command))
        return posts


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise ConfigError(f"--gpus {text}: give numbers with commas between them, such as 0,1") from None


def running_supervisor() -> Record | None:
    """Of this machine, in the background or not."""
    try:
        values = json.loads(_record_path().read_text(encoding="utf-8"))
        record = Record(**{**values, "queues": tuple(values["queues"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return record if record.alive else None


def supervise(crew: Crew, *, keep_server: bool = False) -> None:
    """Serves this machine until a signal, and with `keep_server` has its server up again whenever that died.
    Raises `ConfigError` where it is served already."""
    state_folder().mkdir(parents=True, exist_ok=True)
    with (state_folder() / "worker.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            found = running_supervisor()
            who = f", by process {found.pid}, as {found.host}" if found else ""
            raise ConfigError(
                f"this machine is served already{who}: stop that with `avatar down`, or Ctrl-C where it was "
                "started"
            ) from None
        names = tuple(post.name for post in crew.posts)
        record = Record(os.getpid(), process_start(os.getpid()) or "", crew.host, names)
        fresh = _record_path().with_suffix(".new")
        fresh.write_text(json.dumps(asdict(record)), encoding="utf-8")
        fresh.replace(_record_path())
        try:
            environment = {**without_address(os.environ), HOST: crew.host}
            Supervisor(crew.posts, environment, _ServerKeeper() if keep_server else None).run()
        finally:
            _record_path().unlink(missing_ok=True)


def start_supervisor(crew: Crew, api_url: str, environment: Mapping[str, str]) -> Record:
    """In the background, unless one runs. Returns once it does. `environment` is what it needs besides, to
    start the server again."""
    if found := running_supervisor():
        return found
    flags = (
        ["--pretend-gpus", str(len(crew.gpus))] if crew.pretend else ["--gpus", ",".join(map(str, crew.gpus))]
    )
    command = [sys.executable, "-P", "-m", "flows.cli", "worker", *flags]
    command += ["--name", crew.host, "--renders", str(crew.renders), "--keep-server"]
    state_folder().mkdir(parents=True, exist_ok=True)
    with log_path().open("ab") as log_file:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment, "PREFECT_API_URL": api_url},
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=log_file,
            start_new_session=True,
        )
    deadline_s = time.monotonic() + START_TIMEOUT_S
    has_ended = False
    while time.monotonic() < deadline_s and not has_ended:
        has_ended = process.poll() is not None  # also where another one was faster, which is found then
        if found := running_supervisor():
            return found
        time.sleep(_TICK_S)
    process.kill()
    raise AvatarError(f"what serves the queues of this machine did not start; its log: {log_path()}")


def stop_supervisor(tell: Callable[[str], None], *, at_once: bool) -> Record | None:
    """Lets shards at hand finish unless `at_once`; what ran, None where nothing did."""
    record = running_supervisor()
    if record is None:
        return None
    for _ in range(2 if at_once else 1):
        with suppress(ProcessLookupError):
            os.kill(record.pid, signal.SIGTERM)
        time.sleep(_TICK_S)
    told_s = time.monotonic()
    while record.alive:
        if told_s and time.monotonic() - told_s > PATIENCE_S:
            told_s = 0.0
            tell("waiting for what is at hand; `avatar down --now` breaks it off")
        time.sleep(_TICK_S)
    return record


def log_path() -> Path:
    return state_folder() / "worker.log"


def _record_path() -> Path:
    return state_folder() / "worker.json"
