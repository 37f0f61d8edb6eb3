"""The movement of one face over a clip: mouth from the visemes, sway and blinks from a seed."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from avatar_core.backends.preview.visemes import Visemes
from avatar_core.media.envelope import smooth

FloatArray = NDArray[np.float32]

HEAD_AXES = ("x", "y", "roll", "yaw", "pitch")
SWAY = (0.026, 0.016, 0.022, 0.055, 0.030)  # in eye-mouth distances (roll in radians), per axis
SWAY_HZ = (0.22, 0.25, 0.19, 0.26, 0.30)
NOD = (0.0, 0.035, 0.0, 0.0, 0.06)  # how far loudness moves each axis
NOD_SMOOTHING_S = 0.24
FADE_IN_S = 0.5  # the first frame is the picture itself

BLINK_SHAPE = (0.35, 0.85, 1.0, 0.8, 0.45, 0.15)  # closure at 25 frames per second
BLINK_SHAPE_FPS = 25
DOUBLE_BLINK_CHANCE, DOUBLE_BLINK_S = 0.12, 0.45
LAST_BLINK_S = 0.3  # no blink starts this close to the end


@dataclass(frozen=True)
class Motion:
    mouth_open: FloatArray  # (num_frames,): 0 closed .. 1 wide open
    mouth_wide: FloatArray  # (num_frames,): -1 rounded .. 1 spread
    blink: FloatArray  # (num_frames,): 0 open .. 1 closed
    head: FloatArray  # (num_frames, 5): see HEAD_AXES


def make_motion(
    visemes: Visemes,
    fps: float,
    seed: int,
    *,
    mouth_gain: float = 1.0,
    head_motion: float = 1.0,
    blinks: bool = True,
) -> Motion:
    """`head_motion` scales the sway: 0 keeps the head still."""
    # Two streams, so that switching the blinks off leaves the sway as it was.
    sway_generator, blink_generator = np.random.default_rng(seed).spawn(2)
    num_frames = len(visemes.energy)
    return Motion(
        mouth_open=np.clip(np.float32(mouth_gain) * visemes.mouth_open, 0, 1),
        mouth_wide=visemes.mouth_wide,
        blink=_blinks(num_frames, fps, blink_generator) if blinks else np.zeros(num_frames, np.float32),
        head=np.float32(head_motion) * _sway(visemes.energy, fps, sway_generator),
    )


def _sway(energy: FloatArray, fps: float, generator: np.random.Generator) -> FloatArray:
    time_s = np.arange(len(energy)) / fps
    loudness = smooth(energy, NOD_SMOOTHING_S * fps) - energy.mean()
    waves = np.stack([_wave(time_s, frequency_hz, generator) for frequency_hz in SWAY_HZ], axis=1)
    head = waves * SWAY + loudness[:, None] * NOD
    fade = np.clip(time_s / FADE_IN_S, 0, 1)
    return (head * (fade * fade * (3 - 2 * fade))[:, None]).astype(np.float32)


def _wave(time_s: NDArray[np.float64], frequency_hz: float, generator: np.random.Generator) -> FloatArray:
    """Three sines of unrelated periods: never repeats within a clip, stays within about 1."""
    wave = np.zeros_like(time_s)
    for multiple in (0.5, 1.0, 1.7):
        detuned_hz = multiple * frequency_hz * (1 + 0.15 * generator.standard_normal())
        wave += np.sin(2 * np.pi * (detuned_hz * time_s + generator.uniform())) / multiple
    return np.asarray(wave / 2.4, np.float32)


def _blinks(num_frames: int, fps: float, generator: np.random.Generator) -> FloatArray:
    blink = np.zeros(num_frames, np.float32)
    shape_s = np.arange(-1, len(BLINK_SHAPE) + 1) / BLINK_SHAPE_FPS
    closure = np.array([0, *BLINK_SHAPE, 0])
    last_s = num_frames / fps - LAST_BLINK_S
    start_s = generator.uniform(0.8, 1.8)
    while start_s < last_s:
        first = int(np.ceil((start_s + shape_s[0]) * fps))
        frames = np.arange(max(first, 0), min(int((start_s + shape_s[-1]) * fps) + 1, num_frames))
        blink[frames] = np.maximum(blink[frames], np.interp(frames / fps - start_s, shape_s, closure))
        single = generator.random() > DOUBLE_BLINK_CHANCE
        start_s += np.clip(generator.gamma(4, 0.9), 1.6, 7) if single else DOUBLE_BLINK_S
    return blink
