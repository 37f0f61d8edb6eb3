"""The whole way from a table to a dataset, in one process: the file to read first.

    from avatar_core.pipeline import render
    result = render({"table": "batch.csv"})

`render` reads the rows, ingests what they name, works out which items are missing, runs them stage by
stage and publishes the dataset. Finished work is found by its content and never done again.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from avatar_core.config import Config, nearest, parse
from avatar_core.devices import usable_gpus
from avatar_core.errors import ConfigError, StoreError
from avatar_core.execution.shard import run_shard
from avatar_core.origins import origin_of, replacement
from avatar_core.planning.batch import Batch, forget, open_batch, open_storage, recorder, take_in_again
from avatar_core.planning.plan import shards
from avatar_core.planning.runs import find_run, plan_stages, read_plan, stage_keys, write_run
from avatar_core.progress import Observer, Silent
from avatar_core.publish import Published, publish, to_frame
from avatar_core.stages.base import ItemSpec
from avatar_core.store.attempts import compact
from avatar_core.store.catalog import Catalog, drop, load_catalog
from avatar_core.store.sharing import share_work
from avatar_core.store.storage import Storage

MAX_PASSES = 3
"""How often damaged results are computed again before the store itself must be at fault."""


@dataclass(frozen=True)
class Result:
    """`dataset` is the folder or URI; `clips` its rows of this run."""

    dataset: str
    clips: pa.Table
    run_id: str
    max_failed_fraction: float

    @cached_property
    def metadata(self) -> pd.DataFrame:
        """A row per clip."""
        return to_frame(self.clips)

    @cached_property
    def failures(self) -> pd.DataFrame:
        """The rows that have no video for a reason; those that a stopped run left are `to do`."""
        return to_frame(self.clips.filter(pc.equal(self.clips["status"], "failed")))

    @property
    def failed_fraction(self) -> float:
        return len(self.failures) / max(1, len(self.clips))

    @property
    def ok(self) -> bool:
        """Whether no more clips failed than the batch allows."""
        return self.failed_fraction <= self.max_failed_fraction


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
    run_id = record_run(batch)
    return finish_batch(batch, run_id, lambda: run_batch(batch, observer, cancelled), observer)


def record_run(batch: Batch) -> str:
    """Write down what is asked, before any work; returns the run's id. Raises `ConfigError` where the work
    cannot be done on this machine, or clips of another table would be lost."""
    check_gpus(batch)
    check_origin(batch)
    backend = {"name": batch.backend.name, **dataclasses.asdict(batch.backend.config)}
    return write_run(batch.storage, batch.name, batch.config, backend, batch.clips)


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
        observer.warning(f"{len(set(damaged))} stored results were damaged or missing: computing them again")
        forget(batch, damaged)
        if any(owner.startswith("ingest:") for owner in damaged):
            take_in_again(batch, observer, cancelled)
    raise _unreliable(batch.storage)


def check_gpus(batch: Batch) -> None:
    """A model that wants a GPU would take days on a CPU."""
    if batch.backend.renders_on_cpu:
        return
    runtime = batch.config.runtime
    to_do = [stage for stage, stage_plan in batch.plan().items() if stage_plan.to_do]
    wanting = [stage for stage in to_do if batch.stages[stage].device_kind == "gpu"]
    if wanting and runtime.gpus == "auto" and not usable_gpus(runtime) and not runtime.pretend:
        raise ConfigError(
            f"backend {batch.backend.name} computes {', '.join(wanting)} on a GPU, and this machine shows "
            "none (`avatar doctor` tells what it sees); runtime.gpus=[] computes on the CPU all the same"
        )


def check_origin(batch: Batch) -> str | None:
    """A warning where the dataset becomes that of another table, `ConfigError` where that must not be."""
    found = replacement(batch)
    if found and not found.allowed:
        raise ConfigError(found.message)
    return found.message if found else None


def finish_batch(batch: Batch, run_id: str, run: Callable[[], None], observer: Observer) -> Result:
    """Call `run` to compute what is missing, then publish; again if a stored video turns out damaged."""
    for _ in range(MAX_PASSES):
        run()
        pa.default_memory_pool().release_unused()
        for stage in batch.stages:
            compact(batch.storage, stage)
        try:
            published = publish_batch(batch, run_id, observer)
        except StoreError as error:
            if not error.keys:
                raise
            observer.warning(f"{error}: computing it again")
            forget(batch, error.keys)
            continue
        allowed = batch.config.max_failed_fraction
        return Result(published.uri, published.metadata, run_id, allowed)
    raise _unreliable(batch.storage)


def publish_batch(batch: Batch, run_id: str, observer: Observer) -> Published:
    if warning := check_origin(batch):  # once more: another run may have published meanwhile
        observer.warning(warning)
    return publish(
        batch.storage,
        batch.name,
        batch.clips,
        batch.results,
        backend=batch.backend.name,
        complete=not (batch.config.limit or batch.config.only),
        origin=origin_of(batch.config),
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
        work = float(stage_plan.to_do.work.sum())
        catalog = batch.results[stage].catalog
        rates = [measured_rate(catalog, column) for column in ("seconds", "bytes")]
        forecast[stage] = Estimate(*(rate if rate is None else rate * work for rate in rates))
    return forecast


def seconds_per_work(batch: Batch, stage: str) -> float:
    """Measured in this store, else guessed: sizes shards, and is never shown."""
    measured = measured_rate(batch.results[stage].catalog, "seconds")
    return measured or batch.stages[stage].guessed_seconds


def measured_rate(catalog: Catalog, column: str) -> float | None:
    """Mean of `column` per unit of work over the finished items."""
    if column not in catalog.table.column_names:
        return None
    table = catalog.table.select(["status", "work", column])
    finished = table.filter(pc.equal(table["status"], "ok"))
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
    return render(rerun_config(config, run, stage=stage, only_failed=only_failed), observer, cancelled)


def rerun_config(config: Config, run: str, *, stage: str | None = None, only_failed: bool = False) -> Config:
    """The recorded configuration of a run, after hiding what is to be computed again."""
    storage = open_storage(config)
    recorded = find_run(storage, run)
    if stage is not None:
        clips = read_plan(storage, recorded.id)
        stages = plan_stages(clips)
        if stage not in stages:
            raise ConfigError(
                f"unknown stage `{stage}`; choose one of: {', '.join(stages)}{nearest(stage, stages)}"
            )
        _drop_stages(storage, clips, stages[stages.index(stage) :], only_failed)
    values = {**recorded.config, "storage": config.storage, "runtime": config.runtime, "retry_failed": True}
    return parse(Config, values)


def _drop_stages(storage: Storage, clips: pd.DataFrame, stages: Sequence[str], only_failed: bool) -> None:
    if only_failed:
        finished = load_catalog(storage, "decode").ok_keys()
        clips = clips[~clips["decode_key"].isin(finished)]
    for stage in stages:
        drop(storage, stage, set(stage_keys(clips, stage)), load_catalog(storage, stage))


def _run_stage(
    batch: Batch,
    name: str,
    items: Sequence[ItemSpec],
    observer: Observer,
    cancelled: Callable[[], bool],
) -> list[str]:
    """Run a stage's items and return the owners (`<stage>:<key>`) of inputs found damaged."""
    damaged: list[str] = []
    results, on_row = batch.results[name], recorder(name, batch.results[name], observer)

    def run(shard: Sequence[ItemSpec]) -> None:
        try:
            run_shard(
                batch.storage,
                batch.stages[name],
                shard,
                consumed_rows(batch, shard),
                device=device,
                memory=runtime.memory,
                cancelled=cancelled,
                on_progress=lambda key, done, total: observer.item_progress(name, key, done, total),
                on_row=on_row,
            )
        except StoreError as error:
            if not error.keys:
                raise
            damaged.extend(error.keys)

    def continuing(shard: Sequence[ItemSpec]) -> dict[str, str]:
        chained = [spec for spec in shard if name in spec.inputs]
        return continued_data(name, chained, consumed_rows(batch, chained))

    runtime, on_gpu = batch.config.runtime, batch.stages[name].device_kind == "gpu"
    device = "cuda" if on_gpu and usable_gpus(runtime) and not runtime.pretend else "cpu"
    seconds = seconds_per_work(batch, name)
    left = items
    while left:
        passed_over: list[ItemSpec] = []
        ready = _ready(batch, name, left, passed_over)
        pieces = shards(ready, seconds, runtime.shard_seconds, batch.stages[name].max_items)
        share_work(
            batch.storage,
            results.catalog,
            pieces,
            run,
            continued=continuing,
            on_row=on_row,
            cancelled=cancelled,
        )
        left = passed_over if len(passed_over) < len(left) else []
    return damaged


