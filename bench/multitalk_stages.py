"""What stands beside the denoising steps of a window, timed at random weights."""

from collections.abc import Callable

import torch
from accelerate import init_empty_weights
from gpu_report import Machine, Report, lazily
from random_models import filled
from random_multitalk import Size

from avatar_core.backends.multitalk.clip import build_clip, clip_features
from avatar_core.backends.multitalk.text import build_text_encoder
from avatar_core.backends.multitalk.vae import build_vae, decode_window, encode_condition

MAX_TOKENS = 512


@torch.inference_mode()
def stages(machine: Machine, size: Size, report: Report, _: float) -> None:
    """Building the models is not counted."""
    report.begin(f"Beside the steps, {size.name}", "what", "s", "peak GiB")
    works: dict[str, Callable[[Machine, Size], Callable[[], object]]] = {
        "UMT5: one prompt": _text,
        "CLIP: one frame": _clip,
        "VAE: frames to a condition": _encode,
        "VAE: latents to frames": _decode,
    }
    for name, build in works.items():

        def cells(
            build: Callable[[Machine, Size], Callable[[], object]] = build,
        ) -> list[str]:
            return [f"{machine.seconds(lazily(lambda: build(machine, size))):.3f}", machine.peak()]

        report.measure(name, cells, machine)


def _text(machine: Machine, size: Size) -> Callable[[], object]:
    model = _random(build_text_encoder, size, "text", machine, torch.bfloat16)
    ids = torch.arange(MAX_TOKENS, device=machine.device)[None] % 400
    return lambda: model(ids, attention_mask=torch.ones_like(ids))


def _clip(machine: Machine, size: Size) -> Callable[[], object]:
    model = _random(build_clip, size, "clip", machine, torch.float16 if machine.on_gpu else torch.float32)
    frame = torch.rand(1, 3, size.height, size.width, device=machine.device) * 2 - 1
    return lambda: clip_features(model, frame)


def _encode(machine: Machine, size: Size) -> Callable[[], object]:
    model = _random(build_vae, size, "vae", machine, torch.float32)
    frame = torch.rand(1, 3, 1, size.height, size.width, device=machine.device) * 2 - 1
    return lambda: encode_condition(model, frame, size.frames)


def _decode(machine: Machine, size: Size) -> Callable[[], object]:
    model = _random(build_vae, size, "vae", machine, torch.float32)
    latents = torch.randn(16, size.latent_frames, size.height // 8, size.width // 8, device=machine.device)
    return lambda: decode_window(model, latents)


def _random(
    build: Callable[..., torch.nn.Module], size: Size, encoder: str, machine: Machine, dtype: torch.dtype
) -> torch.nn.Module:
    with init_empty_weights():
        model = build((size.encoders or {}).get(encoder))
    return filled(model, machine.device, dict.fromkeys(model.state_dict(), dtype)).to(machine.device)
