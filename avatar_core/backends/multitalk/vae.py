"""Frames to latents and back by Wan's autoencoder, in float32."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from avatar_core.checkpoint import Rename

MASK_CHANNELS = 4  # one for each of the frames that become one latent frame

# From diffusers' names to the official ones, in this order.
_WITHIN = (
    (r"\.norm1\.gamma$", ".residual.0.gamma"),
    (r"\.conv1\.(weight|bias)$", r".residual.2.\1"),
    (r"\.norm2\.gamma$", ".residual.3.gamma"),
    (r"\.conv2\.(weight|bias)$", r".residual.6.\1"),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.down_blocks\.", ".downsamples."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
)


def build_vae(sizes: Mapping[str, Any] | None = None) -> AutoencoderKLWan:
    """`sizes` are those that differ from the official ones."""
    return AutoencoderKLWan(**(sizes or {}))


def vae_name_map(sizes: Mapping[str, Any] | None = None) -> list[Rename]:
    """From the official names to those of diffusers."""
    with torch.device("meta"):
        vae: Any = build_vae(sizes)
    layers = vae.config.num_res_blocks + 1
    return [Rename(_official_name(name, layers), name) for name in vae.state_dict()]


def _official_name(name: str, layers: int) -> str:
    """`layers`: residual blocks of a stage of the decoder, after which it grows."""
    for pattern, replacement in _WITHIN:
        name = re.sub(pattern, replacement, name)

    def place(match: re.Match[str]) -> str:
        stage, kind, layer = int(match[1]), match[2], int(match[3])
        return f".upsamples.{stage * (layers + 1) + (layer if kind == 'resnets' else layers)}."

    return re.sub(r"\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", place, name)


def encode(vae: Any, frames: Tensor) -> Tensor:
    """Latents [1, 16, T, h, w] of frames [1, 3, F, H, W] in -1..1, F = 4 (T - 1) + 1."""
    mean, deviation = _statistics(vae)
    return (vae.encode(frames).latent_dist.mode() - mean) / deviation


def encode_condition(vae: Any, frames: Tensor, num_frames: int) -> Tensor:
    """What a window begins with, [1, 20, T, h, w]: a mask of `frames` [1, 3, n, H, W] among `num_frames`, and
    latents of them with grey after them."""
    given = frames.shape[2]
    grey = frames.new_zeros(*frames.shape[:2], num_frames - given, *frames.shape[3:])
    latents = encode(vae, torch.cat([frames, grey], dim=2))
    known = torch.arange(num_frames, device=frames.device) < given
    known = torch.cat([known[:1].expand(MASK_CHANNELS), known[1:]]).view(-1, MASK_CHANNELS)
    mask = known.T[None, :, :, None, None].expand(1, -1, -1, *latents.shape[3:])
    return torch.cat([mask.to(latents), latents], dim=1)


def decode_window(vae: Any, latents: Tensor) -> Tensor:
    """Frames [3, F, H, W] in -1..1 of latents [16, T, h, w]."""
    mean, deviation = _statistics(vae)
    frames = vae.decode(latents[None].to(vae.dtype) * deviation + mean, return_dict=False)[0]
    return frames[0].clamp(-1, 1)


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents' channels."""
    config, like = vae.config, next(vae.parameters())
    return tuple(like.new_tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
