"""Local queues: a child process per GPU and some for the CPU, each working on one shard at a time.

A child keeps its models between shards and knows no flow engine. It is started as a fresh interpreter, not
by `multiprocessing`, which would import the parent's main module into it and set its environment too late.
So that it never waits, it is sent a shard as it begins the last item of the one before, whose results it
commits meanwhile. A child that dies or falls silent is replaced; its shards are handed back.
"""

import dataclasses
import logging
import mmap
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from avatar_core.errors import ConfigError
from avatar_core.execution.shard import AUTO, Rows
from avatar_core.stages.base import ItemSpec

log = logging.getLogger(__name__)

Row = dict[str, Any]
OnProgress = Callable[[str, int, int], None]
OnRow = Callable[[Row], None]

START_TIMEOUT_S = 300.0  # for imports, which are slow from a cold network disk
_EXIT_GRACE_S = 1.0  # for a process on its way out to leave its own exit status
_END_TIMEOUT_S = 30.0
_ALL = 2**63 - 1

_BOOT = (
    "import sys; sys.path[:] = sys.argv[4:]; "
    "from avatar_core.execution.child import serve; serve(*sys.argv[1:4])"
)


@dataclass(frozen=True)
class Job:
    """A shard and where its results go, as plain data.

    `backend` holds the resolved values for `create_backend`, its name included; `options` are those of
    `Storage` and never shown.
    """

    root: str
    options: Mapping[str, Any] = field(repr=False)
    cache_dir: str | None
    cache_bytes: int
    backend: Mapping[str, Any]
    stage: str
    items: tuple[ItemSpec, ...]
    inputs: Rows
    memory: str = AUTO


@dataclass(frozen=True)
class JobResult:
    """`rows` are committed, also where there is an error; `unfinished` are the keys of the other items.

    `keys` names stored results that must be computed again. Where the child died or hung, `last_item` is
    the key of the item that it worked on, None outside of any item. What it had besides, a shard that was
    being committed or had not begun, ends as `cancelled`: nothing speaks against doing it again.
    """

    rows: tuple[Row, ...] = ()
    error: str | None = None
    error_type: str | None = None
    keys: tuple[str, ...] = ()
    cancelled: bool = False
    died: bool = False
    hung: bool = False
    unfinished: tuple[str, ...] = ()
    last_item: str | None = None


class Said(Enum):
    """What a child says of itself; else it sends progress, rows, log records and results."""

    READY = auto()
    BEGUN = auto()
    AT_LAST_ITEM = auto()


class _End(Enum):
    """Why the answers to a job end without a result: the child was lost, with this job or another one."""

    LOST = auto()
    LOST_WITH_ANOTHER = auto()


def _show_no_start() -> None:
    pass


def _show_no_progress(key: str, done: int, total: int) -> None:
    pass


def _show_no_row(row: Row) -> None:
    pass


