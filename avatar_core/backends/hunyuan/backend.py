"""The `hunyuan` backend: HunyuanVideo-Avatar (https://arxiv.org/abs/2505.20156), 13B, one speaker."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avatar_core.backends.base import CheckpointBackend, covering_frames, with_scale
from avatar_core.backends.hunyuan.audio import parity_num_frames
from avatar_core.backends.hunyuan.config import HunyuanConfig
from avatar_core.backends.hunyuan.picture import fit_picture
from avatar_core.backends.hunyuan.stages import (
    HunyuanAudio,
    HunyuanDecode,
    HunyuanDenoise,
    HunyuanReference,
    HunyuanText,
)
from avatar_core.errors import about
from avatar_core.stages.base import Picture
from avatar_core.stages.clip_stage import BackendStage, Scale


class HunyuanBackend(CheckpointBackend):
    name = "hunyuan"
    label = "HunyuanVideo-Avatar"
    config_type = HunyuanConfig
    config: HunyuanConfig

    def num_frames(self, duration_s: float, fps: float) -> int:
        if self.config.mode == "parity":
            return parity_num_frames(duration_s, fps)
        return covering_frames(duration_s, fps)

    def fit_picture(self, picture: Picture, max_side: int) -> tuple[Picture, Scale]:
        """By `image_size`; `max_side` is for backends of any size."""
        with about("picture"):
            return with_scale(fit_picture(picture, self.config.image_size), picture)

    def own_stages(self) -> Sequence[BackendStage[Any, Any, Any]]:
        checkpoint = self.config.checkpoint
        return (
            HunyuanAudio(self, checkpoint),
            HunyuanText(self, checkpoint),
            HunyuanReference(self, checkpoint),
            HunyuanDenoise(self, checkpoint),
            HunyuanDecode(self, checkpoint),
        )

    def write_tiny_checkpoint(self, folder: Path) -> None:
        from avatar_core.backends.hunyuan.tiny import write_tiny_checkpoint

        write_tiny_checkpoint(folder)
