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
        self._least_samples = _samples_of_one_row(self.model.config)
        self.model.feature_extractor.register_forward_hook(self._stretch)

    def encode(self, tracks: Sequence[Samples], sample_rate: int, num_frames: int) -> NDArray[np.float32]:
        """[speakers, num_frames, layers, channels] of equally long mono recordings. Speakers who take turns
        have silence before or after them, which is left out of the measure of their loudness."""
        levelled_tracks = (levelled(track, sample_rate, heard(track)) for track in tracks)
        return np.stack([self.embed(track, num_frames) for track in levelled_tracks])

    @torch.inference_mode()
    def embed(self, samples: Samples, num_frames: int) -> NDArray[np.float32]:
        """[num_frames, layers, channels] of one recording."""
        self._num_frames = num_frames
        wave = torch.from_numpy(normalised(samples))[None].to(self._device)
        wave = nn.functional.pad(wave, (0, max(0, self._least_samples - wave.shape[1])))
        states = self.model(wave, output_hidden_states=True).hidden_states[1:]
        return torch.cat(states).transpose(0, 1).float().cpu().numpy()

    def _stretch(self, module: nn.Module, given: Any, features: Tensor) -> Tensor:
        """From 50 rows a second to one per frame, before the layers see them."""
        return nn.functional.interpolate(features, size=self._num_frames, mode="linear", align_corners=True)


def heard(samples: Samples) -> Samples:
    """From the first sample that is not zero to the last one."""
    places = np.flatnonzero(samples)
    return samples[places[0] : places[-1] + 1] if len(places) else samples[:0]


def levelled(samples: Samples, sample_rate: int, measured: Samples) -> Samples:
    """At the loudness of broadcasts, of which `measured` is the part to go by. What is silent or too short to
    measure stays as it is."""
    if len(measured) < _MEASURED_S * sample_rate:
        return samples
    loudness = loudness_lufs(measured, sample_rate)
    if not abs(loudness) <= _SILENT_LUFS:
        return samples
    return (samples * gain(loudness)).astype(np.float32)


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


def _samples_of_one_row(config: Any) -> int:
    """What the convolutions need at least."""
    count = 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        count = (count - 1) * stride + kernel
    return count
