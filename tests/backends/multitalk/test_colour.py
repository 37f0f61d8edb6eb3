import pytest
import torch
from torch import Tensor

from avatar_core.backends.multitalk.colour import match_colour

BOTH = pytest.mark.parametrize("parity", [False, True])


def picture(seed: int = 0, spread: float = 0.25) -> Tensor:
    """[3, H, W] of soft colours in -1..1."""
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(3, 24, 32, generator=generator) + 0.1).clamp(-0.95, 0.95)


def clip(*seeds: int, spread: float = 0.25) -> Tensor:
    return torch.stack([picture(seed, spread) for seed in seeds], dim=1)


@BOTH
def test_frames_with_the_picture_s_colours_stay_as_they_are(parity: bool) -> None:
    frames = clip(0, 0)
    assert (match_colour(frames, picture(0), 1.0, parity=parity) - frames).abs().max() < 1e-3


@BOTH
def test_a_drift_of_colours_is_taken_back(parity: bool) -> None:
    """Of each frame by itself."""
    drift = torch.tensor([0.2, -0.1, 0.05]).view(3, 1, 1)
    frames = torch.stack([picture(), picture() + drift, picture() * 0.6 - drift], dim=1)
    matched = match_colour(frames, picture(), 1.0, parity=parity)
    before = (frames - picture()[:, None]).abs().amax((0, 2, 3))
    after = (matched - picture()[:, None]).abs().mean((0, 2, 3))
    assert before[1:].min() > 0.15
    assert after.max() < 0.05


@BOTH
def test_strength_is_a_share(parity: bool) -> None:
    frames = clip(1, 2, spread=0.1) + 0.2
    full, part = (match_colour(frames, picture(0), s, parity=parity) for s in (1.0, 0.25))
    assert (full - frames).abs().max() > 0.1
    assert (part - (0.75 * frames + 0.25 * full)).abs().max() < 1e-5
    assert match_colour(frames, picture(0), 0.0, parity=parity) is frames


def test_a_frame_of_one_colour_takes_the_picture_s_mean() -> None:
    flat = torch.full((3, 2, 24, 32), 0.3)
    matched = match_colour(flat, picture(), 1.0)
    assert torch.isfinite(matched).all()
    assert matched.std((2, 3)).max() < 1e-4
    assert (matched[:, 0] - picture().mean((1, 2))[:, None, None]).abs().max() < 0.1


@BOTH
@pytest.mark.parametrize("value", [-1.0, 1.0, 0.0])
def test_a_picture_of_one_colour_gives_finite_frames(value: float, parity: bool) -> None:
    matched = match_colour(clip(0, 1), torch.full((3, 24, 32), value), 1.0, parity=parity)
    assert torch.isfinite(matched).all()
    assert (matched - value).abs().max() < 1e-2


@BOTH
def test_frames_stay_within_their_range(parity: bool) -> None:
    wild = torch.randn(3, 3, 24, 32, generator=torch.Generator().manual_seed(0)) * 3
    matched = match_colour(wild, picture(spread=2.0), 1.0, parity=parity)
    assert matched.shape == wild.shape
    assert matched.dtype == wild.dtype
    assert matched.abs().max() <= 1


def test_both_ways_agree() -> None:
    frames = clip(3, 4)
    one, other = (match_colour(frames, picture(0), 1.0, parity=parity) for parity in (False, True))
    assert 0 < (one - other).abs().max() < 1e-4
