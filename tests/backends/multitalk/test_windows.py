import numpy as np
import pytest

from avatar_core.backends.multitalk.config import DenoiseConfig
from avatar_core.backends.multitalk.windows import (
    num_speech_frames,
    num_video_frames,
    num_windows,
    window_seed,
    window_start,
    with_mirrored_end,
)
from avatar_core.errors import InputError

DEFAULT, PARITY = DenoiseConfig(), DenoiseConfig(mode="parity")


@pytest.mark.parametrize(
    ("speech", "windows"), [(1, 1), (81, 1), (82, 2), (137, 2), (138, 3), (25 * 180, 80), (25 * 3600, 1607)]
)
def test_as_many_windows_as_the_speech_needs(speech: int, windows: int) -> None:
    assert num_windows(speech, DEFAULT) == windows
    assert num_video_frames(speech, DEFAULT) == speech
    assert num_windows(num_video_frames(speech, DEFAULT), DEFAULT) == windows
    last = window_start(windows - 1, DEFAULT)
    assert last + 81 >= speech > (last + 25 if windows > 1 else 0)


@pytest.mark.parametrize(("windows", "frames"), [(1, 81), (2, 137), (3, 193)])
def test_windows_can_be_limited(windows: int, frames: int) -> None:
    config = DenoiseConfig(max_windows=windows)
    assert num_windows(1000, config) == windows
    assert num_video_frames(1000, config) == frames
    assert num_windows(40, config) == 1
    assert num_video_frames(40, config) == 40


@pytest.mark.parametrize(
    ("speech", "windows", "frames"),
    [
        (82, 2, 79),
        (137, 2, 134),
        (138, 3, 135),
        (977, 17, 974),
        (978, 18, 942),
        (1010, 18, 974),  # cut at 1000 frames, and then once more by what lacks of the last window
        (1033, 18, 997),
        (1034, 18, 1000),
        (5000, 18, 1000),
    ],
)
def test_parity_is_as_long_as_the_published_code(speech: int, windows: int, frames: int) -> None:
    assert num_windows(speech, PARITY) == windows
    assert num_video_frames(speech, PARITY) == frames


def test_parity_fills_a_single_window() -> None:
    config = DenoiseConfig(mode="parity", max_windows=1)
    assert num_windows(90, config) == 1
    assert num_video_frames(90, config) == 81
    with pytest.raises(InputError, match=r"more than 81 frames of speech \(3\.24 s\), got 81"):
        num_windows(81, config)


def test_speech_frames() -> None:
    assert num_speech_frames(1.01, 25.0, "default") == 26
    assert num_speech_frames(1.0 + 1e-5, 30.0, "default") == 30
    assert num_speech_frames(0.001, 25.0, "default") == 1
    assert num_speech_frames(18560 / 16000, 25.0, "parity") == 28  # of 29 whole ones
    with pytest.raises(InputError, match="mode=parity knows 25 frames a second, got 24"):
        num_speech_frames(1.0, 24.0, "parity")


def test_the_end_is_mirrored_as_often_as_needed() -> None:
    embeddings = np.arange(3, dtype=np.float32).reshape(1, 3, 1, 1)
    assert with_mirrored_end(embeddings, 2) is embeddings
    extended = with_mirrored_end(embeddings, 5)[0, :, 0, 0]
    assert extended.tolist() == [0, 1, 2, 2, 1]
    assert with_mirrored_end(embeddings, 14)[0, :, 0, 0].tolist() == [
        0,
        1,
        2,
        2,
        1,
        0,
        0,
        1,
        2,
        2,
        1,
        0,
        0,
        1,
    ]


def test_windows_have_seeds_of_their_own() -> None:
    seeds = [window_seed(7, window) for window in range(100)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 100
    assert window_seed(8, 3) != window_seed(7, 3)
