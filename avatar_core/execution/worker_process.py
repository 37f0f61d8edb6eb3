"""Workers that are child processes: one per GPU and some for the CPU, each at one shard at a time.

A child keeps its models between shards and knows no flow engine. It is started as a fresh interpreter, not
by `multiprocessing`, which would import the parent's main module into it and set its environment too late.
So that it never waits, it is sent a shard as it begins the last item of the one before, whose results it
commits meanwhile. A child that dies or falls silent is replaced; its shards are handed back.
"""

import dataclasses
import json
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
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from avatar_core.config import RuntimeConfig
from avatar_core.errors import ConfigError
from avatar_core.execution.worker import Cancellation, Job, JobResult, Listener, WorkerKind

log = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0  # for imports, which are slow from a cold network disk
_EXIT_GRACE_S = 1.0  # for a process on its way out to leave its own exit status
_END_TIMEOUT_S = 30.0

_BOOT = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from avatar_core.execution.child import serve; serve(sys.argv[1])"
)


@dataclass(frozen=True)
class ChildSettings:
    """What a child is started with; `connection` and `cells` are file descriptors. `gpu` says whether it has
    one of its own, and `pretended` names one that it only pretends to have."""

    name: str
    connection: int
    cells: int
    gpu: bool
    pretended: str | None
    idle_s: float


class Said(Enum):
    """What a child says of itself; else it sends progress, rows, log records and results."""

    READY = auto()
    BEGUN = auto()
    AT_LAST_ITEM = auto()


class _End(Enum):
    """Why the answers to a job end without a result: the child was lost, with this job or another one."""

    LOST = auto()
    LOST_WITH_ANOTHER = auto()


class WorkerProcess:
    """One child process. `gpu` is the device that it gets, as `CUDA_VISIBLE_DEVICES` has it; with `pretend`
    it computes on the CPU as if it had that one. A GPU is let go once there was nothing to do for `idle_s`.
    """

    capacity = 2
    unavailable = None

    def __init__(
        self,
        name: str,
        gpu: str | None = None,
        *,
        pretend: bool = False,
        idle_s: float = RuntimeConfig.idle_s,
    ) -> None:
        self.name = name
        self.kind: WorkerKind = "cpu" if gpu is None else "gpu"
        self._gpu, self._pretend, self._idle_s = gpu, pretend, idle_s
        self._child: _Child | None = None
        self._turn = threading.Lock()
        self._changing = threading.Lock()
        self._numbers = 0
        # Shared memory without a lock: a child killed or stopped while it held one would block the parent.
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._file.truncate(mmap.PAGESIZE)
        self._cancelled = CancelledJobs(self._file.fileno())

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
        self, job: Job, item_timeout_s: float, cancellation: Cancellation, listener: Listener
    ) -> JobResult:
        """Blocks until the shard has ended; shards of several threads take turns. A cancelled one stops at
        its next report.

        The child is given up after `item_timeout_s` without a word, in which the models must be loaded, an
        item must report and the shard be committed.
        """
        with self._changing:
            self._numbers += 1
            number = self._numbers
        with cancellation.heard_by(lambda: self._cancelled.add(number)), ExitStack() as turn:
            turn.enter_context(self._turn)
            listener.on_start()
            child = None if number in self._cancelled else self._living_child()
            if child is None:
                result = JobResult(cancelled=True)
            else:
                with closing(child.answers(number, job, item_timeout_s)) as answers:
                    result = self._listen(child, job, answers, turn.close, listener)
        if (result.died or result.hung) and number in self._cancelled:
            result = JobResult(cancelled=True)
        committed = {row["key"] for row in result.rows}
        unfinished = tuple(item.key for item in job.items if item.key not in committed)
        return dataclasses.replace(result, unfinished=unfinished)

    def stop(self) -> None:
        """Ends the child at once, and all that it started; whatever runs then returns as cancelled."""
        with self._changing:
            self._cancelled.add_all()
            child, self._child = self._child, None
        if child:
            child.end()
        self._file.close()

    def _living_child(self) -> "_Child | None":
        with self._changing:
            if self._cancelled.has_all:
                return None
            if self._child and (self._child.lost or self._child.exit_status is not None):
                self._child.end()
                self._child = None
            if self._child is None:
                visible = "" if self._gpu is None else self._gpu
                has_gpu = self._gpu is not None and not self._pretend
                settings = partial(
                    ChildSettings,
                    name=self.name,
                    cells=self._file.fileno(),
                    gpu=has_gpu,
                    pretended=self._gpu if self._pretend else None,
                    idle_s=self._idle_s,
                )
                self._child = _Child(settings, {"CUDA_VISIBLE_DEVICES": visible})
            return self._child

    def _listen(
        self,
        child: "_Child",
        job: Job,
        answers: Iterator[Any],
        next_turn: Callable[[], None],
        listener: Listener,
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
                        listener.on_progress(key, done, total)
                    case _End.LOST:
                        self._replace(child, _EXIT_GRACE_S)
                        last_item = job.items[ended].key if started and ended < len(job.items) else None
                        return _lost(self.name, child.exit_status, child.silent_s, last_item)
                    case _End.LOST_WITH_ANOTHER:
                        self._replace(child, _EXIT_GRACE_S)
                        return JobResult(cancelled=True)
                    case _:
                        ended += 1
                        listener.on_row(answer)
        except BaseException:
            self._replace(child)
            raise
        raise AssertionError("answers end with a result or the loss of the child")

    def _replace(self, child: "_Child", grace_s: float = 0.0) -> None:
        child.end(grace_s)
        self.start()


class WorkerProcesses(Mapping[str, WorkerProcess]):
    """The workers of this machine by name: `gpu-0`, `cpu-0`, ... Leaving the context ends their children.

    `gpus` are positions among the devices that this process may see.
    """

    def __init__(
        self,
        gpus: Sequence[int] = (),
        pretend: bool = False,
        cpus: int = 1,
        idle_s: float = RuntimeConfig.idle_s,
    ) -> None:
        devices = {f"gpu-{gpu}": str(gpu) if pretend else visible_device(gpu) for gpu in gpus}
        on_gpus = {
            name: WorkerProcess(name, device, pretend=pretend, idle_s=idle_s)
            for name, device in devices.items()
        }
        names = [f"cpu-{cpu}" for cpu in range(cpus)]
        self._workers = on_gpus | {name: WorkerProcess(name, idle_s=idle_s) for name in names}

    def __enter__(self) -> "WorkerProcesses":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def __getitem__(self, name: str) -> WorkerProcess:
        return self._workers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._workers)

    def __len__(self) -> int:
        return len(self._workers)

    def start(self) -> None:
        for worker in self.values():
            worker.start()

    def stop(self) -> None:
        with ThreadPoolExecutor(max(1, len(self))) as pool:
            list(pool.map(WorkerProcess.stop, self.values()))


