"""How the answers to a step's calls are joined: by plain differences, or by projected ones."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scales:
    text: float
    audio: float


def guide(conditional: Tensor, no_text: Tensor, nothing: Tensor, scales: Scales) -> Tensor:
    """From the answers to prompt and speech, to the negative prompt and speech, and to neither."""
    return nothing + scales.text * (conditional - no_text) + scales.audio * (no_text - nothing)


def guide_by_speech(conditional: Tensor, silent: Tensor, audio_scale: float) -> Tensor:
    """From the answers to prompt and speech and to the prompt alone."""
    return silent + audio_scale * (conditional - silent)


class Direction:
    """A difference of answers as adaptive projected guidance takes it: with momentum over the steps, not
    longer than `norm_threshold`, and without its part along the conditional answer."""

    def __init__(self, momentum: float, norm_threshold: float) -> None:
        self._momentum = momentum
        self._norm_threshold = norm_threshold
        self.average: Tensor | float = 0.0

    def __call__(self, difference: Tensor, conditional: Tensor) -> Tensor:
        self.average = difference = difference + self._momentum * self.average
        if self._norm_threshold > 0:
            difference = difference * torch.clamp(self._norm_threshold / difference.norm(), max=1.0)
        wide, axis = difference.double(), conditional.double()
        axis = axis / axis.norm().clamp(min=1e-12)
        return (wide - (wide * axis).sum() * axis).type_as(difference)


class ProjectedGuidance:
    """Both directions of a window."""

    def __init__(self, momentum: float, norm_threshold: float) -> None:
        self._text = Direction(momentum, norm_threshold)
        self._audio = Direction(momentum, norm_threshold)

    def guide(self, conditional: Tensor, no_text: Tensor, nothing: Tensor, scales: Scales) -> Tensor:
        by_text = self._text(conditional - no_text, conditional)
        by_audio = self._audio(no_text - nothing, conditional)
        return conditional + (scales.text - 1) * by_text + (scales.audio - 1) * by_audio

    def guide_by_speech(self, conditional: Tensor, silent: Tensor, audio_scale: float) -> Tensor:
        return conditional + (audio_scale - 1) * self._audio(conditional - silent, conditional)
