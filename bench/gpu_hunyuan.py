"""Speed and memory of the `hunyuan` backend on a GPU, at full size with random weights.

    python bench/gpu_hunyuan.py [--only PART ...] [--stages] [--profile] [--minutes M] [--save]
    python bench/gpu_hunyuan.py --tiny          # all of it, at toy size on the CPU

A step is one full denoising step of a 129x704x768 clip: two forwards of 33 latent frames and the reference
picture. Its share is that of the dense bfloat16 rate measured on this machine. The yardstick is diffusers'
plain model of the same size. A part that does not fit into memory, does not work here or comes after
`--minutes` says so in its line. `--save` keeps the tables in bench/results/gpu_hunyuan.md.
"""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_report import (
    GOAL,
    Machine,
    Report,
    Speeds,
    about,
    as_markdown,
    console,
    gemm_rate,
    kernels_of,
    lazily,
    limited_to,
)
from gpu_stages import stages
from random_models import (
    FULL,
    TEXT_ROWS,
    TINY,
    random_conditions,
    random_plain_transformer,
    random_text,
    random_transformer,
    shallow,
    to_fp8,
)
from torch import Tensor

from avatar_core.backends.hunyuan.chunked_blocks import run_in_chunks
from avatar_core.backends.hunyuan.sampling import GuidedTransformer, guide
from avatar_core.backends.hunyuan.schedules import EARLY_STEPS, ClipWindows, cached_steps
from avatar_core.backends.hunyuan.transformer import Conditions, TransformerConfig
from avatar_core.memory import LEVELS, Level, attention, compile_blocks, place

PUBLISHED_PFLOP = 4.81  # of a forward at full size with 256 tokens of text
COMPILED = Level("compiled", 0, compile=True)
FULL_STEPS = 50


# --- work and rate


def forward_flops(config: TransformerConfig, image_tokens: int, text_tokens: int) -> float:
    """Of the blocks: scores and values of the attention, and linear layers."""
    rows, dim = image_tokens + text_tokens, config.hidden_size
    num_blocks = config.num_layers + config.num_single_layers
    return num_blocks * (4 * rows**2 * dim + 2 * rows * (4 + 2 * config.mlp_ratio) * dim**2)


# --- one step


def plain_step(machine: Machine) -> Callable[[], object]:
    """Both halves of a step by diffusers' plain model, one by one: no autocast, no mask, valid text alone."""
    size, config = machine.size, machine.size.transformer
    model = random_plain_transformer(config, machine.device)
    shape = (*size.latent_shape[:2], size.latent_shape[2] + 1, *size.latent_shape[3:])
    latents = torch.randn(shape, device=machine.device, dtype=machine.dtype)
    timestep = torch.tensor([500.0], device=machine.device, dtype=machine.dtype)
    text = random_text(config, size.text_tokens, machine.device, seed=2)
    words = text.prompt_embeds[:, : size.text_tokens].to(machine.dtype)
    pooled = text.pooled_prompt_embeds.to(machine.dtype)

    def forward() -> Tensor:
        rotary = model.rope(latents)
        vector, _ = model.time_text_embed(timestep, pooled, None)
        rows, text_rows = model.x_embedder(latents), model.context_embedder(words, timestep, None)
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            rows, text_rows = block(rows, text_rows, vector, None, rotary)
        return model.proj_out(model.norm_out(rows, vector))

    return lambda: [forward(), forward()]


class Clip:
    """A random clip's steps by the backend's own transformer and guidance."""

    def __init__(
        self, machine: Machine, transformer: Any, *, sequential: bool = True, cache_device: str | None = None
    ) -> None:
        conditions = random_conditions(machine.size, machine.device)
        windows = ClipWindows.of(conditions.audio.shape[1])
        self._window = windows.at(0)[0]
        self._guided = GuidedTransformer(
            transformer, conditions, windows, sequential=sequential, cache_device=cache_device
        )
        generator = torch.Generator(machine.device).manual_seed(4)
        self._latents = torch.randn(machine.size.latent_shape, generator=generator, device=machine.device)
        self._timestep = torch.tensor([500.0], device=machine.device)

    def step(self, index: int = EARLY_STEPS + 10, *, cached: bool = False) -> Tensor:
        answers = self._guided(self._latents, self._timestep, index, 0, self._window, cached=cached)
        return guide(*answers, 6.0, torch.float32)


