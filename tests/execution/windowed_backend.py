"""A backend that renders clips in windows, each of which depends on every bit of the one before.

Importing this module makes the backend known as `windowed`. Like `counted`, it travels to children
in its configuration.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator

from avatar_core.backends.base import BACKENDS
from avatar_core.errors import BackendError, InputError
from avatar_core.stages.base import Picture, Report, Tensors
from avatar_core.stages.clip_stage import BackendStage
from avatar_core.stages.decode import ChainedDecodeStage
from avatar_core.stages.denoise import ChainedDenoiseStage
from avatar_core.stages.subject import Subject
from tests.execution.counted_backend import (
    STEPS,
    CountedAudio,
    CountedBackend,
    CountedConfig,
    CountedReference,
    StageConfig,
)

WINDOW_FRAMES = 6

BACKENDS["windowed"] = "tests.execution.windowed_backend:WindowedBackend"


class ImportedInChild(str):
    """Unlike plain text, it is unpickled by its module."""

    __slots__ = ()


@dataclass(frozen=True)
class WindowConfig(StageConfig):
    """`gpu` changes the last bits of what is computed, as another GPU does; the window `bad` fails."""

    gpu: int = field(default=0, metadata={"execution": True})
    bad: int | None = field(default=None, metadata={"execution": True})


@dataclass(frozen=True)
class WindowedConfig(CountedConfig):
    module: Annotated[str, AfterValidator(ImportedInChild)] = ImportedInChild(__name__)
    denoise: WindowConfig = WindowConfig()


class WindowedBackend(CountedBackend):
    name = "windowed"
    label = "windowed"
    config_type = WindowedConfig

    def own_stages(self) -> Sequence[BackendStage[Any, Any, Any]]:
        return CountedAudio(self), CountedReference(self), WindowedDenoise(self), WindowedDecode(self)


class WindowedDenoise(ChainedDenoiseStage[WindowConfig, None]):
    version = 1
    device_kind = "gpu"
    guessed_seconds = 0.01

    def num_windows(self, subject: Subject) -> int:
        return -(-self.backend.num_frames(subject.segment.duration_s, subject.fps) // WINDOW_FRAMES)

    def load_models(self, options: WindowConfig, device: str, memory: str | None) -> None:
        return None

    def denoise_window(
        self,
        models: None,
        conditions: Mapping[str, Tensors],
        fps: float,
        seed: int,
        options: WindowConfig,
        report: Report,
        window: int,
        previous: Tensors | None,
    ) -> Tensors:
        if window == options.bad:
            raise InputError(f"window {window} is bad")
        for step in range(STEPS):
            report(step, STEPS)
        volume = conditions["audio"]["volume"][window * WINDOW_FRAMES :][:WINDOW_FRAMES]
        noise = np.random.default_rng([seed, window]).random((len(volume), 1))
        before = previous["tail"] if previous else np.zeros(3)
        latents = volume[:, None] + noise + conditions["reference"]["shade"] / 255 + before
        latents += options.gpu * 1e-12
        return {"before": before, "latents": latents, "tail": latents[-1] / 2}


class WindowedDecode(ChainedDecodeStage[StageConfig, None]):
    version = 1
    guessed_seconds = 0.5

    def load_models(self, options: StageConfig, device: str, memory: str | None) -> None:
        return None

    def frames(
        self, models: None, picture: Picture, windows: Sequence[Tensors], options: StageConfig
    ) -> Iterator[Picture]:
        before: Any = np.zeros(3)
        for number, window in enumerate(windows):
            if not np.array_equal(window["before"], before):
                raise BackendError(f"window {number} does not continue the one before")
            before = window["tail"]
            for shade in window["latents"]:
                yield (picture * (shade / 4).clip(0, 1)).astype(np.uint8)
