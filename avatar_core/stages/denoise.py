"""Denoise: the heavy stage, from conditions to the latents of a clip (`preview`: its motion).

A backend may cut a clip into windows that continue each other. Each is then an item, whose row says by key
and SHA-256 which result it went on from: only windows that belong together make a video.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from avatar_core.backends.base import Backend, Tensors, WindowedBackend
from avatar_core.stages.base import BackendStage, Item, Output, Report
from avatar_core.store.catalog import CHAIN_SCHEMA


@dataclass(frozen=True)
class DenoiseStageConfig:
    """The seed differs in every clip, so the key holds it apart from the digest of the configuration; so it
    does with the window."""

    fps: float
    backend: Any = None
    seed: int = field(default=0, compare=False, metadata={"execution": True})
    window: int = field(default=0, compare=False, metadata={"execution": True})


class DenoiseStage(BackendStage):
    name = "denoise"
    columns = pa.schema({"seed": pa.int64()})

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        if isinstance(backend, WindowedBackend):
            self.columns = pa.schema([*self.columns, *CHAIN_SCHEMA])
            self.max_items = 1  # each window is committed on its own

    def process(
        self, item: Item, config: DenoiseStageConfig, models: Any, scratch: Path, report: Report
    ) -> Output:
        conditions = {
            stage: outputs[0].tensors for stage, outputs in item.inputs.items() if stage != self.name
        }
        if isinstance(self.backend, WindowedBackend):
            return self._window(self.backend, item, conditions, config, models, report)
        latents = self.backend.denoise(
            models, conditions, config.fps, config.seed, config.backend, report, item.unfinished
        )
        return Output({"seed": config.seed}, latents)

    def _window(
        self,
        backend: WindowedBackend,
        item: Item,
        conditions: Mapping[str, Tensors],
        config: DenoiseStageConfig,
        models: Any,
        report: Report,
    ) -> Output:
        (previous,) = item.inputs.get(self.name, (None,))
        latents = backend.denoise_window(
            models,
            conditions,
            config.fps,
            config.seed,
            config.backend,
            report,
            config.window,
            previous.tensors if previous else None,
        )
        columns = {"seed": config.seed, "window": config.window}
        if previous:
            columns |= {
                "previous_key": previous.columns["key"],
                "previous_sha256": previous.columns["sha256"],
            }
        return Output(columns, latents)
