"""A random Kokoro checkpoint in the official layout, which says texts as noise of their length."""

import json
import tempfile
from pathlib import Path
from typing import Any

from avatar_core.errors import WeightsError
from avatar_core.media.kokoro import CONFIG, MODEL, REPOSITORY, STYLE_SHAPE
from avatar_core.optional_packages import hide_broken_packages

hide_broken_packages()

import torch  # noqa: E402 - after the broken packages are hidden
from kokoro import KModel  # noqa: E402
from torch import Tensor  # noqa: E402

VOICES = ("af_heart", "am_adam", "bf_emma", "ef_dora", "em_alex")

_IPA = (*range(0x20, 0x7F), *range(0xE6, 0x100), *range(0x250, 0x2D1), 0x3B8, 0x1D4A, 0x1D7B)
_PHONEMES = [*map(chr, _IPA)]
_LARGE = 100_000  # elements of a tensor


def write_tiny_checkpoint(folder: Path, *, seed: int = 0) -> None:
    """Raises `WeightsError` where the folder holds anything but an earlier one."""
    mark = folder / "tiny"
    if folder.exists() and any(folder.iterdir()) and not mark.is_file():
        raise WeightsError(f"{folder} holds other files; give an empty or absent folder")
    try:
        (folder / "voices").mkdir(parents=True, exist_ok=True)
        mark.touch()
        (folder / CONFIG).write_text(json.dumps(_config(), ensure_ascii=False), encoding="utf-8")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            torch.save(_random_state(), folder / MODEL)
            for voice in VOICES:
                torch.save(torch.randn(STYLE_SHAPE), folder / "voices" / f"{voice}.pt")
    except OSError as error:
        raise WeightsError(f"the checkpoint cannot be written to {folder}: {error}") from error


def _config() -> dict[str, Any]:
    """The official one with smaller layers, and phonemes of some 25 ms."""
    return {
        "istftnet": {
            "upsample_kernel_sizes": [20, 12],
            "upsample_rates": [10, 6],
            "gen_istft_hop_size": 5,
            "gen_istft_n_fft": 20,
            "resblock_dilation_sizes": [[1, 3, 5]],
            "resblock_kernel_sizes": [3],
            "upsample_initial_channel": 512,
        },
        "dim_in": 64,
        "dropout": 0.2,
        "hidden_dim": 512,
        "max_dur": 2,
        "n_layer": 1,
        "n_mels": 80,
        "n_token": len(_PHONEMES) + 1,
        "style_dim": 128,
        "text_encoder_kernel_size": 5,
        "plbert": {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 512,
            "num_hidden_layers": 1,
            "dropout": 0.1,
        },
        "vocab": {phoneme: number for number, phoneme in enumerate(_PHONEMES, start=1)},
    }


def _random_state() -> dict[str, dict[str, Tensor]]:
    """By part, under the names of the official file, which was saved from parallel training."""
    with tempfile.TemporaryDirectory() as folder:
        nothing = Path(folder) / MODEL
        torch.save({}, nothing)
        model = KModel(REPOSITORY, config=_config(), model=str(nothing))
    spectrum = model.decoder.generator.conv_post  # logarithms of magnitudes, then phases
    with torch.no_grad():
        spectrum.weight_g.mul_(0.05)
        spectrum.bias[: spectrum.out_channels // 2] = -1.0
    return {
        name: {f"module.{key}": _lean(tensor) for key, tensor in part.state_dict().items()}
        for name, part in model.named_children()
    }


def _lean(tensor: Tensor) -> Tensor:
    """Some layers have a fixed size: one column stands for all of theirs, so that the file stays small."""
    if tensor.numel() < _LARGE:
        return tensor
    return tensor[:, :1].clone().expand_as(tensor)