class _Child:
    """A started interpreter and the pipe to it."""

    def __init__(self, settings: "partial[ChildSettings]", environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            given = settings(connection=theirs.fileno())
            arguments = [json.dumps(dataclasses.asdict(given)), *sys.path]
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, *arguments],
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,  # never written to: it tells the child that the parent lives
                pass_fds=(given.connection, given.cells),
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

    def answers(self, number: int, job: Job, item_timeout_s: float) -> Generator[Any]:
        """What the child says of this job; a result comes last, or an end without one."""
        message = pickle.dumps(job, pickle.HIGHEST_PROTOCOL)
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


def visible_device(gpu: int) -> str:
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


class CancelledJobs:
    """Numbers of jobs in memory that a parent shares with its child, for as long as there are no more than a
    few hundred later ones."""

    def __init__(self, file: int) -> None:
        self._cells = memoryview(mmap.mmap(file, mmap.PAGESIZE)).cast("q")

    def add(self, number: int) -> None:
        self._cells[self._place(number)] = number

    def add_all(self) -> None:
        """Of all times."""
        self._cells[0] = 1

    @property
    def has_all(self) -> bool:
        return bool(self._cells[0])

    def __contains__(self, number: int) -> bool:
        return self.has_all or self._cells[self._place(number)] == number

    def _place(self, number: int) -> int:
        return 1 + number % (len(self._cells) - 1)


def _lost(worker: str, exit_status: int | None, silent_s: float | None, last_item: str | None) -> JobResult:
    place = f"while it worked on item {last_item}" if last_item else "outside of any item"
    if silent_s is not None:
        error = f"the process of worker {worker} said nothing for {silent_s:g} s {place}; it was replaced"
        return JobResult(error=error, error_type=TimeoutError.__name__, hung=True, last_item=last_item)
    if exit_status is not None and exit_status < 0:
        how = f"ended by signal {-exit_status} ({signal.strsignal(-exit_status)})"
    else:
        how = f"exited with status {exit_status}"
    hint = "; the usual reason is that memory ran out" if exit_status == -signal.SIGKILL else ""
    error = f"the process of worker {worker} {how} {place}{hint}"
    return JobResult(error=error, error_type=ChildProcessError.__name__, died=True, last_item=last_item)


def _log_here(record: logging.LogRecord) -> None:
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)
