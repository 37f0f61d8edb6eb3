"""MultiTalk's models at random weights, built on their device without a checkpoint, and random conditions."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from random_models import filled
from torch import Tensor

from avatar_core.backends.multitalk.sampling import ClipInputs
from avatar_core.backends.multitalk.tiny import CLIP, TEXT, VAE
from avatar_core.backends.multitalk.tiny import TRANSFORMER as TINY_TRANSFORMER
from avatar_core.backends.multitalk.transformer import (
    MultiTalkTransformer,
    TransformerConfig,
    parameter_dtype,
)

IMAGE_ROWS = 257  # of CLIP


@dataclass(frozen=True)
class Size:
    """Of a window in pixels and frames; `text_tokens` are the valid ones of the prompt."""

    transformer: TransformerConfig
    height: int
    width: int
    gemm_sides: tuple[int, ...]
    frames: int = 81
    persons: int = 2
    text_tokens: int = 60
    encoders: Mapping[str, Mapping[str, Any] | None] | None = None

    @property
    def head_dim(self) -> int:
        return self.transformer.dim // self.transformer.num_heads

    @property
    def latent_frames(self) -> int:
        return (self.frames - 1) // 4 + 1

    @property
    def tokens(self) -> int:
        return self.latent_frames * self.height * self.width // 256

    @property
    def name(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


FULL = tuple(
    Size(TransformerConfig(), height, width, (4096, 8192, 16384))
    for height, width in ((480, 832), (640, 640))
)
TINY = (
    Size(
        TINY_TRANSFORMER,
        64,
        96,
        (64, 128),
        frames=13,
        text_tokens=7,
        encoders={"text": {**TEXT, "vocab_size": 500}, "clip": CLIP, "vae": VAE},
    ),
)


def shallow(config: TransformerConfig) -> TransformerConfig:
    """As wide, for comparisons in float32."""
    return replace(config, num_layers=2)


def random_transformer(
    config: TransformerConfig, device: str, dtype: torch.dtype = torch.bfloat16
) -> MultiTalkTransformer:
    """The same for one configuration in every dtype, up to rounding to it: bfloat16 numbers."""
    with init_empty_weights():
        transformer = MultiTalkTransformer(config)
    dtypes = {name: parameter_dtype(name, dtype) for name in transformer.state_dict()}
    return filled(transformer, device, dtypes).to(device)


def random_plain_transformer(config: TransformerConfig, device: str) -> WanTransformer3DModel:
    """diffusers' model of this size without MultiTalk's layers, throughout in bfloat16."""
    with init_empty_weights():
        transformer = WanTransformer3DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.dim // config.num_heads,
            in_channels=config.in_dim,
            out_channels=config.out_dim,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            image_dim=config.clip_dim,
            added_kv_proj_dim=config.dim,
        )
    dtypes = dict.fromkeys(transformer.state_dict(), torch.bfloat16)
    return filled(transformer, device, dtypes).to(device)


def random_inputs(size: Size, device: str, persons: int | None = None) -> ClipInputs:
    config, count = size.transformer, persons or size.persons
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    latent = (size.latent_frames, size.height // 8, size.width // 8)
    return ClipInputs(
        prompt_embeds=normal(size.text_tokens, config.text_dim),
        negative_prompt_embeds=normal(2 * size.text_tokens, config.text_dim),
        clip_features=normal(1, IMAGE_ROWS, config.clip_dim),
        condition=normal(1, config.in_dim - config.out_dim, *latent),
        audio=normal(count, size.frames, config.audio_window, config.audio_blocks, config.audio_channels),
        speaker_masks=_halves(*latent[1:], device),
        motion_latents=None,
    )


def _halves(height: int, width: int, device: str) -> Tensor:
    """The first person on the left, the other on the right, a strip of background above."""
    masks = torch.zeros(3, height, width, device=device)
    masks[0, height // 4 :, : width // 2] = 1
    masks[1, height // 4 :, width // 2 :] = 1
    masks[2, : height // 4] = 1
    return masks
