"""Denoise: the heavy stage, from conditions to the latents of a clip (`preview`: its motion)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from avatar_core.stages.base import BackendStage, Item, Output, Report


@dataclass(frozen=True)
class DenoiseStageConfig:
    """The seed differs in every clip, so the key holds it apart from the digest of the configuration."""

    fps: float
    backend: Any = None
    seed: int = field(default=0, compare=False, metadata={"execution": True})


class DenoiseStage(BackendStage):
    name = "denoise"
    columns = pa.schema({"seed": pa.int64()})

    def process(
        self, item: Item, config: DenoiseStageConfig, models: Any, scratch: Path, report: Report
    ) -> Output:
        conditions = {stage: outputs[0].tensors for stage, outputs in item.inputs.items()}
        latents = self.backend.denoise(
            models, conditions, config.fps, config.seed, config.backend, report, item.unfinished
        )
        return Output({"seed": config.seed}, latents)
