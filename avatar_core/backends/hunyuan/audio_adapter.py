"""How sound reaches the picture: audio features to tokens, and the cross attention that reads them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class AudioProjection(nn.Module):
    """Encoder states around each video frame -> audio tokens of that frame."""

    def __init__(self, in_features: int, inner_dim: int, num_tokens: int, hidden_size: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.proj1 = nn.Linear(in_features, inner_dim)
        self.proj2 = nn.Linear(inner_dim, inner_dim)
        self.proj3 = nn.Linear(inner_dim, num_tokens * hidden_size)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, audio: Tensor) -> Tensor:
        """(B, frames, positions, layers, channels) -> (B, frames, num_tokens, hidden_size)."""
        hidden_states = self.proj1(audio.flatten(2)).relu()
        hidden_states = self.proj2(hidden_states).relu()
        tokens = self.proj3(hidden_states).unflatten(2, (self.num_tokens, -1))
        return self.norm(tokens)


def tokens_per_latent_frame(audio_tokens: Tensor) -> Tensor:
    """(B, 4 T - 3, n, D) -> (B, T, 4 n, D).

    A latent frame stands for four video frames, but the first one for a single frame, which it sees four
    times.
    """
    first = audio_tokens[:, :1].expand(-1, 3, -1, -1)
    return torch.cat([first, audio_tokens], dim=1).unflatten(1, (-1, 4)).flatten(2, 3)


@dataclass(frozen=True)
class AudioKeys:
    """Keys and values of one adapter, each (B, T, audio tokens, inner_dim)."""

    key: Tensor
    value: Tensor


class AudioAdapter(nn.Module):
    """Cross attention with one head from the image tokens of a latent frame to its audio tokens."""

    def __init__(self, hidden_size: int, inner_dim: int) -> None:
        super().__init__()
        self.scale = inner_dim**-0.25  # on queries and keys alike
        self.norm1 = nn.LayerNorm(hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.to_q = nn.Linear(hidden_size, inner_dim, bias=False)
        self.to_kv = nn.Linear(hidden_size, 2 * inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, hidden_size, bias=False)

    def read(self, audio_tokens: Tensor) -> AudioKeys:
        key, value = self.to_kv(self.norm1(audio_tokens)).chunk(2, dim=-1)
        return AudioKeys(key * self.scale, value)

    def forward(self, hidden_states: Tensor, audio: AudioKeys) -> Tensor:
        """(B, T, image tokens, D) -> what is to be added to it."""
        query = self.to_q(self.norm2(hidden_states)) * self.scale
        scores = query @ audio.key.transpose(-1, -2)
        weights = scores.float().softmax(dim=-1).to(audio.value.dtype)
        return self.to_out(weights @ audio.value)
