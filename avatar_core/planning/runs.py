"""The record of each run: what was asked and which items it stands on, written before any work."""

import io
import json
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from avatar_core.config import Config, nearest, to_dict
from avatar_core.errors import StoreError
from avatar_core.media.cells import as_text
from avatar_core.media.table import TableRows
from avatar_core.planning.clip_names import slug
from avatar_core.planning.clips import Clips
from avatar_core.store.storage import Storage
from avatar_core.store.tables import put_table, stretches

_RUN_ID = re.compile(r"(?P<name>.+)-\d{8}T\d{6}Z-[0-9a-f]{4,6}")

_ROWS = pa.schema({"row": pa.int64(), "values": pa.string()})
_PLAN = pa.schema(
    {
        "name": pa.string(),
        "row": pa.int64(),
        "take": pa.int64(),
        "part": pa.int64(),
        "seed": pa.int64(),
        "error": pa.string(),
    }
)
"""The keys of each stage of the run's backend follow, in running order."""

_KEY, _WINDOWS = "_key", "_window_keys"
"""After a stage's name: the key of the clip's item, and for a chained stage those of all windows of the clip,
of which it is the last."""


@dataclass(frozen=True)
class Run:
    id: str
    name: str
    config: dict[str, Any]


class RunRecord:
    """Of a run that is under way."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self.id = run_id
        self._storage = storage
        self._has_plan = False

    def write_plan(self, clips: Clips) -> None:
        """Once all clips are known. A run that is tried again may find other files under the same names."""
        if self._has_plan:
            return
        self._has_plan = True
        schema = _plan_schema(clips)
        plan = (_plan(clips, schema, *stretch) for stretch in stretches(len(clips)))
        put_table(self._storage, f"runs/{self.id}/plan.parquet", _for_pandas(schema, seed="Int64"), plan)
        assets = pd.DataFrame({"sha256": sorted(clips.assets())}, dtype="string")
        self._storage.write_bytes(f"runs/{self.id}/assets.parquet", assets.to_parquet(index=False))


def write_run(
    storage: Storage, name: str, config: Config, backend: dict[str, Any], rows: TableRows
) -> RunRecord:
    """Record what a run is asked, before any work. `backend` has every `auto` settled, as the run uses it."""
    run_id = _new_id(name, datetime.now(UTC))
    values = {**to_dict(config), "name": name, "backend": backend}
    pieces = (_rows(rows, *stretch) for stretch in stretches(len(rows)))
    put_table(storage, f"runs/{run_id}/rows.parquet", _for_pandas(_ROWS), pieces)
    values = json.loads(json.dumps(values, default=as_text))
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    storage.write_bytes(f"runs/{run_id}/config.yaml", text.encode())
    return RunRecord(storage, run_id)


def _new_id(name: str, now: datetime) -> str:
    """Ends in the fraction of the second and chance, so that runs of the same second are in order too."""
    fraction = now.microsecond * 0x10000 // 1_000_000
    return f"{name}-{now:%Y%m%dT%H%M%SZ}-{fraction:04x}{secrets.token_hex(1)}"


def resumed_run(storage: Storage, run_id: str, rows: TableRows) -> RunRecord | None:
    """The record of a run that is tried again, None where it was asked for other rows or is not there."""
    path = f"runs/{run_id}/rows.parquet"
    if not storage.exists(path):
        return None
    recorded = pq.read_table(io.BytesIO(storage.read_bytes(path))).cast(_ROWS)
    same = recorded.num_rows == len(rows) and all(
        _rows(rows, *stretch).equals(recorded.slice(stretch[0], stretch[1] - stretch[0]))
        for stretch in stretches(len(rows))
    )
    return RunRecord(storage, run_id) if same else None


def list_runs(storage: Storage) -> list[str]:
    """Ids of the recorded runs, oldest first."""
    ids = {path.split("/")[1] for path in storage.list("runs") if path.endswith("/config.yaml")}
    return sorted(ids, key=lambda run_id: run_id.rsplit("-", 2)[1:])


def find_run(storage: Storage, name_or_id: str) -> Run:
    """The run of this id, or the latest one of this name. Raises `StoreError`."""
    ids = list_runs(storage)
    name = slug(name_or_id)
    matches = [i for i in ids if i == name_or_id] or [i for i in ids if run_name(i) == name]
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


def started_at(run_id: str) -> datetime:
    return datetime.strptime(run_id.split("-")[-2], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)


def read_plan(storage: Storage, run_id: str) -> pd.DataFrame:
    """A row per clip with the keys of its items, which `stage_keys` gives for each of its `plan_stages`; no
    row for a run that ended before its clips were known."""
    path = f"runs/{run_id}/plan.parquet"
    if not storage.exists(path):
        return pd.DataFrame(_for_pandas(_PLAN, seed="Int64").empty_table().to_pandas())
    return pd.read_parquet(io.BytesIO(storage.read_bytes(path)))


def count_rows(storage: Storage, run_id: str) -> int:
    """Of the table that a run was asked to render."""
    rows = pq.ParquetFile(io.BytesIO(storage.read_bytes(f"runs/{run_id}/rows.parquet")))
    return int(rows.metadata.num_rows)


def plan_stages(clips: pd.DataFrame) -> list[str]:
    """The stages of a plan after ingest, in running order."""
    return [column.removesuffix(_KEY) for column in map(str, clips) if column.endswith(_KEY)]


def stage_keys(clips: pd.DataFrame, stage: str) -> pd.Series:
    """The keys of the clips' items of a stage, under the clip's label: several for a clip of several windows,
    none where the row was rejected."""
    windows = f"{stage}{_WINDOWS}"
    keys: pd.Series = clips[windows].explode() if windows in clips else clips[f"{stage}{_KEY}"]
    return keys.dropna()


def read_assets(storage: Storage, run_id: str) -> set[str]:
    """SHA-256 of the pictures and recordings that a run stands on."""
    path = f"runs/{run_id}/assets.parquet"
    if not storage.exists(path):
        return set()
    return set(pd.read_parquet(io.BytesIO(storage.read_bytes(path)))["sha256"])


def _rows(rows: TableRows, start: int, stop: int) -> pa.Table:
    """The table as it was read: a JSON object of each row's columns."""
    sources = rows.column("source", start, stop)
    values = [json.dumps(dict(source), default=as_text, ensure_ascii=False) for source in sources]
    return pa.table([rows.column("index", start, stop), values], _ROWS)


