"""The `multitalk` backend: MultiTalk (https://arxiv.org/abs/2505.22647) on Wan2.1 14B, 1 or 2 speakers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avatar_core.backends.base import CheckpointBackend
from avatar_core.backends.multitalk.config import MultiTalkConfig
from avatar_core.backends.multitalk.picture import fit_picture
from avatar_core.backends.multitalk.stages import (
    MultiTalkAudio,
    MultiTalkDecode,
    MultiTalkDenoise,
    MultiTalkReference,
    MultiTalkText,
)
from avatar_core.backends.multitalk.windows import num_speech_frames, num_video_frames
from avatar_core.errors import about
from avatar_core.stages.base import Picture
from avatar_core.stages.clip_stage import BackendStage, Scale


class MultiTalkBackend(CheckpointBackend):
    name = "multitalk"
    label = "MultiTalk"
    config_type = MultiTalkConfig
    config: MultiTalkConfig
    max_speakers = 2

    def num_frames(self, duration_s: float, fps: float) -> int:
        speech = num_speech_frames(duration_s, fps, self.config.mode)
        return num_video_frames(speech, self.config.denoise)

    def fit_picture(self, picture: Picture, max_side: int) -> tuple[Picture, Scale]:
        """By `image_size`; `max_side` is for backends of any size. What does not fit is cut off on both
        sides."""
        with about("picture"):
            fitted = fit_picture(picture, self.config.image_size)
        scale = max(fitted.shape[0] / picture.shape[0], fitted.shape[1] / picture.shape[1])
        return fitted, (scale, scale)

    def own_stages(self) -> Sequence[BackendStage[Any, Any, Any]]:
        checkpoint = self.config.checkpoint
        return (
            MultiTalkAudio(self, checkpoint),
            MultiTalkText(self, checkpoint),
            MultiTalkReference(self, checkpoint),
            MultiTalkDenoise(self, checkpoint),
            MultiTalkDecode(self, checkpoint, self.config.denoise),
        )

    def write_tiny_checkpoint(self, folder: Path) -> None:
        from avatar_core.backends.multitalk.tiny import write_tiny_checkpoint

        write_tiny_checkpoint(folder)
