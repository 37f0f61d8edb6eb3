"""A backend that renders nothing: its stages read what came before, wait, write 1 kB and say so in a log.

Importing this module makes the backend known as `stub`, with a decode stage that encodes no video. Nothing
but the seconds of the stages costs anything, so what is left of a run's time is the cost of running it.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator

from avatar_core.backends.base import BACKENDS, Backend
from avatar_core.media.face import Face
from avatar_core.stages.audio import AudioStage, Track
from avatar_core.stages.base import Item, Output, Picture, Report, Tensors
from avatar_core.stages.clip_stage import BackendStage, Scale
from avatar_core.stages.decode import DecodeStage, DecodeStageConfig
from avatar_core.stages.denoise import DenoiseStage
from avatar_core.stages.reference import ReferenceStage

BACKENDS["stub"] = "stub_backend:StubBackend"

FEATURES = 256  # float32: 1 kB
SLOWNESS = float(os.environ.get("STUB_SLOWNESS", "1"))
"""Of this machine's GPUs: factor of the seconds of denoise."""
GUESS_S = float(os.environ.get("STUB_GUESS_S", "0.01"))
"""What denoise is taken to last before one was seen."""


class CallLog(str):
    """Path of a file that every call of a stage adds a line to: stage, item, start and end in seconds.

    It travels in each job, and unpickling it imports this module: so the backend is known in a child.
    """

    __slots__ = ()

    def call(self, stage: str, item: str, seconds: float, *, announced: bool = False) -> None:
        """One that is `announced` has a line `begin` too, which stays alone where its process is killed."""
        start_s = time.time()
        if announced:
            self._write("begin", item, start_s)
        if seconds:
            time.sleep(seconds)
        self._write(stage, item, start_s)

    def _write(self, what: str, item: str, start_s: float) -> None:
        line = f"{what} {item} {start_s:.6f} {time.time():.6f}\n"
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
    weights: tuple[str, ...] = ()
    audio: StubStageConfig = StubStageConfig()
    reference: StubStageConfig = StubStageConfig()
    denoise: StubStageConfig = StubStageConfig()
    decode: StubStageConfig = StubStageConfig()


class StubBackend(Backend):
    name = "stub"
    label = "stub (renders nothing)"
    config_type = StubConfig
    config: StubConfig
    max_speakers = 2
    renders_on_cpu = True

    def num_frames(self, duration_s: float, fps: float) -> int:
        return max(1, round(duration_s * fps))

    def fit_picture(self, picture: Picture, max_side: int) -> tuple[Picture, Scale]:
        return picture, (1.0, 1.0)

    def own_stages(self) -> Sequence[BackendStage[Any, Any, Any]]:
        log = self.config.log
        return StubAudio(self, log), StubReference(self, log), StubDenoise(self, log), StubDecode(self, log)


class StubAudio(AudioStage[StubStageConfig, None]):
    version = 1
    guessed_seconds = 0.05

    def __init__(self, backend: StubBackend, log: CallLog) -> None:
        super().__init__(backend)
        self._log = log

    def load_models(self, options: StubStageConfig, device: str, memory: str | None) -> None:
        return None

    def encode(
        self, models: None, tracks: Sequence[Track], fps: float, num_frames: int, options: StubStageConfig
    ) -> Tensors:
        self._log.call(self.name, "-", options.seconds)
        return {"features": tracks[0][:FEATURES].astype(np.float32)}


class StubReference(ReferenceStage[StubStageConfig, None]):
    version = 1
    guessed_seconds = 0.3

    def __init__(self, backend: StubBackend, log: CallLog) -> None:
        super().__init__(backend)
        self._log = log

    def load_models(self, options: StubStageConfig, device: str, memory: str | None) -> None:
        return None

    def encode(
        self, models: None, picture: Picture, faces: Sequence[Face], options: StubStageConfig
    ) -> Tensors:
        self._log.call(self.name, "-", options.seconds)
        return {"features": picture.ravel()[:FEATURES].astype(np.float32)}


class StubDenoise(DenoiseStage[StubStageConfig, None]):
    version = 1
    device_kind = "gpu"
    guessed_seconds = GUESS_S

    def __init__(self, backend: StubBackend, log: CallLog) -> None:
        super().__init__(backend)
        self._log = log

    def weight_names(self, options: StubStageConfig) -> tuple[str, ...]:
        """Read by nobody, but each lane must have them."""
        return self.backend.config.weights

    def load_models(self, options: StubStageConfig, device: str, memory: str | None) -> None:
        self._log.call("load", str(os.getpid()), 0.0)
        return None

    def denoise(
        self,
        models: None,
        conditions: Mapping[str, Tensors],
        fps: float,
        seed: int,
        options: StubStageConfig,
        report: Report,
        unfinished: Path | None,
    ) -> Tensors:
        features = conditions["audio"]["features"] + conditions["reference"]["features"]
        self._log.call(self.name, str(seed), options.seconds * SLOWNESS, announced=True)
        return {"latents": features}


class StubDecode(DecodeStage[StubStageConfig, None]):
    """Encodes no video."""

    version = 1
    guessed_seconds = 0.5

    def __init__(self, backend: StubBackend, log: CallLog) -> None:
        super().__init__(backend)
        self._log = log

    def load_models(self, options: StubStageConfig, device: str, memory: str | None) -> None:
        return None

    def frames(self, *arguments: Any) -> Iterator[Picture]:
        raise NotImplementedError

    def process(
        self, item: Item, config: DecodeStageConfig, models: None, scratch: Path, report: Report
    ) -> Output:
        latents = item.inputs["denoise"][0].tensors["latents"]
        self._log.call(self.name, item.key, config.backend.seconds)
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
