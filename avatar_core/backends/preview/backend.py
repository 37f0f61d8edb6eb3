"""The `preview` backend: a procedural talking head. No weights to download, no GPU, any machine.

The picture's own pixels are warped by outlines of mouth and eyes, driven by the formants of the speech. It
is a draft of the clip, not a neural rendering, and every result says so. Planning must start fast, so
what draws and listens (scipy, librosa) is imported by the methods that use it.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from avatar_core import weights
from avatar_core.backends.base import Picture, ReportStep, Tensors
from avatar_core.media.face import Face
from avatar_core.media.image import fit

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_MESH = "face-mesh"


@dataclass(frozen=True)
class ReferenceConfig:
    """`landmarks`: outlines from the 468-point mesh, from the detector's 5 points, or the best present."""

    __pydantic_config__ = _STRICT
    landmarks: Literal["auto", "mesh", "points"] = "auto"


@dataclass(frozen=True)
class DenoiseConfig:
    __pydantic_config__ = _STRICT
    mouth_gain: Annotated[float, Field(ge=0, le=1.5)] = field(default=1.0, metadata={"row": True})
    head_motion: Annotated[float, Field(ge=0, le=2)] = field(default=1.0, metadata={"row": True})
    blinks: bool = field(default=True, metadata={"row": True})


@dataclass(frozen=True)
class PreviewConfig:
    __pydantic_config__ = _STRICT
    reference: ReferenceConfig = ReferenceConfig()
    denoise: DenoiseConfig = DenoiseConfig()


class PreviewBackend:
    name = "preview"
    label = "procedural preview (no neural network renders these frames)"
    config_type = PreviewConfig
    guessed_seconds: ClassVar = MappingProxyType(
        {"audio": 0.05, "reference": 0.3, "denoise": 0.01, "decode": 0.5}
    )
    max_speakers = 2
    text_sees_picture = False
    versions: ClassVar = MappingProxyType({"audio": 1, "reference": 2, "denoise": 1, "decode": 3})
    queues: ClassVar = MappingProxyType(
        {"audio": "cpu", "reference": "cpu", "denoise": "cpu", "decode": "cpu"}
    )

    def __init__(self, config: PreviewConfig) -> None:
        self.config = config

    def resolve(self) -> "PreviewBackend":
        landmarks = self.config.reference.landmarks
        if landmarks == "auto":
            landmarks = "mesh" if weights.present(_MESH) else "points"
        elif landmarks == "mesh":
            weights.locate(_MESH)
        return PreviewBackend(dataclasses.replace(self.config, reference=ReferenceConfig(landmarks)))

    def weights(self, stage: str, config: Any) -> tuple[str, ...]:
        return (_MESH,) if stage == "reference" and config.landmarks == "mesh" else ()

    def fit_picture(
        self, picture: Picture, max_side: int, config: Any
    ) -> tuple[Picture, tuple[float, float]]:
        scale = min(1.0, max_side / max(picture.shape[:2]))
        return fit(picture, max_side), (scale, scale)

    def num_frames(self, duration_s: float, fps: float) -> int:
        # A hair less than a whole frame too much is rounding of the sample count, not a frame.
        return max(1, int(np.ceil(duration_s * fps - 1e-3)))

    def load(self, stage: str, config: Any, device: str, memory: str | None) -> Any:
        if self.weights(stage, config):
            return weights.locate(_MESH) / "face_landmark.tflite"
        return None

    def encode_audio(
        self,
        models: Any,
        tracks: Sequence[NDArray[np.float32]],
        sample_rate: int,
        fps: float,
        num_frames: int,
    ) -> Tensors:
        from avatar_core.backends.preview.visemes import make_visemes

        visemes = [make_visemes(track, sample_rate, fps, num_frames) for track in tracks]
        return {
            name: np.stack([getattr(v, name) for v in visemes]).astype(np.float32)
            for name in ("mouth_open", "mouth_wide", "energy")
        }

    def encode_picture(self, models: Any, picture: Picture, faces: Sequence[Face], config: Any) -> Tensors:
        from avatar_core.backends.preview import contours

        if models:
            found = [contours.contours_from_mesh(picture, face, models) for face in faces]
        else:
            found = [contours.contours_from_points(picture, face) for face in faces]
        return contours.contours_to_tensors(found)

    def denoise(
        self,
        models: Any,
        conditions: Mapping[str, Tensors],
        fps: float,
        seed: int,
        config: Any,
        report: ReportStep,
        unfinished: Path | None,
    ) -> Tensors:
        from avatar_core.backends.preview.motion import Motion, make_motion
        from avatar_core.backends.preview.visemes import Visemes

        audio = conditions["audio"]
        speakers = [
            make_motion(
                Visemes(*(audio[name][s] for name in ("mouth_open", "mouth_wide", "energy"))),
                fps,
                seed + s,
                mouth_gain=config.mouth_gain,
                head_motion=config.head_motion,
                blinks=config.blinks,
            )
            for s in range(len(audio["energy"]))
        ]
        return {name: np.stack([getattr(m, name) for m in speakers]) for name in Motion.__dataclass_fields__}

    def decode(
        self, models: Any, picture: Picture, conditions: Mapping[str, Tensors], config: Any
    ) -> Iterator[Picture]:
        from avatar_core.backends.preview.contours import contours_from_tensors
        from avatar_core.backends.preview.renderer import Renderer

        faces = contours_from_tensors(conditions["reference"])
        renderer = Renderer(picture, faces)
        # Without face.required there may be fewer faces than speakers.
        motion = {name: values[: len(faces)] for name, values in conditions["denoise"].items()}
        for i in range(conditions["denoise"]["blink"].shape[1]):
            yield renderer.frame(
                motion["mouth_open"][:, i],
                motion["mouth_wide"][:, i],
                motion["blink"][:, i],
                motion["head"][:, i],
            )
