"""The log of a run as its server has it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter, LogFilter
from prefect.client.schemas.objects import FlowRun, Log
from prefect.client.schemas.sorting import FlowRunSort, LogSort
from rich.console import Console
from rich.text import Text

from avatar_core.errors import ConfigError
from flows.deploy import FLOW
from flows.prefect_client import prefect_client

PAGE = 200
FOLLOW_S = 2.0
_STYLES = {40: "red", 30: "yellow"}


def print_logs(console: Console, run: str, *, follow: bool) -> None:
    """Of the run, its tasks and its shards, by time. Raises `ConfigError` for an unknown run."""
    with prefect_client() as client:
        found = _find(client, run)
        said: set[UUID] = set()
        while True:
            ended = client.read_flow_run(found.id).end_time is not None
            shards = list(_shards(client, found))
            fresh = [line for line in _lines(client, [found, *shards]) if line.id not in said]
            names = _names(client, found, shards) if fresh else {}
            for line in fresh:
                said.add(line.id)
                _print(console, line, names)
            if ended or not follow:
                return
            time.sleep(FOLLOW_S)


def _find(client: SyncPrefectClient, run: str) -> FlowRun:
    """By its id, else the latest of that name. Shards have names of clips in theirs: they are no renders."""
    renders = FlowFilter.model_validate({"name": {"any_": [FLOW]}})
    for name in ({"any_": [run]}, {"like_": f"{run}-"}):
        wanted = FlowRunFilter.model_validate({"name": name})
        found = client.read_flow_runs(
            flow_filter=renders, flow_run_filter=wanted, sort=FlowRunSort.START_TIME_DESC, limit=PAGE
        )
        for each in found:
            if each.name.startswith(run):
                return each
    raise ConfigError(f"the Prefect server has no run `{run}`; `avatar status` lists those that are recorded")


def _lines(client: SyncPrefectClient, runs: Sequence[FlowRun]) -> list[Log]:
    """By time. Page after page begins with the last moment of the one before: lines that come in meanwhile
    would shift pages that are counted."""
    of_run = [run.id for run in runs]
    found: dict[UUID, Log] = {}
    for start in range(0, len(of_run), PAGE):
        wanted: dict[str, Any] = {"flow_run_id": {"any_": of_run[start : start + PAGE]}}
        while True:
            page = client.read_logs(
                log_filter=LogFilter.model_validate(wanted), limit=PAGE, sort=LogSort.TIMESTAMP_ASC
            )
            if all(line.id in found for line in page):
                break
            found |= {line.id: line for line in page}
            wanted["timestamp"] = {"after_": page[-1].timestamp}
    return sorted(found.values(), key=lambda line: (line.timestamp, line.id))


def _shards(client: SyncPrefectClient, run: FlowRun) -> Iterator[FlowRun]:
    """Flow runs on queues of GPUs carry the run's id as a tag."""
    wanted = FlowRunFilter.model_validate({"tags": {"all_": [run.name]}})
    offset = 0
    while page := client.read_flow_runs(flow_run_filter=wanted, limit=PAGE, offset=offset):
        yield from page
        offset += len(page)


def _names(client: SyncPrefectClient, run: FlowRun, shards: Sequence[FlowRun]) -> dict[UUID, str]:
    """Of tasks and shards: many lines say no more than how one of them ended."""
    names = {shard.id: f"{shard.work_queue_name}, {shard.name}" for shard in shards}
    of_run = FlowRunFilter.model_validate({"id": {"any_": [run.id]}})
    offset = 0
    while page := client.read_task_runs(flow_run_filter=of_run, limit=PAGE, offset=offset):
        names |= {task.id: task.name for task in page}
        offset += len(page)
    return names


def _print(console: Console, line: Log, names: Mapping[UUID, str]) -> None:
    stamp: datetime = line.timestamp.astimezone()
    style = next((style for level, style in _STYLES.items() if line.level >= level), "")
    of = [names[each] for each in (line.task_run_id, line.flow_run_id) if each and each in names]
    about = f"{of[0]}: " if of else ""
    console.print(Text(f"{stamp:%H:%M:%S} {about}{line.message}", style=style), soft_wrap=True)
