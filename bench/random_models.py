"""Models at random weights, built on their device without a checkpoint, and random conditions for them."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    WhisperConfig,
    WhisperModel,
)

from avatar_core.backends.hunyuan.fp8 import WEIGHT_DTYPE, Fp8Linear, store_linears_as_fp8
from avatar_core.backends.hunyuan.sampling import ClipConditions
from avatar_core.backends.hunyuan.schedules import WINDOW
from avatar_core.backends.hunyuan.tiny import TRANSFORMER as TINY_TRANSFORMER
from avatar_core.backends.hunyuan.tiny import VAE_CONFIG as TINY_VAE
from avatar_core.backends.hunyuan.transformer import (
    HunyuanAvatarTransformer,
    TextConditions,
    TransformerConfig,
    parameter_dtype,
)
from avatar_core.backends.hunyuan.vae import build_vae
from avatar_core.memory import BLOCK_STACKS

TEXT_ROWS = 831  # that LLaVA hands on, valid or not


@dataclass(frozen=True)
class Size:
    """Of the picture in pixels; `text_tokens` are the valid ones of the prompt."""

    transformer: TransformerConfig
    height: int
    width: int
    text_tokens: int
    gemm_sides: tuple[int, ...]
    vae: dict[str, Any]
    llava: LlavaConfig
    clip: CLIPTextConfig
    whisper: WhisperConfig

    @property
    def head_dim(self) -> int:
        return self.transformer.attention_head_dim

    @property
    def frame_tokens(self) -> int:
        return self.height * self.width // 256

    @property
    def image_tokens(self) -> int:
        """Of a window and the reference picture."""
        return (WINDOW + 1) * self.frame_tokens

    @property
    def latent_shape(self) -> tuple[int, int, int, int, int]:
        return 1, self.transformer.in_channels, WINDOW, self.height // 8, self.width // 8


FULL = Size(
    transformer=TransformerConfig(),
    height=704,
    width=768,
    text_tokens=256,
    gemm_sides=(4096, 8192, 16384),
    vae={
        **TINY_VAE,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "norm_num_groups": 32,
    },
    llava=LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=LlamaConfig(
            vocab_size=128_320,
            hidden_size=4096,
            intermediate_size=14_336,
            num_hidden_layers=30,  # without the two whose states are not read
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
        image_token_index=128_257,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    ),
    clip=CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
    whisper=WhisperConfig(),  # its defaults are whisper-tiny
)

TINY = Size(
    transformer=TINY_TRANSFORMER,
    height=64,
    width=64,
    text_tokens=7,
    gemm_sides=(64, 128),
    vae=TINY_VAE,
    llava=LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=336,
            patch_size=56,
        ),
        text_config=LlamaConfig(
            vocab_size=1000,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        ),
        image_token_index=999,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    ),
    clip=CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2),
    whisper=WhisperConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        vocab_size=10,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    ),
)


def shallow(config: TransformerConfig) -> TransformerConfig:
    """As wide, for comparisons in float32."""
    return replace(config, num_layers=2, num_single_layers=3, adapter_layers=(1,))


def random_transformer(
    config: TransformerConfig, device: str, dtype: torch.dtype = torch.bfloat16
) -> HunyuanAvatarTransformer:
    """The same for one configuration in every dtype, up to rounding to it: bfloat16 numbers."""
    with torch.device("meta"):
        transformer = HunyuanAvatarTransformer(config)
    dtypes = {name: parameter_dtype(name, dtype) for name in transformer.state_dict()}
    return filled(transformer, device, dtypes)


def random_plain_transformer(
    config: TransformerConfig, device: str, dtype: torch.dtype = torch.bfloat16
) -> HunyuanVideoTransformer3DModel:
    """diffusers' model of this size, throughout in `dtype`."""
    with torch.device("meta"):
        transformer = HunyuanVideoTransformer3DModel(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            num_layers=config.num_layers,
            num_single_layers=config.num_single_layers,
            num_refiner_layers=config.num_refiner_layers,
            mlp_ratio=config.mlp_ratio,
            patch_size=config.patch_size[1],
            patch_size_t=config.patch_size[0],
            guidance_embeds=False,
            text_embed_dim=config.text_embed_dim,
            pooled_projection_dim=config.pooled_projection_dim,
            rope_theta=config.rope_theta,
            rope_axes_dim=config.rope_axes_dim,
            image_condition_type=None,
        )
    return filled(transformer, device, dict.fromkeys(transformer.state_dict(), dtype))


