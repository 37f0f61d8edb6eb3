"""What is known of a clip before any work: the facts from which each stage takes its own configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from avatar_core.config import AudioConfig, FaceConfig, InputConfig, VideoConfig
from avatar_core.stages.base import Asset

Combination = Literal["para", "add", "turns"] | None
"""Two speakers at the same time (`para`), one after the other (`add`), or in recordings that run at the same
time and of which only one holds speech at once (`turns`)."""


@dataclass(frozen=True)
class Segment:
    """Which stretch of the recordings a clip is; `duration_s` is the exact length of the clip."""

    duration_s: float
    start_s: float = 0.0
    combine: Combination = None


@dataclass(frozen=True)
class SoundFormat:
    """Of a clip's sound: `channels` are 1 or 2."""

    sample_rate: int
    channels: int


@dataclass(frozen=True, eq=False)
class BatchOptions:
    """The parts of a batch's configuration that stages read. Equal only to itself, which is quick to tell."""

    input: InputConfig
    audio: AudioConfig
    face: FaceConfig
    video: VideoConfig


@dataclass(frozen=True, eq=False)
class BackendOptions:
    """The backend's own options by stage, after a row's `params`; none for a stage without options. Equal
    only to itself."""

    by_stage: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Subject:
    """The facts of one clip. `picture` is the asset of a picture, or of `footage`; `recordings` are one per
    speaker, as are `boxes` where the row has any: x_min, y_min, x_max, y_max in pixels of the upright
    picture. `window` is that of the item of a chained stage, 0 elsewhere."""

    batch: BatchOptions
    options: BackendOptions
    picture: Asset
    footage: bool
    recordings: tuple[Asset, ...]
    sound: SoundFormat
    segment: Segment
    fps: float
    boxes: tuple[tuple[float, ...], ...]
    prompt: str
    negative_prompt: str | None
    seed: int
    window: int = 0

    @property
    def speakers(self) -> int:
        return len(self.recordings)
