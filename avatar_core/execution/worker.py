"""What the coordinator gives work to, and what passes between them: a job goes in, a result comes out.

A worker may be this process, a child process of this machine, or stand for a process of another one. So a job
is plain data, and nothing else is shared but the store.
"""

import json
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

from avatar_core.backends.base import create_backend
from avatar_core.errors import AvatarError, Cancelled
from avatar_core.execution.device import Device
from avatar_core.execution.shard import AUTO, Commit, Rows, run_shard
from avatar_core.planning.stages import create_stages
from avatar_core.stages.base import ItemSpec, Stage
from avatar_core.store.claims import this_process
from avatar_core.store.keys import new_id
from avatar_core.store.storage import Storage

log = logging.getLogger(__name__)

WorkerKind = Literal["cpu", "gpu"]
Row = dict[str, Any]

PACKAGE_VERSION = version("avatar-dataset")


@dataclass(frozen=True)
class StoreAddress:
    """What a worker of this machine opens a store with. `options` may hold credentials: they are never shown
    or written, and a worker of another machine has its own, as it has its own cache."""

    root: str
    options: Mapping[str, Any] = field(repr=False)
    cache_dir: str | None
    cache_bytes: int

    def open(self) -> Storage:
        cache_dir = Path(self.cache_dir) if self.cache_dir else None
        return Storage(self.root, self.options, cache_dir, self.cache_bytes)


@dataclass(frozen=True)
class Job:
    """A shard: items of one stage, and the manifest `Rows` of what they consume.

    `backend` holds the resolved values for `create_backend`, its name included. `version` is that of the
    package which planned the items: another one may give other results for the same keys. `asker` is the
    process that gives it out. `id` names this attempt, never to be used for another one.
    """

    store: StoreAddress
    backend: Mapping[str, Any]
    stage: str
    items: tuple[ItemSpec, ...]
    inputs: Rows
    memory: str = AUTO
    version: str = PACKAGE_VERSION
    asker: str = field(default_factory=this_process)
    id: str = field(default_factory=new_id)

    def again(self, keys: Collection[str]) -> "Job":
        """Another attempt, at the items of these keys."""
        return replace(self, items=tuple(item for item in self.items if item.key in keys), id=new_id())


@dataclass(frozen=True)
class JobResult:
    """`rows` are committed, also where there is an error, by the manifests of these `attempts`; some may be
    missing, and are then found in the store. `unfinished` are the keys of the other items.

    `keys` names stored results that must be computed again. Where the worker `died` or `hung`, `last_item` is
    the key of the item that it worked on, None outside of any item. What it had besides, a shard that was
    being committed or had not begun, ends as `cancelled`: nothing speaks against doing it again.

    A job that was not begun has `busy`, who holds the device for now, or `refused`, why this worker can never
    do it although another may.
    """

    rows: tuple[Row, ...] = ()
    attempts: tuple[str, ...] = ()
    error: str | None = None
    error_type: str | None = None
    keys: tuple[str, ...] = ()
    cancelled: bool = False
    died: bool = False
    hung: bool = False
    unfinished: tuple[str, ...] = ()
    last_item: str | None = None
    busy: str | None = None
    refused: str | None = None


class Cancellation:
    """Asked for once, heard by every worker that has jobs of it. `wanted` is looked at by whoever asks in a
    thread that the coordinator waits for."""

    def __init__(self, wanted: Callable[[], bool] = lambda: False) -> None:
        self._asked = threading.Event()
        self._wanted = wanted
        self._changing = threading.Lock()
        self._listeners: dict[object, Callable[[], None]] = {}

    def ask(self) -> None:
        with self._changing:
            self._asked.set()
            listeners = list(self._listeners.values())
        for listener in listeners:
            listener()

    def asked(self) -> bool:
        return self._asked.is_set() or self._wanted()

    def wait(self, timeout_s: float) -> None:
        self._asked.wait(timeout_s)

    @contextmanager
    def heard_by(self, listener: Callable[[], None]) -> Iterator[None]:
        """`listener` is called when, or at once if, it is asked for."""
        token = object()
        with self._changing:
            self._listeners[token] = listener
            asked = self._asked.is_set()
        try:
            if asked:
                listener()
            yield
        finally:
            with self._changing:
                del self._listeners[token]


