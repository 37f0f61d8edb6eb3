"""A transformer of a few thousand weights, for tests of what is built round it."""

from dataclasses import replace

from avatar_core.backends.hunyuan.transformer import TransformerConfig

TOY = TransformerConfig(
    in_channels=2,
    out_channels=2,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    num_single_layers=2,
    num_refiner_layers=1,
    rope_axes_dim=(4, 4, 4),
    text_embed_dim=8,
    pooled_projection_dim=6,
    audio_window=(2, 2, 3),
    audio_inner_dim=8,
    audio_tokens=2,
    adapter_inner_dim=8,
    adapter_layers=(1,),
)
TOY_WITH_THREE_SINGLE = replace(TOY, num_single_layers=3)
