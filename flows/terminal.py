"""What a run looks like: live bars in a terminal, plain lines elsewhere."""

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from avatar_core.origins import replacement
from avatar_core.planning.batch import Batch
from avatar_core.planning.estimate import Estimate
from avatar_core.planning.plan import Outlook
from avatar_core.progress import Observer, StepClock
from avatar_core.result import Result

ROWS_SHOWN = 40
REASONS_SHOWN = 10
STEPS_TOLD_S = 30.0


class View(Observer, Protocol):
    """An observer that is shown for as long as a run lasts."""

    def __enter__(self) -> "View": ...

    def __exit__(self, *error: object) -> None: ...


def create_view(console: Console) -> View:
    return LiveView(console) if console.is_terminal else PlainView(console)


class PlainView:
    """One line per stage, failure and warning; a count every ten per cent of a long stage, and now and then
    how far a long clip is."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._done: Counter[str] = Counter()
        self._to_do: dict[str, int] = {}
        self._said: dict[str, str] = {}
        self._clock = StepClock()
        self._told_s = time.monotonic()

    def __enter__(self) -> "PlainView":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def stage_started(self, stage: str, *, items: int, cached: int, to_do: int) -> None:
        self._to_do[stage] = to_do
        text = f"{stage}: {to_do} to do, {cached} of {items} cached"
        if self._said.get(stage) != text:
            self._said[stage] = text
            self._line(text)

    def stage_grew(self, stage: str, *, items: int, cached: int, to_do: int) -> None:
        self._to_do[stage] = to_do  # told once all is known

    def item_progress(self, stage: str, key: str, done: int, total: int) -> None:
        text = self._clock.text(key, done, total)
        if text and stage == "denoise" and time.monotonic() - self._told_s >= STEPS_TOLD_S:
            self._told_s = time.monotonic()
            self._line(f"{stage}: {text}")

    def item_ended(self, stage: str, row: dict[str, Any]) -> None:
        self._clock.end(row["key"])
        self._done[stage] += 1
        done, to_do = self._done[stage], self._to_do[stage]
        if row["status"] == "failed":
            self._line(f"{stage}: failed: {row['error']}")
        if to_do >= 20 and done * 10 // to_do > (done - 1) * 10 // to_do:
            self._line(f"{stage}: {done} of {to_do}")

    def clip_published(self, name: str, path: str) -> None:
        pass

    def warning(self, message: str) -> None:
        self._line(f"warning: {message}")

    def _line(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)


class RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed or not task.fields["to_do"]:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{speed * 60:.1f}/min")


class LiveView:
    """A bar per stage with its failures and the time left; what needs reading scrolls above."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            RateColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._failed: Counter[str] = Counter()
        self._whole: Counter[str] = Counter()
        self._cached: dict[str, int] = {}
        self._clock = StepClock()

    def __enter__(self) -> "LiveView":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def stage_started(self, stage: str, *, items: int, cached: int, to_do: int) -> None:
        self._cached[stage] = cached
        if stage not in self._tasks:
            self._tasks[stage] = self.progress.add_task(stage, note="", to_do=to_do)
        if to_do:
            self.progress.update(self._tasks[stage], total=to_do, to_do=to_do)
            self._show(stage, 0.0)
        else:
            self.progress.update(self._tasks[stage], completed=items, total=items, note="all cached")

    stage_grew = stage_started

    def item_progress(self, stage: str, key: str, done: int, total: int) -> None:
        text = self._clock.text(key, done, total)
        self._show(stage, min(done / max(total, 1), 0.99), text if stage == "denoise" else "")

    def item_ended(self, stage: str, row: dict[str, Any]) -> None:
        self._clock.end(row["key"])
        self._whole[stage] += 1
        if row["status"] == "failed":
            self._failed[stage] += 1
            self.progress.console.print(Text(f"{stage}: failed: {row['error']}", style="red"), soft_wrap=True)
        self._show(stage, 0.0)

    def clip_published(self, name: str, path: str) -> None:
        pass

    def warning(self, message: str) -> None:
        self.progress.console.print(Text(f"warning: {message}", style="yellow"), soft_wrap=True)

    def _show(self, stage: str, fraction: float, now: str = "") -> None:
        notes = [now] if now else []
        if self._cached[stage]:
            notes.append(f"{self._cached[stage]} cached")
        if self._failed[stage]:
            notes.append(f"[red]{self._failed[stage]} failed[/]")
        completed = self._whole[stage] + fraction
        self.progress.update(self._tasks[stage], completed=completed, note=", ".join(notes))


