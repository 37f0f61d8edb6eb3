"""A configuration becomes a batch: its rows, what they name or say taken into the store, and its clips."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from avatar_core.backends.base import Backend, create_backend
from avatar_core.config import Config, nearest, parse
from avatar_core.errors import ConfigError, InputError
from avatar_core.execution.shard import run_shard
from avatar_core.media.cells import plain
from avatar_core.media.documents import SILENCE
from avatar_core.media.row_sources import Speech, speeches_of
from avatar_core.media.source import stat_source
from avatar_core.media.table import PATHS, TableRows, is_absent, parse_rows, read_table, resolve_uri
from avatar_core.planning.clip import Source
from avatar_core.planning.clip_builder import ClipBuilder
from avatar_core.planning.clip_names import clip_names, slug
from avatar_core.planning.clips import Clips
from avatar_core.planning.plan import Outlook, StagePlan, make_plan, outlook, shards
from avatar_core.planning.stages import create_stages
from avatar_core.progress import Observer, Silent
from avatar_core.stages.base import Asset, ItemSpec, Stage
from avatar_core.stages.ingest import IngestStage, Kind, ingest_config, source_policy
from avatar_core.stages.speech import SpeechStage, prepare, speech_item
from avatar_core.store.catalog import OK, drop, load_catalog
from avatar_core.store.keys import config_values, digest, item_key, new_id
from avatar_core.store.results import StageResults
from avatar_core.store.sharing import share_work
from avatar_core.store.storage import Storage
from avatar_core.store.tables import stretches

INGEST_SECONDS, SPEECH_SECONDS = 0.05, 5.0
"""Guesses per file and text: only size shards."""


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

    def outlook(self) -> Outlook:
        return outlook(self.clips, self.results, retry_failed=self.config.retry_failed)


def open_batch(
    config: Config | Mapping[str, Any],
    observer: Observer | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Batch:
    """Read the table and ingest its pictures and recordings; all keys follow from that."""
    pa.set_memory_pool(pa.system_memory_pool())  # the others keep what they were given back
    config = located(config if isinstance(config, Config) else parse(Config, config))
    observer = observer or Silent()
    backend = create_backend(config.backend).resolve()
    rows = read_rows(config)
    names, warnings = clip_names(rows, numbered=config.takes > 1 or config.audio.max_duration_s is not None)
    for warning in warnings:
        observer.warning(warning)
    rows, names = select(rows, names, config)
    storage = open_storage(config)
    stages = create_stages(backend)
    results = {stage: StageResults(load_catalog(storage, stage)) for stage in stages}
    sources = take_in(storage, rows, config, results["ingest"], observer, cancelled)
    clips = Clips(ClipBuilder(config, backend, sources), rows, names)
    batch = Batch(config, batch_name(config), storage, backend, stages, clips, results)
    _drop_lost_videos(batch)
    return batch


def take_in_again(batch: Batch, observer: Observer, cancelled: Callable[[], bool]) -> None:
    """Ingest what is missing of the batch once more; the clips follow from what the sources hold now."""
    rows = batch.clips.rows
    sources = take_in(batch.storage, rows, batch.config, batch.results["ingest"], observer, cancelled)
    builder = ClipBuilder(batch.config, batch.backend, sources)
    batch.clips = Clips(builder, rows, batch.clips.names)


def forget(batch: Batch, owners: Iterable[str]) -> None:
    """Hide damaged results (`<stage>:<key>`), so that they are computed again."""
    by_stage: dict[str, set[str]] = {}
    for owner in owners:
        stage, _, key = owner.partition(":")
        by_stage.setdefault(stage, set()).add(key)
    for stage, keys in by_stage.items():
        drop(batch.storage, stage, keys, load_catalog(batch.storage, stage))
        batch.results[stage] = StageResults(load_catalog(batch.storage, stage))


def open_storage(config: Config) -> Storage:
    cache_dir = Path(config.runtime.cache_dir).expanduser() if config.runtime.cache_dir else None
    return Storage(config.storage.root, config.storage.options, cache_dir, config.runtime.cache_bytes)


def batch_name(config: Config) -> str:
    """The dataset's name: `config.name`, else the stem of the table, or the name of a single row's clip."""
    if config.name:
        return slug(config.name)
    if config.table:
        return slug(Path(config.table).stem)
    return clip_names(parse_rows(config.rows))[0][0] if len(config.rows) == 1 else "clips"


def located(config: Config) -> Config:
    """The same batch with absolute paths, so that its record holds from any folder."""
    here = str(Path.cwd() / "rows")
    if config.table and "://" not in config.table:
        config = dataclasses.replace(config, table=str(Path(config.table).expanduser().resolve()))
    rows = tuple({name: _located(name, value, here) for name, value in row.items()} for row in config.rows)
    return dataclasses.replace(config, rows=rows)


def _located(name: str, value: Any, here: str) -> Any:
    cell = plain(value)
    is_path = name.lower() in PATHS and isinstance(cell, str) and not is_absent(cell)
    return resolve_uri(cell.strip(), here) if is_path else cell


def read_rows(config: Config) -> TableRows:
    """The rows of the batch, with pictures and recordings as paths or URIs that hold from anywhere."""
    if config.table:
        table, remote = config.table, "://" in config.table
        options = config.storage.options if remote else None
        return read_table(table, storage_options=options, base=table)
    if config.rows:
        return parse_rows(config.rows, base=str(Path.cwd() / "rows"))
    raise ConfigError("nothing to render: give a table (`table=batch.csv`) or `rows`")


def select(rows: TableRows, names: list[str], config: Config) -> tuple[TableRows, list[str]]:
    """The rows that `only` and `limit` leave, with their names. Raises `ConfigError` for an unknown name."""
    if not config.only and config.limit is None:
        return rows, names
    chosen: Sequence[int] = range(len(rows))
    if config.only:
        given = rows.column("name")
        known = {*names, *filter(None, given)}
        for wanted in config.only:
            if wanted not in known:
                raise ConfigError(f"no row is called `{wanted}`{nearest(wanted, sorted(known))}")
        chosen = [i for i in chosen if names[i] in config.only or given[i] in config.only]
    chosen = chosen[: config.limit]
    return rows.chosen(chosen), [names[i] for i in chosen]


def take_in(
    storage: Storage,
    rows: TableRows,
    config: Config,
    results: StageResults,
    observer: Observer,
    cancelled: Callable[[], bool],
) -> dict[str, Source]:
    """All that the clips of the rows stand on, by the name of its source: what the table points to, and its
    texts as recordings. Raises `ConfigError` or `WeightsError` first of all, where nobody can speak."""
    texts = speeches_of(rows)
    if texts:
        prepare(config, sorted({voice for voices in texts.values() for voice in voices[1]}))
    sources = ingest(storage, rows, config, results, observer, cancelled)
    return sources | speak(storage, texts, config, results, observer, cancelled)


def ingest(
    storage: Storage,
    rows: TableRows,
    config: Config,
    results: StageResults,
    observer: Observer,
    cancelled: Callable[[], bool],
) -> dict[str, Source]:
    """Every picture, video and recording of the rows, by `<column>:<uri>`, taken into the store once."""
    kinds: dict[str, tuple[Kind, str]] = {}
    for image, video, audio, audio_2, error in rows.columns("image", "video", "audio", "audio_2", "error"):
        if not error:
            kinds |= {f"image:{image}": ("image", image)} if image else {f"video:{video}": ("video", video)}
            kinds |= {f"audio:{uri}": _recording(uri) for uri in (audio, audio_2) if uri}
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
    _run_missing(
        storage, IngestStage(), "ingest", missing, INGEST_SECONDS, config, results, observer, cancelled
    )
    sources |= {name: _source(spec.key, results) for name, spec in specs.items()}
    for name, source in sources.items():
        if warning := source.columns.get("warning"):
            observer.warning(f"{name.replace(':', ' ', 1)}: {warning}")
    return sources


def speak(
    storage: Storage,
    texts: Mapping[str, Speech],
    config: Config,
    results: StageResults,
    observer: Observer,
    cancelled: Callable[[], bool],
) -> dict[str, Source]:
    """Every text of the rows as recordings, by the name of their source: said once for all rows."""
    sources: dict[str, Source] = {}
    specs: dict[str, ItemSpec] = {}
    for name, speech in texts.items():
        try:
            specs[name] = speech_item(*speech, config)
        except InputError as error:
            sources[name] = Source(error=f"column 'voice': {error}")
    missing = {spec.key: spec for spec in specs.values() if not results.has(spec.key)}
    if texts:
        cached = len(specs) - len(missing)
        observer.stage_started("speech", items=len(texts), cached=cached, to_do=len(missing))
    _run_missing(
        storage, SpeechStage(), "speech", missing, SPEECH_SECONDS, config, results, observer, cancelled
    )
    return sources | {name: _source(spec.key, results) for name, spec in specs.items()}


def _run_missing(
    storage: Storage,
    stage: Stage,
    shown_as: str,
    missing: Mapping[str, ItemSpec],
    item_seconds: float,
    config: Config,
    results: StageResults,
    observer: Observer,
    cancelled: Callable[[], bool],
) -> None:
    record = recorder(shown_as, results, observer)
    pieces = shards(list(missing.values()), item_seconds, config.runtime.shard_seconds)

    def run(shard: Sequence[ItemSpec]) -> None:
        run_shard(storage, stage, shard, {}, cancelled=cancelled, on_row=record)

    share_work(storage, results.catalog, pieces, run, on_row=record, cancelled=cancelled)


def recorder(stage: str, results: StageResults, observer: Observer) -> Callable[[dict[str, Any]], None]:
    def record(row: dict[str, Any]) -> None:
        results.add(row)
        observer.item_ended(stage, row)

    return record


def _recording(uri: str) -> tuple[Kind, str]:
    return ("silence", uri.removeprefix(SILENCE)) if uri.startswith(SILENCE) else ("audio", uri)


def _ingest_item(kind: Kind, uri: str, config: Config) -> ItemSpec:
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


def _drop_lost_videos(batch: Batch) -> None:
    """A finished video that is gone, or has another size, is rendered again."""
    results = batch.results["decode"]
    keys = batch.clips.stages["decode"].keys
    finished = keys[results.states(keys) == OK]
    if not len(finished):
        return
    kept = batch.storage.list("stages/decode/data")
    lost = []
    for start, stop in stretches(len(finished)):
        rows = results.columns(finished[start:stop], ["key", "data", "bytes"])
        for key, path, size in zip(*rows.values(), strict=True):
            if path not in kept or kept[path].size != size:
                lost.append(f"decode:{key}")
    if lost:
        forget(batch, lost)
