"""The whole way from a table to a dataset, in one process: the file to read first.

    from avatar_core.pipeline import render
    result = render({"table": "batch.csv"})

`render` reads the rows, ingests what they name, works out which items are missing, runs them stage by
stage and publishes the dataset. Finished work is found by its content and never done again.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow.compute as pc

from avatar_core.backends.base import Backend, create_backend
from avatar_core.clips import STAGES, ClipBuilder, Clips, Source, clip_names, slug
from avatar_core.config import Config, nearest, parse
from avatar_core.errors import ConfigError, InputError, StoreError
from avatar_core.media.source import stat_source
from avatar_core.media.table import TableRow, parse_rows, read_table, resolve_uri
from avatar_core.plan import StagePlan, make_plan, shards
from avatar_core.progress import Observer, Silent
from avatar_core.publish import Published, publish
from avatar_core.run import run_shard
from avatar_core.runs import find_run, read_plan, write_run
from avatar_core.stages.base import Asset, ItemSpec, Stage
from avatar_core.stages.ingest import IngestStage, ingest_config, source_policy
from avatar_core.stages.registry import create_stages
from avatar_core.store.attempts import compact
from avatar_core.store.catalog import Catalog, drop, load_catalog
from avatar_core.store.keys import config_values, digest, item_key, new_id
from avatar_core.store.storage import Storage

MAX_PASSES = 3
"""How often damaged results are computed again before the store itself must be at fault."""

GUESSED_SECONDS = {
    "ingest": 0.05,
    "face": 0.3,
    "audio": 0.05,
    "reference": 0.3,
    "denoise": 0.01,
    "decode": 0.5,
}
"""Seconds per unit of work where this store has measured none: only sizes shards, never shown."""


@dataclass(frozen=True)
class Result:
    """`dataset` is the folder or URI; `failures` are the rows of `metadata` that have no video."""

    dataset: str
    metadata: pd.DataFrame
    failures: pd.DataFrame
    run_id: str

    @property
    def failed_fraction(self) -> float:
        return len(self.failures) / max(1, len(self.metadata))


@dataclass
class StageResults:
    """Manifest rows of one stage: what the store held at the start and what this run added."""

    catalog: Catalog
    fresh: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def has(self, key: str) -> bool:
        row = self.fresh.get(key)
        return row["status"] == "ok" if row is not None else key in self.catalog

    def ok(self, key: str) -> Mapping[str, Any] | None:
        row = self.fresh.get(key)
        if row is not None:
            return row if row["status"] == "ok" else None
        return self.catalog.get(key)

    def failure(self, key: str) -> Mapping[str, Any] | None:
        row = self.fresh.get(key)
        if row is not None:
            return row if row["status"] == "failed" else None
        return self.catalog.failure(key)

    def add(self, row: Mapping[str, Any]) -> None:
        self.fresh[row["key"]] = row


@dataclass
class Batch:
    """A table after ingest: its clips and what is known of their items."""

    config: Config
    name: str
    storage: Storage
    backend: Backend
    stages: dict[str, Stage]
    clips: Clips
    results: dict[str, StageResults]

    def plan(self) -> dict[str, StagePlan]:
        return make_plan(self.clips, self.results, retry_failed=self.config.retry_failed)


def render(
    config: Config | Mapping[str, Any],
    observer: Observer | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Result:
    """Render a batch and publish its dataset. Bad rows are in `Result.failures`; the rest goes on.

    Raises `ConfigError` or `InputError` where the batch as a whole cannot be read, `StoreError` where
    results cannot be kept, `Cancelled` soon after `cancelled()` turns true.
    """
    observer = observer or Silent()
    batch = open_batch(config, observer, cancelled)
    backend = {"name": batch.backend.name, **dataclasses.asdict(batch.backend.config)}
    run_id = write_run(batch.storage, batch.name, batch.config, backend, batch.clips)
    run_batch(batch, observer, cancelled)
    published = publish_batch(batch, run_id, observer)
    for stage in batch.stages:
        compact(batch.storage, stage)
    return Result(published.uri, published.metadata, published.failures, run_id)


def open_batch(
    config: Config | Mapping[str, Any],
    observer: Observer | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Batch:
    """Read the table and ingest its pictures and recordings; all keys follow from that."""
    config = config if isinstance(config, Config) else parse(Config, config)
    observer = observer or Silent()
    backend = create_backend(config.backend).resolve()
    rows = read_rows(config)
    names, warnings = clip_names(rows)
    for warning in warnings:
        observer.warning(warning)
    selected = select(rows, names, config)
    storage = open_storage(config)
    stages = create_stages(backend)
    results = {stage: StageResults(load_catalog(storage, stage)) for stage in stages}
    sources = ingest(storage, [row for row, _ in selected], config, results["ingest"], observer, cancelled)
    builder = ClipBuilder(config, backend, stages, sources)
    clips = Clips(builder, [row for row, _ in selected], [name for _, name in selected])
    batch = Batch(config, batch_name(config), storage, backend, stages, clips, results)
    _drop_lost_videos(batch)
    return batch


def run_batch(batch: Batch, observer: Observer, cancelled: Callable[[], bool] = lambda: False) -> None:
    """Run every missing item, stage by stage. Results found damaged on the way are computed again."""
    for _ in range(MAX_PASSES):
        damaged: list[str] = []
        for stage, stage_plan in batch.plan().items():
            observer.stage_started(
                stage, items=stage_plan.items, cached=stage_plan.cached, to_do=len(stage_plan.to_do)
            )
            damaged += _run_stage(batch, stage, stage_plan.to_do, observer, cancelled)
        if not damaged:
            return
        observer.warning(
            f"{len(set(damaged))} stored result(s) were damaged or missing: computing them again"
        )
        _forget(batch, damaged)
    raise StoreError(
        f"results in {batch.storage.uri} are damaged again after being recomputed {MAX_PASSES} times; "
        "check the disk or bucket"
    )


def publish_batch(batch: Batch, run_id: str, observer: Observer) -> Published:
    return publish(
        batch.storage,
        batch.name,
        batch.clips,
        batch.results,
        backend=batch.backend.name,
        complete=not (batch.config.limit or batch.config.only),
        table=batch.config.table,
        run_id=run_id,
        observer=observer,
    )


@dataclass(frozen=True)
class Estimate:
    """Forecast of what is left to do; None where this store has measured nothing yet."""

    seconds: float | None
    bytes: float | None


def estimate(batch: Batch) -> dict[str, Estimate]:
    """By stage, from the rates of everything that the store holds."""
    forecast = {}
    for stage, stage_plan in batch.plan().items():
        work = sum(spec.work for spec in stage_plan.to_do)
        catalog = batch.results[stage].catalog
        rates = [measured_rate(catalog, column) for column in ("seconds", "bytes")]
        forecast[stage] = Estimate(*(rate if rate is None else rate * work for rate in rates))
    return forecast


def measured_rate(catalog: Catalog, column: str) -> float | None:
    """Mean of `column` per unit of work over the finished items."""
    if column not in catalog.table.column_names:
        return None
    finished = catalog.table.filter(pc.equal(catalog.table["status"], "ok"))
    work, total = pc.sum(finished["work"]).as_py(), pc.sum(finished[column]).as_py()
    return total / work if work and total is not None else None


def rerun(
    config: Config,
    run: str,
    *,
    stage: str | None = None,
    only_failed: bool = False,
    observer: Observer | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Result:
    """Run a recorded batch again, trying its failed items anew.

    With `stage` that stage and all after it are computed again for every clip, or with `only_failed` for
    those that failed. `config` says where the store is; the rest comes from the record.
    """
    storage = open_storage(config)
    recorded = find_run(storage, run)
    values = {**recorded.config, "storage": config.storage, "runtime": config.runtime, "retry_failed": True}
    if stage is not None:
        if stage not in STAGES:
            raise ConfigError(
                f"unknown stage `{stage}`; choose one of: {', '.join(STAGES)}{nearest(stage, STAGES)}"
            )
        _drop_stages(storage, recorded.id, STAGES[STAGES.index(stage) :], only_failed)
    return render(parse(Config, values), observer, cancelled)


def _drop_stages(storage: Storage, run_id: str, stages: Sequence[str], only_failed: bool) -> None:
    clips = read_plan(storage, run_id)
    if only_failed:
        finished = load_catalog(storage, "decode").ok_keys()
        clips = clips[~clips["decode_key"].isin(finished)]
    for stage in stages:
        drop(storage, stage, set(clips[f"{stage}_key"].dropna()), load_catalog(storage, stage))


def open_storage(config: Config) -> Storage:
    cache_dir = Path(config.runtime.cache_dir).expanduser() if config.runtime.cache_dir else None
    return Storage(config.storage.root, config.storage.options, cache_dir, config.runtime.cache_bytes)


def batch_name(config: Config) -> str:
    """The dataset's name: `config.name`, else the stem of the table."""
    if config.name:
        return slug(config.name)
    return slug(Path(config.table).stem) if config.table else "clips"


