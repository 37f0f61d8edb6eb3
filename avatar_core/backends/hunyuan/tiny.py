"""A random checkpoint in the official layout, small enough to make whole clips on a CPU in seconds.

Every file is of the official kind, with the official names, and is read by the same code. What comes out
shows nothing, but it depends on the picture, the sound, the prompt, the seed and every weight.
"""

import dataclasses
import io
import json
import math
import shutil
import zipfile
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from avatar_core.backends.hunyuan.fp8 import WEIGHT_DTYPE
from avatar_core.backends.hunyuan.name_map import VAE_KEY, VAE_PREFIX, transformer_name_map
from avatar_core.backends.hunyuan.official import CONFIG
from avatar_core.backends.hunyuan.tiny_tokenizers import save_clip_tokenizer, save_llava_tokenizer
from avatar_core.backends.hunyuan.transformer import (
    HunyuanAvatarTransformer,
    TransformerConfig,
    parameter_dtype,
)
from avatar_core.backends.hunyuan.vae import build_vae
from avatar_core.checkpoint import undo_rename, write_shards
from avatar_core.errors import WeightsError
from avatar_core.optional_packages import hide_broken_packages

hide_broken_packages()

from transformers import (  # noqa: E402 - after the broken packages are hidden
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

_WIDTH = 32  # of the encoders
_AUDIO_LAYERS, _AUDIO_WIDTH = 4, 16

TRANSFORMER = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=32,
    num_layers=2,
    num_single_layers=2,
    num_refiner_layers=1,
    rope_axes_dim=(8, 12, 12),
    text_embed_dim=_WIDTH,
    pooled_projection_dim=_WIDTH,
    audio_window=(10, _AUDIO_LAYERS + 1, _AUDIO_WIDTH),
    audio_inner_dim=32,
    adapter_inner_dim=32,
    adapter_layers=(1,),
)

VAE_CONFIG = {
    "_class_name": "AutoencoderKLCausal3D",
    "act_fn": "silu",
    "block_out_channels": [8, 16, 16, 16],
    "down_block_types": ["DownEncoderBlockCausal3D"] * 4,
    "in_channels": 3,
    "latent_channels": TRANSFORMER.in_channels,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "mid_block_causal_attn": True,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": 256,
    "sample_tsize": 64,
    "scaling_factor": 0.476986,
    "time_compression_ratio": 4,
    "up_block_types": ["UpDecoderBlockCausal3D"] * 4,
}

_LLAVA_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
_SHARD_BYTES = 64 << 10

# By which the usual random weights grow, so that picture and sound show in the video as the prompt does.
_GAINS = {
    "ref_proj.weight": 6.0,
    "audio_adapters.*.to_out.weight": 2.0,
    "*.to_q.weight": 2.0,
    "*.to_k.weight": 2.0,
    "*.attn.to_out.0.weight": 2.0,
    "*.attn.to_add_out.weight": 2.0,
    "*.ff*.net.2.weight": 2.0,
    "single_transformer_blocks.*.proj_out.weight": 2.0,
}

# Linear layers of the blocks are float8 in the official file made for it.
_FP8_BLOCKS = ("double_blocks.", "single_blocks.")


def write_tiny_checkpoint(folder: Path, *, seed: int = 0, scale: float = 1.0) -> None:
    """Write all files below `folder`, in place of those of an earlier call. `scale` multiplies the spread of
    the transformer's weights. Raises `WeightsError` where the folder holds anything else."""
    ckpts = folder / "ckpts"
    video = ckpts / "hunyuan-video-t2v-720p"
    # The official folder has no such file.
    is_tiny = (video / "transformers" / CONFIG).is_file()
    if not is_tiny and folder.exists() and any(folder.iterdir()):
        raise WeightsError(f"{folder} holds other files; give an empty or absent folder")
    parts: list[tuple[Path, Callable[[Path], None]]] = [
        (video / "transformers", lambda part: _write_transformer(part, scale)),
        (video / "vae", _write_vae),
        (ckpts / "llava_llama_image", _write_llava),
        (ckpts / "text_encoder_2", _write_clip),
        (ckpts / "whisper-tiny", _write_whisper),
        (ckpts / "det_align", _write_detector),
    ]
    try:
        for earlier in (ckpts, folder / "converted"):
            shutil.rmtree(earlier, ignore_errors=True)
        for number, (part, write) in enumerate(parts):
            part.mkdir(parents=True)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed * len(parts) + number)
                write(part)
    except OSError as error:
        raise WeightsError(f"the checkpoint cannot be written to {folder}: {error}") from error


