"""What MultiTalk adds to Wan: speech as tokens, and attention of each frame to the tokens of its moment."""

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from avatar_core.backends.multitalk.lrope import key_positions, rotate

_EARLY, _CENTRE, _LATE = slice(0, 3), slice(2, 3), slice(2, 5)
_OF_GROUP = (_EARLY, _CENTRE, _CENTRE, _LATE)
"""Rows of the windows of four frames, which become one latent frame, that the projection takes."""


class AudioProjection(nn.Module):
    """Windows [persons, F, window, layers, channels] to tokens [persons, T, tokens, width]."""

    def __init__(
        self, window: int, layers: int, channels: int, intermediate_dim: int, output_dim: int, tokens: int
    ) -> None:
        super().__init__()
        rows = sum(len(range(window)[part]) for part in _OF_GROUP)
        self.proj1 = nn.Linear(window * layers * channels, intermediate_dim)
        self.proj1_vf = nn.Linear(rows * layers * channels, intermediate_dim)
        self.proj2 = nn.Linear(intermediate_dim, intermediate_dim)
        self.proj3 = nn.Linear(intermediate_dim, tokens * output_dim)
        self.norm = nn.LayerNorm(output_dim)
        self._shape = (tokens, output_dim)

    def forward(self, windows: Tensor) -> Tensor:
        first, later = by_latent_frame(windows)
        states = [self.proj1(first.flatten(2)).relu(), self.proj1_vf(later.flatten(2)).relu()]
        joined = self.proj2(torch.cat(states, dim=1)).relu()
        return self.norm(self.proj3(joined).unflatten(2, self._shape))


def by_latent_frame(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows for the first latent frame [persons, 1, 5, ...] and for the others [persons, T - 1, 8, ...]."""
    groups = windows[:, 1:].unflatten(1, (-1, len(_OF_GROUP)))
    rows = [groups[:, :, number, part] for number, part in enumerate(_OF_GROUP)]
    return windows[:, :1], torch.cat(rows, dim=2)


def join_speakers(tokens: Tensor) -> Tensor:
    """[T, persons * tokens, width] of [persons, T, tokens, width]: first speaker first."""
    return tokens.transpose(0, 1).flatten(1, 2)


class AudioCrossAttention(nn.Module):
    def __init__(self, dim: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(context_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, hidden_states: Tensor, context: Tensor, positions: Tensor | None) -> Tensor:
        """Tokens [1, L, dim] of T frames and sound [T, tokens, width]; `positions` [L] are those
        of the tokens where there are two speakers, whose sounds follow each other in `context`."""
        frames = context.shape[0]
        query = self.q_linear(hidden_states).view(
            frames, -1, self.heads, hidden_states.shape[2] // self.heads
        )
        key, value = self.kv_linear(context).unflatten(2, (2, self.heads, -1)).unbind(2)
        if positions is not None:
            query = rotate(query, positions.view(frames, -1))
            key = rotate(key, key_positions(context.shape[1], key.device))
        attended = dispatch_attention_fn(query, key, value)
        return self.proj(attended.flatten(2).reshape(hidden_states.shape))