def read_rows(config: Config) -> list[TableRow]:
    """The rows of the batch, with pictures and recordings as paths or URIs that hold from anywhere."""
    if config.table:
        remote = "://" in config.table
        table = config.table if remote else str(Path(config.table).resolve())
        rows = read_table(table, storage_options=config.storage.options if remote else None)
    elif config.rows:
        table = str(Path.cwd() / "rows")
        rows = parse_rows(config.rows)
    else:
        raise ConfigError("nothing to render: give a table (`table=batch.csv`) or `rows`")
    return [
        dataclasses.replace(
            row,
            image=resolve_uri(row.image, table),
            audio=resolve_uri(row.audio, table),
            audio_2=resolve_uri(row.audio_2, table) if row.audio_2 else None,
        )
        for row in rows
    ]


def select(rows: Sequence[TableRow], names: Sequence[str], config: Config) -> list[tuple[TableRow, str]]:
    """The rows that `only` and `limit` leave, with their names. Raises `ConfigError` for an unknown name."""
    pairs = list(zip(rows, names, strict=True))
    if config.only:
        known = set(names) | {row.name for row in rows if row.name}
        for wanted in config.only:
            if wanted not in known:
                raise ConfigError(f"no row is called `{wanted}`{nearest(wanted, sorted(known))}")
        pairs = [(row, name) for row, name in pairs if name in config.only or row.name in config.only]
    return pairs[: config.limit]


