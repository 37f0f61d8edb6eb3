"""Colours of frames drawn to those of a picture: mean and spread of each channel of CIE L*a*b*."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

# sRGB with its white D65, as scikit-image rounds them.
_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_FROM_XYZ = np.linalg.inv(np.array(_TO_XYZ)).tolist()
_WHITE = (0.95047, 1.0, 1.08883)
_FLAT = 1e-9  # spread of a channel that is the same everywhere, but for rounding

Array = Any
"""numpy's or torch's: what follows is the same in both."""


def match_colour(frames: Tensor, reference: Tensor, strength: float, *, parity: bool = False) -> Tensor:
    """Frames [3, F, H, W] in -1..1 with the colours of `reference` [3, H, W]; `strength` 0 to 1. In `parity`
    by numpy in float32, which gives even a frame of one colour the noise of the published code."""
    if strength == 0:
        return frames
    goal = _to_lab(_unit(reference, parity))
    goals = [_moments(goal[..., c]) for c in range(3)]
    matched = torch.empty_like(frames)
    for number in range(frames.shape[1]):  # one by one: the steps between need several times the memory
        frame = _unit(frames[:, number], parity)
        lab = _to_lab(frame)
        channels = [_drawn(lab[..., c], goals[c], 0.0 if parity else _FLAT) for c in range(3)]
        corrected = _to_rgb(_stack(channels)).clip(0, 1)
        blended = ((1 - strength) * frame + strength * corrected) * 2 - 1
        matched[:, number] = torch.as_tensor(blended).movedim(-1, 0)
    return matched


def _unit(frame: Tensor, parity: bool) -> Array:
    """[H, W, 3] in 0..1."""
    pixels = frame.movedim(0, -1)
    array: Array = np.ascontiguousarray(pixels.float().cpu().numpy()) if parity else pixels.double()
    return ((array + 1) / 2).clip(0, 1)


def _drawn(channel: Array, goal: tuple[Array, Array], flat: float) -> Array:
    mean, spread = _moments(channel)
    goal_mean, goal_spread = goal
    gain = goal_spread / spread if spread > flat else 0.0
    return (channel - mean) * gain + goal_mean


def _moments(channel: Array) -> tuple[Array, Array]:
    mean = channel.mean()
    return mean, ((channel - mean) ** 2).mean() ** 0.5


def _to_lab(rgb: Array) -> Array:
    linear = _where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = (linear @ _like(rgb, _TO_XYZ).T) / _like(rgb, _WHITE)
    root = np.cbrt(xyz) if isinstance(xyz, np.ndarray) else xyz ** (1 / 3)
    bent = _where(xyz > 0.008856, root, 7.787 * xyz + 16 / 116)
    x, y, z = (bent[..., number] for number in range(3))
    return _stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def _to_rgb(lab: Array) -> Array:
    y = (lab[..., 0] + 16) / 116
    bent = _stack([lab[..., 1] / 500 + y, y, (y - lab[..., 2] / 200).clip(0)])
    xyz = _where(bent > 0.2068966, bent**3, (bent - 16 / 116) / 7.787) * _like(lab, _WHITE)
    linear = xyz @ _like(lab, _FROM_XYZ).T
    curved = 1.055 * linear.clip(0.0031308) ** (1 / 2.4) - 0.055
    return _where(linear > 0.0031308, curved, 12.92 * linear)


def _where(condition: Array, one: Array, other: Array) -> Array:
    return (np if isinstance(one, np.ndarray) else torch).where(condition, one, other)


def _stack(channels: list[Array]) -> Array:
    return (np if isinstance(channels[0], np.ndarray) else torch).stack(channels, axis=-1)


def _like(array: Array, values: Any) -> Array:
    return np.array(values, array.dtype) if isinstance(array, np.ndarray) else array.new_tensor(values)
