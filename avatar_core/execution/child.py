"""The child process of a worker: runs shards as they come and keeps what it loaded."""

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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import copy
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa

from avatar_core.execution.device import Device
from avatar_core.execution.shard import Commit, one_thread, run_shard
from avatar_core.execution.worker import Job, JobResult, Opened, Row, refusal, result_of
from avatar_core.execution.worker_process import CancelledJobs, ChildSettings, Said
from avatar_core.store.manifest import parquet_bytes

PROGRESS_INTERVAL_S = 0.1


def serve(settings: str) -> None:
    """The life of a child, until its parent closes the connection; `settings` are JSON."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    given = ChildSettings(**json.loads(settings))
    multiprocessing.current_process().name = given.name  # log records carry it
    _Child(given).serve()


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


class _Child:
    """Runs jobs with storages, backends and models that stay until it was idle for long.

    A job's results are committed in a second thread, while the next job's first item is worked on.
    """

    def __init__(self, settings: ChildSettings) -> None:
        self._connection = Connection(settings.connection)
        self._cancelled = CancelledJobs(settings.cells)
        self._settings = settings
        self._device = Device(gpu=settings.gpu, pretended=settings.pretended)
        self._sending = threading.Lock()
        self._committer = ThreadPoolExecutor(1)
        self._opened = Opened()
        self._told_s = 0.0
        self._at_last_item = False
        self._number = 0
        self._item_key: str | None = None
        self._ending = threading.local()
        for name in ("avatar_core", "flows"):
            logger = logging.getLogger(name)
            logger.setLevel(logging.INFO)
            logger.addHandler(_PipeHandler(self))
            logger.propagate = False

    def serve(self) -> None:
        _warm_up()
        self.send(0, Said.READY)
        with suppress(EOFError, ConnectionError):
            while True:
                if not self._connection.poll(self._settings.idle_s):
                    self._device.let_go()
                self._number, self._item_key = self._connection.recv(), None
                self.send(self._number, Said.BEGUN)
                self._work(self._number, self._connection.recv_bytes())

    def send(self, number: int, message: Any) -> None:
        try:
            with self._sending:
                self._connection.send((number, message))
        except OSError:
            os._exit(1)  # the parent is gone; an exception would be taken for a failure of the item

    def _work(self, number: int, message: bytes) -> None:
        rows: list[Row] = []
        commits: list[Commit] = []
        error: Exception | None = None
        self._told_s, self._at_last_item = 0.0, False
        job: Job = pickle.loads(message)
        if refused := refusal(job):
            self.send(number, refused)
            return
        try:
            storage, stage = self._opened.get(job)
            if holder := self._device.take_for(stage, job.items):
                self.send(number, JobResult(busy=holder))
                return
            run_shard(
                storage,
                stage,
                job.items,
                job.inputs,
                device=self._device.of(stage),
                memory=job.memory,
                cancelled=lambda: number in self._cancelled,
                on_progress=lambda key, done, total: self._progress(job.items[-1].key, key, done, total),
                on_row=lambda row: self._keep(row, rows),
                commit_with=commits.append,
            )
        except Exception as caught:
            error = caught
        self._committer.submit(self._end, number, job, commits, rows, error)

    def _end(
        self,
        number: int,
        job: Job,
        commits: Sequence[Commit],
        rows: Sequence[Row],
        error: Exception | None,
    ) -> None:
        self._ending.number = number
        try:
            attempts = [commit() for commit in commits]
        except Exception as caught:
            self.send(number, result_of(job, (), caught))
        else:
            self.send(number, result_of(job, rows, error, attempts))

    def subject(self) -> tuple[int, str | None]:
        """Number and item of the job that the present thread is at; libraries' threads are with the items."""
        if ending := getattr(self._ending, "number", None):
            return ending, None
        return self._number, self._item_key

    def _progress(self, last_key: str, key: str, done: int, total: int) -> None:
        self._item_key = key
        now_s = time.monotonic()
        if now_s - self._told_s >= PROGRESS_INTERVAL_S:
            self._told_s = now_s
            self.send(self._number, (key, done, total))
        if key == last_key and not self._at_last_item:
            self._at_last_item = True
            self.send(self._number, Said.AT_LAST_ITEM)

    def _keep(self, row: Row, rows: list[Row]) -> None:
        rows.append(row)  # the commit adds to this very row where its tensors lie
        self.send(self._number, row)


def _warm_up() -> None:
    """What the first commit would load in the middle of the first shard."""
    with one_thread(), _without("pandas"):
        parquet_bytes(pa.Table.from_pylist([{"key": ""}]))


@contextmanager
def _without(package: str) -> Iterator[None]:
    """As if it were not installed. pyarrow looks for pandas once, at its first array, and would import it,
    which takes as long as all else here; nothing in a child has need of it."""

    class Absent:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            if name == package:
                raise ModuleNotFoundError(f"{name} is left out", name=name)

    sys.meta_path.insert(0, Absent)
    try:
        yield
    finally:
        sys.meta_path.remove(Absent)


class _PipeHandler(logging.Handler):
    """Sends records as text: arguments and tracebacks would not survive the way."""

    def __init__(self, worker: _Child) -> None:
        super().__init__()
        self._worker = worker

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sent = copy(record)
            sent.msg, sent.args = self.format(record), None
            sent.exc_info = sent.exc_text = sent.stack_info = None
            number, sent.item_key = self._worker.subject()
            self._worker.send(number, sent)
        except Exception:
            self.handleError(record)
