"""What became of recorded runs, read from their plans and what the store holds now. Ingests nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import pandas as pd

from avatar_core.planning.runs import (
    count_rows,
    find_run,
    list_runs,
    plan_stages,
    read_plan,
    run_name,
    stage_keys,
    started_at,
)
from avatar_core.store.catalog import Catalog, load_catalog
from avatar_core.store.storage import Storage


@dataclass(frozen=True)
class RunSummary:
    """Numbers of clips; `to_do` have neither a video nor a failure. Of a run whose clips are not known yet,
    those of its rows."""

    id: str
    name: str
    started: datetime
    clips: int
    ok: int
    failed: int
    to_do: int


@dataclass(frozen=True)
class StageStatus:
    """Numbers of items that the run's clips need together.

    `to_do` are missing and belong to a clip that is still to do. The rest is neither in the store nor
    wanted: behind a failure, or in front of a finished video.
    """

    stage: str
    items: int
    cached: int
    to_do: int
    failed: int


@dataclass(frozen=True)
class ClipFailure:
    name: str
    row: int
    stage: str
    error: str


@dataclass(frozen=True)
class RunStatus:
    """`dataset` is the folder or URI, None before anything was published there."""

    summary: RunSummary
    dataset: str | None
    stages: tuple[StageStatus, ...]
    failures: tuple[ClipFailure, ...]


def summarise_runs(storage: Storage, latest: int | None = 20) -> list[RunSummary]:
    """The recorded runs, newest first."""
    catalogs = _Catalogs(storage)
    ids = list_runs(storage)[::-1][:latest]
    return [_summary(storage, run_id, _outcomes(read_plan(storage, run_id), catalogs)) for run_id in ids]


def read_status(storage: Storage, name_or_id: str) -> RunStatus:
    """Raises `StoreError` if there is no such run."""
    run = find_run(storage, name_or_id)
    catalogs = _Catalogs(storage)
    clips = read_plan(storage, run.id)
    clips["outcome"] = _outcomes(clips, catalogs)
    published = storage.exists(f"datasets/{run.name}/metadata.parquet")
    return RunStatus(
        _summary(storage, run.id, clips["outcome"]),
        f"{storage.uri}/datasets/{run.name}" if published else None,
        tuple(_stage(stage, clips, catalogs[stage]) for stage in plan_stages(clips)),
        tuple(_failures(clips, catalogs)),
    )


class _Catalogs(dict[str, Catalog]):
    """By stage, each loaded when it is first asked for."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def __missing__(self, stage: str) -> Catalog:
        self[stage] = load_catalog(self._storage, stage)
        return self[stage]


def _outcomes(clips: pd.DataFrame, catalogs: Mapping[str, Catalog]) -> pd.Series:
    """By clip: `ok`, `to do`, or the stage that failed first."""
    stages = plan_stages(clips)
    if clips.empty:
        return pd.Series(dtype=object)
    conditions: list[Sequence[bool] | pd.Series] = [
        clips["error"].notna(),
        clips["decode_key"].isin(catalogs["decode"].ok_keys()),
    ]
    for stage in stages:
        failed = _failed_keys(clips, stage, catalogs[stage])
        conditions.append(clips.index.to_series().isin(failed.index))
    outcomes = np.select(conditions, ["ingest", "ok", *stages], "to do")
    return pd.Series(outcomes, clips.index)


def _failed_keys(clips: pd.DataFrame, stage: str, catalog: Catalog) -> pd.Series:
    """The key of the first item of a clip that failed, under the clip's label."""
    keys = stage_keys(clips, stage)
    keys = keys[keys.isin(catalog.failed_keys())]
    return keys[~keys.index.duplicated()]


def _summary(storage: Storage, run_id: str, outcomes: pd.Series) -> RunSummary:
    ok, to_do = int((outcomes == "ok").sum()), int((outcomes == "to do").sum())
    failed = len(outcomes) - ok - to_do
    if outcomes.empty:
        to_do = count_rows(storage, run_id)
    return RunSummary(run_id, run_name(run_id), started_at(run_id), ok + failed + to_do, ok, failed, to_do)


def _stage(stage: str, clips: pd.DataFrame, catalog: Catalog) -> StageStatus:
    keys = stage_keys(clips, stage)
    known, failed = keys.isin(catalog.ok_keys()), keys.isin(catalog.failed_keys())
    wanted = keys[(clips["outcome"] == "to do").loc[keys.index] & ~known]
    return StageStatus(stage, keys.nunique(), keys[known].nunique(), wanted.nunique(), keys[failed].nunique())


def _failures(clips: pd.DataFrame, catalogs: Mapping[str, Catalog]) -> list[ClipFailure]:
    failures = []
    failed = clips[~clips["outcome"].isin(["ok", "to do"])]
    keys = {stage: _failed_keys(failed, stage, catalogs[stage]) for stage in plan_stages(failed)}
    for label, clip in zip(failed.index, failed.to_dict("records"), strict=True):
        stage = clip["outcome"]
        row = catalogs[stage].failure(keys[stage][label]) if stage != "ingest" else None
        failures.append(ClipFailure(clip["name"], clip["row"], stage, row["error"] if row else clip["error"]))
    return failures
