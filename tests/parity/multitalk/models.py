"""The models of a golden folder, loaded through the name maps of the backend."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from avatar_core.backends.multitalk.clip import build_clip, clip_half, clip_name_map
from avatar_core.backends.multitalk.name_map import transformer_name_map
from avatar_core.backends.multitalk.quantised import SCALE, scale_renames, store_quantised
from avatar_core.backends.multitalk.text import build_text_encoder, text_name_map
from avatar_core.backends.multitalk.transformer import MultiTalkTransformer, TransformerConfig
from avatar_core.backends.multitalk.vae import build_vae, vae_name_map
from avatar_core.checkpoint import Rename, load_strict, rename
from tests.parity.golden import Golden

TRANSFORMER, CLIP, VAE = "transformer_weights", "clip_visual", "vae"


def config_of(golden: Golden) -> TransformerConfig:
    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    settings = {**golden.settings["model_kwargs"], **golden.settings["config"]}
    return TransformerConfig(**{name: value for name, value in settings.items() if name in names})


def as_told(golden: Golden, name_map: Sequence[Rename]) -> list[Rename]:
    """The name map as the golden wants it applied."""
    rows: dict[str, list[Rename]] = {}
    for entry in name_map:
        rows.setdefault(entry.source, []).append(entry)
    return [replace(entry, source=name) for name, row in golden.misdirected(rows).items() for entry in row]


def load_transformer(golden: Golden, state: Mapping[str, Tensor] | None = None) -> MultiTalkTransformer:
    """`golden` is that of the weights; `state` is what is loaded instead, quantised or not."""
    config, given = config_of(golden), golden.weights if state is None else state
    renamed = rename(given, scale_renames(as_told(golden, transformer_name_map(config)), given))
    with torch.device("meta"):
        transformer = MultiTalkTransformer(config)
    transformer.rope = type(transformer.rope)(config.dim // config.num_heads, (1, 2, 2), 1024)
    modules = [name.removesuffix(SCALE) for name in renamed if name.endswith(SCALE)]
    store_quantised(transformer, modules, {name: renamed[f"{name}.weight"].dtype for name in modules})
    load_strict(transformer, renamed)
    return transformer.eval().requires_grad_(False)


def load_clip(golden: Golden) -> Any:
    config = golden.settings["config"]
    sizes = {
        "hidden_size": config["vision_dim"],
        "intermediate_size": int(config["vision_dim"] * config["vision_mlp_ratio"]),
        "num_hidden_layers": config["vision_layers"],
        "num_attention_heads": config["vision_heads"],
        "image_size": config["image_size"],
        "patch_size": config["patch_size"],
    }
    half = clip_half({f"visual.{name}": tensor for name, tensor in golden.weights.items()})
    clip = build_clip(sizes)
    load_strict(clip, rename(half, as_told(golden, clip_name_map(sizes))))
    return clip.eval().requires_grad_(False)


def load_text_encoder(golden: Golden) -> Any:
    config = golden.settings["config"]
    sizes = {
        "vocab_size": config["vocab"],
        "d_model": config["dim"],
        "d_kv": config["dim_attn"] // config["num_heads"],
        "d_ff": config["dim_ffn"],
        "num_layers": config["num_layers"],
        "num_heads": config["num_heads"],
        "relative_attention_num_buckets": config["num_buckets"],
    }
    encoder = build_text_encoder(sizes)
    load_strict(encoder, rename(golden.weights, as_told(golden, text_name_map(sizes))))
    return encoder.eval().requires_grad_(False)


def load_vae(golden: Golden) -> Any:
    config = golden.settings["config"]
    sizes = {
        "base_dim": config["dim"],
        "z_dim": config["z_dim"],
        "dim_mult": config["dim_mult"],
        "num_res_blocks": config["num_res_blocks"],
        "temperal_downsample": config["temperal_downsample"],
    }
    vae = build_vae(sizes)
    load_strict(vae, rename(golden.weights, as_told(golden, vae_name_map(sizes))))
    return vae.eval().requires_grad_(False)
