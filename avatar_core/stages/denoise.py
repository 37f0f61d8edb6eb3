"""Denoise: the heavy stage, from conditions to the latents of a clip (`preview`: its motion)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from avatar_core.backends.base import Backend
from avatar_core.stages.base import Item, Output, Report


@dataclass(frozen=True)
class DenoiseStageConfig:
    seed: int
    fps: float
    backend: Any = None


class DenoiseStage:
    name = "denoise"
    folder = None
    columns: ClassVar = pa.schema({"seed": pa.int64()})

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.version = backend.versions[self.name]
        self.queue = backend.queues[self.name]

    def weights(self, config: DenoiseStageConfig) -> tuple[str, ...]:
        return self.backend.weights(self.name, config.backend)

    def load(self, config: DenoiseStageConfig, device: str) -> Any:
        return self.backend.load(self.name, config.backend, device)

    def process(
        self, item: Item, config: DenoiseStageConfig, models: Any, scratch: Path, report: Report
    ) -> Output:
        conditions = {stage: outputs[0].tensors for stage, outputs in item.inputs.items()}
        latents = self.backend.denoise(models, conditions, config.fps, config.seed, config.backend, report)
        return Output({"seed": config.seed}, latents)
