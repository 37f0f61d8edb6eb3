"""All models that register a source, from the stored faces of a picture to the tensors of its avatar."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from avatar_core.backends.ditto.appearance import AppearanceExtractor
from avatar_core.backends.ditto.motion_extractor import MotionExtractor
from avatar_core.backends.ditto.motion_vector import Array
from avatar_core.backends.ditto.registration import (
    BoxLandmarks,
    CropLandmarks,
    FaceDetection,
    FaceFinder,
    RegistrationSettings,
    register,
)
from avatar_core.media.face import Face, Picture


def registration_settings(options: Mapping[str, Any], *, parity: bool) -> RegistrationSettings:
    """From options under their published names."""
    names = ("crop_scale", "crop_vx_ratio", "crop_vy_ratio", "crop_flag_do_rot", "smo_k_s")
    return RegistrationSettings(**{name: options[name] for name in names}, parity=parity)


@dataclass(frozen=True)
class FaceModels:
    """Without `landmark106`, five points of the detector lead to the face."""

    detector: FaceDetection
    landmark106: BoxLandmarks | None
    landmark203: CropLandmarks
    landmark478: CropLandmarks


class Registrar:
    def __init__(
        self,
        faces: FaceModels,
        appearance: AppearanceExtractor,
        motion: MotionExtractor,
        settings: RegistrationSettings,
    ) -> None:
        self._faces, self._settings = faces, settings
        self._appearance, self._motion = appearance, motion
        parameter = next(appearance.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype

    def register(
        self, frames: Iterable[Picture], speakers: Sequence[Face], *, is_image: bool
    ) -> dict[str, NDArray[Any]]:
        """Tensors of the `Avatar`; `speakers` are the chosen faces of the first frame, if any."""
        finder = FaceFinder(
            self._faces.detector,
            self._faces.landmark106,
            self._faces.landmark203,
            self._settings,
            speaker=speakers[0] if speakers else None,
        )
        avatar = register(
            frames,
            finder,
            self._faces.landmark478,
            self._features,
            self._source_motion,
            self._settings,
            is_image=is_image,
        )
        return avatar.tensors()

    @torch.inference_mode()
    def _features(self, pixels: Array) -> NDArray[Any]:
        """float16 where the network computes in half precision."""
        volume = self._appearance(self._tensor(pixels))
        kept = torch.float32 if self._dtype == torch.float32 else torch.float16
        return np.asarray(volume.to(kept).cpu().numpy())

    @torch.inference_mode()
    def _source_motion(self, pixels: Array) -> dict[str, Array]:
        return {name: values.cpu().numpy() for name, values in self._motion(self._tensor(pixels)).items()}

    def _tensor(self, pixels: Array) -> torch.Tensor:
        return torch.from_numpy(pixels).to(self._device, self._dtype)
