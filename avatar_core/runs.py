"""The record of each run: what was asked and which items it stands on, written before any work."""

import io
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pandas as pd
import yaml

from avatar_core.clips import Clip
from avatar_core.config import Config, nearest, to_dict
from avatar_core.errors import StoreError
from avatar_core.plan import STAGES
from avatar_core.store.storage import Storage

_RUN_ID = re.compile(r"(?P<name>.+)-\d{8}T\d{6}Z-[0-9a-f]{4}")


@dataclass(frozen=True)
class Run:
    id: str
    name: str
    config: dict[str, Any]


def write_run(
    storage: Storage, name: str, config: Config, backend: dict[str, Any], clips: Sequence[Clip]
) -> str:
    """Record a run and return its id. `backend` has every `auto` settled, as the run uses it."""
    run_id = f"{name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
    values = {**to_dict(config), "name": name, "backend": backend}
    storage.write_bytes(f"runs/{run_id}/rows.parquet", _parquet(_rows(clips)))
    storage.write_bytes(f"runs/{run_id}/plan.parquet", _parquet(_plan(clips)))
    text = yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False, allow_unicode=True)
    storage.write_bytes(f"runs/{run_id}/config.yaml", text.encode())
    return run_id


def list_runs(storage: Storage) -> list[str]:
    """Ids of the recorded runs, oldest first."""
    ids = {path.split("/")[1] for path in storage.list("runs") if path.endswith("/config.yaml")}
    return sorted(ids, key=lambda run_id: run_id.rsplit("-", 2)[1:])


def find_run(storage: Storage, name_or_id: str) -> Run:
    """The run of this id, or the latest one of this name. Raises `StoreError`."""
    ids = list_runs(storage)
    matches = [i for i in ids if i == name_or_id] or [i for i in ids if run_name(i) == name_or_id]
    if not matches:
        names = sorted({run_name(i) for i in ids})
        known = ", ".join(names[:10]) or "none yet"
        raise StoreError(
            f"no run `{name_or_id}` in {storage.uri}; known: {known}{nearest(name_or_id, names)}"
        )
    config = yaml.safe_load(storage.read_bytes(f"runs/{matches[-1]}/config.yaml"))
    return Run(matches[-1], run_name(matches[-1]), config)


def run_name(run_id: str) -> str:
    match = _RUN_ID.fullmatch(run_id)
    return match["name"] if match else run_id


def read_plan(storage: Storage, run_id: str) -> pd.DataFrame:
    """A row per clip with the key of each of its items and the hashes of its assets."""
    return pd.read_parquet(io.BytesIO(storage.read_bytes(f"runs/{run_id}/plan.parquet")))


def _rows(clips: Sequence[Clip]) -> pd.DataFrame:
    rows = {clip.row.index: clip.row for clip in clips}
    return pd.DataFrame(
        {
            "row": list(rows),
            "values": [
                json.dumps(dict(row.source), default=str, ensure_ascii=False) for row in rows.values()
            ],
        }
    )


def _plan(clips: Sequence[Clip]) -> pd.DataFrame:
    columns: dict[str, list[Any]] = {
        "name": [clip.name for clip in clips],
        "row": [clip.row.index for clip in clips],
        "take": [clip.take for clip in clips],
        "part": [clip.part for clip in clips],
        "seed": [clip.seed for clip in clips],
        "error": [clip.error for clip in clips],
    }
    for stage in STAGES:
        columns[f"{stage}_key"] = [clip.items[stage].key if stage in clip.items else None for clip in clips]
    columns["assets"] = [
        sorted({a.sha256 for assets in clip.items["decode"].assets.values() for a in assets})
        if clip.items
        else []
        for clip in clips
    ]
    return pd.DataFrame(columns).astype({"seed": "Int64"})


def _parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()
