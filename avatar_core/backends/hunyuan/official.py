"""Models from the files of the official checkpoint, or from the faster copy that `convert` makes of one.

A model is built without memory for its weights and takes them straight from the mapped file, one by one.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from torch import Tensor

from avatar_core import weights
from avatar_core.backends.hunyuan.fp8 import (
    WEIGHT_DTYPE,
    cast_to_fp8,
    check_fp8_weights,
    official_scales,
    store_linears_as_fp8,
)
from avatar_core.backends.hunyuan.name_map import VAE_KEY, VAE_PREFIX, transformer_name_map
from avatar_core.backends.hunyuan.transformer import (
    FLOAT32_MODULES,
    HunyuanAvatarTransformer,
    TransformerConfig,
    parameter_dtype,
)
from avatar_core.backends.hunyuan.vae import build_vae
from avatar_core.checkpoint import load_strict, read_checkpoint, rename, write_shards
from avatar_core.errors import WeightsError

CONFIG = "config.json"

_PART, _FP8_PART = "transformer", "transformer-fp8"
_KEY = "module"
_ALIGNMENT = 64  # bytes, as torch allocates
_CASTS = ("bfloat16", "float16", "float32")


def load_transformer(
    name: str, device: str, dtype: torch.dtype = torch.bfloat16, *, as_fp8: bool = False
) -> HunyuanAvatarTransformer:
    """`name` is that of the weights: `hunyuan/transformer`, `hunyuan/transformer-fp8`, or of another
    checkpoint. float8 weights stay so, whatever `dtype` says; `as_fp8` makes others so. Raises
    `WeightsError`."""
    copy = weights.converted(name)
    folder = copy or weights.locate(name)
    config = read_config(folder)
    state = read_checkpoint(copy) if copy else read_transformer(name, folder, config)
    if as_fp8 and not _is_fp8(name):
        state = cast_to_fp8(state)
    with torch.device("meta"):
        transformer = HunyuanAvatarTransformer(config)
        if as_fp8 or _is_fp8(name):
            store_linears_as_fp8(transformer)
    placed = {each: _aligned(t.to(device, _dtype(each, t, dtype))) for each, t in state.items()}
    load_strict(transformer, placed)
    return transformer.eval().requires_grad_(False)


def load_vae(folder: Path, device: str, dtype: torch.dtype = torch.float16) -> AutoencoderKLHunyuanVideo:
    """Raises `WeightsError`, also for a configuration that this autoencoder does not have."""
    config = _read_json(folder / CONFIG)
    state = read_checkpoint(folder / "pytorch_model.pt", key=VAE_KEY, prefix=VAE_PREFIX)
    with torch.device("meta"):
        vae = build_vae(config)
    load_strict(vae, {name: tensor.to(device, dtype) for name, tensor in state.items()})
    vae.requires_grad_(False)
    return vae


def read_config(folder: Path) -> TransformerConfig:
    """The official folder has no configuration: the published size."""
    path = folder / CONFIG
    if not path.is_file():
        return TransformerConfig()
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in _read_json(path).items()
    }
    try:
        return TransformerConfig(**values)
    except TypeError as error:
        raise WeightsError(f"{path} does not describe this transformer: {error}") from error


def read_transformer(name: str, folder: Path, config: TransformerConfig) -> dict[str, Tensor]:
    """The official files under this project's names, memory-mapped."""
    name_map = transformer_name_map(config)
    if not _is_fp8(name):
        return rename(read_checkpoint(folder / "mp_rank_00_model_states.pt", key=_KEY), name_map)
    state = rename(read_checkpoint(folder / "mp_rank_00_model_states_fp8.pt", key=_KEY), name_map)
    check_fp8_weights(state)
    scales = read_checkpoint(folder / "mp_rank_00_model_states_fp8_map.pt", key=_KEY)
    return state | official_scales(scales, name_map)


def convert(name: str, dtype: str | None = None) -> Path:
    """Write a copy of a transformer as sharded safetensors that loads as it is, and return its folder; from
    then on it is used instead. Without a `dtype` the results keep their keys."""
    if dtype not in (None, *_CASTS):
        raise WeightsError(f"got dtype {dtype!r}, allowed are: {', '.join(_CASTS)}")
    if name.partition("/")[2] not in (_PART, _FP8_PART):
        raise WeightsError(
            f"weights {name!r} need no conversion; there are: {_PART}, {_FP8_PART} of a checkpoint"
        )
    folder, copy = weights.locate(name), weights.conversion_folder(name)
    if folder == copy:
        raise WeightsError(
            f"weights {name!r}: the official files are gone, only their copy is left in {copy}"
        )
    config = read_config(folder)
    state = read_transformer(name, folder, config)
    keep = [f"{module}.*" for module in FLOAT32_MODULES]
    keep += [
        each for each, tensor in state.items() if tensor.dtype == WEIGHT_DTYPE or each.endswith(".scale")
    ]
    target = getattr(torch, dtype) if dtype else None
    write_shards(state, copy, dtype=target, keep=keep, metadata={"source": weights.fingerprint(name)})
    if (folder / CONFIG).is_file():
        shutil.copyfile(folder / CONFIG, copy / CONFIG)
    weights.record_conversion(name, dtype or "")
    return copy


def _is_fp8(name: str) -> bool:
    return name.endswith(f"/{_FP8_PART}")


def _dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return tensor.dtype if tensor.dtype == WEIGHT_DTYPE else parameter_dtype(name, dtype)


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
