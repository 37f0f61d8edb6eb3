"""A backend whose denoise stage calls whatever function an item's configuration holds.

Unpickling one of the functions below imports this module in a child, which makes the backend known there.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avatar_core.backends.base import BACKENDS, Backend
from avatar_core.errors import Cancelled, WeightsError
from avatar_core.stages.base import ItemSpec, Picture, Report, Tensors
from avatar_core.stages.clip_stage import BackendStage, Scale
from avatar_core.stages.denoise import DenoiseStage, DenoiseStageConfig

if "pytest" not in sys.modules:
    BACKENDS["toy"] = "tests.execution.toy_backend:ToyBackend"

SILENCE_S = 5.0
"""Longer than a child that works is kept waiting by a busy machine."""

log = logging.getLogger("avatar_core.toy")
_backends: list["ToyBackend"] = []
_loads: list[str] = []
_memory: list[str | None] = []

Act = Callable[[Report], Any]
"""What an item does; its answer is kept as JSON."""


@dataclass(frozen=True)
class ToyConfig:
    memory_levels: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()


class ToyDenoise(DenoiseStage[Act, None]):
    inputs = ()
    version = 1
    device_kind = "gpu"
    guessed_seconds = 0.01

    def __init__(self, backend: "ToyBackend") -> None:
        super().__init__(backend)
        self._levels = backend.config.memory_levels
        self._weights = backend.config.weights

    def weight_names(self, options: Act) -> tuple[str, ...]:
        return self._weights

    def memory_levels(self, device: str) -> tuple[str, ...]:
        return self._levels

    def load_models(self, options: Act, device: str, memory: str | None) -> None:
        _loads.append(device)
        _memory.append(memory)

    def denoise(
        self,
        models: None,
        conditions: Any,
        fps: float,
        seed: int,
        options: Act,
        report: Report,
        unfinished: Path | None,
    ) -> Tensors:
        return {"answer": np.frombuffer(json.dumps(options(report)).encode(), np.uint8)}


class ToyBackend(Backend):
    name = "toy"
    label = "toy"
    config_type = ToyConfig
    config: ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        _backends.append(self)

    def fit_picture(self, picture: Picture, max_side: int) -> tuple[Picture, Scale]:
        raise NotImplementedError

    def own_stages(self) -> Sequence[BackendStage[Any, Any, Any]]:
        return [ToyDenoise(self)]


def toy_item(key: str, act: Act) -> ItemSpec:
    return ItemSpec(key, DenoiseStageConfig(seed=0, fps=25.0, backend=act))


# --- what an item can do


def nothing(report: Report) -> None:
    pass


def describe(report: Report) -> dict[str, Any]:
    return {
        "modules": sorted(sys.modules),
        "environment": dict(os.environ),
        "backends": len(_backends),
        "loads": _loads,
        "pid": os.getpid(),
        "stdin": sys.stdin.read(),
    }


def report_often(report: Report) -> float:
    """Reports as fast as it can for half a second; answers with the true number of reports."""
    reports, end_s = 0, time.monotonic() + 0.5
    while time.monotonic() < end_s:
        report(reports := reports + 1, 10**9)
    return reports


def report_for_longer(report: Report) -> None:
    """Than `SILENCE_S`."""
    end_s = time.monotonic() + 1.2 * SILENCE_S
    while time.monotonic() < end_s:
        report(0, 1)
        time.sleep(0.01)


def wait_for_cancel(report: Report) -> None:
    while True:
        report(0, 1)
        time.sleep(0.01)


def sleep_for_ever(report: Report) -> None:
    time.sleep(1e6)


def compute_for_ever(report: Report) -> None:
    """Never lets another Python thread of its process run."""
    pow(3, 10**9)


def start_helper(report: Report) -> None:
    """Waits beside a process of its own, whose id it logs."""
    import subprocess

    log.info("helper %d", subprocess.Popen(["sleep", "1000"]).pid)
    time.sleep(1e6)


def exit_with_status(report: Report) -> None:
    sys.exit(3)


def crash(report: Report) -> None:
    import ctypes

    ctypes.string_at(0)


def log_levels(report: Report) -> None:
    log.debug("never sent")
    log.info("half of %s", "it", extra={"unpicklable": lambda: None})
    log.info("all of %s", "it")


def break_unexpectedly(report: Report) -> None:
    raise ZeroDivisionError("by zero")


def need_less_memory(report: Report) -> list[str | None]:
    """Runs out of it on the highest level; answers with the levels so far."""
    if _memory[-1] == "high":
        raise MemoryError
    return _memory


def lack_weights(report: Report) -> None:
    raise WeightsError("weights 'toy' are missing; run: avatar weights fetch toy")


def cancel_itself(report: Report) -> None:
    raise Cancelled("stopped by the user")


def be_in_two_places(report: Report) -> None:
    """Ends only once a second item of this kind runs in another process; the file lists both."""
    meeting = Path(os.environ["MEETING"])
    with meeting.open("a") as file:
        file.write(f"{os.getpid()}\n")
    while len(set(meeting.read_text().split())) < 2:
        report(0, 1)
        time.sleep(0.01)
