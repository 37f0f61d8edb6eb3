"""Weights and large inputs of the golden folders are not stored: they are drawn by name from the seed."""

from collections.abc import Mapping, Sequence
from hashlib import sha256

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avatar_core.backends.ditto.lmdm import MotionDecoder, Rotary
from avatar_core.backends.ditto.official import motion_decoder
from tests.parity.golden import Golden

SCALED = {
    "dense_motion_network.mask.weight": 8.0,
    "dense_motion_network.occlusion.weight": 4.0,
    "final_layer.weight": 0.1,
}
POWER_ITERATIONS = 3

Shapes = Mapping[str, Sequence[int]]


def rs(seed: int, tag: str) -> np.random.RandomState:
    return np.random.RandomState(
        int.from_bytes(sha256(f"{seed}:{tag}".encode("ascii")).digest()[:4], "little")
    )


def normal(seed: int, tag: str, shape: Sequence[int]) -> NDArray[np.float64]:
    return rs(seed, tag).standard_normal(int(np.prod(shape))).reshape(shape)


def randn(seed: int, tag: str, shape: Sequence[int]) -> NDArray[np.float32]:
    return normal(seed, tag, shape).astype(np.float32)


def weights(seed: int, shapes: Shapes, wrong: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """A state dict of these shapes; `wrong` names tensors that are drawn under another's name."""
    names = wrong or {}
    state = {name: weight(seed, name, shape, names.get(name, name)) for name, shape in shapes.items()}
    for name in shapes:
        if name.endswith("weight_orig"):
            layer = name.removesuffix("_orig")
            state[f"{layer}_u"], state[f"{layer}_v"] = spectral_pair(seed, f"{layer}_u", state[name])
    return state


def weight(seed: int, name: str, shape: Sequence[int], tag: str) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.zeros(tuple(shape), dtype=torch.int64)
    if name.endswith("rotary.freqs"):
        return Rotary(2 * shape[0]).freqs
    if name.endswith(("weight_u", "weight_v")):
        return torch.empty(tuple(shape))  # follow from `weight_orig`
    n = randn(seed, tag, shape).astype(np.float64)
    filled = scaled(name, shape, n).astype(np.float32)
    return torch.from_numpy(filled * np.float32(SCALED.get(name, 1.0)))


def scaled(name: str, shape: Sequence[int], n: NDArray[np.float64]) -> NDArray[np.float64]:
    """Normal numbers as the first rule that fits the name wants them."""
    rules = {
        ("running_mean",): lambda: 0.1 * n,
        ("running_var",): lambda: np.exp(0.2 * n),
        ("null_cond_embed", "null_cond_hidden"): lambda: n,
        ("grn.gamma", "grn.beta"): lambda: 0.2 * n,
        ("bias",): lambda: 0.1 * n,
    }
    for endings, rule in rules.items():
        if name.endswith(endings):
            return rule()
    return 1 + 0.1 * n if len(shape) == 1 else n / np.sqrt(np.prod(shape[1:]))


def spectral_pair(seed: int, tag: str, weight_orig: Tensor) -> tuple[Tensor, Tensor]:
    matrix = weight_orig.double().flatten(1).numpy()
    u = unit(normal(seed, tag, (matrix.shape[0],)))
    v = u
    for _ in range(POWER_ITERATIONS):
        v = unit(matrix.T @ u)
        u = unit(matrix @ v)
    return torch.from_numpy(u.astype(np.float32)), torch.from_numpy(v.astype(np.float32))


def unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    return vector / np.linalg.norm(vector)


def smooth_field(seed: int, tag: str, height: int, width: int) -> NDArray[np.float64]:
    """(height, width, 3) in 0..255: three waves in each channel."""
    generator = rs(seed, tag)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    field = np.zeros((height, width, 3))
    for channel in range(3):
        for _ in range(3):
            fx, fy = generator.uniform(-3, 3, 2)
            phase = generator.uniform(0, 2 * np.pi)
            field[..., channel] += np.sin(2 * np.pi * (fx * x / width + fy * y / height) + phase)
    return np.clip(127.5 * (1 + field / 3), 0, 255)


def tiny_lmdm(golden: Golden) -> MotionDecoder:
    """The small motion network of the folder."""
    step = golden.sibling("lmdm_step_tiny")
    state = weights(step.settings["seed"], step.settings["shapes"], step.wrong_rows)
    return motion_decoder(state, step.settings["config"]["num_heads"])
