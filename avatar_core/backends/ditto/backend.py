"""The `ditto` backend: Ditto (https://arxiv.org/abs/2411.19509), a talking head in motion space, one speaker.

Planning must start fast, so what computes (torch, onnxruntime) is imported by the methods that use it.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from avatar_core import weights
from avatar_core.backends.base import Picture, ReportStep, Tensors
from avatar_core.backends.ditto.config import STAGES, DittoConfig, chosen
from avatar_core.backends.ditto.files import model_file, model_files
from avatar_core.errors import InputError, about
from avatar_core.media.face import Face
from avatar_core.weights.ensure import ensure

FPS = 25
MAX_SOURCE_FRAMES = 1000

_TINY = "ditto-tiny"
_SAMPLE_RATE = 16_000


class DittoBackend:
    name = "ditto"
    label = "Ditto"
    config_type = DittoConfig
    versions: ClassVar = MappingProxyType(
        dict.fromkeys(STAGES, 1) | {"audio": 2, "reference": 2, "decode": 2}
    )
    guessed_seconds: ClassVar = MappingProxyType(
        {"audio": 1.0, "reference": 3.0, "denoise": 0.2, "decode": 1.0}
    )
    max_speakers = 1
    text_sees_picture = False
    takes_video = True

    def __init__(self, config: DittoConfig) -> None:
        self.config = config
        self.frames_in_turn = config.mode == "parity"
        # Random weights prove the chain on any machine.
        heavy = "cpu" if config.checkpoint == _TINY else "gpu"
        self.queues: Mapping[str, str] = dict.fromkeys(STAGES, heavy) | {"audio": "cpu"}

    def resolve(self) -> "DittoBackend":
        checkpoint = self.config.checkpoint
        used = [name for stage in STAGES for name in self.weights(stage, getattr(self.config, stage))]
        ensure(checkpoint, list(dict.fromkeys(used)), _write_tiny if checkpoint == _TINY else None)
        if self.config.official_config:
            self._official_config()
        return self

    def weights(self, stage: str, config: Any) -> tuple[str, ...]:
        parts: dict[str, tuple[str, ...]] = {
            "audio": ("hubert",),
            "reference": ("landmark203", "landmark478", "appearance", "motion"),
            "denoise": ("lmdm",),
            "decode": ("stitch", "warp", "decoder"),
        }
        own = parts[stage]
        if stage == "reference" and config.detector == "insightface":
            own += ("detector", "landmark106")
        if stage != "audio" and config.official_config:
            own += ("config",)
        names = tuple(f"{self.config.checkpoint}/{part}" for part in own)
        return (*names, "mtcnn") if stage == "reference" and config.detector == "mtcnn" else names

    def fit_picture(
        self, picture: Picture, max_side: int, config: Any
    ) -> tuple[Picture, tuple[float, float]]:
        from avatar_core.backends.ditto.crop import fit_picture

        with about("picture"):
            fitted = fit_picture(picture, max_side)
        return fitted, (fitted.shape[1] / picture.shape[1], fitted.shape[0] / picture.shape[0])

    def num_frames(self, duration_s: float, fps: float) -> int:
        if fps != FPS:
            raise InputError(
                f"fps={fps:g}: backend ditto renders {FPS} frames a second; leave it out or set it to {FPS}"
            )
        if self.config.mode == "parity":
            return int(np.ceil(round(duration_s * _SAMPLE_RATE) / _SAMPLE_RATE * FPS))
        # A hair less than a whole frame too much is rounding of the sample count, not a frame.
        return max(1, int(np.ceil(duration_s * fps - 1e-3)))

    def load(self, stage: str, config: Any, device: str, memory: str | None) -> Any:
        if stage == "audio":
            from avatar_core.backends.ditto.audio import HubertEncoder

            return HubertEncoder(self._file("hubert"), device)
        loaders = {
            "reference": self._load_registrar,
            "denoise": self._load_motion,
            "decode": self._load_renderer,
        }
        return loaders[stage](config, device)

    def _file(self, part: str) -> Path:
        return model_file(self.config.checkpoint, part)

    def _network(self, part: str, device: str, precision: str = "fp32") -> Any:
        from avatar_core.backends.ditto.official import dtype_on, load_network

        return load_network(part, self._file(part), device, dtype_on(device, precision))

    def _official_config(self) -> Any:
        from avatar_core.backends.ditto.config_reader import OfficialConfig, read_official_config

        if not self.config.official_config:
            return OfficialConfig()
        return read_official_config(self.config.checkpoint)

    def _load_registrar(self, config: Any, device: str) -> Any:
        from avatar_core.backends.ditto.registrar import FaceModels, Registrar, registration_settings
        from avatar_core.media.face import FaceDetector
        from avatar_core.media.face_mesh import FaceMesh
        from avatar_core.media.landmarks import Landmark106, Landmark203
        from avatar_core.media.scrfd import ScrfdDetector

        insightface = config.detector == "insightface"
        blaze_face, face_mesh = model_files(self.config.checkpoint, "landmark478")
        faces = FaceModels(
            ScrfdDetector(self._file("detector"), device)
            if insightface
            else FaceDetector(weights.locate("mtcnn")),
            Landmark106(self._file("landmark106"), device) if insightface else None,
            Landmark203(self._file("landmark203"), device),
            FaceMesh(blaze_face, face_mesh, device),
        )
        appearance = self._network("appearance", device, config.precision)
        motion = self._network("motion", device, config.precision)
        options = chosen(config, self._official_config().defaults)
        settings = registration_settings(options, parity=config.mode == "parity")
        return Registrar(faces, appearance, motion, settings)

    def _load_motion(self, config: Any, device: str) -> Any:
        from avatar_core.backends.ditto.clip_motion import ClipMotion

        return ClipMotion(self._network("lmdm", device), self._official_config())

    def _load_renderer(self, config: Any, device: str) -> Any:
        from avatar_core.backends.ditto.rendering import Renderer

        stitched = chosen(config, self._official_config().defaults)["flag_stitching"]
        warping = self._network("warp", device, config.precision)
        decoder = self._network("decoder", device, config.precision)
        renderer = Renderer(self._network("stitch", device) if stitched else None, warping, decoder)
        if config.compile:
            renderer.compile(config.batch_frames)
        return renderer

    def encode_audio(
        self,
        models: Any,
        tracks: Sequence[NDArray[np.float32]],
        sample_rate: int,
        fps: float,
        num_frames: int,
    ) -> Tensors:
        """One row of features for each frame."""
        from avatar_core.backends.ditto.audio import FRAME_SAMPLES, encode

        least = (num_frames - 1) * FRAME_SAMPLES + 1
        samples = np.pad(tracks[0], (0, max(0, least - len(tracks[0]))))
        return {"features": encode(samples, models)[:num_frames]}

    def encode_picture(self, models: Any, picture: Picture, faces: Sequence[Face], config: Any) -> Tensors:
        registered: Tensors = models.register([picture], faces, is_image=True)
        return registered

    def encode_video(
        self, models: Any, frames: Sequence[Picture], faces: Sequence[Face], config: Any
    ) -> Tensors:
        wanted = chosen(config, self._official_config().defaults)["template_n_frames"]
        num_frames = min(len(frames), wanted) if wanted > 0 else len(frames)
        if num_frames > MAX_SOURCE_FRAMES:
            raise InputError(
                f"video: has {num_frames} frames; backend ditto takes {MAX_SOURCE_FRAMES} at most: use a "
                "shorter one or set backend.reference.template_n_frames"
            )
        registered: Tensors = models.register(islice(frames, num_frames), faces, is_image=False)
        return registered

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
        from avatar_core.backends.ditto.registration import Avatar

        avatar = Avatar.from_tensors(conditions["reference"])
        motion: Tensors = models(conditions["audio"]["features"], avatar, seed, config, report)
        return motion

    def decode(
        self, models: Any, picture: Any, conditions: Mapping[str, Tensors], config: Any
    ) -> Iterator[Picture]:
        """`picture` is one, or a sequence of frames."""
        from avatar_core.backends.ditto.clip_renderer import rendered_frames
        from avatar_core.backends.ditto.putback import Composer

        reference = conditions["reference"]
        pictures = [picture] if isinstance(picture, np.ndarray) else picture
        composer = Composer(pictures, reference["crop_to_picture"], config.image_size)
        return rendered_frames(models, composer, reference, conditions["denoise"], config.batch_frames)


def _write_tiny(folder: Path) -> None:
    from avatar_core.backends.ditto.tiny import write_tiny_checkpoint

    write_tiny_checkpoint(folder)
