"""The child process of a local queue: runs shards as they come and keeps what it loaded."""

import fcntl
import json
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa

from avatar_core.backends.base import create_backend
from avatar_core.errors import AvatarError, Cancelled
from avatar_core.run import one_thread, run_shard
from avatar_core.stages.base import Stage
from avatar_core.stages.registry import create_stages
from avatar_core.store.manifest import parquet_bytes
from avatar_core.store.storage import Storage
from flows.queues import Job, JobResult, Row, shared_number

log = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 0.1


def serve(name: str, connection: str, cell: str) -> None:
    """The life of a child, until its parent closes the connection; the numbers are file descriptors."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    multiprocessing.current_process().name = name  # log records carry it
    _Worker(Connection(int(connection)), shared_number(int(cell))).serve()


def _end_with_parent() -> None:
    """The kernel ends this process group when the parent's end of standard input closes.

    That needs no thread of ours, which a library that holds the interpreter's lock would keep waiting;
    a parent-death signal would come already when the thread that started this process ends.
    """
    stdin = sys.stdin.fileno()
    life = os.dup(stdin)
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), stdin)  # whoever asks a question there gets no answer instead of waiting
    fcntl.fcntl(life, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)


class _Worker:
    """Runs jobs with storages, backends and models that stay."""

    def __init__(self, connection: Connection, cancelled: memoryview) -> None:
        self._connection = connection
        self._cancelled = cancelled
        self._sending = threading.Lock()
        self._opened: dict[str, tuple[Storage, dict[str, Stage]]] = {}
        self._told_s = 0.0
        self.item_key: str | None = None
        for name in ("avatar_core", "flows"):
            logger = logging.getLogger(name)
            logger.setLevel(logging.INFO)
            logger.addHandler(_PipeHandler(self))
            logger.propagate = False

    def serve(self) -> None:
        _warm_up()
        self.send(None)
        with suppress(EOFError, ConnectionError):
            while True:
                self.send(self._work(self._connection.recv_bytes()))

    def send(self, message: Any) -> None:
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            os._exit(1)  # the parent is gone; an exception would be taken for a failure of the item

    def _work(self, message: bytes) -> JobResult:
        rows: list[Row] = []
        committed: list[Row] = []
        self._told_s, self.item_key = 0.0, None
        try:
            number, device, job = pickle.loads(message)
            storage, stages = self._open(job)
            run_shard(
                storage,
                stages[job.stage],
                job.items,
                job.inputs,
                device=device,
                cancelled=lambda: self._cancelled[0] >= number,
                on_progress=self._progress,
                on_row=lambda row: self._keep(row, rows),
                on_commit=lambda: committed.extend(rows),
            )
        except Exception as error:
            return _failed(error, committed)
        return JobResult(rows=tuple(committed))

    def _open(self, job: Job) -> tuple[Storage, dict[str, Stage]]:
        settings = [job.root, job.options, job.cache_dir, job.cache_bytes, job.backend]
        name = json.dumps(settings, sort_keys=True, default=str)
        if name not in self._opened:
            cache_dir = Path(job.cache_dir) if job.cache_dir else None
            storage = Storage(job.root, job.options, cache_dir, job.cache_bytes)
            self._opened[name] = storage, create_stages(create_backend(job.backend))
        return self._opened[name]

    def _progress(self, key: str, done: int, total: int) -> None:
        self.item_key = key
        now_s = time.monotonic()
        if now_s - self._told_s >= PROGRESS_INTERVAL_S:
            self._told_s = now_s
            self.send((key, done, total))

    def _keep(self, row: Row, rows: list[Row]) -> None:
        rows.append(row)  # the commit adds to this very row where its tensors lie
        self.send(row)


def _warm_up() -> None:
    """What the first commit would load in the middle of the first shard: pyarrow brings pandas in."""
    with one_thread():
        parquet_bytes(pa.Table.from_pylist([{"key": ""}]))


def _failed(error: Exception, rows: Sequence[Row]) -> JobResult:
    text = " ".join(str(error).split()) or "no message"
    if not isinstance(error, AvatarError):
        log.error("a shard failed", exc_info=error)
        text = f"unexpected {type(error).__name__}: {text}"
    return JobResult(
        rows=tuple(rows),
        error=text,
        error_type=type(error).__name__,
        keys=tuple(getattr(error, "keys", ())),
        cancelled=isinstance(error, Cancelled),
    )


class _PipeHandler(logging.Handler):
    """Sends records as text: arguments and tracebacks would not survive the way."""

    def __init__(self, worker: _Worker) -> None:
        super().__init__()
        self._worker = worker

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sent = copy(record)
            sent.msg, sent.args = self.format(record), None
            sent.exc_info = sent.exc_text = sent.stack_info = None
            sent.item_key = self._worker.item_key
            self._worker.send(sent)
        except Exception:
            self.handleError(record)
