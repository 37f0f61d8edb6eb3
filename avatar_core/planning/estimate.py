"""How long what is left to do will take, from what this store has measured."""

from dataclasses import dataclass

import pyarrow.compute as pc

from avatar_core.planning.batch import Batch
from avatar_core.store.catalog import Catalog


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
