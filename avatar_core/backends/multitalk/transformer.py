"""The transformer of MultiTalk: Wan's image-to-video model with attention to speech in every block."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import (
    WanRotaryPosEmbed,
    WanTimeTextImageEmbedding,
    WanTransformerBlock,
)
from torch import Tensor, nn

from avatar_core.backends.multitalk.audio_layers import (
    AudioCrossAttention,
    AudioProjection,
    join_speakers,
)
from avatar_core.backends.multitalk.lrope import attention_map, query_positions

PATCH = (1, 2, 2)
Rotary = tuple[Tensor, Tensor]
Modulation = tuple[Tensor, ...]  # shift, scale and gate of the attention, and of the feed-forward part

FLOAT32_MODULES = (
    "condition_embedder.time_embedder.",
    "condition_embedder.time_proj.",
    "proj_out.",
    "scale_shift_table",
)
"""What computes in float32, if with numbers that were rounded to the model's dtype."""


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes under the names of the official `config.json`, and those that it does not name."""

    dim: int = 5120
    ffn_dim: int = 13824
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    in_dim: int = 36
    out_dim: int = 16
    num_heads: int = 40
    num_layers: int = 40
    eps: float = 1e-6
    clip_dim: int = 1280
    audio_window: int = 5
    audio_blocks: int = 12
    audio_channels: int = 768
    intermediate_dim: int = 512
    output_dim: int = 768
    context_tokens: int = 32

    @classmethod
    def from_official(cls, values: Mapping[str, Any]) -> "TransformerConfig":
        """Raises `TypeError` for an unknown name."""
        return cls(**{n: v for n, v in values.items() if not n.startswith("_") and n != "model_type"})

    def to_official(self) -> dict[str, Any]:
        return {"model_type": "i2v", **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Conditions:
    """What stays the same during the steps of a window: `context` [1, 257 + 512, dim], the sound as tokens
    [T, persons * tokens, width] and, where two speak, masks [3, S] of the first frame's tokens."""

    context: Tensor
    audio: Tensor
    token_masks: Tensor | None

    def positions(self, query: Tensor, key: Tensor) -> Tensor | None:
        """[L] of the tokens, by which of two speakers they show; of query and key [1, L, heads, d]."""
        if self.token_masks is None:
            return None
        return query_positions(attention_map(query, key, self.token_masks))