def print_result(console: Console, result: Result) -> None:
    table = Table(title=None, header_style="bold", pad_edge=False, box=None)
    for heading in ("clip", "status", "length", "size", "file or reason"):
        table.add_column(heading, overflow="fold")
    order = pc.sort_indices(result.clips, [("status", "ascending"), ("row", "ascending")])  # failures first
    shown = [result.clips.slice(position, 1) for position in order[:ROWS_SHOWN].to_pylist()]
    for row in pa.concat_tables(shown).to_pylist():
        if row["status"] == "to do":
            cells = ["", "", "left for another run"]
        elif row["status"] == "ok":
            cells = [f"{row['duration_s']:.2f} s", f"{row['width']}x{row['height']}", row["file_name"]]
        else:
            cells = ["", "", f"{row['failed_stage']}: {row['error']}"]
        status = Text(row["status"], style="green" if row["status"] == "ok" else "red")
        table.add_row(Text(row["name"]), status, *map(Text, cells))
    console.print(table)
    total = len(result.clips)
    if total > ROWS_SHOWN:
        console.print(f"... and {total - ROWS_SHOWN} more in metadata.parquet")
    done = pc.sum(pc.equal(result.clips["status"], "ok")).as_py() or 0
    console.print(Text(f"{done} of {total} clips in {result.dataset}"), soft_wrap=True)


def print_plan(console: Console, batch: Batch, forecast: Mapping[str, Estimate]) -> None:
    """Of the items, `skipped` are those that no clip to do needs: behind a failure, in front of a video."""
    plan, outlook = batch.plan(), batch.outlook()
    table = Table(header_style="bold", pad_edge=False, box=None)
    for heading in ("stage", "items", "cached", "to do", "failed", "skipped", "time", "size"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage, stage_plan in plan.items():
        to_do = len(stage_plan.to_do)
        skipped = stage_plan.items - stage_plan.cached - to_do - stage_plan.failed
        numbers = (stage_plan.items, stage_plan.cached, to_do)
        failed = f"[red]{stage_plan.failed}[/]" if stage_plan.failed else ""
        cells = [*map(str, numbers), failed, str(skipped) if skipped else ""]
        if to_do:
            expected = forecast[stage]
            cells.append("unknown" if expected.seconds is None else f"{expected.seconds:.1f} s")
            cells.append("" if expected.bytes is None else f"{expected.bytes / 1e6:.1f} MB")
        table.add_row(stage, *cells)
    console.print(table)
    _print_reasons(console, outlook)
    _print_rejected(console, batch)
    if found := replacement(batch):
        _print(console, f"{'warning' if found.allowed else 'error'}: {found.message}", "red")
    seconds = [forecast[stage].seconds for stage, p in plan.items() if p.to_do]
    total = "unknown" if None in seconds else f"{sum(s for s in seconds if s is not None):.0f} s"
    _print(console, f"{outlook.done} clips done, {outlook.to_do} to do, {outlook.failed} failed before")
    rejected = len(batch.clips.rejected)
    _print(console, f"{len(batch.clips)} clips, {rejected} rejected; estimated time: {total}")


def _print_reasons(console: Console, outlook: Outlook) -> None:
    """What keeps clips from being tried: the most common reasons."""
    if not outlook.failed:
        return
    _print(console, f"{outlook.failed} clips failed and are left out; retry_failed=true tries them again:")
    for (stage, error), count in outlook.reasons.most_common(REASONS_SHOWN):
        _print(console, f"{count} x {stage}: {error}", "red")
    if len(outlook.reasons) > REASONS_SHOWN:
        _print(console, f"... and {len(outlook.reasons) - REASONS_SHOWN} more reasons")


def _print_rejected(console: Console, batch: Batch) -> None:
    rejected = list(batch.clips.rejected)
    for clip in map(batch.clips.__getitem__, rejected[:ROWS_SHOWN]):
        _print(console, f"rejected {clip.name} (row {clip.row.index + 1}): {clip.error}", "red")
    if len(rejected) > ROWS_SHOWN:
        _print(console, f"... and {len(rejected) - ROWS_SHOWN} more rejected rows")


def _print(console: Console, line: str, style: str = "") -> None:
    console.print(Text(line, style=style), soft_wrap=True)
