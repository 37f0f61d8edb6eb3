"""A random checkpoint in the official layout, small enough to make whole clips on a CPU in seconds.

Every file is of the official kind, with the official names, and is read by the same code. What comes out
shows nothing, but it depends on the picture, the sound, the prompt, the seed and every weight.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from avatar_core.backends.multitalk.clip import build_clip, clip_name_map, whole_clip
from avatar_core.backends.multitalk.config import OFFICIAL_QUANTISED
from avatar_core.backends.multitalk.lora import merge_lora
from avatar_core.backends.multitalk.name_map import transformer_name_map
from avatar_core.backends.multitalk.official import (
    AUDIO_LAYERS,
    AUDIO_LAYERS_FILE,
    CLIP_FILE,
    CONFIG,
    ENCODERS,
    QUANTISED,
    QUANTISED_FILES,
    TEXT_FILE,
    TOKENIZER,
    VAE_FILE,
    WAN,
)
from avatar_core.backends.multitalk.quantised import quantise
from avatar_core.backends.multitalk.text import build_text_encoder, text_name_map
from avatar_core.backends.multitalk.tiny_tokenizer import save_tokenizer
from avatar_core.backends.multitalk.transformer import MultiTalkTransformer, TransformerConfig
from avatar_core.backends.multitalk.vae import build_vae, vae_name_map
from avatar_core.checkpoint import undo_rename
from avatar_core.errors import WeightsError
from avatar_core.optional_packages import hide_broken_packages

hide_broken_packages()

from transformers import (  # noqa: E402 - after the broken packages are hidden
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForPreTraining,
)

AUDIO = "chinese-wav2vec2-base"
LORAS = {
    "fusionx": "Wan14BT2VFusioniX/FusionX_LoRa/Wan2.1_I2V_14B_FusionX_LoRA.safetensors",
    "lightx2v": "WanVideo_comfy/Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors",
}

_WIDTH = 32  # of the encoders
_AUDIO_LAYERS, _AUDIO_WIDTH = 4, 16
_LORA_RANK = 4

TRANSFORMER = TransformerConfig(
    dim=64,
    ffn_dim=96,
    freq_dim=32,
    text_dim=_WIDTH,
    num_heads=2,
    num_layers=2,
    clip_dim=_WIDTH,
    audio_blocks=_AUDIO_LAYERS,
    audio_channels=_AUDIO_WIDTH,
    intermediate_dim=32,
    output_dim=24,
    context_tokens=4,
)
TEXT = {"d_model": _WIDTH, "d_kv": 16, "d_ff": 2 * _WIDTH, "num_layers": 2, "num_heads": 2}
CLIP = {
    "hidden_size": _WIDTH,
    "intermediate_size": 2 * _WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
VAE = {"base_dim": 4, "num_res_blocks": 1}


def write_tiny_checkpoint(folder: Path, *, seed: int = 0, scale: float = 1.0) -> None:
    """Write all files below `folder`, in place of those of an earlier call. `scale` multiplies the spread of
    the transformer's weights. Raises `WeightsError` where the folder holds anything else."""
    is_tiny = (folder / WAN / ENCODERS).is_file()  # the official folder has no such file
    if not is_tiny and folder.exists() and any(folder.iterdir()):
        raise WeightsError(f"{folder} holds other files; give an empty or absent folder")
    parts: list[Callable[[], None]] = [
        lambda: _write_transformer(folder, scale),
        lambda: _write_text(folder),
        lambda: _write_clip(folder / WAN),
        lambda: _write_vae(folder / WAN),
        lambda: _write_audio(folder / AUDIO),
    ]
    try:
        for earlier in (
            WAN,
            AUDIO_LAYERS,
            AUDIO,
            *(path.split("/")[0] for path in LORAS.values()),
            "converted",
        ):
            shutil.rmtree(folder / earlier, ignore_errors=True)
        for number, write in enumerate(parts):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed * len(parts) + number)
                write()
    except OSError as error:
        raise WeightsError(f"the checkpoint cannot be written to {folder}: {error}") from error


