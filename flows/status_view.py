"""How servers, their queues and recorded runs are shown in a terminal."""

import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from avatar_core.errors import AvatarError
from avatar_core.status import RunStatus, RunSummary
from flows.alive import crash_lost_runs
from flows.database import describe_database, history_elsewhere
from flows.names import host_of
from flows.prefect_client import load_prefect, prefect_client, without_login
from flows.server import (
    Server,
    answers,
    log_path,
    running_server,
    server_environment,
    state_folder,
)
from flows.supervisor import Record

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

    from flows.queues import Fleet

FAILURES_SHOWN = 20
FLOW_RUNS_SHOWN = 5
WATCH_S = 2.0


def print_server(console: Console, server: Server, fresh: bool, served: Record) -> None:
    lines = [
        f"the Prefect server is {'up' if fresh else 'up already'}: {server.address}",
        f"its log: {log_path()}",
        _database(server),
        *filter(None, [_sqlite_hint(server, served), history_elsewhere(server.database, state_folder())]),
        f"queues of this machine: {', '.join(served.queues) or 'none'}",
        "renders run there from now on; `avatar down` stops it",
        f"for the `prefect` command: export PREFECT_API_URL={server.api_url}",
    ]
    other = os.environ.get("PREFECT_API_URL")
    if other and other != server.api_url:
        lines.append(f"not used by this shell, where PREFECT_API_URL={without_login(other)}")
    for line in lines:
        _print(console, line)


def _sqlite_hint(server: Server, served: Record) -> str | None:
    """SQLite has one writer at a time."""
    if server.database == "sqlite" and any(map(host_of, served.queues)):
        return "with many GPUs and renders at a time `avatar up --postgres` answers sooner"
    return None


def print_address(console: Console) -> None:
    url = os.environ.get("PREFECT_API_URL")
    server = running_server()
    if url and not (server and url == server.api_url):
        _print(console, f"server: {without_login(url)}{'' if answers(url) else ' (does not answer)'}")
    elif server:
        _print(console, f"server: {server.address}{'' if answers(server.api_url) else ' (does not answer)'}")
        _print(console, _database(server))
    else:
        _print(console, "no server runs; `avatar up` starts one")
    with _client(console) as client:
        if client:
            _print_queues(console, client)


def print_runs(console: Console, runs: Sequence[RunSummary]) -> None:
    if not runs:
        _print(console, "no runs are recorded yet")
        return
    table = _table("run", "started", "clips", "ok", "failed", "to do")
    for run in runs:
        started = f"{run.started.astimezone():%Y-%m-%d %H:%M:%S}"
        table.add_row(run.id, started, str(run.clips), str(run.ok), _failed(run.failed), str(run.to_do))
    console.print(table)


def print_run(console: Console, status: RunStatus) -> None:
    run = status.summary
    table = _table("stage", "items", "cached", "to do", "failed")
    for stage in status.stages:
        numbers = map(str, (stage.items, stage.cached, stage.to_do))
        table.add_row(stage.stage, *numbers, _failed(stage.failed))
    console.print(table)
    for failure in status.failures[:FAILURES_SHOWN]:
        _print(console, f"{failure.name} (row {failure.row + 1}): {failure.stage}: {failure.error}", "red")
    if len(status.failures) > FAILURES_SHOWN:
        _print(console, f"... and {len(status.failures) - FAILURES_SHOWN} more failures")
    _print(console, f"{run.id}: {run.ok} of {run.clips} clips ok, {run.failed} failed, {run.to_do} to do")
    _print(console, f"dataset: {status.dataset or 'not published yet'}")
    with _client(console) as client:
        if client:
            crash_lost_runs()
            for line in _flow_runs(client, run.id):
                _print(console, line)
            _print_queues(console, client)


def watch(console: Console, show: Callable[[Console], None]) -> None:
    """What `show` prints, anew every two seconds until Ctrl-C; in place where that can be."""
    with suppress(KeyboardInterrupt):
        if not console.is_terminal:
            while True:
                show(console)
                time.sleep(WATCH_S)
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(_drawn(console, show), refresh=True)
                time.sleep(WATCH_S)


def _drawn(console: Console, show: Callable[[Console], None]) -> Text:
    page = io.StringIO()
    show(Console(file=page, width=console.width, force_terminal=True, _environ={}))
    return Text.from_ansi(page.getvalue())