class Listener(Protocol):
    """What is heard of a job while it lasts, from any thread. It is for display only: a worker far away may
    tell it late, thinned out or not at all."""

    def on_start(self) -> None:
        """Its turn has come."""
        ...

    def on_progress(self, key: str, done: int, total: int) -> None: ...

    def on_row(self, row: Row) -> None:
        """An item has ended; it is not committed yet, and the row misses the place of its tensors."""
        ...


class Worker(Protocol):
    """Runs jobs, with models that stay loaded. `capacity` is how many it is given at once, so that it never
    waits for the next; it works on one.

    `run` blocks until the job has ended, and may be called from several threads, for several batches. It
    raises nothing for what goes wrong with the job or the worker: that is in the result, and then the worker
    takes the next job. Once cancelled it comes back soon, even where nobody answers; a job that ended as
    `cancelled` although nobody asked for it is done again.
    """

    kind: WorkerKind
    capacity: int

    @property
    def unavailable(self) -> str | None:
        """Why it should be given nothing for now; what it has been given goes on or comes back."""
        ...

    def run(
        self, job: Job, item_timeout_s: float, cancellation: Cancellation, listener: Listener
    ) -> JobResult:
        """A worker that says nothing for `item_timeout_s` is given up, and the result has `hung`."""
        ...


class InProcess:
    """Works in the thread that calls it, and so on one job at a time; nobody can give it up. Leaving the
    context lets a GPU go.

    Without a `gpu` everything is computed on the CPU.
    """

    kind: WorkerKind = "cpu"
    capacity = 1
    unavailable = None

    def __init__(self, *, gpu: bool) -> None:
        self._device = Device(gpu=gpu)
        self._opened = Opened()

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        self._device.let_go()

    def run(
        self, job: Job, item_timeout_s: float, cancellation: Cancellation, listener: Listener
    ) -> JobResult:
        listener.on_start()
        rows: list[Row] = []
        committed: list[Row] = []
        attempts: list[str] = []
        error: Exception | None = None

        def keep(row: Row) -> None:
            rows.append(row)
            listener.on_row(row)

        def commit(write: Commit) -> None:
            attempts.append(write())
            committed.extend(rows)

        try:
            storage, stage = self._opened.get(job)
            if holder := self._device.take_for(stage, job.items):
                return JobResult(busy=holder)
            run_shard(
                storage,
                stage,
                job.items,
                job.inputs,
                device=self._device.of(stage),
                memory=job.memory,
                cancelled=cancellation.asked,
                on_progress=listener.on_progress,
                on_row=keep,
                commit_with=commit,
            )
        except Exception as caught:
            error = caught
        return result_of(job, committed, error, attempts)


class Opened:
    """Storages, and the stages of backends, that stay open for the jobs that follow."""

    def __init__(self) -> None:
        self._opened: dict[str, tuple[Storage, dict[str, Stage]]] = {}

    def get(self, job: Job) -> tuple[Storage, Stage]:
        name = json.dumps([asdict(job.store), job.backend], sort_keys=True, default=str)
        if name not in self._opened:
            self._opened[name] = job.store.open(), create_stages(create_backend(job.backend))
        storage, stages = self._opened[name]
        return storage, stages[job.stage]


def refusal(job: Job) -> JobResult | None:
    """Of a job of another version of this package: its keys promise what that one computes."""
    if job.version == PACKAGE_VERSION:
        return None
    return JobResult(
        refused=f"it has avatar-dataset {PACKAGE_VERSION}, the run {job.version}; install the same in both"
    )


def result_of(
    job: Job, committed: Sequence[Row], error: Exception | None, attempts: Sequence[str] = ()
) -> JobResult:
    """How a job ended: by itself, or with this `error`."""
    done = {row["key"] for row in committed}
    unfinished = tuple(item.key for item in job.items if item.key not in done)
    result = JobResult(tuple(committed), tuple(attempts), unfinished=unfinished)
    if error is None:
        return result
    text = " ".join(str(error).split()) or "no message"
    if not isinstance(error, AvatarError):
        log.error("a shard failed", exc_info=error)
        text = f"unexpected {type(error).__name__}: {text}"
    return replace(
        result,
        error=text,
        error_type=type(error).__name__,
        keys=tuple(getattr(error, "keys", ())),
        cancelled=isinstance(error, Cancelled),
    )
