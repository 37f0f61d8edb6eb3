"""How servers and recorded runs are shown in a terminal."""

import os
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from avatar_core.errors import AvatarError
from avatar_core.status import RunStatus, RunSummary
from flows.alive import crash_lost_runs
from flows.database import describe_database, history_elsewhere
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

FAILURES_SHOWN = 20
FLOW_RUNS_SHOWN = 5


def print_server(console: Console, server: Server, fresh: bool, served: Record) -> None:
    lines = [
        f"the Prefect server is {'up' if fresh else 'up already'}: {server.address}",
        f"its log: {log_path()}",
        _database(server),
        *filter(None, [history_elsewhere(server.database, state_folder())]),
        f"queues of this machine: {', '.join(served.queues) or 'none'}",
        "renders run there from now on; `avatar down` stops it",
        f"for the `prefect` command: export PREFECT_API_URL={server.api_url}",
    ]
    other = os.environ.get("PREFECT_API_URL")
    if other and other != server.api_url:
        lines.append(f"not used by this shell, where PREFECT_API_URL={without_login(other)}")
    for line in lines:
        _print(console, line)


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
    for line in _flow_runs(run.id):
        _print(console, line)


def _database(server: Server) -> str:
    return describe_database(server.database, server.keep_days, state_folder())


def _flow_runs(run_id: str) -> list[str]:
    """State and page of the flow runs that carry the run's id as their name."""
    url = os.environ.get("PREFECT_API_URL")
    environment = server_environment() or ({"PREFECT_API_URL": url} if url and answers(url) else {})
    if not environment:
        return []
    os.environ.update(environment)
    try:
        load_prefect()
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
        from prefect.client.schemas.sorting import FlowRunSort
        from prefect.utilities.urls import url_for

        wanted = FlowRunFilter(name=FlowRunFilterName(any_=[run_id]))
        crash_lost_runs()
        with prefect_client() as client:
            runs = client.read_flow_runs(
                flow_run_filter=wanted, sort=FlowRunSort.START_TIME_DESC, limit=FLOW_RUNS_SHOWN
            )
    except AvatarError as error:
        return [f"its flow run is not shown: {error}"]
    return [f"flow run: {run.state_name}, {url_for(run)}" for run in runs]


def _table(*headings: str) -> Table:
    table = Table(header_style="bold", pad_edge=False, box=None)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    return table


def _failed(number: int) -> Text:
    return Text(str(number), style="red" if number else "")


def _print(console: Console, line: str, style: str = "") -> None:
    console.print(Text(line, style=style), soft_wrap=True)
