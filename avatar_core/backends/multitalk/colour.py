"""Colours of frames drawn to those of a picture: mean and spread of each channel of CIE L*a*b*."""

import torch
from torch import Tensor

# sRGB with its white D65, as scikit-image rounds them.
_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.95047, 1.0, 1.08883)
_FLAT = 1e-9  # spread of a channel that is the same everywhere, but for rounding


def match_colour(frames: Tensor, reference: Tensor, strength: float) -> Tensor:
    """Frames [3, F, H, W] in -1..1 with the colours of `reference` [3, H, W]; `strength` 0 to 1."""
    if strength == 0:
        return frames
    goal = _to_lab(_unit(reference))
    goal_mean, goal_spread = _moments(goal)
    matched = torch.empty_like(frames)
    for number in range(frames.shape[1]):  # one by one: the steps between need several times the memory
        frame = _unit(frames[:, number])
        lab = _to_lab(frame)
        mean, spread = _moments(lab)
        gain = torch.where(spread > _FLAT, goal_spread / spread, torch.zeros_like(spread))
        corrected = _to_rgb((lab - mean) * gain + goal_mean).clamp(0, 1)
        matched[:, number] = ((1 - strength) * frame + strength * corrected) * 2 - 1
    return matched


def _unit(frame: Tensor) -> Tensor:
    return ((frame.double() + 1) / 2).clamp(0, 1)


def _moments(lab: Tensor) -> tuple[Tensor, Tensor]:
    return lab.mean((1, 2), keepdim=True), lab.std((1, 2), correction=0, keepdim=True)


def _to_lab(rgb: Tensor) -> Tensor:
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = torch.einsum("ij,jhw->ihw", rgb.new_tensor(_TO_XYZ), linear) / _white(rgb)
    x, y, z = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def _to_rgb(lab: Tensor) -> Tensor:
    y = (lab[0] + 16) / 116
    xyz = torch.stack([y + lab[1] / 500, y, (y - lab[2] / 200).clamp(min=0)])
    xyz = torch.where(xyz > 0.2068966, xyz**3, (xyz - 16 / 116) / 7.787) * _white(lab)
    linear = torch.einsum("ij,jhw->ihw", torch.linalg.inv(lab.new_tensor(_TO_XYZ)), xyz)
    curved = 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, curved, 12.92 * linear)


def _white(like: Tensor) -> Tensor:
    return like.new_tensor(_WHITE).view(3, 1, 1)
