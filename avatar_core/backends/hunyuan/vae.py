"""Pictures to latents and latents to frames, piece by piece.

The official `vae/config.json` has fields that diffusers' class lacks: `sample_size` and `sample_tsize` (side
and frames of a tile, each overlapping the next by a quarter) and `mid_block_causal_attn`.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from numpy.typing import NDArray
from torch import Tensor

from avatar_core.errors import WeightsError

NUM_REFERENCE_FRAMES = 129
"""The picture is encoded as a still video of this length."""

_TAKEN_OVER = (
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "norm_num_groups",
    "scaling_factor",
    "spatial_compression_ratio",
    "mid_block_add_attention",
)
_ONLY_VALUES = {
    "act_fn": ("silu",),
    "down_block_types": ("DownEncoderBlockCausal3D",),
    "up_block_types": ("UpDecoderBlockCausal3D",),
    "shift_factor": (None, 0, 0.0),
}


class AttendAllFrames(AttnProcessor2_0):
    """Attention of a middle block that is not causal: the mask over later frames is left out."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        return super().__call__(attn, hidden_states, encoder_hidden_states, None, temb)


def build_vae(config: Mapping[str, Any]) -> AutoencoderKLHunyuanVideo:
    """An autoencoder, its weights yet to be loaded, from the official `vae/config.json`. Raises
    `WeightsError` where the file says something that this class does not do."""
    check_config(config)
    vae = AutoencoderKLHunyuanVideo(
        **{name: config[name] for name in _TAKEN_OVER if name in config},
        temporal_compression_ratio=config["time_compression_ratio"],
        down_block_types=("HunyuanVideoDownBlock3D",) * len(config["block_out_channels"]),
        up_block_types=("HunyuanVideoUpBlock3D",) * len(config["block_out_channels"]),
    )
    side, num_frames = config["sample_size"], config["sample_tsize"]
    vae.enable_tiling(side, side, num_frames, side * 3 // 4, side * 3 // 4, num_frames * 3 // 4)
    if not config.get("mid_block_causal_attn", False):
        for attention in (*vae.encoder.mid_block.attentions, *vae.decoder.mid_block.attentions):
            attention.set_processor(AttendAllFrames())
    return vae.eval()


def check_config(config: Mapping[str, Any]) -> None:
    needed = ("block_out_channels", "time_compression_ratio", "sample_size", "sample_tsize")
    absent = [name for name in needed if name not in config]
    if absent:
        raise WeightsError(f"vae/config.json: {', '.join(absent)} not given; fetch the official file again")
    for name, allowed in _ONLY_VALUES.items():
        value = config.get(name, allowed[0])
        for part in value if isinstance(value, list | tuple) else [value]:
            if part not in allowed:
                raise WeightsError(
                    f"vae/config.json: {name} is {part!r}; this autoencoder has {allowed[0]!r}, so the file "
                    "belongs to another model"
                )
    sizes = (config["sample_size"], config["sample_tsize"])
    if not all(isinstance(size, int) and size > 0 and size % 4 == 0 for size in sizes):
        raise WeightsError(
            f"vae/config.json: sample_size, sample_tsize are {sizes}; a tile is a whole multiple of 4"
        )


@torch.inference_mode()
def encode_reference(
    vae: AutoencoderKLHunyuanVideo,
    picture: NDArray[np.uint8],
    generator: torch.Generator | None,
    num_frames: int = NUM_REFERENCE_FRAMES,
) -> Tensor:
    """Scaled latents (1, channels, latent frames, height / 8, width / 8) of the picture (height, width, 3),
    shown for `num_frames`.

    They are a sample of the posterior. The reference draws it from the device's default generator, so a fresh
    one on that device with the run's seed gives the numbers of its first clip.
    """
    pixels = normalised(picture).to(vae.device, vae.dtype)
    posterior = DiagonalGaussianDistribution(encode_still(vae, pixels, num_frames))
    latents: Tensor = posterior.sample(generator) * vae.config["scaling_factor"]
    return latents


def normalised(picture: NDArray[np.uint8]) -> Tensor:
    """(1, 3, 1, height, width) in -1..1, computed in float16 as the model has always been shown pictures."""
    pixels = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None, :, None]
    return pixels.to(torch.float16) / 127.5 - 1