def _write_transformer(folder: Path, scale: float) -> None:
    model = HunyuanAvatarTransformer(TRANSFORMER)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gains = [gain for pattern, gain in _GAINS.items() if fnmatchcase(name, pattern)]
            if parameter.dim() > 1:
                parameter.mul_(scale * math.prod(gains))
    state = {name: t.to(parameter_dtype(name, torch.bfloat16)) for name, t in model.state_dict().items()}
    official = undo_rename(state, transformer_name_map(TRANSFORMER))
    _write_json(folder / CONFIG, dataclasses.asdict(TRANSFORMER))
    torch.save({"module": official}, folder / "mp_rank_00_model_states.pt")
    quantized, scales = _quantize(official)
    torch.save({"module": quantized}, folder / "mp_rank_00_model_states_fp8.pt")
    torch.save({"module": scales}, folder / "mp_rank_00_model_states_fp8_map.pt")


def _quantize(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state with float8 weights, and the scale of each such layer."""
    quantized, scales = dict(state), {}
    for name, tensor in state.items():
        if name.startswith(_FP8_BLOCKS) and name.endswith(".weight") and tensor.dim() == 2:
            largest = tensor.float().abs().max()
            scale = largest / torch.finfo(WEIGHT_DTYPE).max
            quantized[name] = (tensor.float() / scale).to(WEIGHT_DTYPE)
            scales[name.removesuffix(".weight")] = scale
    return quantized, scales


def _write_vae(folder: Path) -> None:
    state = build_vae(VAE_CONFIG).state_dict()
    _write_json(folder / CONFIG, VAE_CONFIG)
    halves = {VAE_PREFIX + name: tensor.half() for name, tensor in state.items()}
    torch.save({VAE_KEY: halves}, folder / "pytorch_model.pt")


def _write_llava(folder: Path) -> None:
    ids = save_llava_tokenizer(folder)
    text = LlamaConfig(
        vocab_size=ids.size,
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        initializer_range=_spread(_WIDTH),
    )
    vision = CLIPVisionConfig(
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        projection_dim=_WIDTH,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids.image,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    config.pad_token_id = ids.pad
    _save(LlavaForConditionalGeneration(config).half(), folder, _LLAVA_NAMES)


def _write_clip(folder: Path) -> None:
    ids = save_clip_tokenizer(folder)
    config = CLIPTextConfig(
        vocab_size=ids.size,
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=_WIDTH,
        initializer_factor=4.0,
        bos_token_id=ids.start,
        eos_token_id=ids.end,
        pad_token_id=ids.end,
    )
    _save(CLIPTextModel(config).half(), folder, {"": "text_model."})


def _write_whisper(folder: Path) -> None:
    config = WhisperConfig(
        d_model=_AUDIO_WIDTH,
        encoder_layers=_AUDIO_LAYERS,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=2 * _AUDIO_WIDTH,
        decoder_ffn_dim=2 * _AUDIO_WIDTH,
        vocab_size=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        init_std=_spread(_AUDIO_WIDTH),
    )
    _save(WhisperModel(config), folder, {"": "model."})
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)


def _save(model: PreTrainedModel, folder: Path, prefixes: Mapping[str, str]) -> None:
    """Under the names of the official files, which are older than the classes."""
    state = {}
    for name, tensor in model.state_dict().items():
        prefix = max((each for each in prefixes if name.startswith(each)), key=len)
        state[prefixes[prefix] + name.removeprefix(prefix)] = tensor
    model.config.save_pretrained(folder)
    if len(prefixes) == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    write_shards(state, folder / "shards", shard_bytes=_SHARD_BYTES)
    for path in (folder / "shards").iterdir():
        path.rename(folder / path.name)
    (folder / "shards").rmdir()


class CentralFace(nn.Module):
    """Finds one face, in the middle: the detector's signature, and its answer for every cell of its grids."""

    def forward(self, image: Tensor, grids: list[Tensor]) -> Tensor:
        height, width = image.shape[2], image.shape[3]
        cells = 0
        for grid in grids:
            cells += grid.shape[2] * grid.shape[3]
        found = torch.zeros(1, cells, 16)
        side = 0.4 * min(height, width)
        x, y = 0.5 * width, 0.45 * height
        found[0, 0, :5] = torch.tensor([x, y, side, 1.2 * side, 0.99])
        found[0, 0, 15] = 0.99
        offsets = torch.tensor([[-0.2, -0.1], [0.2, -0.1], [0.0, 0.1], [-0.15, 0.3], [0.15, 0.3]])
        found[0, 0, 5:15] = (torch.tensor([x, y]) + side * offsets).flatten()
        return found


def _write_detector(folder: Path) -> None:
    """Without what tells where the source lies, and the hash of that: the same bytes on every machine."""
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(CentralFace().eval()), script)
    with zipfile.ZipFile(script) as full, zipfile.ZipFile(folder / "detface.pt", "w") as lean:
        for entry in full.infolist():
            if not entry.filename.endswith((".debug_pkl", "/serialization_id")):
                lean.writestr(entry, full.read(entry))


def _spread(width: int) -> float:
    """Standard deviation of weights that keep the size of what they multiply."""
    return float(width**-0.5)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
