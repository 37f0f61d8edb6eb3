"""Care of a store: checking what a run stands on, and deleting what no run needs."""

import io
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from avatar_core.errors import StoreError
from avatar_core.planning.runs import (
    find_run,
    list_runs,
    plan_stages,
    read_assets,
    read_plan,
    run_name,
    stage_keys,
    started_at,
)
from avatar_core.store.catalog import drop, load_catalog
from avatar_core.store.gc import GcReport, gc
from avatar_core.store.storage import Storage


@dataclass(frozen=True)
class Verification:
    checked: int
    problems: tuple[str, ...]


def verify_run(storage: Storage, name_or_id: str, *, repair: bool = False) -> Verification:
    """Hash again the published videos of a run and every stored result and asset that it stands on.

    With `repair` damaged results are hidden and damaged published files deleted, so that the next run of the
    batch makes them again.
    """
    run = find_run(storage, name_or_id)
    clips = read_plan(storage, run.id)
    problems: list[str] = []
    checked = 0
    for stage, keys in [
        ("ingest", None),
        *((stage, set(stage_keys(clips, stage))) for stage in plan_stages(clips)),
    ]:
        files = _assets(storage, run.id) if keys is None else _results(storage, stage, keys)
        damaged = set()
        for path, (sha256, owners) in files.items():
            checked += 1
            problem = _check(storage, path, sha256)
            if problem:
                problems.append(problem)
                damaged |= owners
        if repair and damaged:
            drop(storage, stage, damaged, load_catalog(storage, stage))
    for path, sha256 in _published(storage, run.name):
        checked += 1
        problem = _check(storage, path, sha256)
        if problem:
            problems.append(problem)
            if repair and storage.exists(path):
                storage.delete([path])
    return Verification(checked, tuple(problems))


def collect_garbage(
    storage: Storage, *, forget: Collection[str] = (), min_age_s: float, delete: bool = False
) -> GcReport:
    """Delete, or only list, what no recorded run needs; `forget` names runs that no longer count."""
    forgotten = {find_run(storage, name).id for name in forget}
    for run_id in _without_plan(storage, set(list_runs(storage)) - forgotten):
        # What it stands on is not known: nothing goes that may be of it.
        min_age_s = max(min_age_s, (datetime.now(UTC) - started_at(run_id)).total_seconds())
    roots: dict[str, set[str]] = {}
    assets: set[str] = set()
    for run_id in list_runs(storage):
        if run_id in forgotten:
            continue
        clips = read_plan(storage, run_id)
        for stage in plan_stages(clips):
            roots.setdefault(stage, set()).update(stage_keys(clips, stage))
        assets |= read_assets(storage, run_id)
    report = gc(storage, roots, assets, min_age_s=min_age_s, dry_run=not delete)
    if delete:
        storage.delete(path for run_id in forgotten for path in storage.list(f"runs/{run_id}"))
    return report


def _without_plan(storage: Storage, run_ids: Collection[str]) -> list[str]:
    """Runs that ended before their clips were known, unless a later one of the same name got further."""
    planned = {path.split("/")[1] for path in storage.list("runs") if path.endswith("/plan.parquet")}
    latest = {run_name(run_id): started_at(run_id) for run_id in list_runs(storage) if run_id in planned}
    return [
        run_id
        for run_id in run_ids
        if run_id not in planned
        and not (run_name(run_id) in latest and latest[run_name(run_id)] > started_at(run_id))
    ]


_Files = dict[str, tuple[str, set[str]]]
"""SHA-256 and owning keys by path."""


def _assets(storage: Storage, run_id: str) -> _Files:
    wanted = read_assets(storage, run_id)
    catalog = load_catalog(storage, "ingest")
    return _files(row for row in map(catalog.get, catalog.ok_keys()) if row and row["sha256"] in wanted)


def _results(storage: Storage, stage: str, keys: set[str]) -> _Files:
    catalog = load_catalog(storage, stage)
    return _files(row for row in map(catalog.get, keys) if row)


def _files(rows: Iterator[object]) -> _Files:
    files: _Files = {}
    for row in rows:
        assert isinstance(row, dict)
        files.setdefault(row["data"], (row["sha256"], set()))[1].add(row["key"])
    return files


def _published(storage: Storage, name: str) -> Iterator[tuple[str, str]]:
    folder = f"datasets/{name}"
    if not storage.exists(f"{folder}/metadata.parquet"):
        return
    metadata = pd.read_parquet(io.BytesIO(storage.read_bytes(f"{folder}/metadata.parquet")))
    videos = metadata[metadata["status"] == "ok"]
    for file_name, sha256 in zip(videos["file_name"], videos["sha256"], strict=True):
        yield f"{folder}/{file_name}", sha256


def _check(storage: Storage, path: str, sha256: str) -> str | None:
    """What is wrong with a stored file, read from the store itself and not from this machine's cache."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            storage.copy_out(path, Path(folder) / "file", sha256)
    except StoreError as error:
        return str(error)
    return None