def filled(model: Any, device: str, dtypes: dict[str, torch.dtype]) -> Any:
    """The model, whose parameters are on the meta device, with random ones."""
    generator = torch.Generator(device).manual_seed(0)
    state = {
        name: _random_parameter(name, tensor.shape, generator).to(dtypes[name])
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _random_parameter(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    device, dtype = generator.device, torch.bfloat16
    if len(shape) < 2 and "norm" in name and name.endswith("weight"):
        return torch.ones(shape, device=device, dtype=dtype)
    spread = shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.02
    return torch.randn(shape, generator=generator, device=device, dtype=dtype) * spread


def to_fp8(transformer: HunyuanAvatarTransformer) -> HunyuanAvatarTransformer:
    """Its blocks with the weights of the official float8 file: one scale for each layer."""
    linears = {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(BLOCK_STACKS)
    }
    store_linears_as_fp8(transformer)
    for name, linear in linears.items():
        stored = transformer.get_submodule(name)
        assert isinstance(stored, Fp8Linear)
        scale = linear.weight.abs().max().float() / torch.finfo(WEIGHT_DTYPE).max
        stored.weight.data = (linear.weight.float() / scale).to(WEIGHT_DTYPE)
        stored.scale.data = scale.to(stored.scale.dtype)
        stored.bias.data = linear.bias.data.to(stored.bias.dtype)
    return transformer


def random_text(config: TransformerConfig, num_tokens: int, device: str, seed: int) -> TextConditions:
    generator = torch.Generator(device).manual_seed(seed)
    shape = (1, TEXT_ROWS, config.text_embed_dim)
    return TextConditions(
        torch.randn(shape, generator=generator, device=device),
        (torch.arange(TEXT_ROWS, device=device) < num_tokens).long()[None],
        torch.randn(1, config.pooled_projection_dim, generator=generator, device=device),
    )


def random_conditions(size: Size, device: str) -> ClipConditions:
    """Of a clip with one window. The negative prompt is a little shorter."""
    config = size.transformer
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    return ClipConditions(
        prompt=random_text(config, size.text_tokens, device, seed=2),
        negative_prompt=random_text(config, size.text_tokens * 3 // 4, device, seed=3),
        ref_latents=normal(*size.latent_shape),
        audio=normal(1, 4 * WINDOW - 3, *config.audio_window),
        face_mask=normal(1, 1, 1, size.height // 8, size.width // 8).sigmoid(),
        motion_exp=torch.full((1, 4), 30.0, device=device),
        motion_pose=torch.full((1, 4), 25.0, device=device),
        fps=torch.full((1,), 25.0, device=device),
    )


def random_vae(size: Size, device: str, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        vae = build_vae(size.vae)
    return filled(vae, device, dict.fromkeys(vae.state_dict(), dtype))


def random_encoders(size: Size, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """LLaVA's model without an output layer, and CLIP's text half."""
    with torch.device(device):
        llava = LlavaForConditionalGeneration._from_config(size.llava, dtype=dtype).model
        clip = CLIPTextModel._from_config(size.clip, dtype=dtype)
    llava.config.pad_token_id = 0
    return llava.eval().requires_grad_(False), clip.eval().requires_grad_(False)


def random_whisper(size: Size, device: str) -> Any:
    with torch.device(device):
        return WhisperModel(size.whisper).get_encoder().eval().requires_grad_(False)
