"""What motion is conditioned on, and how speech becomes features."""

from typing import Any

import numpy as np
import pytest

from avatar_core.backends.ditto import audio
from avatar_core.backends.ditto.condition import Condition, emotion_weights
from avatar_core.errors import ConfigError
from tests.backends.ditto.toy import speech, toy_hubert

EYES = np.arange(3, dtype=np.float32)[:, None]


def condition(**options: Any) -> Condition:
    return Condition(
        emotion_weights([[4], [3, 6]]),
        EYES.repeat(2, 1),
        EYES.repeat(6, 1),
        np.full(63, 7, np.float32),
        **options,
    )


def test_rows_hold_speech_emotion_eyes_and_shape_in_this_order() -> None:
    rows = condition().rows(np.full((5, 1024), -1, np.float32), 1)

    assert rows.shape == (5, 1103)
    assert (rows[:, :1024] == -1).all()
    assert rows[:, 1024:1032].argmax(axis=1).tolist() == [3, 4, 3, 4, 3]
    assert rows[:, 1032].tolist() == [1, 2, 2, 1, 0]  # forth and back
    assert (rows[:, 1040:] == 7).all()


def test_frames_before_the_first_are_taken_for_it() -> None:
    rows = condition().rows(np.zeros((4, 1024), np.float32), -3)

    assert rows[:, 1032].tolist() == [0, 0, 0, 0]


def test_eyes_of_the_first_frame_throughout() -> None:
    assert not condition(eye_f0_mode=True).rows(np.zeros((4, 1024), np.float32), 1)[:, 1032:1040].any()


@pytest.mark.parametrize(
    ("switch", "width"), [("use_emo", 8), ("use_eye_open", 2), ("use_eye_ball", 6), ("use_sc", 63)]
)
def test_what_is_not_used_has_no_columns(switch: str, width: int) -> None:
    assert condition(**{switch: False}).rows(np.zeros((2, 1024), np.float32), 0).shape == (2, 1103 - width)


@pytest.mark.parametrize("emotion", [8, -1, [], [4, 9], [[4], []], [[1, "happy"]]])
def test_unknown_emotions_are_refused(emotion: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown emotion .* choose one or more of: 0 angry, .* 7 contempt"
    ):
        emotion_weights(emotion)


def test_emotion_weights_of_another_width_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"shape \(3, 7\); allowed: \(m, 8\)"):
        emotion_weights(np.zeros((3, 7), np.float32))


@pytest.mark.parametrize(
    ("num_samples", "frames", "parity_frames"), [(0, 0, 0), (1, 1, 1), (640, 1, 1), (4480, 7, 8)]
)
def test_whole_frames_are_counted_exactly(num_samples: int, frames: int, parity_frames: int) -> None:
    assert audio.num_frames(num_samples) == frames
    assert audio.num_frames(num_samples, parity=True) == parity_frames


@pytest.mark.parametrize("num_samples", [0, 1, 3200, 16_000, 20_001])
def test_a_recording_has_a_row_of_features_for_each_frame(num_samples: int) -> None:
    features = audio.encode(speech(2)[:num_samples], toy_hubert)

    assert features.shape == (audio.num_frames(num_samples), 1024)


def test_streaming_windows_do_not_depend_on_the_pieces() -> None:
    samples = speech(1.3)
    whole, ragged = audio.StreamingWindows(), audio.StreamingWindows()

    one = [*whole.feed(samples), *whole.finish()]
    many = [w for i in range(0, len(samples), 77) for w in ragged.feed(samples[i : i + 77])] + [
        *ragged.finish()
    ]

    assert np.array_equal(one, many)
    assert len(one) * audio.CHUNK_FRAMES >= audio.num_frames(len(samples))
    assert whole.num_samples == ragged.num_samples == len(samples)


@pytest.mark.parametrize("frames", [1, 5, 70, 79])
def test_features_of_silence_are_those_of_a_silent_recording(frames: int) -> None:
    samples = np.zeros(frames * audio.FRAME_SAMPLES, np.float32)

    def hubert(window: np.ndarray) -> np.ndarray:
        return toy_hubert(window) + np.arange(20, dtype=np.float32)[:, None]

    assert np.array_equal(audio.silence(frames, hubert), audio.encode(samples, hubert))
