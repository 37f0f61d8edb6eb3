"""Which speaker a token of the picture listens to: labels from the first frame's attention, turned into
positions of a rotation that fits the sound of that speaker best."""

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

BACKGROUND = 12.0
RANGES = ((0.0, 4.0), (20.0, 24.0))
"""Positions of the tokens that show each speaker."""
KEY_POSITIONS = tuple(sum(ends) / 2 for ends in RANGES)
_THETA = 10000.0


def attention_map(query: Tensor, key: Tensor, token_masks: Tensor) -> Tensor:
    """How much each token looks at each class of the first frame's tokens: [classes, L] from query and key
    [1, L, heads, d] and masks [classes, S] of the first S tokens; mean of the heads."""
    classes, num_tokens = token_masks.shape
    # Sums of the attention weights over a mask are what attention gives with masks for values.
    values = query.new_zeros(1, num_tokens, query.shape[2], query.shape[3])
    values[..., :classes] = token_masks.T[None, :, None, :]
    sums = dispatch_attention_fn(query, key[:, :num_tokens], values)[0, ..., :classes]
    return (sums.float().mean(dim=1) / token_masks.sum(dim=1)).T


def query_positions(seen: Tensor) -> Tensor:
    """[L] from the map [3, L] of two speakers and the background."""
    low, high = seen.amin(dim=1, keepdim=True), seen.amax(dim=1, keepdim=True)
    within = (seen - low) / (high - low + 1e-8)
    labels = [start + row * (end - start) for row, (start, end) in zip(within, RANGES, strict=False)]
    background = torch.full_like(labels[0], BACKGROUND)
    return torch.stack([*labels, background]).gather(0, seen.argmax(dim=0)[None])[0]


def key_positions(tokens: int, device: torch.device) -> Tensor:
    """[tokens]: the first half belongs to the first speaker."""
    positions = torch.tensor(KEY_POSITIONS, device=device)
    return positions.repeat_interleave(tokens // len(KEY_POSITIONS))


def rotate(states: Tensor, positions: Tensor) -> Tensor:
    """[..., L, heads, d] turned by `positions`, which end with L; pairs of neighbours are turned together."""
    half = states.shape[-1] // 2
    steps = torch.arange(half, device=states.device, dtype=torch.float32)
    angles = positions.float()[..., None, None] * _THETA ** (-steps / half)
    cos, sin = angles.cos(), angles.sin()
    first, second = states.float().unflatten(-1, (half, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.flatten(-2).type_as(states)