RunBlocks = Callable[[Tensor], Tensor]
Cache = Callable[[Tensor, Tensor, RunBlocks], Tensor]
"""`cache(time, tokens, run)` gives what `run(tokens)` would give, or something near it."""


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Of a model that computes in `dtype`."""
    return torch.float32 if any(part in name for part in FLOAT32_MODULES) else dtype


class MultiTalkBlock(WanTransformerBlock):
    """Wan's block with `audio_cross_attn` before its feed-forward part."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(
            config.dim,
            config.ffn_dim,
            config.num_heads,
            cross_attn_norm=True,
            eps=config.eps,
            added_kv_proj_dim=config.dim,
        )
        self.norm_x = FP32LayerNorm(config.dim, config.eps)
        self.audio_cross_attn = AudioCrossAttention(config.dim, config.num_heads, config.output_dim)

    def forward(  # type: ignore[override]  # other conditions
        self, hidden_states: Tensor, time: Tensor, conditions: Conditions, rotary: Rotary
    ) -> Tensor:
        """`time` [1, 6, dim]; float32, as is all that scales and shifts."""
        modulation = self.modulation(time)
        query, key, value = self.heads(hidden_states, rotary, modulation)
        positions = conditions.positions(query, key)
        attended = dispatch_attention_fn(query, key, value)
        hidden_states = self.attend(hidden_states, attended, conditions.context, modulation)
        hidden_states = self.listen(hidden_states, conditions.audio, positions)
        return self.feed_forward(hidden_states, modulation)

    # What follows computes every token by itself.

    def modulation(self, time: Tensor) -> Modulation:
        return (self.scale_shift_table + time).chunk(6, dim=1)

    def heads(
        self, hidden_states: Tensor, rotary: Rotary, modulation: Modulation
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [1, L, heads, d]."""
        shift, scale, *_ = modulation
        normed = (self.norm1(hidden_states).float() * (1 + scale) + shift).type_as(hidden_states)
        attn, shape = self.attn1, (self.attn1.heads, -1)
        query = rotated(attn.norm_q(attn.to_q(normed)).unflatten(2, shape), rotary)
        key = rotated(attn.norm_k(attn.to_k(normed)).unflatten(2, shape), rotary)
        return query, key, attn.to_v(normed).unflatten(2, shape)

    def attend(
        self, hidden_states: Tensor, attended: Tensor, context: Tensor, modulation: Modulation
    ) -> Tensor:
        gate = modulation[2]
        to_out: Any = self.attn1.to_out
        added = to_out[0](attended.flatten(2)) * gate
        hidden_states = (hidden_states.float() + added).type_as(hidden_states)
        return hidden_states + self.attn2(self.norm2(hidden_states), context)

    def listen(self, hidden_states: Tensor, audio: Tensor, positions: Tensor | None) -> Tensor:
        """Of whole frames."""
        return hidden_states + self.audio_cross_attn(self.norm_x(hidden_states), audio, positions)

    def feed_forward(self, hidden_states: Tensor, modulation: Modulation) -> Tensor:
        *_, shift, scale, gate = modulation
        normed = (self.norm3(hidden_states).float() * (1 + scale) + shift).type_as(hidden_states)
        return (hidden_states.float() + self.ffn(normed) * gate).type_as(hidden_states)


def rotated(states: Tensor, rotary: Rotary) -> Tensor:
    cos, sin = (each[..., 0::2] for each in rotary)
    first, second = states.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.flatten(-2).type_as(states)


class MultiTalkTransformer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.rope = WanRotaryPosEmbed(dim // config.num_heads, PATCH, 1024)
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, kernel_size=PATCH, stride=PATCH)
        self.condition_embedder = WanTimeTextImageEmbedding(
            dim, config.freq_dim, 6 * dim, config.text_dim, config.clip_dim
        )
        self.audio_proj = AudioProjection(
            config.audio_window,
            config.audio_blocks,
            config.audio_channels,
            config.intermediate_dim,
            config.output_dim,
            config.context_tokens,
        )
        self.blocks = nn.ModuleList(MultiTalkBlock(config) for _ in range(config.num_layers))
        self.norm_out = FP32LayerNorm(dim, config.eps, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, config.out_dim * PATCH[1] * PATCH[2])
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def prepare(
        self, prompt_embeds: Tensor, clip_features: Tensor, audio: Tensor, speaker_masks: Tensor
    ) -> Conditions:
        """`prompt_embeds` [n, text_dim] of the valid tokens, `clip_features` [1, 257, clip_dim], `audio`
        [persons, F, window, layers, channels], `speaker_masks` [3, h, w]."""
        missing = self.config.text_len - prompt_embeds.shape[0]
        text = nn.functional.pad(prompt_embeds.to(self.dtype), (0, 0, 0, missing))[None]
        embedder: Any = self.condition_embedder
        image = embedder.image_embedder(clip_features.to(self.dtype))
        context = torch.cat([image, embedder.text_embedder(text)], dim=1)
        speech = join_speakers(self.audio_proj(audio.to(self.dtype)))
        return Conditions(context, speech, token_masks(speaker_masks) if len(audio) > 1 else None)

    def forward(
        self, latents: Tensor, timestep: Tensor, conditions: Conditions, cache: Cache | None = None
    ) -> Tensor:
        """Velocity [1, out_dim, T, h, w] in float32 of `latents` [1, in_dim, T, h, w], noise first; time
        [1] in 0..1000."""
        rotary = self.rope(latents)
        tokens = self.patch_embedding(latents.to(self.dtype))
        grid = tokens.shape[2:]
        tokens = tokens.flatten(2).transpose(1, 2).contiguous()
        time, modulation = self.time(timestep)

        def run(hidden_states: Tensor) -> Tensor:
            for block in self.blocks:
                hidden_states = block(hidden_states, modulation, conditions, rotary)
            return hidden_states

        tokens = cache(modulation, tokens, run) if cache else run(tokens)
        shift, scale = (self.scale_shift_table + time[:, None]).chunk(2, dim=1)
        output = self.proj_out(self.norm_out(tokens).float() * (1 + scale) + shift)
        patches = output.unflatten(1, grid).unflatten(-1, (*PATCH, -1))
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """[1, dim] and [1, 6, dim], in float32."""
        embedder = self.condition_embedder
        time = embedder.time_embedder(time_sinusoid(timestep, self.config.freq_dim))
        return time, embedder.time_proj(nn.functional.silu(time)).unflatten(1, (6, -1))


def time_sinusoid(timestep: Tensor, size: int) -> Tensor:
    """[1, size] of [1]. The position is in float64, not rounded as in diffusers."""
    half = size // 2
    steps = torch.arange(half, device=timestep.device, dtype=torch.float64)
    angles = timestep.double()[:, None] * 10000.0 ** (-steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def token_masks(speaker_masks: Tensor) -> Tensor:
    """[3, S] of masks [3, h, w]: the upper left latent of every token."""
    return (speaker_masks[:, :: PATCH[1], :: PATCH[2]] > 0).flatten(1).float()
