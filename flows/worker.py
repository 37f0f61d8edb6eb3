"""Deployments on this machine: the work pool `local` and the worker that runs what is scheduled there.

Prefect puts the working directory first on the import path when it loads a flow, so that packages of the
user's that are called `flows` or `tasks` would be taken for ours. Each run is therefore started by our own
command, `avatar execute`, which has ours loaded before Prefect looks for the flow.
"""

import asyncio
import logging
import os
import runpy
import signal
import socket
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import flows
from avatar_core.errors import AvatarError, ConfigError
from flows.alive import crash_lost_runs
from flows.config_files import CONFIG_DIR
from flows.prefect_client import load_prefect, prefect_client
from flows.server import server_environment

POOL = "local"
COMMAND = "avatar execute"

_PACKAGE = "AVATAR_FLOWS_PACKAGE"
"""Environment variable by which a worker tells its runs which `flows` they must have."""


def ensure_work_pool(api_url: str | None = None) -> None:
    """On that server, or on the one that Prefect's settings name. Raises `AvatarError`."""
    load_prefect(api_url)
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    template: dict[str, Any] = ProcessWorker.get_default_base_job_template()
    template["variables"]["properties"]["command"]["default"] = COMMAND
    about = "Renders on this machine. `avatar worker` runs what is scheduled here."
    pool = WorkPoolCreate(name=POOL, type=ProcessWorker.type, description=about, base_job_template=template)
    with prefect_client(api_url) as client:
        try:
            client.create_work_pool(pool)
        except ObjectAlreadyExists:
            if client.read_work_pool(POOL).base_job_template != template:
                client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=template))


def run_worker(limit: int) -> None:
    """Runs what is due, `limit` renders at a time, until a signal comes."""
    os.environ.update(server_environment())
    if not os.environ.get("PREFECT_API_URL"):
        raise ConfigError("there is no Prefect server: start one with `avatar up`, or set PREFECT_API_URL")
    os.environ.setdefault("PREFECT_WORKER_QUERY_SECONDS", "5")
    os.environ[_PACKAGE] = _package()
    # The runs must find the `avatar` of this environment, also where it is not activated.
    os.environ["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    )
    if folder := os.environ.get(CONFIG_DIR):  # runs start elsewhere
        os.environ[CONFIG_DIR] = str(Path(folder).expanduser().resolve())
    ensure_work_pool()
    crash_lost_runs()
    asyncio.run(_serve(limit))


async def _serve(limit: int) -> None:
    from prefect.workers.process import ProcessWorker

    worker = ProcessWorker(name=socket.gethostname(), work_pool_name=POOL, limit=limit)
    take, stopping = worker.get_and_submit_flow_runs, asyncio.Event()

    async def take_unless_stopping() -> list[Any]:
        return [] if stopping.is_set() else await take()

    async def stop_when_idle() -> None:
        await stopping.wait()
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
