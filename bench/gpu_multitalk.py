"""Speed and memory of the `multitalk` backend on a GPU, at full size with random weights.

    python bench/gpu_multitalk.py [--only PART ...] [--stages] [--minutes M] [--save]
    python bench/gpu_multitalk.py --tiny          # all of it, at toy size on the CPU

A step is one full denoising step of a window with two people: three forwards. Its share is that of the dense
bfloat16 rate measured on this machine, of which the work of the base's blocks alone counts. The yardstick is
diffusers' plain Wan blocks of the same size, without MultiTalk's audio layers. A part that does not fit into
memory, does not work here or comes after `--minutes` says so in its line. `--save` keeps the tables in
bench/results/gpu_multitalk.md.
"""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
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
from multitalk_stages import stages
from random_multitalk import (
    FULL,
    IMAGE_ROWS,
    TINY,
    Size,
    random_inputs,
    random_plain_transformer,
    random_transformer,
    shallow,
)
from torch import Tensor

from avatar_core.backends.multitalk.config import DenoiseConfig
from avatar_core.backends.multitalk.quantised import cast_weights
from avatar_core.backends.multitalk.sampling import SamplerSettings, denoise_window
from avatar_core.memory import LEVELS, Level, attention, compile_blocks, place

PUBLISHED_PFLOP = "1.69 at 81x480x832, 1.75 at 81x640x640"
COMPILED = Level("compiled", 0, compile=True)
CALLS = 3  # of the transformer in a step
FULL_STEPS = 40
CACHE_STEPS = 8  # of which the first five are always in full
STACKS = ("blocks",)


def forward_flops(size: Size) -> float:
    """Of the base's blocks: scores and values of the attentions, and linear layers."""
    config, rows = size.transformer, size.tokens
    context = IMAGE_ROWS + config.text_len
    attentions = 4 * rows * (rows + context) * config.dim
    linear = 2 * rows * (6 * config.dim**2 + 2 * config.dim * config.ffn_dim) + 4 * context * config.dim**2
    return config.num_layers * (attentions + linear)


# --- one step


