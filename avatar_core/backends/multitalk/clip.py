"""What CLIP sees in a frame."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from avatar_core.checkpoint import Rename
from avatar_core.optional_packages import hide_broken_packages

hide_broken_packages()

from transformers import CLIPVisionConfig, CLIPVisionModel  # noqa: E402 - after the broken packages are hidden

_OFFICIAL: Mapping[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

_UNUSED = "head"  # projects to what texts are compared with

_EMPTY_DIMS = {"visual.cls_embedding": 2, "visual.pos_embedding": 1}
_EMBEDDINGS = {
    "cls_embedding": "embeddings.class_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
    "patch_embedding.weight": "embeddings.patch_embedding.weight",
}
_OF_LAYER = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}


def clip_config(sizes: Mapping[str, Any] | None) -> CLIPVisionConfig:
    """`sizes` are those that differ from the official ones."""
    return CLIPVisionConfig(**{**_OFFICIAL, **(sizes or {})})


def build_clip(sizes: Mapping[str, Any] | None = None) -> CLIPVisionModel:
    return CLIPVisionModel(clip_config(sizes))


def clip_name_map(sizes: Mapping[str, Any] | None = None) -> list[Rename]:
    """From the official names to those of transformers, which has three tensors for query, key and value."""
    config = clip_config(sizes)
    width = config.hidden_size
    renames = [Rename(f"visual.{a}", f"{b}") for a, b in _EMBEDDINGS.items()]
    pairs = {"pre_norm": "pre_layrnorm", "post_norm": "post_layernorm"}
    for layer in range(config.num_hidden_layers):
        source, target = f"transformer.{layer}", f"encoder.layers.{layer}"
        pairs |= {f"{source}.{a}": f"{target}.{b}" for a, b in _OF_LAYER.items()}
        renames += [
            Rename(
                f"visual.{source}.attn.to_qkv.{kind}",
                f"{target}.self_attn.{part}_proj.{kind}",
                slice(number * width, (number + 1) * width),
            )
            for kind in ("weight", "bias")
            for number, part in enumerate("qkv")
        ]
    renames += [
        Rename(f"visual.{a}.{kind}", f"{b}.{kind}") for a, b in pairs.items() for kind in ("weight", "bias")
    ]
    return renames


def clip_half(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vision half of the official state, its embeddings without empty dimensions."""
    used = {n: t for n, t in state.items() if n.startswith("visual.") and n != f"visual.{_UNUSED}"}
    for name, dims in _EMPTY_DIMS.items():
        if name in used:
            used[name] = used[name].reshape(used[name].shape[dims:])
    return used


def whole_clip(half: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state that `clip_half` would make this one of, with a projection that nothing reads."""
    whole = dict(half)
    for name, dims in _EMPTY_DIMS.items():
        whole[name] = whole[name][(None,) * dims]
    width = len(whole["visual.pre_norm.weight"])
    return whole | {f"visual.{_UNUSED}": torch.zeros(width, width)}


def clip_features(model: Any, frame: Tensor) -> Tensor:
    """[1, 257, channels] of frames [1, 3, H, W] in -1..1: states before the last layer."""
    pixels = clip_pixels(frame, model.config.image_size)
    return model(pixels.to(model.dtype), output_hidden_states=True).hidden_states[-2]


def clip_pixels(frame: Tensor, side: int) -> Tensor:
    pixels = nn.functional.interpolate(frame, size=(side, side), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(v, device=frame.device).view(1, 3, 1, 1) for v in (_MEAN, _STD))
    return (pixels * 0.5 + 0.5 - mean) / std
