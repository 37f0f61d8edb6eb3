"""The video transformer of HunyuanVideo-Avatar: HunyuanVideo's, with a reference picture and sound.

    transformer = HunyuanAvatarTransformer(config)
    prepared = transformer.prepare(conditions)          # once per window and text: all that time leaves alone
    full = transformer(latents, timestep, prepared)
    cached = transformer(latents, timestep, prepared, cache=full.cache)     # the last block alone

Shapes: B clips, C latent channels, T latent frames of h x w, S tokens in a latent frame (the patches of
h x w), D hidden size, L text tokens. Image rows are ordered by time, then down, then right.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoPatchEmbed,
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTokenRefiner,
    HunyuanVideoTransformerBlock,
)
from torch import Tensor, nn

from avatar_core.backends.hunyuan.audio_adapter import (
    AudioAdapter,
    AudioKeys,
    AudioProjection,
    tokens_per_latent_frame,
)
from avatar_core.backends.hunyuan.rope import rotary_tables
from avatar_core.errors import BackendError

_SINUSOIDS = 256  # a scalar (time, motion, frame rate) enters as so many sines and cosines
_MOTION_SCALARS = 4

FLOAT32_MODULES = ("audio_proj", "audio_adapters", "ref_proj", "proj_out")
"""Modules whose parameters stay float32 in a half-precision model."""


@dataclass(frozen=True)
class TransformerConfig:
    """The defaults are the published model."""

    in_channels: int = 16
    out_channels: int = 16
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    num_layers: int = 20
    num_single_layers: int = 40
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    patch_size: tuple[int, int, int] = (1, 2, 2)  # frames, rows, columns
    rope_axes_dim: tuple[int, int, int] = (16, 56, 56)
    rope_theta: float = 256.0
    text_embed_dim: int = 4096
    pooled_projection_dim: int = 768
    audio_window: tuple[int, int, int] = (10, 5, 384)  # encoder positions, layers, channels of a frame
    audio_inner_dim: int = 1024
    audio_tokens: int = 4  # of a video frame
    adapter_inner_dim: int = 1024
    adapter_layers: tuple[int, ...] = tuple(range(1, 20, 2))  # dual-stream blocks followed by an adapter

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_official(cls, settings: Mapping[str, Any]) -> "TransformerConfig":
        """From the names that the published code gives to these numbers."""
        audio = settings["audio_proj"]
        return cls(
            in_channels=settings["in_channels"],
            out_channels=settings["out_channels"],
            num_attention_heads=settings["num_heads"],
            attention_head_dim=settings["head_dim"],
            num_layers=settings["depth_double_blocks"],
            num_single_layers=settings["depth_single_blocks"],
            num_refiner_layers=settings["refiner_depth"],
            mlp_ratio=settings["mlp_width_ratio"],
            patch_size=tuple(settings["patch_size"]),
            rope_axes_dim=tuple(settings["rope_dim_list"]),
            rope_theta=settings["rope_theta"],
            text_embed_dim=settings["text_states_dim"],
            pooled_projection_dim=settings["text_states_dim_2"],
            audio_window=(audio["seq_len"], audio["blocks"], audio["channels"]),
            audio_inner_dim=audio["intermediate_dim"],
            audio_tokens=audio["context_tokens"],
            adapter_inner_dim=settings["adapter_dim_head"],
            adapter_layers=tuple(settings["adapter_after_double_blocks"]),
        )


@dataclass(frozen=True)
class TextConditions:
    prompt_embeds: Tensor  # (B, L, text_embed_dim)
    prompt_mask: Tensor  # (B, L); its ones count for attention, their places for the token refiner
    pooled_prompt_embeds: Tensor  # (B, pooled_projection_dim)


@dataclass(frozen=True)
class Conditions:
    """What one forward is conditioned on. B is that of the latents; `ref_latents` and `face_masks` may be
    one for all."""

    text: TextConditions
    ref_latents: Tensor  # (B, C, T, h, w)
    audio: Tensor  # (B, 4 T - 3, *audio_window)
    face_masks: Tensor  # (B, 1, 1, h, w): the share of the sound's effect that reaches a place
    motion_exp: Tensor  # (B, 4)
    motion_pose: Tensor  # (B, 4)
    fps: Tensor  # (B,)


@dataclass(frozen=True)
class PreparedText:
    prompt_embeds: Tensor
    prompt_mask: Tensor
    pooled: Tensor  # (B, D)
    length: int  # rows that go on after the refiner: the longest valid text of the batch
    lengths: tuple[int, ...]  # valid rows of each text


@dataclass(frozen=True)
class PreparedPicture:
    reference: Tensor  # (B, S, D), rows put before those of the video
    residual: Tensor  # (B, T S, D), added to those of the video
    rotary: tuple[Tensor, Tensor]  # (S + T S, attention_head_dim) each


@dataclass(frozen=True)
class Prepared:
    """What stays the same from step to step. Parts may be replaced (`dataclasses.replace`) by those of
    another window or text."""

    text: PreparedText
    picture: PreparedPicture
    audio: tuple[AudioKeys, ...]  # of each adapter
    face_gate: Tensor  # (B, 1, S, 1)
    scalars: tuple[Tensor, ...]  # embeddings of motion and frame rate, (B, D) each


@dataclass(frozen=True)
class BlockInput:
    """Rows that enter the last single-stream block."""

    reference: Tensor  # (B, S, D)
    image: Tensor  # (B, T S, D)
    text: Tensor  # (B, PreparedText.length, D)


@dataclass(frozen=True)
class Output:
    sample: Tensor  # (B, C, T, h, w)
    cache: BlockInput


class ConditionEmbedding(nn.Module):
    """Time, motion, frame rate and pooled text as one modulation vector."""

    def __init__(self, hidden_size: int, pooled_projection_dim: int) -> None:
        super().__init__()
        self.time_proj = Timesteps(_SINUSOIDS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(_SINUSOIDS, hidden_size)
        self.text_embedder = PixArtAlphaTextProjection(pooled_projection_dim, hidden_size, act_fn="silu")
        self.motion_exp_embedder = TimestepEmbedding(_SINUSOIDS, hidden_size // _MOTION_SCALARS)
        self.motion_pose_embedder = TimestepEmbedding(_SINUSOIDS, hidden_size // _MOTION_SCALARS)
        self.fps_embedder = TimestepEmbedding(_SINUSOIDS, hidden_size)

    def embed_scalars(self, motion_exp: Tensor, motion_pose: Tensor, fps: Tensor) -> tuple[Tensor, ...]:
        batch_size = len(fps)
        expression = self.motion_exp_embedder(self.time_proj(motion_exp.flatten())).view(batch_size, -1)
        pose = self.motion_pose_embedder(self.time_proj(motion_pose.flatten())).view(batch_size, -1)
        return expression, pose, self.fps_embedder(self.time_proj(fps))

    def forward(self, timestep: Tensor, constants: Sequence[Tensor]) -> Tensor:
        # One after the other, in this order: half-precision sums depend on it.
        return sum(constants, start=self.timestep_embedder(self.time_proj(timestep)))


class HunyuanAvatarTransformer(nn.Module):
    """Parameters have the names of diffusers' HunyuanVideoTransformer3DModel; `name_map` gives the official
    ones.

    Half-precision weights compute under autocast, float32 weights without it, whatever the caller has set.
    Weights other than those of `transformer_blocks` and `single_transformer_blocks` (4 % of all) must be
    on the device for `prepare`.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim, heads, head_dim = config.hidden_size, config.num_attention_heads, config.attention_head_dim
        patch_numel = torch.Size(config.patch_size).numel()
        self.x_embedder = HunyuanVideoPatchEmbed(config.patch_size, config.in_channels, dim)
        self.ref_embedder = HunyuanVideoPatchEmbed(config.patch_size, config.in_channels, dim)
        self.ref_proj = nn.Linear(dim, dim)
        self.context_embedder = HunyuanVideoTokenRefiner(
            config.text_embed_dim, heads, head_dim, num_layers=config.num_refiner_layers
        )
        self.time_text_embed = ConditionEmbedding(dim, config.pooled_projection_dim)
        self.audio_proj = AudioProjection(
            torch.Size(config.audio_window).numel(), config.audio_inner_dim, config.audio_tokens, dim
        )
        self.transformer_blocks = nn.ModuleList(
            HunyuanVideoTransformerBlock(heads, head_dim, mlp_ratio=config.mlp_ratio)
            for _ in range(config.num_layers)
        )
        self.audio_adapters = nn.ModuleList(
            AudioAdapter(dim, config.adapter_inner_dim) for _ in config.adapter_layers
        )
        self.single_transformer_blocks = nn.ModuleList(
            HunyuanVideoSingleTransformerBlock(heads, head_dim, mlp_ratio=config.mlp_ratio)
            for _ in range(config.num_single_layers)
        )
        self.norm_out = AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(dim, patch_numel * config.out_channels)

    def prepare(self, conditions: Conditions) -> Prepared:
        return Prepared(
            text=self.prepare_text(conditions.text),
            picture=self.prepare_picture(conditions.ref_latents),
            audio=self.prepare_audio(conditions.audio),
            face_gate=self.prepare_face_masks(conditions.face_masks),
            scalars=self.prepare_scalars(conditions.motion_exp, conditions.motion_pose, conditions.fps),
        )

    def prepare_text(self, text: TextConditions) -> PreparedText:
        with self._autocast(text.prompt_embeds):
            pooled = self.time_text_embed.text_embedder(text.pooled_prompt_embeds.float())
        lengths = tuple(text.prompt_mask.sum(dim=1).tolist())
        return PreparedText(text.prompt_embeds.float(), text.prompt_mask, pooled, max(lengths), lengths)

    def prepare_picture(self, ref_latents: Tensor) -> PreparedPicture:
        grid = self._token_grid(ref_latents)
        cosines, sines = rotary_tables(*grid, self.config.rope_axes_dim, self.config.rope_theta)
        with self._autocast(ref_latents):
            reference = self.x_embedder(self._as_input(ref_latents[:, :, :1]))
            residual = self.ref_proj(self.ref_embedder(self._as_input(ref_latents)))
        tables = cosines.to(ref_latents.device), sines.to(ref_latents.device)
        return PreparedPicture(reference, residual, tables)

    def prepare_audio(self, audio: Tensor) -> tuple[AudioKeys, ...]:
        with self._autocast(audio):
            tokens = tokens_per_latent_frame(self.audio_proj(audio.float()))
            adapters = cast(Iterable[AudioAdapter], self.audio_adapters)
            return tuple(adapter.read(tokens) for adapter in adapters)

    def prepare_face_masks(self, face_masks: Tensor) -> Tensor:
        """Each token takes the value at the upper left of its patch."""
        _, rows, columns = self.config.patch_size
        return face_masks[:, :, 0, ::rows, ::columns].flatten(2).unsqueeze(-1)

    def prepare_scalars(self, motion_exp: Tensor, motion_pose: Tensor, fps: Tensor) -> tuple[Tensor, ...]:
        with self._autocast(fps):
            return self.time_text_embed.embed_scalars(motion_exp, motion_pose, fps)

    def embed_time(self, timestep: Tensor) -> Tensor:
        """(B, D) for `timestep` (B,), or for a single one."""
        embedding = self.time_text_embed
        with self._autocast(timestep):
            embedded: Tensor = embedding.timestep_embedder(embedding.time_proj(timestep.reshape(-1)))
        return embedded

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, prepared: Prepared, cache: BlockInput | None = None
    ) -> Output:
        """`hidden_states` (B, C, T, h, w), `timestep` (B,) in 0..1000.

        With `cache`, the `Output.cache` of an earlier step, only the last block and the output layer run, on
        those rows; of `hidden_states` the shape alone counts then.
        """
        if cache is not None and cache.text.shape[1] != prepared.text.length:
            raise BackendError(
                f"the kept rows are of a text with {cache.text.shape[1]} tokens, the one given has "
                f"{prepared.text.length}; run a full step after the text has changed"
            )
        with self._autocast(hidden_states):
            temb = self.time_text_embed(timestep, (*prepared.scalars, prepared.text.pooled))
            mask = self._attention_mask(prepared)
            rows = cache or self._run_blocks(hidden_states, timestep, temb, mask, prepared)
            image = self._last_block(rows, temb, mask, prepared)
            patches = self.proj_out(self.norm_out(image, temb))
        return Output(self._unpatchify(patches, hidden_states), rows)

    def _run_blocks(
        self, latents: Tensor, timestep: Tensor, temb: Tensor, mask: Tensor | None, prepared: Prepared
    ) -> BlockInput:
        picture, text = prepared.picture, prepared.text
        text_rows = self.context_embedder(text.prompt_embeds, timestep, text.prompt_mask)
        text_rows = _packed(text_rows[:, : text.length])
        video = self.x_embedder(self._as_input(latents)) + picture.residual
        rows = torch.cat([picture.reference.expand(len(video), -1, -1), video], dim=1)
        num_reference = picture.reference.shape[1]
        adapters = dict(zip(self.config.adapter_layers, self.audio_adapters, strict=True))
        audio = dict(zip(self.config.adapter_layers, prepared.audio, strict=True))
        for index, block in enumerate(self.transformer_blocks):
            rows, text_rows = block(rows, text_rows, temb, mask, picture.rotary)
            if index in adapters:
                frames = rows[:, num_reference:].unflatten(1, (-1, num_reference))
                frames += prepared.face_gate * adapters[index](frames, audio[index])
        for block in self.single_transformer_blocks[:-1]:
            rows, text_rows = map(_packed, block(rows, text_rows, temb, mask, picture.rotary))
        return BlockInput(rows[:, :num_reference], rows[:, num_reference:], text_rows)

    def _last_block(self, rows: BlockInput, temb: Tensor, mask: Tensor | None, prepared: Prepared) -> Tensor:
        """Rows of the video alone."""
        num_reference = rows.reference.shape[1]
        image = torch.cat([rows.reference, rows.image], dim=1)
        block = self.single_transformer_blocks[-1]
        image, _ = block(image, rows.text, temb, mask, prepared.picture.rotary)
        return image[:, num_reference:]

    def _attention_mask(self, prepared: Prepared) -> Tensor | None:
        """(B, 1, 1, rows), or None where all texts are equally long: the fast kernels take no mask."""
        text = prepared.text
        if min(text.lengths) == text.length:
            return None
        num_image = len(prepared.picture.rotary[0])
        device = text.prompt_embeds.device
        valid = num_image + torch.tensor(text.lengths, device=device)
        return (torch.arange(num_image + text.length, device=device) < valid[:, None])[:, None, None]

    def _unpatchify(self, patches: Tensor, latents: Tensor) -> Tensor:
        grid = self._token_grid(latents)
        blocks = patches.unflatten(2, (self.config.out_channels, *self.config.patch_size)).unflatten(1, grid)
        # (B, T, H, W, C, t, y, x) -> (B, C, T, t, H, y, W, x)
        return blocks.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _token_grid(self, latents: Tensor) -> tuple[int, int, int]:
        frames, height, width = (
            size // patch for size, patch in zip(latents.shape[2:], self.config.patch_size, strict=True)
        )
        return frames, height, width

    def _as_input(self, latents: Tensor) -> Tensor:
        return latents.to(self.x_embedder.proj.weight.dtype)

    def _autocast(self, like: Tensor) -> torch.autocast:
        dtype = self.x_embedder.proj.weight.dtype
        half = dtype.itemsize < 4
        return torch.autocast(like.device.type, dtype=dtype if half else None, enabled=half)


def _packed(rows: Tensor) -> Tensor:
    """(B, rows, D) as if they were no part of longer ones: compiled blocks serve one layout of memory each.
    Copies for B > 1 alone."""
    return rows.flatten(0, 1).unflatten(0, (len(rows), -1))


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Of a parameter, by its name here, in a model that is otherwise kept in `dtype`."""
    return torch.float32 if name.split(".")[0] in FLOAT32_MODULES else dtype
