"""Speech features: a streaming HuBERT hears windows of a few frames, of which it gives five rows.

Frames are 40 ms (640 samples at 16 kHz). A window holds the 5 frames that it is for, 3 before and 2 behind
them, and 80 samples. Offline and streaming windows differ by 80 samples of alignment.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from avatar_core.media.onnx_model import OnnxModel

Samples = NDArray[np.float32]
Hubert = Callable[[Samples], NDArray[np.float32]]
"""From a window [6480] to hidden states [20, 1024]."""

SAMPLE_RATE = 16_000
FPS = 25
FRAME_SAMPLES = SAMPLE_RATE // FPS
CHUNK_FRAMES = 5
WINDOW_SAMPLES = 10 * FRAME_SAMPLES + 80
FEATURE_DIM = 1024

_PAST_FRAMES, _FUTURE_FRAMES = 3, 2
_CHUNK_SAMPLES = CHUNK_FRAMES * FRAME_SAMPLES
_OFFLINE_SILENCE = WINDOW_SAMPLES - (CHUNK_FRAMES + _FUTURE_FRAMES) * FRAME_SAMPLES
_ONLINE_SILENCE = _PAST_FRAMES * FRAME_SAMPLES
_ROWS = slice(-2 * (CHUNK_FRAMES + _FUTURE_FRAMES), -2 * _FUTURE_FRAMES)  # two hidden states a frame


def num_frames(num_samples: int, *, parity: bool = False) -> int:
    """Of the video for so many samples at 16 kHz. The reference divides in floating point, which makes some
    whole numbers of frames one too many."""
    if parity:
        return math.ceil(num_samples / SAMPLE_RATE * FPS)
    return -(-num_samples // FRAME_SAMPLES)


class HubertEncoder:
    """The published ONNX file."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self._model = OnnxModel(path, device)

    def __call__(self, window: Samples) -> NDArray[np.float32]:
        return self._model.run(window[None])[0]


def chunk_features(hidden_states: NDArray[np.float32]) -> NDArray[np.float32]:
    """[5, 1024] from the hidden states of a window: the mean of each frame's two."""
    pairs = hidden_states[_ROWS].reshape(CHUNK_FRAMES, 2, -1)
    return np.asarray(pairs.mean(axis=1), np.float32)


def offline_windows(samples: Samples, frames: int) -> Iterator[Samples]:
    padded = np.concatenate(
        [np.zeros(_OFFLINE_SILENCE, np.float32), samples, np.zeros(WINDOW_SAMPLES, np.float32)]
    )
    for start in range(0, frames * FRAME_SAMPLES, _CHUNK_SAMPLES):
        yield padded[start : start + WINDOW_SAMPLES]


def encode(samples: Samples, hubert: Hubert, *, parity: bool = False) -> NDArray[np.float32]:
    """[frames, 1024] for a whole recording at 16 kHz."""
    frames = num_frames(len(samples), parity=parity)
    chunks = [chunk_features(hubert(window)) for window in offline_windows(samples, frames)]
    return np.concatenate([np.zeros((0, FEATURE_DIM), np.float32), *chunks])[:frames]


def silence(frames: int, hubert: Hubert) -> NDArray[np.float32]:
    """[frames, 1024] as `encode` gives for silence: all its windows are one and the same."""
    chunk = chunk_features(hubert(np.zeros(WINDOW_SAMPLES, np.float32)))
    return np.tile(chunk, (-(-frames // CHUNK_FRAMES), 1))[:frames]


class StreamingWindows:
    """Windows of speech that comes in pieces of any size, each as soon as its last sample is there."""

    def __init__(self) -> None:
        self._samples: Samples = np.zeros(_ONLINE_SILENCE, np.float32)
        self.num_samples = 0

    def feed(self, samples: Samples) -> Iterator[Samples]:
        self.num_samples += len(samples)
        self._samples = np.concatenate([self._samples, samples])
        while len(self._samples) >= WINDOW_SAMPLES:
            yield self._next()

    def finish(self) -> Iterator[Samples]:
        """The windows that begin before the end, filled up with silence."""
        while len(self._samples):
            yield self._next()

    def _next(self) -> Samples:
        window = self._samples[:WINDOW_SAMPLES]
        self._samples = self._samples[_CHUNK_SAMPLES:]
        return np.pad(window, (0, WINDOW_SAMPLES - len(window)))
