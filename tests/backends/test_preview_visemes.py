from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from avatar_core.backends.preview import motion, visemes
from avatar_core.backends.preview.motion import make_motion
from avatar_core.backends.preview.visemes import Visemes, make_visemes
from avatar_core.media.audio import load_mono

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
SAMPLE_RATE = 16_000


@pytest.fixture(scope="module")
def speech() -> NDArray[np.float32]:
    return load_mono(SAMPLES / "hello.wav", SAMPLE_RATE)


def vowel(f1_hz: float, f2_hz: float, duration_s: float = 0.5) -> NDArray[np.float32]:
    """A 120 Hz voice through two resonances."""
    time_s = np.arange(int(duration_s * SAMPLE_RATE)) / SAMPLE_RATE
    wave = np.zeros_like(time_s)
    for frequency_hz in np.arange(120, 4000, 120):
        gain = sum(1 / (1 + ((frequency_hz - formant) / 60) ** 2) for formant in (f1_hz, f2_hz))
        wave += (gain + 0.01) * np.sin(2 * np.pi * frequency_hz * time_s)
    return (0.1 * wave).astype(np.float32)


def num_frames(samples: NDArray[np.float32], fps: float = 25) -> int:
    return max(1, int(np.ceil(len(samples) / SAMPLE_RATE * fps)))


def test_a_opens_the_mouth_and_i_spreads_it() -> None:
    pause = np.zeros(4000, np.float32)
    sounds = np.concatenate([pause, vowel(750, 1200), pause, vowel(300, 2200), pause, vowel(320, 800), pause])
    tracks = make_visemes(sounds, SAMPLE_RATE, 100, num_frames(sounds, 100))
    a, i, u = slice(35, 65), slice(110, 140), slice(185, 215)
    assert tracks.mouth_open[a].mean() > 1.5 * tracks.mouth_open[i].mean()
    assert tracks.mouth_wide[i].mean() > 0.3
    assert tracks.mouth_wide[u].mean() < -0.3
    assert tracks.mouth_open[:15].max() < 0.02


def test_hissing_closes_the_teeth(speech: NDArray[np.float32]) -> None:
    noise = np.random.default_rng(0).standard_normal(8000)
    hiss = np.diff(np.diff(noise, prepend=0), prepend=0).astype(np.float32) * 0.05
    tracks = make_visemes(np.concatenate([speech, hiss]), SAMPLE_RATE, 25, num_frames(speech) + 12)
    hissing = slice(-10, -2)
    assert tracks.energy[hissing].mean() > 0.5
    assert tracks.mouth_open[hissing].mean() < 0.35 * tracks.energy[hissing].mean()


@pytest.mark.parametrize("fps", [12, 25, 29.97, 50])
def test_values_stay_in_range_at_any_frame_rate(speech: NDArray[np.float32], fps: float) -> None:
    tracks = make_visemes(speech, SAMPLE_RATE, fps, num_frames(speech, fps))
    assert len(tracks.mouth_open) == len(tracks.mouth_wide) == len(tracks.energy) == num_frames(speech, fps)
    assert 0 <= tracks.mouth_open.min() < 0.05
    assert 0.5 < tracks.mouth_open.max() <= 1
    assert np.abs(tracks.mouth_wide).max() <= 1
    assert tracks.mouth_open.dtype == tracks.mouth_wide.dtype == tracks.energy.dtype == np.float32


def test_same_speech_gives_same_mouth(speech: NDArray[np.float32]) -> None:
    first, second = (make_visemes(speech, SAMPLE_RATE, 25, num_frames(speech)) for _ in range(2))
    np.testing.assert_array_equal(first.mouth_open, second.mouth_open)
    np.testing.assert_array_equal(first.mouth_wide, second.mouth_wide)


