"""A clip is made in windows, each of which begins with the last frames of the one before. No model here."""

import math

import numpy as np
from numpy.typing import NDArray

from avatar_core.backends.multitalk.config import DenoiseConfig, Mode
from avatar_core.errors import InputError
from avatar_core.store.keys import derive_seed

SAMPLE_RATE = 16_000
PARITY_FPS = 25.0
PARITY_MAX_FRAMES = 1000
SPARE_FRAMES = 3  # of mirrored speech beyond a window's end, as the published code has it


def num_speech_frames(duration_s: float, fps: float, mode: Mode) -> int:
    """In `parity` with the rounding of the published code, which knows one frame rate."""
    if mode == "default":
        # A hair less than a whole frame too much is rounding of the sample count, not a frame.
        return max(1, math.ceil(duration_s * fps - 1e-3))
    if fps != PARITY_FPS:
        raise InputError(f"mode=parity knows {PARITY_FPS:g} frames a second, got {fps:g}; use mode=default")
    return int(round(duration_s * SAMPLE_RATE) / SAMPLE_RATE * PARITY_FPS)


def num_windows(num_speech_frames: int, config: DenoiseConfig) -> int:
    """`num_speech_frames`: frames of the speech. In `parity` a second window follows any speech."""
    if config.mode == "parity":
        _check_parity(num_speech_frames, config)
        num_speech_frames = min(num_speech_frames, PARITY_MAX_FRAMES)
    step = config.window_frames - config.motion_frames
    later = math.ceil(max(0, num_speech_frames - config.window_frames) / step)
    return min(1 + later, config.max_windows or 1 + later)


def num_video_frames(num_speech_frames: int, config: DenoiseConfig) -> int:
    """Frames of the clip: as many as the speech, if `max_windows` allows. The published code leaves out the
    last three of a clip of several windows, more of one that it cuts, and always fills a single window."""
    count = num_windows(num_speech_frames, config)
    end = window_start(count - 1, config) + config.window_frames
    if config.mode == "default":
        return min(num_speech_frames, end)
    if count == 1:
        return end
    whole = min(end, PARITY_MAX_FRAMES)
    missing = end - num_speech_frames + SPARE_FRAMES
    return whole - missing if end >= num_speech_frames else min(whole, end)


def window_start(window: int, config: DenoiseConfig) -> int:
    """Its first frame in the clip."""
    return window * (config.window_frames - config.motion_frames)


def window_seed(seed: int, window: int) -> int:
    """Noise of a window does not depend on how the ones before it were made."""
    return seed if window == 0 else derive_seed(seed, "window", window)


def with_mirrored_end(embeddings: NDArray[np.float32], num_frames: int) -> NDArray[np.float32]:
    """[persons, n, ...] with at least `num_frames` frames: the end of the speech backwards, and so on."""
    extended = embeddings
    while extended.shape[1] < num_frames:
        missing = num_frames - extended.shape[1]
        extended = np.concatenate([extended, extended[:, ::-1][:, :missing]], axis=1)
    return extended


def _check_parity(num_speech_frames: int, config: DenoiseConfig) -> None:
    if num_speech_frames <= config.window_frames:
        raise InputError(
            f"mode=parity needs more than {config.window_frames} frames of speech "
            f"({config.window_frames / PARITY_FPS:.2f} s), got {num_speech_frames}; use mode=default"
        )
