"""A backend that renders nothing: its stages read what came before, wait, write 1 kB and say so in a log.

Importing this module makes the backend known as `stub`, with a decode stage that encodes no video. Nothing
but the seconds of the stages costs anything, so what is left of a run's time is the cost of running it.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator

from avatar_core.backends.base import BACKENDS, Picture, ReportStep, Tensors
from avatar_core.stages import registry
from avatar_core.stages.base import Item, Output, Report
from avatar_core.stages.decode import DecodeStage, DecodeStageConfig

BACKENDS["stub"] = "stub_backend:StubBackend"

FEATURES = 256  # float32: 1 kB


class CallLog(str):
    """Path of a file that every call of a stage adds a line to: stage, item, start and end in seconds.

    It travels in each job, and unpickling it imports this module: so the backend is known in a child.
    """

    __slots__ = ()

    def call(self, stage: str, item: str, seconds: float) -> None:
        start_s = time.time()
        if seconds:
            time.sleep(seconds)
        line = f"{stage} {item} {start_s:.6f} {time.time():.6f}\n"
        file = os.open(self, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)


@dataclass(frozen=True)
class StubStageConfig:
    seconds: float = field(default=0.0, metadata={"execution": True})


@dataclass(frozen=True)
class StubConfig:
    log: Annotated[str, AfterValidator(CallLog)] = os.devnull
    audio: StubStageConfig = StubStageConfig()
    reference: StubStageConfig = StubStageConfig()
    denoise: StubStageConfig = StubStageConfig()
    decode: StubStageConfig = StubStageConfig()


class StubBackend:
    name = "stub"
    label = "stub (renders nothing)"
    config_type = StubConfig
    guessed_seconds: ClassVar = MappingProxyType(
        {"audio": 0.05, "reference": 0.3, "denoise": 0.01, "decode": 0.5}
    )
    max_speakers = 2
    text_sees_picture = False
    versions: ClassVar = MappingProxyType({"audio": 1, "reference": 1, "denoise": 1, "decode": 1})
    queues: ClassVar = MappingProxyType(
        {"audio": "cpu", "reference": "cpu", "denoise": "gpu", "decode": "cpu"}
    )

    def __init__(self, config: Any) -> None:
        self.config = config

    def resolve(self) -> "StubBackend":
        return self

    def weights(self, stage: str, config: Any) -> tuple[str, ...]:
        return ()

    def num_frames(self, duration_s: float, fps: float) -> int:
        return max(1, round(duration_s * fps))

    def load(self, stage: str, config: Any, device: str, memory: str | None) -> None:
        return None

    def encode_audio(
        self,
        models: None,
        tracks: Sequence[NDArray[np.float32]],
        sample_rate: int,
        fps: float,
        num_frames: int,
    ) -> Tensors:
        self.config.log.call("audio", "-", self.config.audio.seconds)
        return {"features": tracks[0][:FEATURES].astype(np.float32)}

    def fit_picture(self, picture: Picture, max_side: int, config: Any) -> Any:
        return picture, (1.0, 1.0)

    def encode_picture(self, models: None, picture: Picture, faces: Any, config: StubStageConfig) -> Tensors:
        self.config.log.call("reference", "-", config.seconds)
        return {"features": picture.ravel()[:FEATURES].astype(np.float32)}

    def denoise(
        self,
        models: None,
        conditions: Mapping[str, Tensors],
        fps: float,
        seed: int,
        config: StubStageConfig,
        report: ReportStep,
        unfinished: Path | None,
    ) -> Tensors:
        features = conditions["audio"]["features"] + conditions["reference"]["features"]
        self.config.log.call("denoise", str(seed), config.seconds)
        return {"latents": features}


class MuxStage(DecodeStage):
    def process(
        self, item: Item, config: DecodeStageConfig, models: Any, scratch: Path, report: Report
    ) -> Output:
        latents = item.inputs["denoise"][0].tensors["latents"]
        self.backend.config.log.call("decode", item.key, config.backend.seconds)
        path = scratch / "clip.mp4"
        path.write_bytes(item.key.encode() + latents.tobytes())
        columns = {
            "num_frames": config.num_frames,
            "width": 64,
            "height": 64,
            "fps": config.fps,
            "duration_s": config.num_frames / config.fps,
            "bytes": path.stat().st_size,
            "backend": self.backend.name,
            "renderer": self.backend.label,
        }
        return Output(columns, file=path)


registry.DecodeStage = MuxStage  # type: ignore[attr-defined]
