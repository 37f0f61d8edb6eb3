"""A backend whose items take milliseconds.

Importing this module makes the backend known as `counted`; its videos are real. Its configuration travels
in each job, and unpickling that imports this module: so children know the backend as well.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator

from avatar_core.backends.base import BACKENDS, Backend
from avatar_core.media.face import Face
from avatar_core.stages.audio import AudioStage, Track
from avatar_core.stages.base import Picture, Report, Tensors
from avatar_core.stages.clip_stage import BackendStage, Scale
from avatar_core.stages.decode import DecodeStage
from avatar_core.stages.denoise import DenoiseStage
from avatar_core.stages.reference import ReferenceStage

STEPS = 4

BACKENDS["counted"] = "tests.execution.counted_backend:CountedBackend"


class ImportedInChild(str):
    """Unlike plain text, it is unpickled by its module."""

    __slots__ = ()


@dataclass(frozen=True)
class StageConfig:
    pass


@dataclass(frozen=True)
class CountedConfig:
    module: Annotated[str, AfterValidator(ImportedInChild)] = ImportedInChild(__name__)
    audio: StageConfig = StageConfig()
    reference: StageConfig = StageConfig()
    denoise: StageConfig = StageConfig()
    decode: StageConfig = StageConfig()


class CountedBackend(Backend):
    name = "counted"
    label = "counted"
    config_type: type = CountedConfig
    config: CountedConfig
    max_speakers = 2
    renders_on_cpu = True

    def num_frames(self, duration_s: float, fps: float) -> int:
        return max(1, round(duration_s * fps))

    def fit_picture(self, picture: Picture, max_side: int) -> tuple[Picture, Scale]:
        return picture, (1.0, 1.0)

    def own_stages(self) -> Sequence[BackendStage[Any, Any, Any]]:
        return CountedAudio(self), CountedReference(self), CountedDenoise(self), CountedDecode(self)


class CountedAudio(AudioStage[StageConfig, None]):
    version = 1
    guessed_seconds = 0.05

    def load_models(self, options: StageConfig, device: str, memory: str | None) -> None:
        return None

    def encode(
        self, models: None, tracks: Sequence[Track], fps: float, num_frames: int, options: StageConfig
    ) -> Tensors:
        return {"volume": np.array([np.abs(part).mean() for part in np.array_split(tracks[0], num_frames)])}


class CountedReference(ReferenceStage[StageConfig, None]):
    version = 1
    guessed_seconds = 0.3

    def load_models(self, options: StageConfig, device: str, memory: str | None) -> None:
        return None

    def encode(self, models: None, picture: Picture, faces: Sequence[Face], options: StageConfig) -> Tensors:
        return {"shade": picture.mean((0, 1)).astype(np.float32)}


class CountedDenoise(DenoiseStage[StageConfig, None]):
    version = 1
    device_kind = "gpu"
    guessed_seconds = 0.01

    def load_models(self, options: StageConfig, device: str, memory: str | None) -> None:
        return None

    def denoise(
        self,
        models: None,
        conditions: Mapping[str, Tensors],
        fps: float,
        seed: int,
        options: StageConfig,
        report: Report,
        unfinished: Path | None,
    ) -> Tensors:
        for step in range(STEPS):
            report(step, STEPS)
        volume = conditions["audio"]["volume"]
        noise = np.random.default_rng(seed).random((len(volume), 1))
        return {"latents": volume[:, None] + noise + conditions["reference"]["shade"] / 255}


class CountedDecode(DecodeStage[StageConfig, None]):
    version = 1
    guessed_seconds = 0.5

    def load_models(self, options: StageConfig, device: str, memory: str | None) -> None:
        return None

    def frames(
        self, models: None, picture: Picture, conditions: Mapping[str, Tensors], options: StageConfig
    ) -> Iterator[Picture]:
        for shade in conditions["denoise"]["latents"]:
            yield (picture * (shade / 3).clip(0, 1)).astype(np.uint8)
