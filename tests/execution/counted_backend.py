"""A backend whose items take milliseconds.

Importing this module makes the backend known as `counted`; its videos are real. Its configuration travels
in each job, and unpickling that imports this module: so children know the backend as well.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator

from avatar_core.backends.base import BACKENDS, Picture, ReportStep, Tensors

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


class CountedBackend:
    name = "counted"
    label = "counted"
    config_type = CountedConfig
    guessed_seconds: ClassVar = MappingProxyType(
        {"audio": 0.05, "reference": 0.3, "denoise": 0.01, "decode": 0.5}
    )
    max_speakers = 2
    text_sees_picture = False
    versions: ClassVar = MappingProxyType({"audio": 1, "reference": 1, "denoise": 1, "decode": 1})
    queues: ClassVar = MappingProxyType(
        {"audio": "cpu", "reference": "cpu", "denoise": "gpu", "decode": "cpu"}
    )

    def __init__(self, config: CountedConfig) -> None:
        self.config = config

    def resolve(self) -> "CountedBackend":
        return self

    def weights(self, stage: str, config: StageConfig) -> tuple[str, ...]:
        return ()

    def fit_picture(self, picture: Picture, max_side: int, config: Any) -> Any:
        return picture, (1.0, 1.0)

    def num_frames(self, duration_s: float, fps: float) -> int:
        return max(1, round(duration_s * fps))

    def load(self, stage: str, config: StageConfig, device: str, memory: str | None) -> None:
        return None

    def encode_audio(
        self,
        models: None,
        tracks: Sequence[NDArray[np.float32]],
        sample_rate: int,
        fps: float,
        num_frames: int,
    ) -> Tensors:
        return {"volume": np.array([np.abs(part).mean() for part in np.array_split(tracks[0], num_frames)])}

    def encode_picture(self, models: None, picture: Picture, faces: Any, config: StageConfig) -> Tensors:
        return {"shade": picture.mean((0, 1)).astype(np.float32)}

    def denoise(
        self,
        models: None,
        conditions: Mapping[str, Tensors],
        fps: float,
        seed: int,
        config: StageConfig,
        report: ReportStep,
        unfinished: Path | None,
    ) -> Tensors:
        for step in range(STEPS):
            report(step, STEPS)
        volume = conditions["audio"]["volume"]
        noise = np.random.default_rng(seed).random((len(volume), 1))
        return {"latents": volume[:, None] + noise + conditions["reference"]["shade"] / 255}

    def decode(
        self, models: None, picture: Picture, conditions: Mapping[str, Tensors], config: StageConfig
    ) -> Iterator[Picture]:
        for shade in conditions["denoise"]["latents"]:
            yield (picture * (shade / 3).clip(0, 1)).astype(np.uint8)
