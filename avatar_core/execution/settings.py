"""How a run is done on this machine; no part of any result's key."""

import os
from dataclasses import dataclass

from avatar_core.config import Config
from avatar_core.devices import usable_gpus


@dataclass(frozen=True)
class RunSettings:
    """`item_timeout_s`: a queue silent for so long is replaced."""

    gpus: tuple[int, ...]
    pretend: bool
    cpus: int
    item_timeout_s: float
    retries: int
    budget_hours: float | None


def run_settings(config: Config) -> RunSettings:
    runtime = config.runtime
    return RunSettings(
        gpus=usable_gpus(runtime),
        pretend=runtime.pretend,
        cpus=runtime.cpus or len(os.sched_getaffinity(0)),
        item_timeout_s=runtime.item_timeout_s,
        retries=runtime.retries,
        budget_hours=config.budget_hours,
    )