def _ready(
    batch: Batch, stage: str, items: Sequence[ItemSpec], passed_over: list[ItemSpec]
) -> Iterator[ItemSpec]:
    """Those whose inputs are there when their turn comes; `passed_over` gets others that may follow, once
    the item that they continue is no longer another run's."""
    for spec in items:
        if _is_ready(batch, spec):
            yield spec
        elif stage in spec.inputs:
            passed_over.append(spec)


def _is_ready(batch: Batch, spec: ItemSpec) -> bool:
    return all(batch.results[stage].has(key) for stage, keys in spec.inputs.items() for key in keys)


def consumed_rows(batch: Batch, shard: Sequence[ItemSpec]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Manifest rows of what the items consume: stage, then key."""
    rows: dict[str, dict[str, Mapping[str, Any]]] = {}
    for spec in shard:
        for stage, keys in spec.inputs.items():
            for key in keys:
                row = batch.results[stage].ok(key)
                assert row is not None
                rows.setdefault(stage, {})[key] = row
    return rows


def continued_data(
    stage: str, shard: Sequence[ItemSpec], consumed: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> dict[str, str]:
    """SHA-256 of the result that an item continues, for those of the shard that do."""
    return {
        spec.key: consumed[stage][spec.inputs[stage][0]]["sha256"] for spec in shard if stage in spec.inputs
    }


def _unreliable(storage: Storage) -> StoreError:
    return StoreError(
        f"results in {storage.uri} are damaged again after being recomputed {MAX_PASSES} times; "
        "check the disk or bucket"
    )
