"""Audio: the recordings of a clip, decoded and turned into the features that the backend wants."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from avatar_core.config import AudioConfig
from avatar_core.errors import InputError, about
from avatar_core.media.audio import loudness_db, mono_and_stereo_db
from avatar_core.media.speakers import speaker_tracks
from avatar_core.stages.base import BackendStage, Item, Output, Report

SAMPLE_RATE = 16_000

_FAINT_DB = 20  # so little above silence, a recording may be what two channels leave of each other
_CANCELLED_DB = 20  # so much softer than one side, a mono mix has lost what is said

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
class AudioStageConfig:
    segment: Segment
    fps: float
    silence_db: float = AudioConfig.silence_db
    backend: Any = None


class AudioStage(BackendStage):
    name = "audio"
    columns = pa.schema(
        {
            "num_frames": pa.int64(),
            "duration_s": pa.float64(),
            "speakers": pa.int64(),
            "loudness_db": pa.float64(),
        }
    )

    def process(
        self, item: Item, config: AudioStageConfig, models: Any, scratch: Path, report: Report
    ) -> Output:
        segment = config.segment
        with about("recording"):
            tracks = read_tracks(item.assets["audio"], segment)
        loudnesses = [loudness_db(track) for track in tracks]
        for number, path in enumerate(item.assets["audio"]):
            if loudnesses[number] < config.silence_db + _FAINT_DB:
                with about(f"recording {number + 1}" if len(tracks) > 1 else "recording"):
                    _check_polarity(path, config.silence_db)
        loudness = max(loudnesses)
        if loudness < config.silence_db:
            raise InputError(
                f"recording: is silent: {loudness:.0f} dBFS, quieter than audio.silence_db="
                f"{config.silence_db:g}; use a recording with speech or lower the limit"
            )
        num_frames = self.backend.num_frames(segment.duration_s, config.fps)
        return Output(
            {
                "num_frames": num_frames,
                "duration_s": segment.duration_s,
                "speakers": len(tracks),
                "loudness_db": loudness,
            },
            self.backend.encode_audio(models, tracks, SAMPLE_RATE, config.fps, num_frames),
        )


def _check_polarity(path: Path, silence_db: float) -> None:
    mono, stereo = mono_and_stereo_db(path, SAMPLE_RATE)
    if stereo >= silence_db and mono <= stereo - _CANCELLED_DB:
        left = "nothing is left" if mono < silence_db else f"{mono:.0f} dBFS are left"
        raise InputError(
            f"its channels cancel each other out: of {stereo:.0f} dBFS {left} when they are mixed to mono; "
            "give a mono recording, or turn the polarity of one channel round"
        )


def read_tracks(paths: Sequence[Path], segment: Segment) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """One mono recording per speaker at `SAMPLE_RATE`, equally long."""
    return speaker_tracks(
        paths, segment.combine, SAMPLE_RATE, start_s=segment.start_s, duration_s=segment.duration_s
    )