def encode_still(vae: AutoencoderKLHunyuanVideo, pixels: Tensor, num_frames: int) -> Tensor:
    """Moments of one frame (batch, channels, 1, height, width) repeated `num_frames` times: those that
    `vae.encode` gives, but tiles of equal length, being equal, are computed once."""
    if num_frames <= vae.tile_sample_min_num_frames:
        return encode_tile(vae, repeat_frame(pixels, num_frames))
    tiles: dict[int, Tensor] = {}
    stride = vae.tile_sample_stride_num_frames // vae.temporal_compression_ratio
    overlap = vae.tile_sample_min_num_frames // vae.temporal_compression_ratio - stride
    row: list[Tensor] = []
    for start in range(0, num_frames, vae.tile_sample_stride_num_frames):
        length = min(vae.tile_sample_min_num_frames + 1, num_frames - start)
        if length not in tiles:
            tiles[length] = encode_tile(vae, repeat_frame(pixels, length))
        row.append(tiles[length][:, :, 1 if start else 0 :].clone())
    pieces = [row[0][:, :, : stride + 1]]
    pieces += [vae.blend_t(last, tile, overlap)[:, :, :stride] for last, tile in pairwise(row)]
    return torch.cat(pieces, dim=2)[:, :, : (num_frames - 1) // vae.temporal_compression_ratio + 1]


def repeat_frame(pixels: Tensor, num_frames: int) -> Tensor:
    return pixels.expand(-1, -1, num_frames, -1, -1)


def encode_tile(vae: AutoencoderKLHunyuanVideo, pixels: Tensor) -> Tensor:
    """Moments of one temporal tile, tiled over the picture where that is larger than a tile."""
    height, width = pixels.shape[-2:]
    with as_published(vae):
        if height > vae.tile_sample_min_height or width > vae.tile_sample_min_width:
            tiled: Any = vae.tiled_encode  # annotated with another type than it returns
            return tiled(pixels)
        return vae.quant_conv(vae.encoder(pixels))


def decode_tile(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> Tensor:
    """Frames of one temporal tile, tiled over the picture where that is larger than a tile."""
    height, width = (side * vae.spatial_compression_ratio for side in latents.shape[-2:])
    with as_published(vae):
        if height > vae.tile_sample_min_height or width > vae.tile_sample_min_width:
            return vae.tiled_decode(latents, return_dict=False)[0]
        return vae.decoder(vae.post_quant_conv(latents))


def as_published(vae: AutoencoderKLHunyuanVideo) -> AbstractContextManager[object]:
    """Half-precision weights compute as the published model did: norms in float32."""
    is_half = vae.dtype.itemsize < 4
    return torch.autocast(vae.device.type, dtype=vae.dtype) if is_half else nullcontext()


def decode_tiles(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> Iterator[Tensor]:
    """Consecutive pieces (batch, 3, frames, height, width) of what `vae.decode` gives as a whole. Only the
    end of a tile, with which the next one is blended, outlives it."""
    min_latents = vae.tile_sample_min_num_frames // vae.temporal_compression_ratio
    stride_latents = vae.tile_sample_stride_num_frames // vae.temporal_compression_ratio
    overlap = vae.tile_sample_min_num_frames - vae.tile_sample_stride_num_frames
    if latents.shape[2] <= min_latents:
        yield decode_tile(vae, latents)
        return
    tail: Tensor | None = None
    # A tile of one latent would hold but the frame that every later tile drops.
    for start in range(0, latents.shape[2] - 1, stride_latents):
        tile = decode_tile(vae, latents[:, :, start : start + min_latents + 1])
        if tail is None:
            kept = vae.tile_sample_stride_num_frames + 1
        else:
            tile = vae.blend_t(tail, tile[:, :, 1:], overlap)
            kept = vae.tile_sample_stride_num_frames
        yield tile[:, :, :kept]
        tail = tile[:, :, -overlap:].clone()


@torch.inference_mode()
def decode_frames(
    vae: AutoencoderKLHunyuanVideo, latents: Tensor, num_frames: int
) -> Iterator[NDArray[np.uint8]]:
    """The first `num_frames` frames (height, width, 3) of a clip's scaled latents, one by one; memory does
    not grow with their number."""
    scaled = (latents.float() / vae.config["scaling_factor"]).to(vae.device, vae.dtype)
    remaining = num_frames
    for piece in decode_tiles(vae, scaled):
        pixels = to_pixels(piece[0, :, :remaining])
        yield from pixels
        remaining -= len(pixels)
        if remaining == 0:
            return


def to_pixels(frames: Tensor) -> NDArray[np.uint8]:
    """(3, frames, height, width) in -1..1 to (frames, height, width, 3) in 0..255, cut off, not rounded."""
    pixels = (frames / 2 + 0.5).clamp(0, 1).float() * 255
    return np.asarray(pixels.to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy())
