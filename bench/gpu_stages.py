"""The stages beside denoising, timed at random weights."""

from collections.abc import Callable

import numpy as np
import torch
from gpu_report import Machine, Report, lazily
from random_models import random_encoders, random_vae, random_whisper

from avatar_core.backends.hunyuan.text import MAX_TOKENS, picture_text_states
from avatar_core.backends.hunyuan.vae import decode_frames, encode_reference


@torch.no_grad()
def stages(machine: Machine, report: Report, _: float) -> None:
    """Models at random weights; building them is not counted."""
    report.begin("Other stages", "what", "s", "peak GiB")
    machine.forget_peak()
    half = torch.float16 if machine.on_gpu else torch.float32
    works = {
        "Whisper: 30 s of sound": lambda: _whisper(machine),
        "LLaVA and CLIP: one prompt": lambda: _text(machine, half),
        "VAE: picture to latents": lambda: _encode(machine, half),
        "VAE: latents to 129 frames": lambda: _decode(machine, half),
    }
    for name, build in works.items():

        def cells(build: Callable[[], Callable[[], object]] = build) -> list[str]:
            return [f"{machine.seconds(lazily(build)):.3f}", machine.peak()]

        report.measure(name, cells, machine)


def _whisper(machine: Machine) -> Callable[[], object]:
    encoder = random_whisper(machine.size, machine.device)
    features = torch.randn(1, machine.size.whisper.num_mel_bins, 3000, device=machine.device)
    return lambda: encoder(features, output_hidden_states=True)


def _text(machine: Machine, dtype: torch.dtype) -> Callable[[], object]:
    llava, clip = random_encoders(machine.size, machine.device, dtype)
    config = machine.size.llava
    ids = torch.arange(MAX_TOKENS, device=machine.device)[None] % 900
    ids[0, 200] = config.image_token_index
    side = config.vision_config.image_size
    pixels = torch.randn(1, 3, side, side, device=machine.device, dtype=dtype)
    mask = torch.ones_like(ids)
    words = ids[:, :77]
    return lambda: [picture_text_states(llava, ids, mask, pixels), clip(words)]


def _encode(machine: Machine, dtype: torch.dtype) -> Callable[[], object]:
    vae = random_vae(machine.size, machine.device, dtype)
    random = np.random.default_rng(0)
    picture = random.integers(0, 256, (machine.size.height, machine.size.width, 3), dtype=np.uint8)
    return lambda: encode_reference(vae, picture, None)


def _decode(machine: Machine, dtype: torch.dtype) -> Callable[[], object]:
    """To pixels in main memory, as the encoder of the file takes them."""
    vae = random_vae(machine.size, machine.device, dtype)
    latents = torch.randn(machine.size.latent_shape)
    return lambda: sum(1 for _ in decode_frames(vae, latents, 129))
