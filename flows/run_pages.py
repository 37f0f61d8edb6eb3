"""What the pages of a run show: its name, how far it is, its stages and queues, and what came of it."""

import base64
import contextvars
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import pyarrow.compute as pc
from prefect import get_client, runtime
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, create_table_artifact
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactUpdate
from slugify import slugify

from avatar_core.execution.batch_run import BatchRun
from avatar_core.execution.tally import counted
from avatar_core.media.contact_sheet import contact_sheet
from avatar_core.result import Result
from avatar_core.store.storage import Storage
from flows.alive import crash_lost_runs
from flows.lanes import Lanes
from flows.work import Work

log = logging.getLogger(__name__)

UPDATE_INTERVAL_S = 2.0
FAILURES_SHOWN = 500
CLIPS_SHOWN = 6

Table = list[dict[str, Any]]


class RunPages:
    """Beside the run: gives it its name, shows its progress and hears of a cancellation.

    In a thread of its own, so that a slow or absent server keeps nothing else waiting. `lanes` are shown once
    they are known.
    """

    def __init__(self, work: Work, run: BatchRun, stop: Callable[[], None]) -> None:
        self.lanes: Lanes | None = None
        self._run_id, self._name = work.record.id, work.batch.name
        self._storage = work.batch.storage
        self._run, self._stop = run, stop
        self._over = threading.Event()
        self._flow_run_id = UUID(runtime.flow_run.id)
        self._shown: dict[str, Any] = {}  # ids of artifacts, by what they show
        self._is_known_away = False
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._watch,), name="pages", daemon=True)

    def __enter__(self) -> "RunPages":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def show(self, result: Result) -> None:
        """What came of it."""
        with self._not_vital():
            show_failures(self._key("failures"), result)
        with self._not_vital():
            _show_dataset(self._key("dataset"), self._name, result, self._run)
        with self._not_vital():
            _show_clips(self._key("clips"), self._storage, self._name, result)

    def _key(self, what: str) -> str:
        """Artifact keys hold small ASCII letters, digits and dashes only."""
        return f"{slugify(self._name) or 'dataset'}-{what}"

    @contextmanager
    def _not_vital(self) -> Iterator[None]:
        """A server that is away, or a clip that cannot be shown, costs a page and not the run; said once."""
        try:
            yield
            self._is_known_away = False
        except Exception as error:
            if not self._is_known_away:
                log.warning("a page of this run is not up to date: %s", error)
            self._is_known_away = True

    def _watch(self) -> None:
        with get_client(sync_client=True) as client:
            with self._not_vital():
                crash_lost_runs()
                client.update_flow_run(self._flow_run_id, name=self._run_id)
            is_over = False
            while not is_over:
                with self._not_vital():
                    self._update(client)
                is_over = self._over.wait(UPDATE_INTERVAL_S)
            with self._not_vital():
                self._update(client, is_over=True)

    def _update(self, client: SyncPrefectClient, *, is_over: bool = False) -> None:
        state = client.read_flow_run(self._flow_run_id).state
        if state and (state.is_cancelling() or state.is_cancelled()):
            self._stop()
        self._show_progress(client, is_over=is_over)
        self._show_table(client, "stages", "items by stage", _stages(self._run))
        if self.lanes and (rows := _queues(self.lanes)):
            self._show_table(client, "queues", "what each GPU has done for this run", rows)

    def _show_progress(self, client: SyncPrefectClient, *, is_over: bool) -> None:
        percent = round(100 * self._run.progress, 1)
        about = _ending(percent) if is_over else _time_left(self._run.seconds_left)
        if "progress" not in self._shown:
            self._shown["progress"] = create_progress_artifact(percent, self._key("progress"), about)
        client.update_artifact(self._shown["progress"], ArtifactUpdate(data=percent, description=about))

    def _show_table(self, client: SyncPrefectClient, what: str, about: str, rows: Table) -> None:
        if what not in self._shown:
            self._shown[what] = create_table_artifact(rows, self._key(what), about)
        client.update_artifact(self._shown[what], ArtifactUpdate(data=json.dumps(rows)))


