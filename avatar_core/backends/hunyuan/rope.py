"""Rotary position tables of the transformer's image tokens."""

from collections.abc import Sequence

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor


def rotary_tables(
    num_frames: int, height: int, width: int, axes_dim: Sequence[int], theta: float
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each float32 ((num_frames + 1) * height * width, sum(axes_dim)), on the CPU.

    Sizes are in tokens. The first height * width rows belong to the reference picture: a frame at time -1.
    """
    grid = torch.meshgrid(
        torch.arange(-1, num_frames, dtype=torch.float32),
        torch.arange(height, dtype=torch.float32),
        torch.arange(width, dtype=torch.float32),
        indexing="ij",
    )
    axes = [
        get_1d_rotary_pos_embed(dim, positions.flatten().numpy(), theta, use_real=True)
        for dim, positions in zip(axes_dim, grid, strict=True)
    ]
    return torch.cat([cosines for cosines, _ in axes], dim=1), torch.cat([sines for _, sines in axes], dim=1)
