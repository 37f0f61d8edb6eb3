"""DDIM sampling of motion on the tiny network."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from avatar_core.backends.ditto.lmdm import MotionDecoder
from avatar_core.backends.ditto.official import motion_decoder
from avatar_core.backends.ditto.sampling import ClipSampler, Schedule
from avatar_core.backends.ditto.tiny import NETWORKS, random_state
from avatar_core.errors import ConfigError

COUNTS = (1, 2, 3, 5, 10, 50, 250, 1000)


@pytest.fixture(scope="module")
def model() -> MotionDecoder:
    return motion_decoder(random_state("lmdm", NETWORKS["lmdm"], seed=0))


def sampled(
    model: MotionDecoder, seed: int = 0, windows: int = 1, guidance: float = 2.0, steps: int = 3
) -> list[NDArray[np.float32]]:
    sample = ClipSampler(model, steps, guidance, torch.Generator().manual_seed(seed))
    generator = np.random.default_rng(0)
    cond = generator.standard_normal((1, 80, 1103)).astype(np.float32)
    return [sample(np.zeros((1, 265), np.float32), cond) for _ in range(windows)]


@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize("num_steps", COUNTS)
def test_every_number_of_steps_has_factors(num_steps: int, parity: bool) -> None:
    schedule = Schedule(num_steps, parity)
    assert len(schedule.times) == num_steps
    assert schedule.times[0] == 999
    assert schedule.times == sorted(schedule.times, reverse=True)
    for factors in (schedule.sigma, schedule.c, schedule.alpha_next_sqrt):
        assert len(factors) == num_steps - 1
        assert factors.isfinite().all()


def test_the_two_ways_to_the_noise_factor_agree_where_both_have_digits() -> None:
    exact, rounded = Schedule(50).c, Schedule(50, parity=True).c
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact[1:], rounded[1:], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_a_number_of_steps_out_of_range_is_refused(num_steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"num_inference_steps={num_steps}: allowed are 1 to 1000"):
        Schedule(num_steps)


def test_motion_is_decided_by_the_seed(model: MotionDecoder) -> None:
    (one,), (same,), (other,) = (sampled(model, seed) for seed in (0, 0, 1))
    assert one.shape == (1, 80, 265)
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3


def test_windows_of_a_clip_start_from_noise_of_their_own(model: MotionDecoder) -> None:
    first, second = sampled(model, windows=2)
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(first, sampled(model)[0])


def test_guidance_goes_beyond_the_conditional_motion(model: MotionDecoder) -> None:
    """With one step the result is linear in the guidance."""
    none, one, two = (sampled(model, guidance=guidance, steps=1)[0] for guidance in (0.0, 1.0, 2.0))
    assert np.abs(one - none).max() > 1e-3
    np.testing.assert_allclose(two - one, one - none, atol=1e-5)