def _stages(run: BatchRun) -> Table:
    return [
        {
            "stage": stage,
            "items": tally.items,
            "cached": tally.cached,
            "done": tally.done,
            "failed": tally.failed,
            "not done": max(0, tally.items - tally.cached - tally.done - tally.failed),
            "seconds": round(tally.seconds, 1),
        }
        for stage, tally in list(run.tallies.items())
    ]


def _queues(lanes: Lanes) -> Table:
    return [
        {
            "queue": name,
            "shards": tally.shards,
            "items": tally.items,
            "busy": f"{tally.busy_share:.0%}",
            "deaths": tally.deaths,
            "state": state,
        }
        for name, (tally, state) in sorted(lanes.tallies.items())
    ]


def _time_left(seconds: float | None) -> str:
    if seconds is None:
        return "percent of the expected time"
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    minutes = round(seconds / 60)
    return (
        f"about {minutes // 60} h {minutes % 60:02d} min left"
        if minutes >= 60
        else f"about {minutes} min left"
    )


def _ending(percent: float) -> str:
    return "all is done" if percent >= 100 else "ended before all was done"


def show_failures(key: str, result: Result) -> None:
    """A text, since the cells of a table artifact have one line each, which cuts the reasons."""
    failures = result.failures.head(FAILURES_SHOWN)
    if not len(failures):
        return
    rows = [
        (
            failure["name"],
            str(failure["row"] + 1),  # as `avatar status` counts
            failure["failed_stage"],
            failure["error"],
            _remedy(failure),
        )
        for failure in json.loads(failures.to_json(orient="records"))
    ]
    about = f"{len(result.failures)} of {len(result.clips)} clips failed"
    more = f"; the first {FAILURES_SHOWN} are below" if len(result.failures) > FAILURES_SHOWN else ""
    text = f"{about}, listed in `{result.dataset}/failures.csv`{more}\n\n{_markdown_table(rows)}\n"
    create_markdown_artifact(text, key, about)


def _markdown_table(rows: Sequence[Sequence[str | None]]) -> str:
    headings = ("clip", "row", "stage", "reason", "what to do")
    lines = [headings, ["---"] * len(headings), *([_verbatim(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _verbatim(text: str | None) -> str:
    """Markdown that shows the text as it is, on one line."""
    return re.sub(r"([\\`*_~<>&|#\[\]])", r"\\\1", " ".join((text or "").split()))


def _remedy(failure: Mapping[str, Any]) -> str:
    if failure["failed_stage"] in ("ingest", "speech", "face"):
        return "mend the file or the row, then retry the run"
    return "change the row or the options, or retry the run as it is"


def _show_dataset(key: str, name: str, result: Result, run: BatchRun) -> None:
    finished = pc.sum(pc.equal(result.clips["status"], "ok")).as_py() or 0
    gpu_s = sum(
        tally.seconds for stage, tally in run.tallies.items() if run.batch.stages[stage].device_kind == "gpu"
    )
    size = pc.sum(result.clips["bytes"]).as_py() or 0
    text = (
        f"{finished} of {counted('clip', len(result.clips))} are in\n\n`{result.dataset}`\n\n"
        f"{size / 1e6:.1f} MB of videos; {gpu_s:.0f} GPU seconds in this run\n"
    )
    create_markdown_artifact(text, key, f"dataset {name}")


def _show_clips(key: str, storage: Storage, name: str, result: Result) -> None:
    """The first clips, as a picture within the text: the server can open no file of the store."""
    finished = result.clips.filter(pc.equal(result.clips["status"], "ok")).slice(0, CLIPS_SHOWN)
    rows = finished.select(["name", "file_name", "sha256"]).to_pylist()
    if not rows:
        return
    paths = [storage.local_path(f"datasets/{name}/{row['file_name']}", row["sha256"]) for row in rows]
    picture = base64.b64encode(contact_sheet(paths)).decode()
    names = ", ".join(row["name"] for row in rows)
    create_markdown_artifact(
        f"![the first clips](data:image/jpeg;base64,{picture})\n\n{names}\n", key, "first clips"
    )