def ingest(
    storage: Storage,
    rows: Iterable[TableRow],
    config: Config,
    results: StageResults,
    observer: Observer,
    cancelled: Callable[[], bool],
) -> dict[str, Source]:
    """Every picture and recording of the rows, by `<column>:<uri>`, taken into the store once."""
    kinds: dict[str, tuple[Literal["image", "audio"], str]] = {}
    for row in rows:
        if not row.error:
            kinds[f"image:{row.image}"] = ("image", row.image)
            kinds |= {f"audio:{uri}": ("audio", uri) for uri in (row.audio, row.audio_2) if uri}
    sources: dict[str, Source] = {}
    specs: dict[str, ItemSpec] = {}
    for name, (kind, uri) in kinds.items():
        try:
            specs[name] = _ingest_item(kind, uri, config)
        except InputError as error:
            sources[name] = Source(error=str(error))
    # A failed ingest may pass when the file was mended in place, so only successes are reused.
    missing = {spec.key: spec for spec in specs.values() if not results.has(spec.key)}
    observer.stage_started("ingest", items=len(kinds), cached=len(specs) - len(missing), to_do=len(missing))
    stage = IngestStage()
    for shard in shards(list(missing.values()), GUESSED_SECONDS["ingest"], config.runtime.shard_seconds):
        run_shard(
            storage, stage, shard, {}, cancelled=cancelled, on_row=_recorder(stage.name, results, observer)
        )
    return sources | {name: _source(spec.key, results) for name, spec in specs.items()}