def _write_transformer(folder: Path, scale: float) -> None:
    model = MultiTalkTransformer(TRANSFORMER)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    official = undo_rename(model.state_dict(), transformer_name_map(TRANSFORMER))
    audio = {name: tensor for name, tensor in official.items() if _is_audio_layer(name)}
    base = {name: tensor for name, tensor in official.items() if name not in audio}
    _write_shards(base, folder / WAN)
    _write_json(folder / WAN / CONFIG, {"_class_name": "WanModel", **TRANSFORMER.to_official()})
    _save(audio, folder / AUDIO_LAYERS / AUDIO_LAYERS_FILE)
    for path in LORAS.values():
        lora = _random_lora(official)
        _save(lora, folder / path)
        if "FusionX" in path:
            merged = merge_lora(official, lora, 1.0, parity=True)
    for kind in OFFICIAL_QUANTISED:
        _write_quantised(official, folder, f"transformer-{kind}", kind)
        _write_quantised(merged, folder, f"transformer-{kind}-fusionx", kind)


def _is_audio_layer(name: str) -> bool:
    return name.startswith("audio_proj.") or ".audio_cross_attn." in name or ".norm_x." in name


def _write_shards(state: Mapping[str, Tensor], folder: Path) -> None:
    """Two, as the official base has seven."""
    names = list(state)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    places: dict[str, str] = {}
    for number, half in enumerate(halves, start=1):
        filename = f"diffusion_pytorch_model-{number:05d}-of-{len(halves):05d}.safetensors"
        _save({name: state[name] for name in half}, folder / filename)
        places |= dict.fromkeys(half, filename)
    _write_json(
        folder / "diffusion_pytorch_model.safetensors.index.json", {"metadata": {}, "weight_map": places}
    )


def _random_lora(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the attentions' products, with a shift of a bias and the notes that such files carry."""
    lora = {}
    for name, weight in state.items():
        if ".self_attn." in name and weight.dim() == 2:
            path = f"diffusion_model.{name.removesuffix('.weight')}"
            lora[f"{path}.lora_down.weight"] = torch.randn(_LORA_RANK, weight.shape[1]) / weight.shape[1]
            lora[f"{path}.lora_up.weight"] = torch.randn(weight.shape[0], _LORA_RANK)
            lora[f"{path}.alpha"] = torch.tensor(float(_LORA_RANK))
    lora["diffusion_model.blocks.0.ffn.0.diff_b"] = 0.1 * torch.randn(TRANSFORMER.ffn_dim)
    return lora


def _write_quantised(state: Mapping[str, Tensor], folder: Path, part: str, kind: str) -> None:
    weights_name, map_name = QUANTISED_FILES[part]
    quantised, quantisation_map = quantise(state, kind)
    _save(quantised, folder / QUANTISED / weights_name)
    _write_json(folder / QUANTISED / map_name, quantisation_map)


def _write_text(folder: Path) -> None:
    tokenizer = folder / WAN / TOKENIZER
    tokenizer.mkdir(parents=True, exist_ok=True)
    sizes = {**TEXT, "vocab_size": save_tokenizer(tokenizer)}
    state = undo_rename(_halved(build_text_encoder(sizes)), text_name_map(sizes))
    torch.save(state, folder / WAN / TEXT_FILE)
    _write_json(folder / WAN / ENCODERS, {"text": sizes, "clip": CLIP, "vae": VAE})
    _write_quantised(state, folder, "text-int8", "int8")


def _halved(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}


def _write_clip(folder: Path) -> None:
    """With a piece of the text half, which nothing reads."""
    state = whole_clip(undo_rename(build_clip(CLIP).state_dict(), clip_name_map(CLIP)))
    rest = {"log_scale": torch.zeros(()), "textual.model.norm.weight": torch.ones(_WIDTH)}
    torch.save({name: tensor.half() for name, tensor in {**rest, **state}.items()}, folder / CLIP_FILE)


def _write_vae(folder: Path) -> None:
    torch.save(undo_rename(build_vae(VAE).state_dict(), vae_name_map(VAE)), folder / VAE_FILE)


def _write_audio(folder: Path) -> None:
    """The whole of what was pretrained, of which the encoder is used."""
    config = Wav2Vec2Config(
        hidden_size=_AUDIO_WIDTH,
        num_hidden_layers=_AUDIO_LAYERS,
        num_attention_heads=2,
        intermediate_size=2 * _AUDIO_WIDTH,
        conv_dim=(_AUDIO_WIDTH,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        codevector_dim=8,
        proj_codevector_dim=8,
        num_codevectors_per_group=4,
        initializer_range=_AUDIO_WIDTH**-0.5,
    )
    model = Wav2Vec2ForPreTraining(config)
    config.save_pretrained(folder)
    _save(model.state_dict(), folder / "model.safetensors")
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)


def _save(state: Mapping[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(contiguous, path, metadata={"format": "pt"})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
