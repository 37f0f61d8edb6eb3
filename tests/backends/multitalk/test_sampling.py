from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from avatar_core.backends.multitalk.config import DenoiseConfig
from avatar_core.backends.multitalk.guidance import Direction, ProjectedGuidance, Scales, guide
from avatar_core.backends.multitalk.sampling import (
    ClipInputs,
    GuidedVelocity,
    SamplerSettings,
    denoise_window,
    timesteps,
)
from avatar_core.backends.multitalk.teacache import CallCache, coefficients
from tests.toy_multitalk import TOY, toy_inputs, toy_transformer

FAST = SamplerSettings(num_inference_steps=3)


@pytest.fixture(scope="module")
def transformer() -> Any:
    return toy_transformer()


def window(transformer: Any, inputs: ClipInputs, settings: SamplerSettings = FAST, seed: int = 5) -> Tensor:
    return denoise_window(
        transformer, inputs, settings, torch.Generator().manual_seed(seed), lambda done, total: None
    )


@pytest.mark.parametrize(("steps", "shift"), [(40, 7.0), (8, 2.0), (1, 11.0)])
def test_times_go_from_one_thousand_to_nothing(steps, shift):
    times = timesteps(steps, shift)
    assert times.dtype == torch.float32
    assert times.shape == (steps + 1,)
    assert times[0] == 1000
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    even = torch.linspace(1, 0.001, steps)
    assert torch.allclose(times[:-1], 1000 * shift * even / (1 + (shift - 1) * even), atol=1e-3)


def test_the_frames_of_the_window_before_come_out_as_they_went_in(transformer):
    inputs = toy_inputs(1, motion_frames=2)
    latents = window(transformer, inputs)
    assert torch.equal(latents[:, :2], inputs.motion_latents)
    free = window(transformer, replace(inputs, motion_latents=None))
    assert not torch.allclose(latents[:, 2:], free[:, 2:], atol=1e-3)


def test_noise_is_of_the_seed_and_the_steps_are_told(transformer):
    inputs, told = toy_inputs(1), []
    again = denoise_window(
        transformer, inputs, FAST, torch.Generator().manual_seed(5), lambda *step: told.append(step)
    )
    assert torch.equal(window(transformer, inputs), again)
    assert not torch.equal(window(transformer, inputs, seed=6), again)
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(("text_scale", "calls"), [(5.0, 3), (1.0, 2)])
def test_a_step_has_two_calls_without_guidance_by_text(transformer, text_scale, calls):
    count = []
    hook = transformer.register_forward_hook(lambda *_: count.append(1))
    window(transformer, toy_inputs(1), replace(FAST, text_guidance_scale=text_scale))
    hook.remove()
    assert len(count) == 3 * calls


def test_silence_is_that_of_one_person(transformer):
    velocity = GuidedVelocity(transformer, toy_inputs(2), FAST)
    speaking, no_text, nothing = velocity._calls
    assert speaking.token_masks is not None
    assert no_text.token_masks is not None
    assert nothing.token_masks is None
    assert nothing.audio.shape[1] * 2 == speaking.audio.shape[1]


def test_options_become_settings():
    config = DenoiseConfig(apg=True, step_cache="teacache", image_size=720)
    settings = SamplerSettings.from_config(config)
    assert settings == SamplerSettings(
        flow_shift=11.0, projected=(-0.75, 55.0), cache_threshold=0.2, image_size=720
    )
    assert SamplerSettings.from_config(DenoiseConfig()) == SamplerSettings()


# --- guidance


def test_scales_of_one_leave_the_conditional_answer():
    answers = torch.randn(3, 4, 2, 2, 2)
    assert torch.allclose(guide(*answers, Scales(1.0, 1.0)), answers[0], atol=1e-6)
    projected = ProjectedGuidance(-0.75, 55.0)
    assert torch.equal(projected.guide(*answers, Scales(1.0, 1.0)), answers[0])


def test_a_projected_direction_is_short_and_across():
    torch.manual_seed(0)
    difference, conditional = 100 * torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    direction = Direction(-0.75, 55.0)
    first = direction(difference, conditional)
    assert first.norm() <= 55.0001
    assert abs(float((first * conditional).sum())) < 1e-3
    direction(torch.zeros_like(difference), conditional)
    assert torch.allclose(direction.average, -0.75 * difference)


def test_without_momentum_and_threshold_only_the_part_along_the_answer_goes():
    torch.manual_seed(0)
    conditional = torch.randn(4, 2, 3, 3)
    across = Direction(0.0, 0.0)(torch.randn(4, 2, 3, 3), conditional)
    assert torch.allclose(Direction(0.0, 0.0)(across + 3 * conditional, conditional), across, atol=1e-5)


# --- TeaCache


def cache_run(threshold: float, changes: list[float]) -> CallCache:
    """Of a time embedding that changes by these parts of itself."""
    cache, time, tokens = CallCache(threshold, coefficients(480)), torch.ones(1, 6, 2), torch.zeros(1, 3, 2)
    for step, change in enumerate([0.0, *changes]):
        time = time * (1 + change)
        result = cache(time, tokens + step, lambda states: states + 10)
        assert torch.equal(result, tokens + step + 10)
    return cache


def test_the_first_five_steps_are_always_computed():
    assert cache_run(1e9, [0.1] * 7).computed == [True] * 5 + [False] * 3


def test_the_cache_computes_as_soon_as_enough_has_moved():
    moved = float(np.polyval(coefficients(480), 0.05))
    cache = cache_run(2.5 * moved, [0.05] * 10)
    assert cache.computed == [True] * 5 + [False, False, True, False, False, True]
    assert cache.moved == 0


def test_coefficients_are_those_of_the_nearest_size():
    assert coefficients(480) == coefficients(64)
    assert coefficients(720)[0] == pytest.approx(8.10705460e03)


@pytest.mark.parametrize("text_scale", [5.0, 1.0])
def test_every_kind_of_call_has_its_own_cache(transformer, text_scale):
    settings = replace(FAST, num_inference_steps=7, cache_threshold=1e9, text_guidance_scale=text_scale)
    ran: list[int] = []
    hook = transformer.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    cached = window(transformer, toy_inputs(1), settings)
    hook.remove()
    assert len(ran) == 5 * (3 if text_scale > 1 else 2)
    full = window(transformer, toy_inputs(1), replace(settings, cache_threshold=None))
    assert not torch.equal(cached, full)
    assert cached.shape == full.shape == (TOY.out_dim, 3, 4, 8)
