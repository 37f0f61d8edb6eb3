"""Models from the files of the official checkpoints, or from the faster copy that `convert` makes of one.

A model is built without memory for its weights and takes them straight from the mapped file, one by one.
Official encoders have no configuration beside them: they have the published sizes unless `encoders.json` says
otherwise.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from avatar_core import weights
from avatar_core.backends.multitalk.clip import build_clip, clip_half, clip_name_map
from avatar_core.backends.multitalk.lora import merge_lora
from avatar_core.backends.multitalk.name_map import transformer_name_map
from avatar_core.backends.multitalk.quantised import (
    SCALE,
    cast_weights,
    read_quantised,
    scale_renames,
    store_quantised,
)
from avatar_core.backends.multitalk.text import build_text_encoder, text_name_map
from avatar_core.backends.multitalk.transformer import (
    MultiTalkTransformer,
    TransformerConfig,
    parameter_dtype,
)
from avatar_core.backends.multitalk.vae import build_vae, vae_name_map
from avatar_core.checkpoint import Rename, load_strict, read_checkpoint, rename, undo_rename, write_shards
from avatar_core.errors import WeightsError

CONFIG = "config.json"
ENCODERS = "encoders.json"
WAN, AUDIO_LAYERS = "Wan2.1-I2V-14B-480P", "MeiGen-MultiTalk"
AUDIO_LAYERS_FILE = "multitalk.safetensors"
QUANTISED = f"{AUDIO_LAYERS}/quant_models"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER = "google/umt5-xxl"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
VAE_FILE = "Wan2.1_VAE.pth"

QUANTISED_FILES = {
    "transformer-int8": ("dit_model_int8.safetensors", "dit_model_map_int8.json"),
    "transformer-fp8": ("dit_model_fp8.safetensors", "dit_model_map_fp8.json"),
    "transformer-int8-fusionx": (
        "quant_model_int8_FusionX.safetensors",
        "quantization_map_int8_FusionX.json",
    ),
    "transformer-fp8-fusionx": (
        "quant_model_fp8_FusionX.safetensors",
        "quantization_map_fp8_FusionX.json",
    ),
    "text-int8": ("t5_int8.safetensors", "t5_map_int8.json"),
}
"""Weights and map of the official quantised models, by part."""

Model = TypeVar("Model", bound=nn.Module)

_PART = "transformer"
_ALIGNMENT = 64  # bytes, as torch allocates
_CASTS = ("bfloat16", "float16", "float32")


def load_transformer(
    name: str,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    lora: str | None = None,
    lora_scale: float = 1.0,
    parity: bool = False,
    cast: str | None = None,
) -> MultiTalkTransformer:
    """`name` is that of the weights, `lora` of those merged into them; `cast` = int8 or fp8 stores the
    blocks' weights so. Raises `WeightsError`."""
    config = read_config(weights.converted(name) or weights.locate(name))
    state = _read_state(name, config)
    if lora:
        (path,) = weights.locate(lora).rglob("*.safetensors")
        state = merge_lora(state, read_checkpoint(path), lora_scale, parity=parity, dtype=dtype)
    transformer = _loaded(
        lambda: MultiTalkTransformer(config),
        state,
        transformer_name_map(config),
        device,
        dtype,
        parameter_dtype,
    )
    if cast:
        cast_weights(transformer, cast)
    return transformer


def load_text_encoder(name: str, device: str, dtype: torch.dtype) -> nn.Module:
    """`name` is that of a part of the weights: `text` or `text-int8`."""
    folder = wan_folder(name)
    sizes = _sizes(folder, "text")
    state = _read_quantised(name) if name.endswith("-int8") else read_checkpoint(folder / TEXT_FILE)
    model = _loaded(lambda: build_text_encoder(sizes), state, text_name_map(sizes), device, dtype)
    model.tie_weights()  # the embedding has two names, and once its 2 GB are enough
    return model


def load_clip(folder: Path, device: str, dtype: torch.dtype) -> nn.Module:
    sizes = _sizes(folder, "clip")
    state = clip_half(read_checkpoint(folder / CLIP_FILE))
    return _loaded(lambda: build_clip(sizes), state, clip_name_map(sizes), device, dtype)


