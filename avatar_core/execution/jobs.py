"""Items of a batch become jobs for a worker."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from avatar_core.execution.worker import Job, StoreAddress
from avatar_core.planning.batch import Batch
from avatar_core.stages.base import ItemSpec


def jobs_of(batch: Batch, stage: str, specs: Sequence[ItemSpec], apart: Container[str]) -> list[Job]:
    """One job, and one more for each item whose key is in `apart`: it has killed a worker before, and so
    takes no other along."""
    suspects = [spec for spec in specs if spec.key in apart]
    others = [spec for spec in specs if spec.key not in apart]
    runtime, storage = batch.config.runtime, batch.config.storage
    cache_dir = runtime.cache_dir and str(Path(runtime.cache_dir).expanduser())
    return [
        Job(
            store=StoreAddress(storage.root, storage.options, cache_dir, runtime.cache_bytes),
            backend={"name": batch.backend.name, **asdict(batch.backend.config)},
            stage=stage,
            items=tuple(items),
            inputs=_consumed_rows(batch, items),
            memory=runtime.memory,
        )
        for items in (others, *([suspect] for suspect in suspects))
        if items
    ]


def _consumed_rows(batch: Batch, specs: Sequence[ItemSpec]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Manifest rows of what the items consume: stage, then key."""
    rows: dict[str, dict[str, Mapping[str, Any]]] = {}
    for spec in specs:
        for stage, keys in spec.inputs.items():
            for key in keys:
                row = batch.results[stage].ok(key)
                assert row is not None
                rows.setdefault(stage, {})[key] = row
    return rows
