"""How a run is done on this machine; no part of any result's key."""

import os
from dataclasses import dataclass

from avatar_core.config import Config
from avatar_core.devices import usable_gpus
from avatar_core.errors import ConfigError
from avatar_core.execution.worker_process import WorkerProcesses
from avatar_core.planning.batch import Batch


@dataclass(frozen=True)
class RunSettings:
    """`item_timeout_s`: a worker silent for so long is replaced."""

    gpus: tuple[int, ...]
    pretend: bool
    cpus: int
    item_timeout_s: float
    idle_s: float
    retries: int
    budget_hours: float | None


def check_gpus(batch: Batch) -> None:
    """A model that wants a GPU would take days on a CPU. Raises `ConfigError`."""
    if batch.backend.renders_on_cpu:
        return
    runtime = batch.config.runtime
    plan = batch.plan()
    # Of rows that are not known yet, everything may be to do.
    to_do = [
        stage for stage in batch.stages if not batch.is_complete or (stage in plan and plan[stage].to_do)
    ]
    wanting = [stage for stage in to_do if batch.stages[stage].device_kind == "gpu"]
    if wanting and runtime.gpus == "auto" and not usable_gpus(runtime) and not runtime.pretend:
        raise ConfigError(
            f"backend {batch.backend.name} computes {', '.join(wanting)} on a GPU, and this machine shows "
            "none (`avatar doctor` tells what it sees); runtime.gpus=[] computes on the CPU all the same"
        )


def has_gpu(config: Config) -> bool:
    """Whether stages that want a GPU get one here."""
    return bool(usable_gpus(config.runtime)) and not config.runtime.pretend


def run_settings(config: Config) -> RunSettings:
    runtime = config.runtime
    return RunSettings(
        gpus=usable_gpus(runtime),
        pretend=runtime.pretend,
        cpus=runtime.cpus or len(os.sched_getaffinity(0)),
        item_timeout_s=runtime.item_timeout_s,
        idle_s=runtime.idle_s,
        retries=runtime.retries,
        budget_hours=config.budget_hours,
    )


def workers_for(batch: Batch, settings: RunSettings) -> WorkerProcesses:
    """No more than could be busy at once, none where nothing is to do."""
    unknown = len(batch.clips.rows) - batch.num_planned
    sources = batch.sources.stages
    to_do = {stage: len(planned.to_do) for stage, planned in batch.plan().items() if stage not in sources}
    if unknown:
        to_do |= {stage: to_do.get(stage, 0) + unknown for stage in batch.stages if stage not in sources}
    on_gpu = any(count and batch.stages[stage].device_kind == "gpu" for stage, count in to_do.items())
    cpus = min(settings.cpus, max(to_do.values(), default=0))
    return WorkerProcesses(settings.gpus if on_gpu else (), settings.pretend, cpus, settings.idle_s)
