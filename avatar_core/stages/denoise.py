"""Denoise: the heavy stage, from conditions to the latents of a clip (`preview`: its motion)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from avatar_core.stages.base import BackendStage, Item, Output, Report


@dataclass(frozen=True)
class DenoiseStageConfig:
    seed: int
    fps: float
    backend: Any = None


class DenoiseStage(BackendStage):
    name = "denoise"
    columns = pa.schema({"seed": pa.int64()})

    def process(
        self, item: Item, config: DenoiseStageConfig, models: Any, scratch: Path, report: Report
    ) -> Output:
        conditions = {stage: outputs[0].tensors for stage, outputs in item.inputs.items()}
        latents = self.backend.denoise(models, conditions, config.fps, config.seed, config.backend, report)
        return Output({"seed": config.seed}, latents)