def _plan_schema(clips: Clips) -> pa.Schema:
    keys = {f"{stage}{_KEY}": pa.string() for stage in clips.stages}
    windows = {f"{stage}{_WINDOWS}": pa.list_(pa.string()) for stage in _chained(clips)}
    return pa.schema([*_PLAN, *pa.schema(keys | windows)])


def _chained(clips: Clips) -> list[str]:
    return [stage for stage, items in clips.stages.items() if items.chain]


def _plan(clips: Clips, schema: pa.Schema, start: int, stop: int) -> pa.Table:
    indices = range(start, stop)
    columns = [
        [clips.name(i) for i in indices],
        clips.row_column("index", start, stop),
        clips.take[start:stop],
        clips.part[start:stop],
        [None if i in clips.rejected else int(clips.seed[i]) for i in indices],
        [clips.rejected.get(i) for i in indices],
        *(clips.hex_keys(stage, start, stop) for stage in clips.stages),
        *(clips.window_keys(stage, start, stop) for stage in _chained(clips)),
    ]
    return pa.table(columns, schema)


def _for_pandas(schema: pa.Schema, **types: str) -> pa.Schema:
    """The same with pandas' own `types`: as floats, where some are absent, seeds would not be exact."""
    frame = schema.empty_table().to_pandas().astype(types)
    return pa.Table.from_pandas(frame, schema, preserve_index=False).schema
