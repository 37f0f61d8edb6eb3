"""The stages of the `ditto` backend.

Planning must start fast, so what computes (torch, onnxruntime) is imported by the methods that use it.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from avatar_core import weights
from avatar_core.backends.ditto.config import (
    AudioConfig,
    DecodeConfig,
    DenoiseConfig,
    ReferenceConfig,
    chosen,
)
from avatar_core.backends.ditto.files import model_file, model_files
from avatar_core.errors import InputError
from avatar_core.media.face import Face, FaceDetector
from avatar_core.stages.audio import AudioStage, Track
from avatar_core.stages.base import Picture, Report, Tensors
from avatar_core.stages.decode import FootageDecodeStage
from avatar_core.stages.denoise import DenoiseStage
from avatar_core.stages.reference import FootageReferenceStage

if TYPE_CHECKING:
    from avatar_core.backends.ditto.audio import HubertEncoder
    from avatar_core.backends.ditto.clip_motion import ClipMotion
    from avatar_core.backends.ditto.config_reader import OfficialConfig
    from avatar_core.backends.ditto.registrar import FaceModels, Registrar
    from avatar_core.backends.ditto.rendering import Renderer

MAX_SOURCE_FRAMES = 1000


class DittoAudio(AudioStage[AudioConfig, "HubertEncoder"]):
    version = 2
    guessed_seconds = 1.0

    def parts(self, options: AudioConfig) -> tuple[str, ...]:
        return ("hubert",)

    def load_models(self, options: AudioConfig, device: str, memory: str | None) -> "HubertEncoder":
        from avatar_core.backends.ditto.audio import HubertEncoder

        return HubertEncoder(model_file(self.checkpoint, "hubert"), device)

    def encode(
        self,
        models: "HubertEncoder",
        tracks: Sequence[Track],
        fps: float,
        num_frames: int,
        options: AudioConfig,
    ) -> Tensors:
        """One row of features for each frame."""
        from avatar_core.backends.ditto.audio import FRAME_SAMPLES, encode

        least = (num_frames - 1) * FRAME_SAMPLES + 1
        samples = np.pad(tracks[0], (0, max(0, least - len(tracks[0]))))
        return {"features": encode(samples, models)[:num_frames]}


class DittoReference(FootageReferenceStage[ReferenceConfig, "Registrar"]):
    version = 2
    device_kind = "gpu"
    guessed_seconds = 3.0

    def parts(self, options: ReferenceConfig) -> tuple[str, ...]:
        return (
            *("landmark203", "landmark478", "appearance", "motion"),
            *(("detector", "landmark106") if options.detector == "insightface" else ()),
            *_config_part(options.official_config),
        )

    def weight_names(self, options: ReferenceConfig) -> tuple[str, ...]:
        names = super().weight_names(options)
        return (*names, "mtcnn") if options.detector == "mtcnn" else names

    def load_models(self, options: ReferenceConfig, device: str, memory: str | None) -> "Registrar":
        from avatar_core.backends.ditto.registrar import Registrar, registration_settings

        appearance = _network(self.checkpoint, "appearance", device, options.precision)
        motion = _network(self.checkpoint, "motion", device, options.precision)
        settings = registration_settings(self._chosen(options), parity=options.mode == "parity")
        return Registrar(self._face_models(options, device), appearance, motion, settings)

    def _face_models(self, options: ReferenceConfig, device: str) -> "FaceModels":
        from avatar_core.backends.ditto.registrar import FaceModels
        from avatar_core.media.face_mesh import FaceMesh
        from avatar_core.media.landmarks import Landmark106, Landmark203
        from avatar_core.media.scrfd import ScrfdDetector

        landmark203 = Landmark203(model_file(self.checkpoint, "landmark203"), device)
        blaze_face, face_mesh = model_files(self.checkpoint, "landmark478")
        mesh = FaceMesh(blaze_face, face_mesh, device)
        if options.detector == "mtcnn":
            return FaceModels(FaceDetector(weights.locate("mtcnn")), None, landmark203, mesh)
        detector = ScrfdDetector(model_file(self.checkpoint, "detector"), device)
        landmark106 = Landmark106(model_file(self.checkpoint, "landmark106"), device)
        return FaceModels(detector, landmark106, landmark203, mesh)

    def _chosen(self, options: ReferenceConfig) -> dict[str, Any]:
        return chosen(options, official_config(self.checkpoint, used=options.official_config).defaults)

    def encode(
        self, models: "Registrar", picture: Picture, faces: Sequence[Face], options: ReferenceConfig
    ) -> Tensors:
        return models.register([picture], faces, is_image=True)

    def encode_footage(
        self,
        models: "Registrar",
        frames: Sequence[Picture],
        faces: Sequence[Face],
        options: ReferenceConfig,
    ) -> Tensors:
        wanted = self._chosen(options)["template_n_frames"]
        num_frames = min(len(frames), wanted) if wanted > 0 else len(frames)
        if num_frames > MAX_SOURCE_FRAMES:
            raise InputError(
                f"video: has {num_frames} frames; backend ditto takes {MAX_SOURCE_FRAMES} at most: use a "
                "shorter one or set backend.reference.template_n_frames"
            )
        return models.register(islice(frames, num_frames), faces, is_image=False)


class DittoDenoise(DenoiseStage[DenoiseConfig, "ClipMotion"]):
    """Its latents are the motion."""

    version = 1
    device_kind = "gpu"
    guessed_seconds = 0.2

    def parts(self, options: DenoiseConfig) -> tuple[str, ...]:
        return ("lmdm", *_config_part(options.official_config))

    def load_models(self, options: DenoiseConfig, device: str, memory: str | None) -> "ClipMotion":
        from avatar_core.backends.ditto.clip_motion import ClipMotion

        official = official_config(self.checkpoint, used=options.official_config)
        return ClipMotion(_network(self.checkpoint, "lmdm", device), official)

    def denoise(
        self,
        models: "ClipMotion",
        conditions: Mapping[str, Tensors],
        fps: float,
        seed: int,
        options: DenoiseConfig,
        report: Report,
        unfinished: Path | None,
    ) -> Tensors:
        from avatar_core.backends.ditto.registration import Avatar

        avatar = Avatar.from_tensors(conditions["reference"])
        return models(conditions["audio"]["features"], avatar, seed, options, report)


class DittoDecode(FootageDecodeStage[DecodeConfig, "Renderer"]):
    version = 2
    device_kind = "gpu"
    guessed_seconds = 1.0

    def parts(self, options: DecodeConfig) -> tuple[str, ...]:
        return ("stitch", "warp", "decoder", *_config_part(options.official_config))

    def load_models(self, options: DecodeConfig, device: str, memory: str | None) -> "Renderer":
        from avatar_core.backends.ditto.rendering import Renderer

        official = official_config(self.checkpoint, used=options.official_config)
        stitched = chosen(options, official.defaults)["flag_stitching"]
        renderer = Renderer(
            _network(self.checkpoint, "stitch", device) if stitched else None,
            _network(self.checkpoint, "warp", device, options.precision),
            _network(self.checkpoint, "decoder", device, options.precision),
        )
        if options.compile:
            renderer.compile(options.batch_frames)
        return renderer

    def frames(
        self,
        models: "Renderer",
        picture: Picture,
        conditions: Mapping[str, Tensors],
        options: DecodeConfig,
    ) -> Iterator[Picture]:
        return self.footage_frames(models, [picture], conditions, options)

    def footage_frames(
        self,
        models: "Renderer",
        footage: Sequence[Picture],
        conditions: Mapping[str, Tensors],
        options: DecodeConfig,
    ) -> Iterator[Picture]:
        from avatar_core.backends.ditto.clip_renderer import rendered_frames
        from avatar_core.backends.ditto.putback import Composer

        reference = conditions["reference"]
        composer = Composer(footage, reference["crop_to_picture"], options.image_size)
        return rendered_frames(models, composer, reference, conditions["denoise"], options.batch_frames)


def official_config(checkpoint: str, *, used: bool) -> "OfficialConfig":
    """The published one of a checkpoint, an empty one where it is not `used`. Raises `WeightsError`."""
    from avatar_core.backends.ditto.config_reader import OfficialConfig, read_official_config

    return read_official_config(checkpoint) if used else OfficialConfig()


def _config_part(used: bool) -> tuple[str, ...]:
    return ("config",) if used else ()


def _network(checkpoint: str, part: str, device: str, precision: str = "fp32") -> Any:
    from avatar_core.backends.ditto.official import dtype_on, load_network

    return load_network(part, model_file(checkpoint, part), device, dtype_on(device, precision))
