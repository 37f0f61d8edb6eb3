"""Official tensor names of the checkpoints, and the names of the same tensors in the classes used here.

Official linear layers that are fused are split by rows: queries, keys and values, and in the single-stream
blocks the first layer of the MLP too. The output layer's modulation changes the order of its halves: (shift,
scale) there, (scale, shift) here.
"""

from collections.abc import Iterator

from avatar_core.backends.hunyuan.transformer import TransformerConfig
from avatar_core.checkpoint import Rename

_LAYERS = {
    "img_in.proj": "x_embedder.proj",
    "ref_in.proj": "ref_embedder.proj",
    "before_proj": "ref_proj",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "motion_exp.mlp.0": "time_text_embed.motion_exp_embedder.linear_1",
    "motion_exp.mlp.2": "time_text_embed.motion_exp_embedder.linear_2",
    "motion_pose.mlp.0": "time_text_embed.motion_pose_embedder.linear_1",
    "motion_pose.mlp.2": "time_text_embed.motion_pose_embedder.linear_2",
    "fps_proj.mlp.0": "time_text_embed.fps_embedder.linear_1",
    "fps_proj.mlp.2": "time_text_embed.fps_embedder.linear_2",
    "audio_proj.proj1": "audio_proj.proj1",
    "audio_proj.proj2": "audio_proj.proj2",
    "audio_proj.proj3": "audio_proj.proj3",
    "audio_proj.norm": "audio_proj.norm",
    "final_layer.linear": "proj_out",
}
"""Layers with a weight and a bias that only change their name; likewise below, within one block."""

_REFINER_LAYERS = {
    "norm1": "norm1",
    "norm2": "norm2",
    "self_attn_proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm_out.linear",
}
_DOUBLE_LAYERS = {
    "img_mod.linear": "norm1.linear",
    "img_attn_proj": "attn.to_out.0",
    "img_mlp.fc1": "ff.net.0.proj",
    "img_mlp.fc2": "ff.net.2",
    "txt_mod.linear": "norm1_context.linear",
    "txt_attn_proj": "attn.to_add_out",
    "txt_mlp.fc1": "ff_context.net.0.proj",
    "txt_mlp.fc2": "ff_context.net.2",
}
_SINGLE_LAYERS = {"linear2": "proj_out", "modulation.linear": "norm.linear"}

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_TEXT_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

_DOUBLE_NORMS = {
    "img_attn_q_norm.weight": "attn.norm_q.weight",
    "img_attn_k_norm.weight": "attn.norm_k.weight",
    "txt_attn_q_norm.weight": "attn.norm_added_q.weight",
    "txt_attn_k_norm.weight": "attn.norm_added_k.weight",
}
_SINGLE_NORMS = {"q_norm.weight": "attn.norm_q.weight", "k_norm.weight": "attn.norm_k.weight"}

_ADAPTER_TENSORS = (
    "norm1.weight",
    "norm1.bias",
    "norm2.weight",
    "norm2.bias",
    "to_q.weight",
    "to_kv.weight",
    "to_out.weight",
)

VAE_PREFIX = "vae."
VAE_KEY = "state_dict"
"""The official VAE file has diffusers' names behind this prefix, under this entry where there is one."""


def transformer_name_map(config: TransformerConfig) -> list[Rename]:
    dim = config.hidden_size
    qkv = (dim, dim, dim)
    entries = list(_layers(_LAYERS))
    entries += _with_parameters("final_layer.adaLN_modulation.1", "norm_out.linear", swap_halves=True)
    for index in range(config.num_refiner_layers):
        source = f"txt_in.individual_token_refiner.blocks.{index}."
        target = f"context_embedder.token_refiner.refiner_blocks.{index}."
        entries += _layers(_REFINER_LAYERS, source, target)
        entries += _split(f"{source}self_attn_qkv", [target + name for name in _QKV], qkv)
    for index in range(config.num_layers):
        source, target = f"double_blocks.{index}.", f"transformer_blocks.{index}."
        entries += _layers(_DOUBLE_LAYERS, source, target)
        entries += _split(f"{source}img_attn_qkv", [target + name for name in _QKV], qkv)
        entries += _split(f"{source}txt_attn_qkv", [target + name for name in _TEXT_QKV], qkv)
        entries += (Rename(source + old, target + new) for old, new in _DOUBLE_NORMS.items())
    for index in range(config.num_single_layers):
        source, target = f"single_blocks.{index}.", f"single_transformer_blocks.{index}."
        entries += _layers(_SINGLE_LAYERS, source, target)
        parts = [target + name for name in (*_QKV, "proj_mlp")]
        entries += _split(f"{source}linear1", parts, (*qkv, int(dim * config.mlp_ratio)))
        entries += (Rename(source + old, target + new) for old, new in _SINGLE_NORMS.items())
    for index in range(len(config.adapter_layers)):
        source, target = f"audio_adapter_blocks.{index}.", f"audio_adapters.{index}."
        entries += (Rename(source + name, target + name) for name in _ADAPTER_TENSORS)
    return entries


def _layers(names: dict[str, str], source: str = "", target: str = "") -> Iterator[Rename]:
    for old, new in names.items():
        yield from _with_parameters(source + old, target + new)


def _split(source: str, targets: list[str], num_rows: tuple[int, ...]) -> Iterator[Rename]:
    start = 0
    for target, rows in zip(targets, num_rows, strict=True):
        yield from _with_parameters(source, target, rows=slice(start, start + rows))
        start += rows


def _with_parameters(
    source: str, target: str, rows: slice | None = None, swap_halves: bool = False
) -> Iterator[Rename]:
    for parameter in ("weight", "bias"):
        yield Rename(f"{source}.{parameter}", f"{target}.{parameter}", rows, swap_halves)