def test_block_size_leaves_no_trace(speech: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_visemes(speech, SAMPLE_RATE, 25, num_frames(speech))
    monkeypatch.setattr(visemes, "BLOCK_STEPS", 37)
    pieces = make_visemes(speech, SAMPLE_RATE, 25, num_frames(speech))
    np.testing.assert_allclose(pieces.mouth_open, whole.mouth_open, atol=0.03)
    np.testing.assert_allclose(pieces.mouth_wide, whole.mouth_wide, atol=0.06)


def test_frames_beyond_the_speech_are_silent(speech: NDArray[np.float32]) -> None:
    tracks = make_visemes(speech, SAMPLE_RATE, 25, num_frames(speech) + 25)
    assert not tracks.mouth_open[-20:].any()


@pytest.mark.parametrize("num_samples", [1, 799, 80_000])
def test_silence_keeps_the_mouth_closed(num_samples: int) -> None:
    silence = np.zeros(num_samples, np.float32)
    tracks = make_visemes(silence, SAMPLE_RATE, 25, num_frames(silence))
    assert not tracks.mouth_open.any()
    assert not tracks.mouth_wide.any()
    assert len(tracks.energy) == num_frames(silence)


def test_faint_noise_is_silence() -> None:
    noise = 1e-5 * np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    assert not make_visemes(noise, SAMPLE_RATE, 25, 25).mouth_open.any()


@pytest.mark.parametrize("num_samples", [1, 800])
def test_very_short_sounds_do_not_fail(num_samples: int) -> None:
    tracks = make_visemes(vowel(700, 1200)[:num_samples], SAMPLE_RATE, 25, 2)
    assert np.isfinite(tracks.mouth_open).all()
    assert np.isfinite(tracks.mouth_wide).all()


def test_clicks_do_not_fail() -> None:
    clicks = np.zeros(16_000, np.float32)
    clicks[::1001] = 0.9
    tracks = make_visemes(clicks, SAMPLE_RATE, 25, 25)
    assert np.isfinite(tracks.mouth_open).all()
    assert np.isfinite(tracks.mouth_wide).all()


def test_speech_without_pauses_moves_the_mouth() -> None:
    tracks = make_visemes(vowel(700, 1200, duration_s=2), SAMPLE_RATE, 25, 50)
    assert tracks.mouth_open[10:40].mean() > 0.3


def test_other_sample_rates_are_resampled(speech: NDArray[np.float32]) -> None:
    doubled = load_mono(SAMPLES / "hello.wav", 32_000)
    high = make_visemes(doubled, 32_000, 25, num_frames(speech))
    low = make_visemes(speech, SAMPLE_RATE, 25, num_frames(speech))
    assert np.corrcoef(high.mouth_open, low.mouth_open)[0, 1] > 0.95


def constant_speech(frames: int) -> Visemes:
    return Visemes(*(np.full(frames, value, np.float32) for value in (0.5, 0.0, 0.7)))


def test_motion_follows_its_seed() -> None:
    first, again = (make_motion(constant_speech(300), 25, seed=3) for _ in range(2))
    other = make_motion(constant_speech(300), 25, seed=4)
    np.testing.assert_array_equal(first.head, again.head)
    np.testing.assert_array_equal(first.blink, again.blink)
    assert np.abs(first.head - other.head).max() > 0.005
    assert (first.blink != other.blink).any()


def test_first_frame_is_the_picture() -> None:
    first = make_motion(constant_speech(50), 25, seed=3)
    assert not first.head[0].any()
    assert first.blink[0] == 0


@pytest.mark.parametrize("fps", [12, 25, 60])
def test_blinks_close_fully_and_briefly(fps: float) -> None:
    blink = make_motion(constant_speech(int(20 * fps)), fps, seed=3).blink
    closed = blink > 0.6
    starts = int((closed[1:] & ~closed[:-1]).sum())
    assert 3 <= starts <= 12
    assert blink.max() > 0.85
    assert closed.sum() / fps / starts < 0.25
    assert blink[-1] == 0


def test_options_scale_and_switch_off() -> None:
    full = make_motion(constant_speech(100), 25, seed=3)
    half = make_motion(constant_speech(100), 25, seed=3, head_motion=0.5, mouth_gain=0.5)
    still = make_motion(constant_speech(100), 25, seed=3, head_motion=0, blinks=False)
    np.testing.assert_allclose(half.head, full.head / 2, atol=1e-7)
    np.testing.assert_allclose(half.mouth_open, full.mouth_open / 2)
    assert not still.head.any()
    assert not still.blink.any()


def test_sway_stays_small_and_smooth() -> None:
    head = make_motion(constant_speech(5000), 25, seed=1).head
    assert head.shape == (5000, len(motion.HEAD_AXES))
    assert np.abs(head).max() < 0.12
    assert np.abs(np.diff(head, axis=0)).max() < 0.02


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_motion_of_very_short_clips(frames: int) -> None:
    movement = make_motion(constant_speech(frames), 25, seed=0)
    assert movement.head.shape == (frames, 5)
    assert np.isfinite(movement.head).all()