@torch.no_grad()
def steps(machine: Machine, report: Report, rate: float) -> None:
    speeds = begin_speeds("A step", machine, report, rate)
    plain_s = speeds.measure("plain diffusers, eager, default attention", lazily(lambda: plain_step(machine)))
    speeds = replace(speeds, plain_s=plain_s)
    transformer = random_transformer(machine.size.transformer, machine.device)
    kernel = machine.attention_kernel()
    with attention(kernel):
        times = [speeds.measure(f"eager, {kernel}", lazily(lambda: Clip(machine, transformer).step))]
        compile_blocks(transformer, COMPILED, machine.device)
        clip, start = Clip(machine, transformer), time.perf_counter()
        times.append(speeds.measure(f"compiled, {kernel}", clip.step))
        console.print(f"({time.perf_counter() - start:.0f} s with compilation)", markup=False)
        speeds.measure("compiled, cached step", lambda: clip.step(cached=True), in_full=False)
        # Another length of text is compiled for once more, and then any.
        speeds.measure("compiled, early step, texts of two lengths", lambda: clip.step(0))
    best_s = min((each for each in times if each), default=None)
    if best_s is not None:
        report.add("best exact step", *speeds.cells(best_s)[:3])
        num_full = FULL_STEPS - sum(cached_steps("scaled", FULL_STEPS))
        console.print(
            f"{FULL_STEPS} steps: {FULL_STEPS * best_s:.0f} s, or {num_full} of them and cached ones"
        )


@torch.no_grad()
def variants(machine: Machine, report: Report, rate: float) -> None:
    speeds = begin_speeds("Variants of a step", machine, report, rate)
    transformer = random_transformer(machine.size.transformer, machine.device)

    def both() -> Callable[[], object]:
        return Clip(machine, transformer, sequential=False).step

    for kernel, problem in kernels_of(machine):
        if problem:
            report.add(f"eager, {kernel}", f"not here: {problem[:100]}")
            continue
        with attention(kernel):
            speeds.measure(f"eager, {kernel}", lazily(lambda: Clip(machine, transformer).step))
    with attention(machine.attention_kernel()):
        speeds.measure("eager, halves as one batch", lazily(both))
        compile_blocks(transformer, COMPILED, machine.device)
        speeds.measure("compiled, halves as one batch", lazily(both))
        to_fp8(transformer)
        torch.compiler.reset()
        compile_blocks(transformer, COMPILED, machine.device)
        speeds.measure("compiled, float8 weights", lazily(lambda: Clip(machine, transformer).step))


def begin_speeds(title: str, machine: Machine, report: Report, rate: float) -> Speeds:
    size = machine.size
    flops = forward_flops(size.transformer, size.image_tokens, size.text_tokens)
    report.begin(
        f"{title}: {size.image_tokens} + {size.text_tokens} tokens, 2 forwards of {flops / 1e15:.3g} PFLOP "
        f"(published for the full size: {PUBLISHED_PFLOP})",
        "variant",
        "s",
        f"share (goal {GOAL:.0%})",
        "x plain",
        "peak GiB",
    )
    return Speeds(machine, report, rate, 2 * flops)


# --- memory


@torch.no_grad()
def levels(machine: Machine, report: Report, _: float) -> None:
    """On as much of the device as the level is meant for."""
    report.begin(
        "Memory levels",
        "level",
        "early step s",
        "step s",
        "cached step s",
        "peak GiB",
        "first step s",
    )
    for level in LEVELS:
        with ExitStack() as limits:
            report.measure(
                level.name, lambda level=level, limits=limits: _level(machine, level, limits), machine
            )


def _level(machine: Machine, level: Level, limits: ExitStack) -> list[str]:
    in_main_memory = level.offload and machine.memory_gib < 40
    transformer = random_transformer(machine.size.transformer, "cpu" if in_main_memory else machine.device)
    start = time.perf_counter()
    _fit(transformer, level, machine)
    compile_blocks(transformer, level, machine.device)
    machine.forget_peak()
    limits.enter_context(limited_to(machine, level.device_gb))
    kernel = machine.attention_kernel()
    with attention(kernel):
        clip = Clip(
            machine,
            transformer,
            sequential=level.split_guidance,
            cache_device="cpu" if level.offload else None,
        )
        clip.step(0)
        machine.wait()
        first_s = time.perf_counter() - start
        early_s = machine.seconds(lambda: clip.step(0), repeats=1)
        full_s = machine.seconds(lambda: clip.step(EARLY_STEPS), repeats=1)
        cached_s = machine.seconds(lambda: clip.step(cached=True), repeats=1)
    return [*(f"{each:.3f}" for each in (early_s, full_s, cached_s)), machine.peak(), f"{first_s:.0f}"]


def _fit(transformer: Any, level: Level, machine: Machine) -> None:
    place(transformer, level, machine.device)
    if level.row_chunks:
        run_in_chunks(transformer)


# --- numbers


