"""Audio: the recordings of a clip, decoded and turned into the features that the backend wants."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from avatar_core.config import AudioConfig
from avatar_core.errors import InputError, about
from avatar_core.media.audio import loudness_db, mono_and_stereo_db
from avatar_core.media.speakers import speaker_tracks
from avatar_core.stages.base import Item, Output, Report, Tensors
from avatar_core.stages.clip_stage import BackendStage, ModelsT, OptionsT
from avatar_core.stages.subject import Segment, Subject

SAMPLE_RATE = 16_000

_FAINT_DB = 20  # so little above silence, a recording may be what two channels leave of each other
_CANCELLED_DB = 20  # so much softer than one side, a mono mix has lost what is said

Track = NDArray[np.float32]
"""One speaker's mono recording, shape (samples,)."""


@dataclass(frozen=True)
class AudioStageConfig:
    segment: Segment
    fps: float
    silence_db: float = AudioConfig.silence_db
    backend: Any = None


class AudioStage(BackendStage[AudioStageConfig, OptionsT, ModelsT], Generic[OptionsT, ModelsT]):
    config_type = AudioStageConfig
    name = "audio"
    noun = "recording"
    facts = ("batch", "options", "segment", "fps")
    reads = ("recordings",)
    columns = pa.schema(
        {
            "num_frames": pa.int64(),
            "duration_s": pa.float64(),
            "speakers": pa.int64(),
            "loudness_db": pa.float64(),
        }
    )

    @abstractmethod
    def encode(
        self, models: ModelsT, tracks: Sequence[Track], fps: float, num_frames: int, options: OptionsT
    ) -> Tensors:
        """Features of a clip's speech; `tracks` are of one speaker each, equally long, at `SAMPLE_RATE`."""
        ...

    def configure(self, subject: Subject) -> AudioStageConfig:
        options = subject.options.by_stage.get(self.name)
        return AudioStageConfig(subject.segment, subject.fps, subject.batch.audio.silence_db, options)

    def work(self, subject: Subject) -> float:
        return subject.segment.duration_s

    def process(
        self, item: Item, config: AudioStageConfig, models: ModelsT, scratch: Path, report: Report
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
            self.encode(models, tracks, config.fps, num_frames, config.backend),
        )


def _check_polarity(path: Path, silence_db: float) -> None:
    mono, stereo = mono_and_stereo_db(path, SAMPLE_RATE)
    if stereo >= silence_db and mono <= stereo - _CANCELLED_DB:
        left = "nothing is left" if mono < silence_db else f"{mono:.0f} dBFS are left"
        raise InputError(
            f"its channels cancel each other out: of {stereo:.0f} dBFS {left} when they are mixed to mono; "
            "give a mono recording, or turn the polarity of one channel round"
        )


def read_tracks(paths: Sequence[Path], segment: Segment) -> list[Track]:
    """One mono recording per speaker at `SAMPLE_RATE`, equally long."""
    return speaker_tracks(
        paths, segment.combine, SAMPLE_RATE, start_s=segment.start_s, duration_s=segment.duration_s
    )
