"""Motion diffusion network: predicts 80 clean motion vectors from noisy ones, the sound and a first frame."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from avatar_core.backends.ditto.layers import count

_THETA = 10_000


@dataclass(frozen=True)
class LmdmConfig:
    """Names as in the published class; a state does not show `num_heads`."""

    nfeats: int = 265
    seq_len: int = 80
    latent_dim: int = 512
    ff_size: int = 1024
    num_layers: int = 8
    num_heads: int = 8
    cond_feature_dim: int = 1103

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], num_heads: int = 8) -> "LmdmConfig":
        _, seq_len, latent_dim = state["null_cond_embed"].shape
        return cls(
            nfeats=state["final_layer.weight"].shape[0],
            seq_len=seq_len,
            latent_dim=latent_dim,
            ff_size=state["cond_encoder.0.linear1.weight"].shape[0],
            num_layers=count(state, "seqTransDecoder.stack."),
            num_heads=num_heads,
            cond_feature_dim=state["cond_projection.weight"].shape[1],
        )


class Rotary(nn.Module):
    """Turns neighbouring pairs of channels by angles that grow with the position. Here it acts on the whole
    width, before attention projects it and divides it among the heads."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # On the meta device, arithmetic and random numbers cost seconds of imports.
        exponents = torch.arange(0, dim, 2, device="cpu").float() / dim
        self.register_buffer("freqs", 1.0 / _THETA**exponents)

    freqs: Tensor

    def forward(self, rows: Tensor) -> Tensor:
        """(B, L, D)."""
        positions = torch.arange(rows.shape[1], device=rows.device, dtype=torch.float32)
        angles = positions[:, None] * self.freqs
        cos, sin = angles.cos().to(rows.dtype), angles.sin().to(rows.dtype)
        even, odd = rows[..., ::2], rows[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


class Attention(nn.MultiheadAttention):
    def __init__(self, config: LmdmConfig) -> None:
        super().__init__(config.latent_dim, config.num_heads, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(query, key, value, need_weights=False)[0]


class SinusoidalEmbedding(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, timesteps: Tensor) -> Tensor:
        """(B,) in 0 .. 999 -> (B, D)."""
        half = self.dim // 2
        steps = torch.arange(half, device=timesteps.device, dtype=torch.float32)
        angles = timesteps[:, None].float() * torch.exp(-steps * (math.log(_THETA) / (half - 1)))
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class _EncoderLayer(nn.Module):
    def __init__(self, config: LmdmConfig, rotary: Rotary) -> None:
        super().__init__()
        dim = config.latent_dim
        self.self_attn = Attention(config)
        self.linear1 = nn.Linear(dim, config.ff_size)
        self.linear2 = nn.Linear(config.ff_size, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.rotary = rotary

    def forward(self, rows: Tensor) -> Tensor:
        normed = self.norm1(rows)
        turned = self.rotary(normed)
        rows = rows + self.self_attn(turned, turned, normed)
        change: Tensor = self.linear2(nn.functional.gelu(self.linear1(self.norm2(rows))))
        return rows + change


class _Film(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Mish(), nn.Linear(dim, 2 * dim))

    def forward(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """Rows (B, L, D), scaled and shifted by what is read from `hidden` (B, D)."""
        scale, shift = self.block(hidden)[:, None].chunk(2, dim=-1)
        return (scale + 1) * rows + shift


class _DecoderLayer(nn.Module):
    def __init__(self, config: LmdmConfig, rotary: Rotary) -> None:
        super().__init__()
        dim = config.latent_dim
        self.self_attn, self.multihead_attn = Attention(config), Attention(config)
        self.linear1 = nn.Linear(dim, config.ff_size)
        self.linear2 = nn.Linear(config.ff_size, dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.film1, self.film2, self.film3 = _Film(dim), _Film(dim), _Film(dim)
        self.rotary = rotary

    def forward(self, rows: Tensor, memory: Tensor, turned_memory: Tensor, hidden: Tensor) -> Tensor:
        normed = self.norm1(rows)
        turned = self.rotary(normed)
        rows = rows + self.film1(self.self_attn(turned, turned, normed), hidden)
        query = self.rotary(self.norm2(rows))
        rows = rows + self.film2(self.multihead_attn(query, turned_memory, memory), hidden)
        change = self.linear2(nn.functional.gelu(self.linear1(self.norm3(rows))))
        return rows + self.film3(change, hidden)


class _DecoderStack(nn.Module):
    def __init__(self, config: LmdmConfig, rotary: Rotary) -> None:
        super().__init__()
        self.stack = nn.ModuleList(_DecoderLayer(config, rotary) for _ in range(config.num_layers))


class Guidance(NamedTuple):
    """What a clip is conditioned on, the same in all steps: `tokens` (B, 80, D) and `hidden` (B, D)."""

    tokens: Tensor
    hidden: Tensor


class MotionDecoder(nn.Module):
    def __init__(self, config: LmdmConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.latent_dim
        self.null_cond_embed = nn.Parameter(torch.randn(1, config.seq_len, dim, device="cpu"))
        self.null_cond_hidden = nn.Parameter(torch.randn(1, dim, device="cpu"))
        self.rotary = Rotary(dim)
        self.time_mlp = nn.Sequential(SinusoidalEmbedding(dim), nn.Linear(dim, 4 * dim), nn.Mish())
        self.to_time_cond = nn.Sequential(nn.Linear(4 * dim, dim))
        self.to_time_tokens = nn.Sequential(nn.Linear(4 * dim, 2 * dim), nn.Unflatten(-1, (2, dim)))
        self.norm_cond = nn.LayerNorm(dim)
        self.input_projection = nn.Linear(2 * config.nfeats, dim)
        self.cond_encoder = nn.Sequential(*(_EncoderLayer(config, self.rotary) for _ in range(2)))
        self.cond_projection = nn.Linear(config.cond_feature_dim, dim)
        self.non_attn_cond_projection = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.seqTransDecoder = _DecoderStack(config, self.rotary)
        self.final_layer = nn.Linear(dim, config.nfeats)

    def conditional(self, cond: Tensor) -> Guidance:
        """`cond` (B, 80, 1103)."""
        tokens = self.cond_encoder(self.cond_projection(cond))
        return Guidance(tokens, self.non_attn_cond_projection(tokens.mean(dim=1)))

    def unconditional(self, batch: int = 1) -> Guidance:
        return Guidance(self.null_cond_embed.expand(batch, -1, -1), self.null_cond_hidden.expand(batch, -1))

    def forward(self, noisy: Tensor, cond_frame: Tensor, timesteps: Tensor, guidance: Guidance) -> Tensor:
        """`noisy` (B, 80, 265), `cond_frame` (B, 265) before the first, `timesteps` (B,) -> clean motion."""
        first = cond_frame[:, None].expand_as(noisy)
        rows = self.input_projection(torch.cat([noisy, first], dim=-1))
        time = self.time_mlp(timesteps)
        hidden = self.to_time_cond(time) + guidance.hidden
        memory = self.norm_cond(torch.cat([guidance.tokens, self.to_time_tokens(time)], dim=1))
        turned = self.rotary(memory)
        for layer in self.seqTransDecoder.stack:
            rows = layer(rows, memory, turned, hidden)
        clean: Tensor = self.final_layer(rows)
        return clean