def plain_step(size: Size, device: str) -> Callable[[], object]:
    """Three forwards of diffusers' blocks: no autocast, no mask."""
    config = size.transformer
    model: Any = random_plain_transformer(config, device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    latents = normal(1, config.in_dim, size.latent_frames, size.height // 8, size.width // 8)
    text = normal(1, config.text_len, config.text_dim)
    image = normal(1, IMAGE_ROWS, config.clip_dim)
    timestep = torch.tensor([500.0], device=device)

    def forward() -> object:
        return model(latents, timestep, text, encoder_hidden_states_image=image, return_dict=False)

    return lambda: [forward() for _ in range(CALLS)]


@dataclass(frozen=True)
class Window:
    """A random window's steps by the backend's own transformer and sampler."""

    machine: Machine
    size: Size
    transformer: Any
    persons: int = 2

    def run(self, **options: Any) -> Tensor:
        config = DenoiseConfig(
            **{
                "num_inference_steps": 1,
                "window_frames": self.size.frames,
                "motion_frames": 5,
                **options,
            }
        )
        inputs = random_inputs(self.size, self.machine.device, self.persons)
        generator = torch.Generator().manual_seed(4)
        settings = SamplerSettings.from_config(config)
        return denoise_window(self.transformer, inputs, settings, generator, lambda done, total: None)


def begin_speeds(title: str, machine: Machine, size: Size, report: Report, rate: float) -> Speeds:
    flops = forward_flops(size)
    report.begin(
        f"{title}, {size.name}: {size.tokens} tokens, {CALLS} forwards of {flops / 1e15:.3g} PFLOP "
        f"(published: {PUBLISHED_PFLOP})",
        "variant",
        "s",
        f"share (goal {GOAL:.0%})",
        "x plain",
        "peak GiB",
    )
    return Speeds(machine, report, rate, CALLS * flops)


@torch.inference_mode()
def steps(machine: Machine, size: Size, report: Report, rate: float) -> None:
    speeds = begin_speeds("A step", machine, size, report, rate)

    def plain() -> Callable[[], object]:
        return plain_step(size, machine.device)

    plain_s = speeds.measure("plain diffusers blocks, eager, flash SDPA", lazily(plain))
    speeds = replace(speeds, plain_s=plain_s)
    transformer = random_transformer(size.transformer, machine.device)
    kernel = machine.attention_kernel()
    with attention(kernel):
        window = Window(machine, size, transformer)
        times = [speeds.measure(f"eager, {kernel}", window.run)]
        compile_blocks(transformer, COMPILED, machine.device, STACKS)
        start = time.perf_counter()
        times.append(speeds.measure(f"compiled, {kernel}", window.run))
        console.print(f"({time.perf_counter() - start:.0f} s with compilation)", markup=False)
        speeds.measure("compiled, one person", replace(window, persons=1).run)
    best_s = min((each for each in times if each), default=None)
    if best_s is not None:
        report.add("best exact step", *speeds.cells(best_s)[:3])
        console.print(f"{FULL_STEPS} steps: {FULL_STEPS * best_s:.0f} s a window")


@torch.inference_mode()
def shortcuts(machine: Machine, size: Size, report: Report, rate: float) -> None:
    """What is not exact: steps that TeaCache skips, and few steps without guidance by the prompt."""
    report.begin(f"Shortcuts, {size.name}", "what", "s", "peak GiB")
    transformer = random_transformer(size.transformer, machine.device)
    compile_blocks(transformer, COMPILED, machine.device, STACKS)
    window = Window(machine, size, transformer)
    cached = {"num_inference_steps": CACHE_STEPS, "step_cache": "teacache"}
    runs: dict[str, dict[str, Any]] = {
        f"{CACHE_STEPS} steps in full": {"num_inference_steps": CACHE_STEPS},
        f"{CACHE_STEPS} steps, all that TeaCache may skip": {**cached, "cache_threshold": 1e9},
        "8 steps of two forwards (FusionX)": {"num_inference_steps": 8, "text_guidance_scale": 1.0},
        "4 steps of two forwards (lightx2v)": {"num_inference_steps": 4, "text_guidance_scale": 1.0},
    }
    with attention(machine.attention_kernel()):
        for name, options in runs.items():

            def cells(options: dict[str, Any] = options) -> list[str]:
                return [f"{machine.seconds(lambda: window.run(**options), repeats=1):.3f}", machine.peak()]

            report.measure(name, cells, machine)


@torch.inference_mode()
def variants(machine: Machine, size: Size, report: Report, rate: float) -> None:
    speeds = begin_speeds("Variants of a step", machine, size, report, rate)
    transformer = random_transformer(size.transformer, machine.device)
    for kernel, problem in kernels_of(machine):
        if problem:
            report.add(f"eager, {kernel}", f"not here: {problem[:100]}")
            continue
        with attention(kernel):
            speeds.measure(f"eager, {kernel}", Window(machine, size, transformer).run)
    del transformer
    for kind in ("fp8", "int8"):

        def cast(kind: str = kind) -> Callable[[], object]:
            model = random_transformer(size.transformer, machine.device)
            cast_weights(model, kind)
            torch.compiler.reset()
            compile_blocks(model, COMPILED, machine.device, STACKS)
            return Window(machine, size, model).run

        with attention(machine.attention_kernel()):
            speeds.measure(f"compiled, {kind} weights", lazily(cast))


# --- memory


@torch.inference_mode()
def levels(machine: Machine, size: Size, report: Report, _: float) -> None:
    """On as much of the device as the level is meant for."""
    report.begin(f"Memory levels, {size.name}", "level", "step s", "peak GiB", "first step s")
    for level in LEVELS:
        with ExitStack() as limits:
            report.measure(
                level.name, lambda level=level, limits=limits: _level(machine, size, level, limits), machine
            )


def _level(machine: Machine, size: Size, level: Level, limits: ExitStack) -> list[str]:
    transformer = random_transformer(size.transformer, "cpu" if level.offload else machine.device)
    start = time.perf_counter()
    place(transformer, level, machine.device, STACKS)
    compile_blocks(transformer, level, machine.device, STACKS)
    machine.forget_peak()
    limits.enter_context(limited_to(machine, level.device_gb))
    with attention(machine.attention_kernel()):
        window = Window(machine, size, transformer)
        window.run()
        machine.wait()
        first_s = time.perf_counter() - start
        step_s = machine.seconds(window.run, repeats=1)
    return [f"{step_s:.3f}", machine.peak(), f"{first_s:.0f}"]


# --- numbers


@torch.inference_mode()
def differences(machine: Machine, size: Size, report: Report, _: float) -> None:
    """Of every option from float32, at 9x64x96 with the full width and few blocks."""
    small = replace(size, transformer=shallow(size.transformer), height=64, width=96, frames=9)
    report.begin("Difference from float32, 9x64x96", "option", "relative", "max abs")
    exactly = torch.backends.cudnn.flags(enabled=False)  # convolutions would be in TF32
    with exactly, attention("_native_math"):
        whole = random_transformer(small.transformer, machine.device, torch.float32)
        exact = Window(machine, small, whole).run()

    def compare(name: str, kernel: str, prepare: Callable[[Any], object] = lambda model: None) -> None:
        def cells() -> list[str]:
            transformer = random_transformer(small.transformer, machine.device)
            prepare(transformer)
            with attention(kernel):
                off = Window(machine, small, transformer).run().float() - exact
            return [f"{float(off.norm() / exact.norm()):.2e}", f"{float(off.abs().max()):.2e}"]

        report.measure(name, cells, machine)

    for kernel, problem in kernels_of(machine):
        if not problem:
            compare(f"bfloat16, {kernel}", kernel)
    best = machine.attention_kernel()
    compiled = partial(compile_blocks, level=COMPILED, device=machine.device, stacks=STACKS)
    compare("bfloat16, compiled", best, compiled)
    for level in LEVELS:
        if level.offload:
            prepare = partial(place, level=level, device=machine.device, stacks=STACKS)
            compare(f"bfloat16, level {level.name}", best, prepare)
    for kind in ("fp8", "int8"):
        compare(f"{kind} weights", best, partial(cast_weights, kind=kind))


# --- the whole


Part = Callable[[Machine, Size, Report, float], None]

PARTS: dict[str, Part] = {
    "differences": differences,
    "steps": steps,
    "shortcuts": shortcuts,
    "variants": variants,
    "levels": levels,
}
OF_EVERY_SIZE = ("steps",)


def main() -> None:
    options = arguments().parse_args()
    sizes = TINY if options.tiny else FULL
    if not (options.tiny or torch.cuda.is_available()):
        sys.exit("no CUDA device found; --tiny runs all of it at toy size on the CPU")
    machine = Machine("cpu" if options.tiny else "cuda:0", sizes[0], options.repeats)
    report = Report(time.monotonic() + 60 * options.minutes)
    for line in about(machine):
        console.print(line, markup=False)
    rate = gemm_rate(machine, report)
    parts = {name: part for name, part in PARTS.items() if name in options.only}
    parts |= {"stages": stages} if options.stages else {}
    for name, part in parts.items():
        for size in sizes if name in OF_EVERY_SIZE else sizes[:1]:
            try:
                part(machine, size, report, rate)
            except torch.OutOfMemoryError:
                report.add(f"the rest of {name}", "does not fit into memory")
            torch.compiler.reset()
    if options.save:
        path = Path(__file__).resolve().parent / "results" / "gpu_multitalk.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(as_markdown("MultiTalk on a GPU", machine, report), encoding="utf-8")
        console.print(f"kept in {path}", soft_wrap=True)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--stages", action="store_true", help="also time UMT5, CLIP and the VAE")
    parser.add_argument("--minutes", type=float, default=30, help="begin nothing new after so long")
    parser.add_argument("--repeats", type=int, default=1, help="of every step, after one that does not count")
    parser.add_argument("--tiny", action="store_true", help="toy size on the CPU")
    parser.add_argument("--save", action="store_true")
    return parser


if __name__ == "__main__":
    main()