def _ingest_item(kind: Literal["image", "audio"], uri: str, config: Config) -> ItemSpec:
    settings = ingest_config(kind, config)
    stat = stat_source(uri, source_policy(settings))
    # A server that tells no version may serve another file next time: such a source is read every time.
    identity = [stat.uri, str(stat.size), stat.version or new_id()]
    key = item_key(
        IngestStage.name, IngestStage.version, digest(config_values(settings)), "", {"source": identity}
    )
    return ItemSpec(key, settings, source=uri)


def _source(key: str, results: StageResults) -> Source:
    row = results.ok(key)
    if row is not None:
        return Source(Asset(key, row["sha256"], row["data"]), row)
    failure = results.failure(key)
    assert failure is not None
    return Source(error=failure["error"])


def _run_stage(
    batch: Batch,
    name: str,
    items: Sequence[ItemSpec],
    observer: Observer,
    cancelled: Callable[[], bool],
) -> list[str]:
    """Run a stage's items and return the owners (`<stage>:<key>`) of inputs found damaged."""
    damaged: list[str] = []
    ready = [
        spec
        for spec in items
        if all(batch.results[stage].has(key) for stage, keys in spec.inputs.items() for key in keys)
    ]
    seconds = measured_rate(batch.results[name].catalog, "seconds") or GUESSED_SECONDS[name]
    for shard in shards(ready, seconds, batch.config.runtime.shard_seconds):
        try:
            run_shard(
                batch.storage,
                batch.stages[name],
                shard,
                _inputs(batch, shard),
                cancelled=cancelled,
                on_progress=lambda key, done, total: observer.item_progress(name, key, done, total),
                on_row=_recorder(name, batch.results[name], observer),
            )
        except StoreError as error:
            if not error.keys:
                raise
            damaged += error.keys
    return damaged


def _inputs(batch: Batch, shard: Sequence[ItemSpec]) -> dict[str, dict[str, Mapping[str, Any]]]:
    rows: dict[str, dict[str, Mapping[str, Any]]] = {}
    for spec in shard:
        for stage, keys in spec.inputs.items():
            for key in keys:
                row = batch.results[stage].ok(key)
                assert row is not None
                rows.setdefault(stage, {})[key] = row
    return rows


def _recorder(stage: str, results: StageResults, observer: Observer) -> Callable[[dict[str, Any]], None]:
    def record(row: dict[str, Any]) -> None:
        results.add(row)
        observer.item_ended(stage, row)

    return record


def _forget(batch: Batch, owners: Iterable[str]) -> None:
    """Hide damaged results, so that the next pass computes them again."""
    by_stage: dict[str, set[str]] = {}
    for owner in owners:
        stage, _, key = owner.partition(":")
        by_stage.setdefault(stage, set()).add(key)
    for stage, keys in by_stage.items():
        catalog = load_catalog(batch.storage, stage)
        drop(batch.storage, stage, keys, catalog)
        batch.results[stage] = StageResults(load_catalog(batch.storage, stage))


def _drop_lost_videos(batch: Batch) -> None:
    """A finished video that is gone, or has another size, is rendered again."""
    results = batch.results["decode"]
    clips = batch.clips
    keys = (clips.key("decode", i) for i in range(len(clips)) if i not in clips.rejected)
    finished = list(dict.fromkeys(key for key in keys if results.has(key)))
    if not finished:
        return
    kept = batch.storage.list("stages/decode/data")
    rows = results.catalog.select(finished).select(["key", "data", "bytes"]).to_pydict()
    lost = [
        key
        for key, path, size in zip(*rows.values(), strict=True)
        if path not in kept or kept[path].size != size
    ]
    if lost:
        _forget(batch, [f"decode:{key}" for key in lost])