class LocalQueue:
    """One child process. `pretend` makes a GPU queue of a machine without GPUs, which computes on the CPU."""

    def __init__(
        self,
        name: str,
        kind: Literal["gpu", "cpu"],
        environment: Mapping[str, str] | None = None,
        pretend: bool = False,
    ) -> None:
        self.name = name
        self.kind = kind
        self.device = "cuda" if kind == "gpu" and not pretend else "cpu"
        self._environment = dict(environment or {})
        self._child: _Child | None = None
        self._turn = threading.Lock()
        self._changing = threading.Lock()
        self._numbers = 0
        # Shared memory without a lock: a child killed or stopped while it held one would block the parent.
        self._cell = tempfile.TemporaryFile()  # noqa: SIM115
        self._cell.truncate(mmap.PAGESIZE)
        self._cancelled = shared_number(self._cell.fileno())

    @property
    def pid(self) -> int | None:
        child = self._child
        return child.pid if child else None

    @property
    def in_flight(self) -> int:
        """Shards that the child has: at work, being committed or next."""
        child = self._child
        return child.in_flight if child else 0

    def start(self) -> None:
        """Returns at once; the child goes on with its imports."""
        self._living_child()

    def run(
        self,
        job: Job,
        *,
        item_timeout_s: float,
        on_start: Callable[[], None] = _show_no_start,
        on_progress: OnProgress = _show_no_progress,
        on_row: OnRow = _show_no_row,
    ) -> JobResult:
        """Blocks until the shard has ended; shards of several threads take turns.

        `on_start` tells that its turn has come. `on_row` shows an item as it ends, before its commit and
        without the place of its tensors. The child is given up after `item_timeout_s` without a word, in
        which the models must be loaded, an item must report and the shard be committed.
        """
        with self._changing:
            self._numbers += 1
            number = self._numbers
        with ExitStack() as turn:
            turn.enter_context(self._turn)
            on_start()
            child = None if number <= self._cancelled[0] else self._living_child()
            if child is None:
                result = JobResult(cancelled=True)
            else:
                with closing(child.answers(number, self.device, job, item_timeout_s)) as answers:
                    result = self._listen(child, job, answers, turn.close, on_progress, on_row)
        if (result.died or result.hung) and number <= self._cancelled[0]:
            result = JobResult(cancelled=True)
        committed = {row["key"] for row in result.rows}
        unfinished = tuple(item.key for item in job.items if item.key not in committed)
        return dataclasses.replace(result, unfinished=unfinished)

    def cancel(self) -> None:
        """Stops the shard at hand at its next report, and those that wait for it. Later ones run."""
        with self._changing:
            self._cancelled[0] = max(self._numbers, self._cancelled[0])

    def stop(self) -> None:
        """Ends the child at once, and all that it started; whatever runs then returns as cancelled."""
        with self._changing:
            self._cancelled[0] = _ALL
            child, self._child = self._child, None
        if child:
            child.end()
        self._cell.close()

    def _living_child(self) -> "_Child | None":
        with self._changing:
            if self._cancelled[0] == _ALL:
                return None
            if self._child and (self._child.lost or self._child.exit_status is not None):
                self._child.end()
                self._child = None
            if self._child is None:
                self._child = _Child(self.name, self._environment, self._cell.fileno())
            return self._child

    def _listen(
        self,
        child: "_Child",
        job: Job,
        answers: Iterator[Any],
        next_turn: Callable[[], None],
        on_progress: OnProgress,
        on_row: OnRow,
    ) -> JobResult:
        started, ended = False, 0
        try:
            for answer in answers:
                match answer:
                    case JobResult():
                        return answer
                    case Said.AT_LAST_ITEM:
                        next_turn()
                    case Said():
                        pass
                    case logging.LogRecord():
                        _log_here(answer)
                    case (key, done, total):
                        started = True
                        on_progress(key, done, total)
                    case _End.LOST:
                        self._replace(child, _EXIT_GRACE_S)
                        last_item = job.items[ended].key if started and ended < len(job.items) else None
                        return _lost(self.name, child.exit_status, child.silent_s, last_item)
                    case _End.LOST_WITH_ANOTHER:
                        self._replace(child, _EXIT_GRACE_S)
                        return JobResult(cancelled=True)
                    case _:
                        ended += 1
                        on_row(answer)
        except BaseException:
            self._replace(child)
            raise
        raise AssertionError("answers end with a result or the loss of the child")

    def _replace(self, child: "_Child", grace_s: float = 0.0) -> None:
        child.end(grace_s)
        self.start()


class LocalQueues(Mapping[str, LocalQueue]):
    """The queues of this machine by name: `gpu-0`, ..., `cpu-0`, ... Leaving the context ends their children.

    `gpus` are positions among the devices that this process may see.
    """

    def __init__(self, gpus: Sequence[int] = (), pretend: bool = False, cpus: int = 1) -> None:
        self._queues: dict[str, LocalQueue] = {}
        for gpu in gpus:
            device = str(gpu) if pretend else _visible_device(gpu)
            self._add(LocalQueue(f"gpu-{gpu}", "gpu", {"CUDA_VISIBLE_DEVICES": device}, pretend))
        for cpu in range(cpus):
            self._add(LocalQueue(f"cpu-{cpu}", "cpu", {"CUDA_VISIBLE_DEVICES": ""}))

    def _add(self, queue: LocalQueue) -> None:
        self._queues[queue.name] = queue

    def __enter__(self) -> "LocalQueues":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def __getitem__(self, name: str) -> LocalQueue:
        return self._queues[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._queues)

    def __len__(self) -> int:
        return len(self._queues)

    def start(self) -> None:
        for queue in self.values():
            queue.start()

    def cancel_all(self) -> None:
        for queue in self.values():
            queue.cancel()

    def stop(self) -> None:
        with ThreadPoolExecutor(max(1, len(self))) as pool:
            list(pool.map(LocalQueue.stop, self.values()))


