"""A configuration becomes a batch: its rows, what they name or say taken into the store, and its clips."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from avatar_core.backends.base import Backend, create_backend
from avatar_core.config import Config, nearest, parse
from avatar_core.errors import ConfigError
from avatar_core.media.cells import plain
from avatar_core.media.table import PATHS, TableRows, is_absent, parse_rows, read_table, resolve_uri
from avatar_core.planning.clip_builder import ClipBuilder
from avatar_core.planning.clip_names import clip_names, slug
from avatar_core.planning.clips import Clips
from avatar_core.planning.plan import Outlook, StagePlan, make_plan, outlook, plan_sources
from avatar_core.planning.sources import Sources
from avatar_core.planning.stages import create_stages
from avatar_core.progress import Observer, Silent
from avatar_core.stages.base import Stage
from avatar_core.store.catalog import OK, drop, load_catalog, load_catalogs
from avatar_core.store.layout import check_layout, claim_layout
from avatar_core.store.results import StageResults
from avatar_core.store.storage import Storage
from avatar_core.store.tables import stretches


@dataclass
class Batch:
    """A table and what is known of its clips: of those rows whose sources are known."""

    config: Config
    name: str
    storage: Storage
    backend: Backend
    stages: dict[str, Stage]
    results: dict[str, StageResults]
    sources: Sources
    clips: Clips
    _planned: NDArray[np.bool_]  # by row

    @property
    def is_complete(self) -> bool:
        """Whether the clips of all rows are known."""
        return bool(self._planned.all())

    @property
    def num_planned(self) -> int:
        """Rows whose clips are known."""
        return int(self._planned.sum())

    @property
    def num_waiting(self) -> int:
        """Rows whose clips could be planned now."""
        if self.is_complete:
            return 0
        return int((self.sources.known_rows() & ~self._planned).sum())

    def grow(self, observer: Observer) -> None:
        """Plans the clips of all rows whose sources are known by now."""
        fresh = np.flatnonzero(self.sources.known_rows() & ~self._planned)
        if not len(fresh):
            return
        self.clips.add(fresh.tolist())
        self._planned[fresh] = True
        self._drop_lost_videos(np.isin(self.clips.position, fresh))
        if self.is_complete:
            for warning in self.sources.warnings():
                observer.warning(warning)

    def plan(self) -> dict[str, StagePlan]:
        """What is left to do, by stage in running order."""
        of_clips = make_plan(self.clips, self.results, retry_failed=self.config.retry_failed)
        return plan_sources(self.sources) | of_clips

    def outlook(self) -> Outlook:
        return outlook(self.clips, self.results, retry_failed=self.config.retry_failed)

    def label(self, stage: str, key: str) -> str:
        """What an item is for: the source that it takes in, or the first clip that needs it."""
        if stage in self.sources.stages:
            return self.sources.label(key)
        return self.clips.name_of_item(stage, key)

    def clip_of(self, stage: str, key: str) -> str:
        """The name of the first clip, or row, that needs an item."""
        if stage in self.sources.stages:
            return str(self.clips.names[self.sources.first_row(key)])
        return self.clips.name_of_item(stage, key)

    def forget(self, owners: Iterable[str]) -> None:
        """Hide damaged results (`<stage>:<key>`), so that they are made again."""
        by_stage: dict[str, set[str]] = {}
        for owner in owners:
            stage, _, key = owner.partition(":")
            by_stage.setdefault(stage, set()).add(key)
        for stage, keys in by_stage.items():
            drop(self.storage, stage, keys, load_catalog(self.storage, stage))
            self.results[stage] = StageResults(load_catalog(self.storage, stage))
        if not by_stage.keys().isdisjoint(self.sources.stages):
            self.sources.look_again()
            builder = ClipBuilder(self.config, self.backend, self.sources)  # the old one remembers sources
            self.clips = Clips(builder, self.clips.rows, self.clips.names)
            self._planned[:] = False

    def _drop_lost_videos(self, fresh: NDArray[np.bool_]) -> None:
        """A finished video that is gone, or has another size, is rendered again."""
        results = self.results["decode"]
        keys = self.clips.keys("decode")[fresh]
        finished = np.unique(keys[results.states(keys) == OK])
        if not len(finished):
            return
        kept = self.storage.list("stages/decode/data")
        lost = []
        for start, stop in stretches(len(finished)):
            rows = results.columns(finished[start:stop], ["key", "data", "bytes"])
            for key, path, size in zip(*rows.values(), strict=True):
                if path not in kept or kept[path].size != size:
                    lost.append(f"decode:{key}")
        if lost:
            self.forget(lost)


def open_batch(config: Config | Mapping[str, Any], observer: Observer | None = None) -> Batch:
    """Read the table and look for what the store has of it. What its rows name is only looked at: taking it
    in is work like any other, after which all keys follow."""
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
    claim_layout(storage)
    stages = create_stages(backend)
    results = {stage: StageResults(known) for stage, known in load_catalogs(storage, stages).items()}
    sources = Sources(rows, config, results)
    clips = Clips(ClipBuilder(config, backend, sources), rows, names)
    planned = np.zeros(len(rows), bool)
    batch = Batch(config, batch_name(config), storage, backend, stages, results, sources, clips, planned)
    batch.grow(observer)
    return batch


def open_storage(config: Config) -> Storage:
    """Raises `StoreError` where it holds what another version of this package made."""
    cache_dir = Path(config.runtime.cache_dir).expanduser() if config.runtime.cache_dir else None
    storage = Storage(config.storage.root, config.storage.options, cache_dir, config.runtime.cache_bytes)
    check_layout(storage)
    return storage


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
