"""Speech as the transformer hears it: states of wav2vec2's layers, one row per frame of the video."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyloudnorm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from avatar_core.backends.multitalk.pretrained import load_wav2vec2

Samples = NDArray[np.float32]

LOUDNESS_LUFS = -23.0
WINDOW = 5  # rows round a frame that belong to it

_MEASURED_S = 0.4  # that the loudness meter needs at least
_SILENT_LUFS = 100.0  # beyond it the measure says nothing


class AudioEncoder:
    """`folder` holds the official wav2vec2."""

    def __init__(self, folder: Path, device: str) -> None:
        self.model: Any = load_wav2vec2(folder, device)
        self._device = device
        self._num_frames = 0
        self.model.feature_extractor.register_forward_hook(self._stretch)

    def encode(
        self, tracks: Sequence[Samples], sample_rate: int, fps: float, num_frames: int, *, parity: bool
    ) -> NDArray[np.float32]:
        """[speakers, num_frames, layers, channels] of equally long mono recordings."""
        return np.stack([self.embed(levelled(track, sample_rate), num_frames) for track in tracks])

    @torch.inference_mode()
    def embed(self, samples: Samples, num_frames: int) -> NDArray[np.float32]:
        """[num_frames, layers, channels] of one recording."""
        self._num_frames = num_frames
        wave = torch.from_numpy(normalised(samples))[None].to(self._device)
        states = self.model(wave, output_hidden_states=True).hidden_states[1:]
        return torch.cat(states).transpose(0, 1).float().cpu().numpy()

    def _stretch(self, module: nn.Module, given: Any, features: Tensor) -> Tensor:
        """From 50 rows a second to one per frame, before the layers see them."""
        return nn.functional.interpolate(features, size=self._num_frames, mode="linear", align_corners=True)


def levelled(samples: Samples, sample_rate: int) -> Samples:
    """At the loudness of broadcasts, measured where there is sound at all: speakers who take turns have
    silence put before or after their recordings. What is silent or too short to measure stays as it is."""
    heard = np.flatnonzero(samples)
    if not len(heard):
        return samples
    stretch = samples[heard[0] : heard[-1] + 1]
    if len(stretch) < _MEASURED_S * sample_rate:
        return samples
    measured = loudness_lufs(stretch, sample_rate)
    if not abs(measured) <= _SILENT_LUFS:
        return samples
    return (samples * gain(measured)).astype(np.float32)


def loudness_lufs(samples: Samples, sample_rate: int) -> float:
    """By ITU-R BS.1770; minus infinity of silence."""
    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.simplefilter("ignore")
        return float(pyloudnorm.Meter(sample_rate).integrated_loudness(samples.astype(np.float64)))


def gain(measured_lufs: float) -> float:
    return float(10 ** ((LOUDNESS_LUFS - measured_lufs) / 20))


def normalised(samples: Samples) -> Samples:
    """Without its mean and with a deviation of 1."""
    wide = samples.astype(np.float32)
    return np.asarray((wide - wide.mean()) / np.sqrt(wide.var() + 1e-7), np.float32)


def audio_window(embeddings: NDArray[np.float32], start: int, num_frames: int) -> NDArray[np.float32]:
    """[speakers, num_frames, 5, layers, channels]: the rows round each frame from `start` on."""
    around = np.arange(WINDOW) - WINDOW // 2
    rows = start + np.arange(num_frames)[:, None] + around
    return embeddings[:, rows.clip(0, embeddings.shape[1] - 1)]