def load_vae(folder: Path, device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    sizes = _sizes(folder, "vae")
    state = read_checkpoint(folder / VAE_FILE)
    return _loaded(lambda: build_vae(sizes), state, vae_name_map(sizes), device, dtype)


def read_config(folder: Path) -> TransformerConfig:
    """`folder` holds the official folders, or is that of a converted copy."""
    inside = folder / WAN / CONFIG
    path = inside if inside.is_file() else folder / CONFIG
    values = _read_json(path)
    try:
        return TransformerConfig.from_official(values)
    except TypeError as error:
        raise WeightsError(f"{path} does not describe this transformer: {error}") from error


def wan_folder(name: str) -> Path:
    """The folder of the base model that a part belongs to."""
    folder = weights.locate(name)
    return folder if folder.name == WAN else folder / WAN


def convert(name: str, dtype: str | None = None) -> Path:
    """Write a copy of a transformer as sharded safetensors that loads as it is, and return its folder; from
    then on it is used instead. Without a `dtype` the results keep their keys."""
    if dtype not in (None, *_CASTS):
        raise WeightsError(f"got dtype {dtype!r}, allowed are: {', '.join(_CASTS)}")
    if name.partition("/")[2] != _PART:
        raise WeightsError(f"weights {name!r} need no conversion; there is: {_PART} of a checkpoint")
    folder, copy = weights.locate(name), weights.conversion_folder(name)
    if folder == copy:
        raise WeightsError(
            f"weights {name!r}: the official files are gone, only their copy is left in {copy}"
        )
    config = read_config(folder)
    state = rename(_read_official(folder), transformer_name_map(config))
    target = getattr(torch, dtype) if dtype else None
    write_shards(state, copy, dtype=target, metadata={"source": weights.fingerprint(name)})
    shutil.copyfile(folder / WAN / CONFIG, copy / CONFIG)
    weights.record_conversion(name, dtype or "")
    return copy


def _read_state(name: str, config: TransformerConfig) -> dict[str, Tensor]:
    """Under the official names, memory-mapped where they are not quantised."""
    if name.partition("/")[2] in QUANTISED_FILES:
        return _read_quantised(name)
    if copy := weights.converted(name):
        return undo_rename(read_checkpoint(copy), transformer_name_map(config))
    return _read_official(weights.locate(name))


def _read_official(folder: Path) -> dict[str, Tensor]:
    """The base and what MultiTalk adds to it. Where MultiTalk is installed as its authors say, the index of
    the base names its file too."""
    state = read_checkpoint(folder / WAN)
    return state | read_checkpoint(folder / AUDIO_LAYERS / AUDIO_LAYERS_FILE)


def _read_quantised(name: str) -> dict[str, Tensor]:
    folder = weights.locate(name) / QUANTISED
    filename, map_name = QUANTISED_FILES[name.partition("/")[2]]
    return read_quantised(read_checkpoint(folder / filename), _read_json(folder / map_name))


def _sizes(folder: Path, encoder: str) -> Mapping[str, Any] | None:
    path = folder / ENCODERS
    return _read_json(path).get(encoder) if path.is_file() else None


def _loaded(
    build: Callable[[], Model],
    state: Mapping[str, Tensor],
    name_map: Sequence[Rename],
    device: str,
    dtype: torch.dtype,
    dtype_of: Callable[[str, torch.dtype], torch.dtype] = lambda name, dtype: dtype,
) -> Model:
    """`state` has the official names. Quantised weights have scales beside them; both stay as they are."""
    renamed = rename(state, scale_renames(name_map, state))
    scales = {name for name in renamed if name.endswith(SCALE)}
    modules = {name.removesuffix(SCALE) for name in scales}
    kept = scales | {f"{module}.weight" for module in modules}
    with init_empty_weights():
        model = build()
        store_quantised(model, modules, {module: renamed[f"{module}.weight"].dtype for module in modules})

    def placed(name: str, tensor: Tensor) -> Tensor:
        if name in kept:
            return _aligned(tensor.to(device))
        # What computes in float32 has numbers of the model's dtype all the same.
        return _aligned(tensor.to(device, dtype).to(dtype_of(name, dtype)))

    load_strict(model, {name: placed(name, tensor) for name, tensor in renamed.items()})
    return model.to(device).eval().requires_grad_(False)


def _aligned(tensor: Tensor) -> Tensor:
    """A copy of what lies anyhow in its file: kernels for the CPU add up in another order there, so that a
    converted model would differ in the last bit."""
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read: {error}; fetch it again") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds {type(content).__name__}, expected settings by name")
    return content
