"""The `preview` backend: a procedural talking head. No weights to download, no GPU, any machine.

The picture's own pixels are warped by outlines of mouth and eyes, driven by the formants of the speech. It
is a draft of the clip, not a neural rendering, and every result says so.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from avatar_core import weights
from avatar_core.backends.base import Backend
from avatar_core.backends.preview.config import PreviewConfig, ReferenceConfig
from avatar_core.backends.preview.stages import (
    MESH,
    PreviewAudio,
    PreviewDecode,
    PreviewDenoise,
    PreviewReference,
)
from avatar_core.media.image import fit
from avatar_core.stages.base import Picture
from avatar_core.stages.clip_stage import BackendStage, Scale


class PreviewBackend(Backend):
    name = "preview"
    label = "procedural preview (no neural network renders these frames)"
    config_type = PreviewConfig
    config: PreviewConfig
    max_speakers = 2
    renders_on_cpu = True

    def resolve(self) -> "PreviewBackend":
        landmarks = self.config.reference.landmarks
        if landmarks == "auto":
            landmarks = "mesh" if weights.present(MESH) else "points"
        elif landmarks == "mesh":
            weights.locate(MESH)
        return type(self)(dataclasses.replace(self.config, reference=ReferenceConfig(landmarks)))

    def fit_picture(self, picture: Picture, max_side: int) -> tuple[Picture, Scale]:
        scale = min(1.0, max_side / max(picture.shape[:2]))
        return fit(picture, max_side), (scale, scale)

    def own_stages(self) -> Sequence[BackendStage[Any, Any, Any]]:
        return PreviewAudio(self), PreviewReference(self), PreviewDenoise(self), PreviewDecode(self)
