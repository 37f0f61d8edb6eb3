"""Recordings of which nothing is left when they are mixed to mono."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from avatar_core.backends.preview.backend import PreviewBackend
from avatar_core.backends.preview.config import PreviewConfig
from avatar_core.backends.preview.stages import PreviewAudio
from avatar_core.errors import InputError
from avatar_core.media.audio import probe_audio
from avatar_core.stages.audio import AudioStageConfig
from avatar_core.stages.base import Item, Output
from avatar_core.stages.subject import Segment
from tests.sample_rows import speech, write_wav

SAMPLES, RATE = speech(duration_s=1.0)
SILENCE = np.zeros_like(SAMPLES)


def process(tmp_path: Path, *recordings: NDArray[np.int16], start_s: float = 0.0) -> Output:
    paths = [write_wav(tmp_path / f"{n}.wav", samples, RATE) for n, samples in enumerate(recordings)]
    duration_s = probe_audio(paths[0]).duration_s - start_s
    segment = Segment(duration_s, start_s, "para" if len(paths) > 1 else None)
    item = Item("", {}, {"audio": paths})
    stage = PreviewAudio(PreviewBackend(PreviewConfig()))
    return stage.process(item, AudioStageConfig(segment, 25), None, tmp_path, lambda *_: None)


def channels(*sides: Any) -> NDArray[np.int16]:
    return np.stack([np.asarray(side).astype(np.int16) for side in sides], axis=1)


@pytest.mark.parametrize(
    "recording",
    [
        channels(SAMPLES, -SAMPLES),
        channels(SAMPLES, -0.98 * SAMPLES),
        channels(SAMPLES, -SAMPLES, SILENCE, SILENCE, SILENCE, SILENCE),
    ],
    ids=["exactly", "nearly", "surround"],
)
def test_channels_that_cancel_each_other_are_named(tmp_path: Path, recording: NDArray[np.int16]) -> None:
    with pytest.raises(InputError) as caught:
        process(tmp_path, recording)
    message = str(caught.value)
    assert message.startswith("recording: its channels cancel each other out: of -")
    assert message.endswith("give a mono recording, or turn the polarity of one channel round")
    assert "is silent" not in message


@pytest.mark.parametrize(
    "recording",
    [
        SAMPLES,
        channels(SAMPLES, SAMPLES),
        channels(SAMPLES, SILENCE),
        channels(SAMPLES, np.roll(SAMPLES, 40)),
        SAMPLES // 30,
        channels(SAMPLES // 30, SAMPLES // 30),
    ],
    ids=["mono", "both", "one side", "room", "faint mono", "faint stereo"],
)
def test_sound_that_is_only_faint_or_on_one_side_is_taken(
    tmp_path: Path, recording: NDArray[np.int16]
) -> None:
    assert process(tmp_path, recording).columns["loudness_db"] > -60


def test_silence_is_still_silence(tmp_path: Path) -> None:
    for recording in (SILENCE, channels(SILENCE, SILENCE), channels(SAMPLES // 10_000, -(SAMPLES // 10_000))):
        with pytest.raises(InputError, match="is silent: -inf dBFS"):
            process(tmp_path, recording)


def test_the_second_speaker_may_be_silent_but_not_cancelled(tmp_path: Path) -> None:
    assert process(tmp_path, SAMPLES, SILENCE).columns["speakers"] == 2
    with pytest.raises(InputError, match="recording 2: its channels cancel each other out"):
        process(tmp_path, SAMPLES, channels(SAMPLES, -SAMPLES))
