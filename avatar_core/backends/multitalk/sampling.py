"""One window from noise to latents: Euler steps of rectified flow, of two or three calls of the model."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avatar_core.backends.multitalk.config import DenoiseConfig
from avatar_core.backends.multitalk.guidance import (
    ProjectedGuidance,
    Scales,
    guide,
    guide_by_speech,
)
from avatar_core.backends.multitalk.teacache import CallCache, coefficients
from avatar_core.backends.multitalk.transformer import Conditions
from avatar_core.stages.base import Report

NUM_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class SamplerSettings:
    """`cache_threshold` is that of TeaCache; None runs every step in full. `projected` = momentum and largest
    norm of adaptive projected guidance; None guides by plain differences."""

    num_inference_steps: int = 40
    flow_shift: float = 7.0
    text_guidance_scale: float = 5.0
    audio_guidance_scale: float = 4.0
    projected: tuple[float, float] | None = None
    cache_threshold: float | None = None
    image_size: int = 480

    @classmethod
    def from_config(cls, config: DenoiseConfig) -> "SamplerSettings":
        return cls(
            num_inference_steps=config.num_inference_steps,
            flow_shift=config.shift,
            text_guidance_scale=config.text_guidance_scale,
            audio_guidance_scale=config.audio_guidance_scale,
            projected=(config.apg_momentum, config.apg_norm_threshold) if config.apg else None,
            cache_threshold=config.cache_threshold if config.step_cache == "teacache" else None,
            image_size=config.image_size,
        )


@dataclass(frozen=True)
class ClipInputs:
    """Of one window. `condition` [1, 20, T, h, w] goes beside the noise; `audio` [persons, F, window, layers,
    channels]; `speaker_masks` [3, h, w]; `motion_latents` [16, n, h, w] are those of the frames that the
    window shares with the one before, if there is one."""

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor
    clip_features: Tensor
    condition: Tensor
    audio: Tensor
    speaker_masks: Tensor
    motion_latents: Tensor | None = None


def timesteps(num_inference_steps: int, flow_shift: float) -> Tensor:
    """[steps + 1] from 1000 to 0, in float32."""
    # numpy's, which is not torch's in the last bit
    even = torch.from_numpy(np.linspace(NUM_TRAIN_TIMESTEPS, 1, num_inference_steps, dtype=np.float32))
    even = even / NUM_TRAIN_TIMESTEPS
    shifted = flow_shift * even / (1 + (flow_shift - 1) * even) * NUM_TRAIN_TIMESTEPS
    return torch.cat([shifted, shifted.new_zeros(1)])


def euler_step(latents: Tensor, velocity: Tensor, time: Tensor, next_time: Tensor) -> Tensor:
    return latents - velocity * (time - next_time) / NUM_TRAIN_TIMESTEPS


def add_noise(latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    part = time / NUM_TRAIN_TIMESTEPS
    return (1 - part) * latents + part * noise


def denoise_window(
    transformer: Any,
    inputs: ClipInputs,
    settings: SamplerSettings,
    generator: torch.Generator,
    report: Report,
) -> Tensor:
    """Latents [16, T, h, w] in float32."""
    condition, motion = inputs.condition, inputs.motion_latents
    shape = (transformer.config.out_dim, *condition.shape[2:])
    times = timesteps(settings.num_inference_steps, settings.flow_shift).to(condition.device)
    velocity = GuidedVelocity(transformer, inputs, settings)
    total = settings.num_inference_steps
    report(0, total)
    latents = _noise(shape, generator, condition)
    latents = _with_motion(latents, motion, times[0], generator)
    for step in range(total):
        latents = euler_step(latents, velocity(latents, times[step]), times[step], times[step + 1])
        latents = _with_motion(latents, motion, times[step + 1], generator)
        report(step + 1, total)
    return latents


def _noise(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Drawn where the generator is."""
    return torch.randn(shape, generator=generator, device=generator.device).to(like.device)


def _with_motion(latents: Tensor, motion: Tensor | None, time: Tensor, generator: torch.Generator) -> Tensor:
    """The shared frames are not the model's to change: they are set anew, as noisy as the time says."""
    if motion is None:
        return latents
    noisy = add_noise(motion, _noise(tuple(motion.shape), generator, motion), time)
    return torch.cat([noisy, latents[:, motion.shape[1] :]], dim=1)


class GuidedVelocity:
    """The guided answer of a window's steps, which come in order."""

    def __init__(self, transformer: Any, inputs: ClipInputs, settings: SamplerSettings) -> None:
        self._transformer = transformer
        self._condition = inputs.condition
        self._by_text = not math.isclose(settings.text_guidance_scale, 1.0)
        self._join = _guidance(settings, by_text=self._by_text)
        self._calls = list(self._conditions(inputs))
        self.caches: list[CallCache | None] = [None] * len(self._calls)
        if settings.cache_threshold is not None:
            powers = coefficients(settings.image_size)
            self.caches = [CallCache(settings.cache_threshold, powers) for _ in self._calls]

    def _conditions(self, inputs: ClipInputs) -> Iterator[Conditions]:
        """Of each call. Silence is that of one person, whoever is in the picture."""
        speaking = inputs
        silent = replace(inputs, audio=torch.zeros_like(inputs.audio[:1]))
        yield self._prepared(speaking, inputs.prompt_embeds)
        if self._by_text:
            yield self._prepared(speaking, inputs.negative_prompt_embeds)
            yield self._prepared(silent, inputs.negative_prompt_embeds)
        else:
            yield self._prepared(silent, inputs.prompt_embeds)

    def _prepared(self, inputs: ClipInputs, prompt_embeds: Tensor) -> Conditions:
        conditions: Conditions = self._transformer.prepare(
            prompt_embeds, inputs.clip_features, inputs.audio, inputs.speaker_masks
        )
        return conditions

    def __call__(self, latents: Tensor, time: Tensor) -> Tensor:
        """[16, T, h, w] of latents of that shape."""
        model_input = torch.cat([latents[None], self._condition], dim=1)
        answers = [
            self._transformer(model_input, time[None], conditions, cache)[0]
            for conditions, cache in zip(self._calls, self.caches, strict=True)
        ]
        return self._join(*answers)


def _guidance(settings: SamplerSettings, *, by_text: bool) -> Callable[..., Tensor]:
    """Of the answers to three calls, or to two."""
    projected = ProjectedGuidance(*settings.projected) if settings.projected else None
    if by_text:
        scales = Scales(settings.text_guidance_scale, settings.audio_guidance_scale)
        return partial(projected.guide if projected else guide, scales=scales)
    by_speech = projected.guide_by_speech if projected else guide_by_speech
    return partial(by_speech, audio_scale=settings.audio_guidance_scale)
