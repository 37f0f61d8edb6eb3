"""Denoise: the heavy stage, from conditions to the latents of a clip (`preview`: its motion).

A backend may cut a clip into windows that continue each other. Each is then an item, whose row says by key
and SHA-256 which result it went on from: only windows that belong together make a video.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

import pyarrow as pa

from avatar_core.stages.base import Item, Output, Report, Tensors
from avatar_core.stages.clip_stage import BackendStage, ModelsT, OptionsT, tensors_of
from avatar_core.stages.subject import Subject
from avatar_core.store.catalog import CHAIN_SCHEMA

_COLUMNS = pa.schema({"seed": pa.int64()})

Conditions = Mapping[str, Tensors]
"""Tensors of the stages that a clip stands on, by stage."""


@dataclass(frozen=True)
class DenoiseStageConfig:
    """The seed differs in every clip, so the key holds it apart from the digest of the configuration; so it
    does with the window."""

    fps: float
    backend: Any = None
    seed: int = field(default=0, compare=False, metadata={"execution": True})
    window: int = field(default=0, compare=False, metadata={"execution": True})


class _DenoiseStage(BackendStage[DenoiseStageConfig, OptionsT, ModelsT], Generic[OptionsT, ModelsT]):
    config_type = DenoiseStageConfig
    name = "denoise"
    noun = "clip"
    inputs: tuple[str, ...] = ("audio", "reference")

    def work(self, subject: Subject) -> float:
        return subject.segment.duration_s


class DenoiseStage(_DenoiseStage[OptionsT, ModelsT], Generic[OptionsT, ModelsT]):
    facts = ("options", "segment", "fps", "seed")
    columns = _COLUMNS

    @abstractmethod
    def denoise(
        self,
        models: ModelsT,
        conditions: Conditions,
        fps: float,
        seed: int,
        options: OptionsT,
        report: Report,
        unfinished: Path | None,
    ) -> Tensors:
        """Latents of a clip. `unfinished` is a file for a state from which a killed clip goes on with the
        same result."""
        ...

    def configure(self, subject: Subject) -> DenoiseStageConfig:
        return DenoiseStageConfig(subject.fps, subject.options.by_stage.get(self.name), subject.seed)

    def process(
        self, item: Item, config: DenoiseStageConfig, models: ModelsT, scratch: Path, report: Report
    ) -> Output:
        given = tensors_of(item, self.inputs)
        latents = self.denoise(
            models, given, config.fps, config.seed, config.backend, report, item.unfinished
        )
        return Output({"seed": config.seed}, latents)


class ChainedDenoiseStage(_DenoiseStage[OptionsT, ModelsT], Generic[OptionsT, ModelsT]):
    """Each window of a clip is an item of its own, and a clip goes on from the last one that was finished."""

    noun = "window"
    facts = ("options", "segment", "fps", "seed", "window")
    columns = pa.schema([*_COLUMNS, *CHAIN_SCHEMA])
    max_items = 1  # each window is committed on its own
    chained = True

    @abstractmethod
    def num_windows(self, subject: Subject) -> int: ...

    @abstractmethod
    def denoise_window(
        self,
        models: ModelsT,
        conditions: Conditions,
        fps: float,
        seed: int,
        options: OptionsT,
        report: Report,
        window: int,
        previous: Tensors | None,
    ) -> Tensors:
        """Latents of a window, and whatever the next one needs to go on. `seed` is the clip's; `previous` is
        what this gave for `window` - 1, None for the first."""
        ...

    def configure(self, subject: Subject) -> DenoiseStageConfig:
        options = subject.options.by_stage.get(self.name)
        return DenoiseStageConfig(subject.fps, options, subject.seed, subject.window)

    def process(
        self, item: Item, config: DenoiseStageConfig, models: ModelsT, scratch: Path, report: Report
    ) -> Output:
        (previous,) = item.inputs.get(self.name, (None,))
        latents = self.denoise_window(
            models,
            tensors_of(item, self.inputs),
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
