"""The stages of the `preview` backend.

Planning must start fast, so what draws and listens (scipy, librosa) is imported by the methods that use it.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from avatar_core import weights
from avatar_core.backends.preview.config import DenoiseConfig, ReferenceConfig
from avatar_core.media.face import Face
from avatar_core.stages.audio import SAMPLE_RATE, AudioStage, Track
from avatar_core.stages.base import Picture, Report, Tensors
from avatar_core.stages.decode import DecodeStage
from avatar_core.stages.denoise import DenoiseStage
from avatar_core.stages.reference import ReferenceStage

MESH = "face-mesh"


class PreviewAudio(AudioStage[None, None]):
    version = 2
    guessed_seconds = 0.05

    def load_models(self, options: None, device: str, memory: str | None) -> None:
        return None

    def encode(
        self, models: None, tracks: Sequence[Track], fps: float, num_frames: int, options: None
    ) -> Tensors:
        from avatar_core.backends.preview.visemes import make_visemes

        visemes = [make_visemes(track, SAMPLE_RATE, fps, num_frames) for track in tracks]
        return {
            "mouth_open": np.stack([v.mouth_open for v in visemes]).astype(np.float32),
            "mouth_wide": np.stack([v.mouth_wide for v in visemes]).astype(np.float32),
            "energy": np.stack([v.energy for v in visemes]).astype(np.float32),
        }


class PreviewReference(ReferenceStage[ReferenceConfig, Path | None]):
    """Its model is the file of the face mesh, if it uses one."""

    version = 2
    guessed_seconds = 0.3

    def weight_names(self, options: ReferenceConfig) -> tuple[str, ...]:
        return (MESH,) if options.landmarks == "mesh" else ()

    def load_models(self, options: ReferenceConfig, device: str, memory: str | None) -> Path | None:
        return weights.locate(MESH) / "face_landmark.tflite" if options.landmarks == "mesh" else None

    def encode(
        self, models: Path | None, picture: Picture, faces: Sequence[Face], options: ReferenceConfig
    ) -> Tensors:
        from avatar_core.backends.preview import contours

        if models:
            found = [contours.contours_from_mesh(picture, face, models) for face in faces]
        else:
            found = [contours.contours_from_points(picture, face) for face in faces]
        return contours.contours_to_tensors(found)


class PreviewDenoise(DenoiseStage[DenoiseConfig, None]):
    """Its latents are the motion."""

    version = 1
    guessed_seconds = 0.01

    def load_models(self, options: DenoiseConfig, device: str, memory: str | None) -> None:
        return None

    def denoise(
        self,
        models: None,
        conditions: Mapping[str, Tensors],
        fps: float,
        seed: int,
        options: DenoiseConfig,
        report: Report,
        unfinished: Path | None,
    ) -> Tensors:
        from avatar_core.backends.preview.motion import make_motion
        from avatar_core.backends.preview.visemes import Visemes

        audio = conditions["audio"]
        tracks = zip(audio["mouth_open"], audio["mouth_wide"], audio["energy"], strict=True)
        speakers = [
            make_motion(
                Visemes(*track),
                fps,
                seed + speaker,
                mouth_gain=options.mouth_gain,
                head_motion=options.head_motion,
                blinks=options.blinks,
            )
            for speaker, track in enumerate(tracks)
        ]
        return {name: np.stack([vars(m)[name] for m in speakers]) for name in vars(speakers[0])}


class PreviewDecode(DecodeStage[None, None]):
    version = 3
    guessed_seconds = 0.5

    def load_models(self, options: None, device: str, memory: str | None) -> None:
        return None

    def frames(
        self, models: None, picture: Picture, conditions: Mapping[str, Tensors], options: None
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