def _database(server: Server) -> str:
    return describe_database(server.database, server.keep_days, state_folder())


@contextmanager
def _client(console: Console) -> "Iterator[SyncPrefectClient | None]":
    """Of the server, None where none answers; what is wrong with it is said, and is no reason to fail."""
    url = os.environ.get("PREFECT_API_URL")
    environment = server_environment() or ({"PREFECT_API_URL": url} if url and answers(url) else {})
    if not environment:
        yield None
        return
    os.environ.update(environment)
    try:
        load_prefect()
        with prefect_client() as client:
            yield client
    except AvatarError as error:
        _print(console, f"what the server has is not shown: {error}")


def _flow_runs(client: "SyncPrefectClient", run_id: str) -> Iterator[str]:
    """State, page and time of the flow runs that carry the run's id as their name."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.utilities.urls import url_for

    wanted = FlowRunFilter(name=FlowRunFilterName(any_=[run_id]))
    for run in client.read_flow_runs(
        flow_run_filter=wanted, sort=FlowRunSort.START_TIME_DESC, limit=FLOW_RUNS_SHOWN
    ):
        yield f"flow run: {run.state_name}, {url_for(run)}"
        if run.state_type == "RUNNING":
            left = _left(client, run)
            yield f"{_clock(run.estimated_run_time)} so far, {f'about {_clock(left)}' if left else '?'} left"
        elif run.end_time:
            yield f"took {_clock(run.estimated_run_time)}"


def _left(client: "SyncPrefectClient", run: "FlowRun") -> timedelta | None:
    """By how far its latest attempt says that it is."""
    from prefect.client.schemas.filters import ArtifactFilter
    from prefect.client.schemas.sorting import ArtifactSort

    wanted = {"flow_run_id": {"any_": [run.id]}, "type": {"any_": ["progress"]}}
    found = client.read_artifacts(
        artifact_filter=ArtifactFilter.model_validate(wanted), sort=ArtifactSort.CREATED_DESC, limit=1
    )
    percent = float(str(found[0].data)) if found else 0.0
    if not percent or not found[0].created:
        return None
    passed: timedelta = datetime.now(UTC) - found[0].created
    return passed * (100 - percent) / percent


def _print_queues(console: Console, client: "SyncPrefectClient") -> None:
    from flows.queues import read_fleet

    fleet = read_fleet(client)
    if fleet.queues:
        console.print(_queue_table(fleet))
    for host in fleet.gone:
        remedy = f"if it does not come back: `avatar worker --remove {host}`"
        _print(console, f"nothing is heard of the machine {host}; {remedy}", "yellow")


def _queue_table(fleet: "Fleet") -> Table:
    table = Table(header_style="bold", pad_edge=False, box=None)
    table.add_column("queue", no_wrap=True)
    table.add_column("does", overflow="fold", min_width=16)
    table.add_column("since", no_wrap=True)
    for heading in ("waiting", "shards", "busy", "last death"):
        table.add_column(heading, justify="right", no_wrap=True)
    for queue in fleet.queues:
        busy = "" if queue.busy is None else f"{queue.busy:.0%}"
        numbers = str(queue.waiting), str(queue.shards), busy
        style = "" if queue.is_served else "yellow"
        table.add_row(
            queue.name, queue.doing, _moment(queue.since), *numbers, _moment(queue.last_death), style=style
        )
    table.caption, table.caption_justify = "shards and busy: of the last hour", "left"
    return table


def _moment(moment: datetime | None) -> str:
    """The time of day, with the date where that is another one."""
    if moment is None:
        return ""
    local = moment.astimezone()
    is_today = local.date() == datetime.now().astimezone().date()
    return f"{local:%H:%M:%S}" if is_today else f"{local:%Y-%m-%d %H:%M}"


def _clock(duration: timedelta) -> str:
    return str(timedelta(seconds=round(duration.total_seconds())))


def _table(*headings: str) -> Table:
    table = Table(header_style="bold", pad_edge=False, box=None)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    return table


def _failed(number: int) -> Text:
    return Text(str(number), style="red" if number else "")


def _print(console: Console, line: str, style: str = "") -> None:
    console.print(Text(line, style=style), soft_wrap=True)