class _Child:
    """A started interpreter and the pipe to it."""

    def __init__(self, name: str, environment: Mapping[str, str], cell: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [name, str(theirs.fileno()), str(cell), *sys.path]
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, *arguments],
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,  # never written to: it tells the child that the parent lives
                pass_fds=(theirs.fileno(), cell),
                process_group=0,  # Ctrl-C is the parent's matter, and what the child starts ends with it
            )
        self._connection = Connection(ours.detach())
        self.pid = self._process.pid
        self.lost = False
        self.silent_s: float | None = None
        """The silence for which it was given up."""
        self._ready = False
        self._talks: dict[int, _Talk] = {}
        self._last_begun = 0
        self._changing, self._ending = threading.Lock(), threading.Lock()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def exit_status(self) -> int | None:
        """Negative after a signal, None while the child lives."""
        return self._process.poll()

    @property
    def in_flight(self) -> int:
        return len(self._talks)

    def answers(self, number: int, device: str, job: Job, item_timeout_s: float) -> Generator[Any]:
        """What the child says of this job; a result comes last, or an end without one."""
        message = pickle.dumps((device, job), pickle.HIGHEST_PROTOCOL)
        talk = _Talk(
            _Watchdog(self._give_up, item_timeout_s if self._ready else START_TIMEOUT_S), item_timeout_s
        )
        with talk.watchdog:
            with self._changing:
                self._talks[number] = talk
                if self.lost:
                    talk.answers.put(_End.LOST)
            with suppress(OSError):  # it is being lost, and the answers will say so
                self._connection.send(number)
                self._connection.send_bytes(message)
            yield from iter(talk.answers.get, None)

    def _read(self) -> None:
        try:
            while True:
                number, answer = self._connection.recv()
                self._ready = True
                with self._changing:
                    for each in self._talks.values():
                        each.watchdog.heard(each.item_timeout_s)
                    if answer is Said.BEGUN:
                        self._last_begun = number
                    talk = self._talks.get(number)
                    if isinstance(answer, JobResult):
                        del self._talks[number]
                if talk:
                    talk.answers.put(answer)
        except (EOFError, OSError):
            pass
        finally:
            self._lose()

    def _lose(self) -> None:
        """It fell over the job that it began last, or if that has ended over the first that waits."""
        with self._changing:
            self.lost = True
            guilty = self._last_begun if self._last_begun in self._talks else next(iter(self._talks), 0)
            for number, talk in self._talks.items():
                talk.answers.put(_End.LOST if number == guilty else _End.LOST_WITH_ANOTHER)

    def _give_up(self, silent_s: float) -> None:
        self.silent_s = silent_s
        self.kill()

    def kill(self) -> None:
        """Its process group too, and the pipe, which a process stuck in a driver would keep open."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as pipe:
            pipe.shutdown(socket.SHUT_RDWR)

    def end(self, grace_s: float = 0.0) -> None:
        assert self._process.stdin
        with self._ending:
            if self._process.stdin.closed:
                return
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
            self.kill()
            self._process.stdin.close()
            try:
                self._process.wait(_END_TIMEOUT_S)
                for folder in Path(tempfile.gettempdir()).glob(f"avatar-{self.pid}-*"):
                    shutil.rmtree(folder, ignore_errors=True)  # what it was working on
            except subprocess.TimeoutExpired:
                log.error("process %d was killed and does not end; its device may need a reset", self.pid)


class _Watchdog:
    """Calls `bark` once nothing was heard for `timeout_s`.

    Counted in steps, so that a parent that was itself suspended does not blame its child.
    """

    def __init__(self, bark: Callable[[float], None], timeout_s: float) -> None:
        self._bark = bark
        self._timeout_s = timeout_s
        self._quiet_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def heard(self, timeout_s: float) -> None:
        self._quiet_s, self._timeout_s = 0.0, timeout_s

    def _watch(self) -> None:
        while not self._over.wait(step_s := min(1.0, self._timeout_s / 10)):
            self._quiet_s += step_s
            if self._quiet_s >= self._timeout_s:
                self._bark(self._timeout_s)
                return


@dataclass
class _Talk:
    """What a child is asked to do. Whatever it says shows that it lives, so all talks hear it."""

    watchdog: _Watchdog
    item_timeout_s: float
    answers: SimpleQueue[Any] = field(default_factory=SimpleQueue)


def _visible_device(gpu: int) -> str:
    """A position among this process's devices as the CUDA libraries name it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not visible:
        return str(gpu)
    names = visible.split(",")
    if gpu >= len(names):
        raise ConfigError(
            f"there is no GPU {gpu}: CUDA_VISIBLE_DEVICES={visible} allows 0 to {len(names) - 1}; "
            "ask for fewer or allow more"
        )
    return names[gpu].strip()


def shared_number(file: int) -> memoryview:
    return memoryview(mmap.mmap(file, mmap.PAGESIZE)).cast("q")


def _lost(queue: str, exit_status: int | None, silent_s: float | None, last_item: str | None) -> JobResult:
    place = f"while it worked on item {last_item}" if last_item else "outside of any item"
    if silent_s is not None:
        error = f"the process of queue {queue} said nothing for {silent_s:g} s {place}; it was replaced"
        return JobResult(error=error, error_type=TimeoutError.__name__, hung=True, last_item=last_item)
    if exit_status is not None and exit_status < 0:
        how = f"ended by signal {-exit_status} ({signal.strsignal(-exit_status)})"
    else:
        how = f"exited with status {exit_status}"
    hint = "; the usual reason is that memory ran out" if exit_status == -signal.SIGKILL else ""
    error = f"the process of queue {queue} {how} {place}{hint}"
    return JobResult(error=error, error_type=ChildProcessError.__name__, died=True, last_item=last_item)


def _log_here(record: logging.LogRecord) -> None:
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)
