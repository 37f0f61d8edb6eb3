"""The worker of this machine's renders: those that are scheduled, submitted or tried again.

Prefect puts the working directory first on the import path when it loads a flow, so that packages of the
user's that are called `flows` or `tasks` would be taken for ours. Each run is therefore started by our own
command, `avatar execute`, which has ours loaded before Prefect looks for the flow.
"""

import asyncio
import logging
import os
import runpy
import signal
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import flows
from avatar_core.errors import AvatarError, ConfigError
from flows.alive import crash_lost_runs
from flows.config_files import CONFIG_DIR
from flows.deploy import register_host
from flows.names import POOL, host_name, render_queue
from flows.prefect_client import connect, load_prefect, prefect_client
from flows.queues import forget_worker

DEFAULT_QUEUE = "default"
"""Of every work pool: for deployments that name no queue."""

ORPHAN_S = 1.0
"""Between two looks at whether the supervisor is still there."""
_PACKAGE = "AVATAR_FLOWS_PACKAGE"
"""Environment variable by which a worker tells its runs which `flows` they must have."""


def run_renders(limit: int) -> None:
    """Runs what is due, `limit` renders at a time, until a signal comes."""
    connect()
    os.environ.setdefault("PREFECT_WORKER_QUERY_SECONDS", "5")
    os.environ[_PACKAGE] = _package()
    # The runs must find the `avatar` of this environment, also where it is not activated.
    os.environ["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    )
    if folder := os.environ.get(CONFIG_DIR):  # runs start elsewhere
        os.environ[CONFIG_DIR] = str(Path(folder).expanduser().resolve())
    with prefect_client() as client:
        register_host(client, host_name(), Path.cwd())
    crash_lost_runs()
    name = f"{render_queue(host_name())}.{os.getpid()}"
    try:
        asyncio.run(_serve(name, limit))
    finally:
        with suppress(AvatarError), prefect_client() as client:  # a server that is away learns it by itself
            forget_worker(client, name)


async def _serve(name: str, limit: int) -> None:
    from prefect.workers.process import ProcessWorker

    queues = [render_queue(host_name()), DEFAULT_QUEUE]
    worker = ProcessWorker(name=name, work_pool_name=POOL, work_queues=queues, limit=limit)
    take, stopping = worker.get_and_submit_flow_runs, asyncio.Event()

    async def take_unless_stopping() -> list[Any]:
        return [] if stopping.is_set() else await take()

    async def stop_when_idle() -> None:
        parent = os.getppid()
        while not stopping.is_set() and os.getppid() == parent:
            with suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), ORPHAN_S)
        if not stopping.is_set():
            on_signal()  # its supervisor was killed, and the next one starts another worker
        with suppress(RuntimeError):  # of a worker that has not begun
            while worker.limiter.borrowed_tokens:
                await asyncio.sleep(0.1)
        serving.cancel()

    def on_signal() -> None:
        if stopping.is_set():
            serving.cancel()  # kills the runs
        stopping.set()
        _ask_children_to_stop()

    worker.get_and_submit_flow_runs = take_unless_stopping  # type: ignore[method-assign]
    serving = asyncio.ensure_future(worker.start())
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    ending = asyncio.create_task(stop_when_idle())
    with suppress(asyncio.CancelledError):
        await serving
    ending.cancel()


def _ask_children_to_stop() -> None:
    """A run then stops after its current step."""
    for path in Path("/proc/self/task").glob("*/children"):
        for pid in path.read_text(encoding="ascii").split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGTERM)


def execute_run() -> None:
    """Runs in this process the flow run that a worker names in the environment."""
    if not os.environ.get("PREFECT__FLOW_RUN_ID"):
        raise ConfigError(
            "`avatar execute` is what a worker starts for each run; start one with `avatar worker`"
        )
    expected = os.environ.get(_PACKAGE, _package())
    if _package() != expected:
        raise ConfigError(
            f"the package `flows` of this run is {_package()}, that of its worker {expected}; "
            "remove what changes PATH or PYTHONPATH from the deployment's job variables"
        )
    if os.getpgrp() != os.getpid():
        os.setpgrp()  # Ctrl-C goes to the worker alone, which asks its runs to stop just once
    load_prefect()
    import_module("flows.render")  # with all that it needs, from where they are safe
    logging.getLogger("prefect.flow_runs").addFilter(_is_news)
    sys.argv[1:] = []  # where Prefect would look for the run's id first
    runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)


def _is_news(record: logging.LogRecord) -> bool:
    """Not the traceback of a run that failed as its state says."""
    from prefect.exceptions import FailedRun

    return not (record.exc_info and isinstance(record.exc_info[1], (AvatarError, FailedRun)))


def _package() -> str:
    return str(Path(flows.__file__ or "").resolve().parent)