@torch.no_grad()
def differences(machine: Machine, report: Report, _: float) -> None:
    """Of every option from float32, at 9x64x64 with the full width and few blocks."""
    config = shallow(machine.size.transformer)
    report.begin("Difference from float32, 9x64x64", "option", "relative", "max abs")
    exactly = torch.backends.cudnn.flags(enabled=False)  # convolutions would be in TF32
    with exactly, attention("_native_math"):
        exact = _answer(machine, random_transformer(config, machine.device, torch.float32))

    def compare(name: str, kernel: str, prepare: Callable[[Any], object] = lambda model: None) -> None:
        def cells() -> list[str]:
            transformer = random_transformer(config, machine.device)
            prepare(transformer)
            with attention(kernel):
                off = _answer(machine, transformer).float() - exact
            return [f"{float(off.norm() / exact.norm()):.2e}", f"{float(off.abs().max()):.2e}"]

        report.measure(name, cells, machine)

    for kernel, problem in kernels_of(machine):
        if not problem:
            compare(f"bfloat16, {kernel}", kernel)
    best = machine.attention_kernel()
    compare("bfloat16, compiled", best, lambda model: compile_blocks(model, COMPILED, machine.device))
    for level in LEVELS:
        if level.offload:
            compare(f"bfloat16, level {level.name}", best, partial(_fit, level=level, machine=machine))
    compare("float8 weights", best, to_fp8)


def _answer(machine: Machine, transformer: Any) -> Tensor:
    config = transformer.config
    generator = torch.Generator(machine.device).manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=machine.device).bfloat16().float()

    motion = torch.full((1, 4), 30.0, device=machine.device)
    prepared = transformer.prepare(
        Conditions(
            text=random_text(config, machine.size.text_tokens, machine.device, seed=2),
            ref_latents=normal(1, config.in_channels, 3, 8, 8),
            audio=normal(1, 9, *config.audio_window),
            face_masks=normal(1, 1, 1, 8, 8).sigmoid(),
            motion_exp=motion,
            motion_pose=motion,
            fps=torch.full((1,), 25.0, device=machine.device),
        )
    )
    latents, timestep = normal(1, config.in_channels, 3, 8, 8), torch.tensor([500.0], device=machine.device)
    return transformer(latents, timestep, prepared).sample


# --- where the time goes


@torch.no_grad()
def profile(machine: Machine, report: Report, _: float) -> None:
    """Kernels of a compiled step, by the time they take themselves."""
    report.begin("Kernels of a step", "kernel", "calls", "ms", "share")
    transformer = random_transformer(machine.size.transformer, machine.device)
    compile_blocks(transformer, COMPILED, machine.device)
    activity = torch.profiler.ProfilerActivity
    used = [activity.CUDA] if machine.on_gpu else [activity.CPU]
    kernel = machine.attention_kernel()
    with attention(kernel):
        clip = Clip(machine, transformer)
        clip.step()
        machine.wait()
        with torch.profiler.profile(activities=used) as profiler:
            clip.step()
            machine.wait()
    name = "self_device_time_total" if machine.on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, name))
    total_us = sum(getattr(event, name) for event in events)
    for event in events[:25]:
        spent_us = getattr(event, name)
        report.add(event.key[:44], str(event.count), f"{spent_us / 1e3:.1f}", f"{spent_us / total_us:.1%}")


# --- the whole


PARTS: dict[str, Callable[[Machine, Report, float], None]] = {
    "differences": differences,
    "steps": steps,
    "variants": variants,
    "levels": levels,
}


def main() -> None:
    options = arguments().parse_args()
    size = TINY if options.tiny else FULL
    if options.text_tokens:
        size = replace(size, text_tokens=options.text_tokens)
    if not (options.tiny or torch.cuda.is_available()):
        sys.exit("no CUDA device found; --tiny runs all of it at toy size on the CPU")
    machine = Machine("cpu" if options.tiny else "cuda:0", size, options.repeats)
    report = Report(time.monotonic() + 60 * options.minutes)
    for line in about(machine):
        console.print(line, markup=False)
    rate = gemm_rate(machine, report)
    parts = {name: part for name, part in PARTS.items() if name in options.only}
    parts |= {"stages": stages} if options.stages else {}
    parts |= {"profile": profile} if options.profile else {}
    for name, part in parts.items():
        try:
            part(machine, report, rate)
        except torch.OutOfMemoryError:
            report.add(f"the rest of {name}", "does not fit into memory")
        torch.compiler.reset()
    if options.save:
        path = Path(__file__).resolve().parent / "results" / "gpu_hunyuan.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(as_markdown("HunyuanVideo-Avatar on a GPU", machine, report), encoding="utf-8")
        console.print(f"kept in {path}", soft_wrap=True)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--stages", action="store_true", help="also time Whisper, LLaVA, CLIP and the VAE")
    parser.add_argument("--profile", action="store_true", help="also list the kernels of one compiled step")
    parser.add_argument("--minutes", type=float, default=30, help="begin nothing new after so long")
    parser.add_argument("--text-tokens", type=int, help=f"valid ones of the prompt, up to {TEXT_ROWS}")
    parser.add_argument("--repeats", type=int, default=1, help="of every step, after one that does not count")
    parser.add_argument("--tiny", action="store_true", help="toy size on the CPU")
    parser.add_argument("--save", action="store_true")
    return parser


if __name__ == "__main__":
    main()
