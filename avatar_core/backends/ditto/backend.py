"""The `ditto` backend: Ditto (https://arxiv.org/abs/2411.19509), one speaker, in motion space."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from avatar_core.backends.base import CheckpointBackend, covering_frames, with_scale
from avatar_core.backends.ditto.config import DittoConfig
from avatar_core.backends.ditto.stages import (
    DittoAudio,
    DittoDecode,
    DittoDenoise,
    DittoReference,
    official_config,
)
from avatar_core.errors import InputError, about
from avatar_core.stages.audio import SAMPLE_RATE
from avatar_core.stages.base import Picture
from avatar_core.stages.clip_stage import BackendStage, Scale

FPS = 25


class DittoBackend(CheckpointBackend):
    name = "ditto"
    label = "Ditto"
    config_type = DittoConfig
    config: DittoConfig
    takes_video = True

    def __init__(self, config: DittoConfig) -> None:
        super().__init__(config)
        self.frames_in_turn = config.mode == "parity"

    def resolve(self) -> Self:
        resolved = super().resolve()
        official_config(self.config.checkpoint, used=self.config.official_config)
        return resolved

    def num_frames(self, duration_s: float, fps: float) -> int:
        if fps != FPS:
            raise InputError(
                f"fps={fps:g}: backend ditto renders {FPS} frames a second; leave it out or set it to {FPS}"
            )
        if self.config.mode == "parity":
            return int(np.ceil(round(duration_s * SAMPLE_RATE) / SAMPLE_RATE * FPS))
        return covering_frames(duration_s, fps)

    def fit_picture(self, picture: Picture, max_side: int) -> tuple[Picture, Scale]:
        from avatar_core.backends.ditto.crop import fit_picture

        with about("picture"):
            return with_scale(fit_picture(picture, max_side), picture)

    def own_stages(self) -> Sequence[BackendStage[Any, Any, Any]]:
        checkpoint = self.config.checkpoint
        return (
            DittoAudio(self, checkpoint),
            DittoReference(self, checkpoint),
            DittoDenoise(self, checkpoint),
            DittoDecode(self, checkpoint),
        )

    def write_tiny_checkpoint(self, folder: Path) -> None:
        from avatar_core.backends.ditto.tiny import write_tiny_checkpoint

        write_tiny_checkpoint(folder)
