"""What changes from step to step: noise level, guidance, which steps run in full, which frames are together.

Frames are of latents unless they are called video frames: the first latent frame is one video frame, every
other one four.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

StepCache = Literal["scaled", "reference", "off", "adaptive"]

WINDOW = 33  # frames that one forward sees
WINDOW_SHIFT = 10  # frames by which the windows of a long clip move back with every step
VIDEO_FRAMES = 4  # that become one frame

EARLY_STEPS = 10
"""So many steps see the negative prompt and a weaker face mask; later ones have the prompt in both halves."""

_LATE_SCALES = (6.5, 3.5)  # guidance of the later steps, at the first and after the last step


def flow_sigmas(num_inference_steps: int, flow_shift: float) -> Tensor:
    """Noise level before every step and after the last, float32: 1 down to 0. Times 1000: timesteps."""
    even = torch.linspace(1, 0, num_inference_steps + 1)
    return flow_shift * even / (1 + (flow_shift - 1) * even)


def euler_step(latents: Tensor, noise_pred: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """float32."""
    return latents.float() + noise_pred.float() * (next_sigma - sigma)


def guidance_at(step: int, num_inference_steps: int, guidance_scale: float) -> float:
    """Falls from `guidance_scale` towards 2, then from 6.5 towards 3.5."""
    first, last = (guidance_scale, 2) if step < EARLY_STEPS else _LATE_SCALES
    return (1 - step / num_inference_steps) * (first - last) + last


def cached_steps(step_cache: StepCache, num_inference_steps: int) -> list[bool]:
    """For every step whether it runs but the last block, on the activations of the last full step.

    `reference` is made for 50 steps: the first 16 and the last 9 in full, every fifth between; whatever comes
    after the 50th is cached. `scaled` has full steps at the same parts of any number of steps. `adaptive` is
    decided on the way: here are the steps that may be cached.
    """
    rules: dict[StepCache, Callable[[int], bool]] = {
        "off": lambda step: True,
        "reference": lambda step: step < 50 and _is_full(step, 50),
        "scaled": lambda step: _is_full(step, num_inference_steps),
        "adaptive": lambda step: step in (0, EARLY_STEPS, num_inference_steps - 1),
    }
    return [not rules[step_cache](step) for step in range(num_inference_steps)]


def _is_full(step: int, num_steps: int) -> bool:
    """In the first three tenths, the last nine fiftieths, and once in every tenth between. Also where the
    texts change: activations of one text do not serve the other."""
    opening, closing = 10 * step < 3 * num_steps, 50 * step >= 41 * num_steps
    tenth_begins = 10 * step // num_steps != 10 * (step - 1) // num_steps
    return opening or closing or tenth_begins or step == EARLY_STEPS


@dataclass(frozen=True)
class Window:
    """Frames of a clip that one forward sees, and the video frames whose sound it hears."""

    frames: Tensor  # (WINDOW,)
    audio_frames: Tensor  # (4 * WINDOW - 3,)


@dataclass(frozen=True)
class ClipWindows:
    """How a clip is cut into windows. They lie in a circle, the end of the clip beside its start, and move on
    with every step, so that seams fall elsewhere each time; frames that two windows hold are averaged."""

    num_frames: int
    num_kept_frames: int
    num_noise_frames: int

    @classmethod
    def of(cls, num_audio_frames: int) -> "ClipWindows":
        """For so many video frames of sound, padding included. A short clip's noise is drawn longer than the
        clip: the first frames of the larger draw count."""
        num_kept_frames = num_audio_frames // VIDEO_FRAMES + 1
        num_frames = (num_audio_frames // 128 + 1) * 32 + 1
        is_single = num_kept_frames == WINDOW
        return cls(WINDOW if is_single else num_frames, num_kept_frames, num_frames)

    @property
    def num_audio_frames(self) -> int:
        """Video frames of the whole circle."""
        return VIDEO_FRAMES * self.num_frames

    def at(self, step: int) -> list[Window]:
        shift = step * WINDOW_SHIFT % WINDOW if self.num_frames > WINDOW else 0
        return [self._window(start - shift) for start in range(0, self.num_frames, WINDOW)]

    def _window(self, start: int) -> Window:
        first_audio, num_audio = VIDEO_FRAMES * start, VIDEO_FRAMES * WINDOW - 3
        return Window(
            torch.arange(start, start + WINDOW) % self.num_frames,
            torch.arange(first_audio, first_audio + num_audio) % self.num_audio_frames,
        )
