"""Speed of the `ditto` backend at full size with random weights.

    python bench/ditto.py [--only PART ...] [--minutes M] [--repeats N] [--save]    # on a GPU
    python bench/ditto.py --cpu --only networks     # full size on the CPU: seconds a frame
    python bench/ditto.py --tiny                    # all of it, at toy size on the CPU

Parts: `networks` one by one; `rendering` of frames, in variants and batches, each in turn with one frame at a
time; `motion`, a window of 80 frames; `decode` with putback, as a render of a table does it; `stream`, first
frame after its speech has arrived, and sustained speed; `cold`, from the start of a process to its first
frame. HuBERT is a random model of the published file's size (which needs transformers), in `cold` a small
one. A share is that of the dense bfloat16 rate measured on this machine. `--save` keeps the tables in
bench/results/ditto.md.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ditto_streams import cold, stream
from gpu_report import Machine, Report, about, as_markdown, console, gemm_rate, lazily
from random_ditto import (
    CONDITION_DIM,
    FULL,
    TINY,
    Size,
    random_avatar,
    random_key_points,
    random_network,
    random_picture,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from avatar_core.backends.ditto.audio import FPS
from avatar_core.backends.ditto.chaining import SEQ_FRAMES
from avatar_core.backends.ditto.clip_renderer import rendered_frames
from avatar_core.backends.ditto.motion_vector import MOTION_DIM
from avatar_core.backends.ditto.putback import Composer
from avatar_core.backends.ditto.rendering import Renderer
from avatar_core.backends.ditto.sampling import ClipSampler, both_halves, guided

PUBLISHED_GFLOP = "F 64.1, M 11.6, S 0.00009, W 342.1, G 891.6, LMDM 5.14"
BATCHES = (1, 2, 5, 10)
CPU_BATCHES = (1, 5)
GOALS = "on a GPU a real-time factor <= 0.25 and a batch >= 2 x as fast as one frame; on a CPU not slower"
CHAINS = {"offline, 50 steps, overlap 10": (50, 10), "online, 10 steps, overlap 70": (10, 70)}


@dataclass(frozen=True)
class Variant:
    """`graphs`: compiled into CUDA graphs, in place of the backend's own compilation."""

    name: str
    dtype: torch.dtype
    in_channels_last: bool = False
    compiled: bool = False
    graphs: bool = False


def variants_on(machine: Machine) -> list[Variant]:
    half = torch.float16
    if not machine.on_gpu:
        return [rendered_variant(machine)]
    return [
        Variant("float32", torch.float32),
        Variant("bfloat16, channels last", torch.bfloat16, True),
        Variant("float16", half),
        Variant("float16, channels last", half, True),
        rendered_variant(machine),
        Variant("float16, channels last, CUDA graphs", half, True, graphs=True),
    ]


def rendered_variant(machine: Machine) -> Variant:
    """What a render of a table uses."""
    if not machine.on_gpu:
        return Variant("float32", torch.float32)
    return Variant("float16, channels last, compiled", torch.float16, True, compiled=True)


def random_renderer(size: Size, machine: Machine, variant: Variant, batch: int) -> Renderer:
    networks = [
        random_network(name, size, machine.device, variant.dtype, in_channels_last=variant.in_channels_last)
        for name in ("warp", "decoder")
    ]
    if variant.graphs:
        for network in networks:
            network.compile(mode="reduce-overhead")
    renderer = Renderer(random_network("stitch", size, machine.device), *networks)
    if variant.compiled:
        renderer.compile(batch)
    return renderer


# --- networks one by one


def calls(size: Size, machine: Machine, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is called how often, with random inputs."""
    device = machine.device
    avatar = random_avatar(size)
    pictures = torch.rand(1, 3, 256, 256, device=device, dtype=dtype)
    volume = torch.from_numpy(avatar.features).to(device, dtype)
    source, driving = (torch.from_numpy(points).to(device) for points in random_key_points(1))
    side = size.volume_side
    feature = torch.randn(1, size.warp.out_channels, side, side, device=device, dtype=dtype)
    inputs = {
        "appearance": ("F, appearance: a source frame", (pictures,), dtype),
        "motion": ("M, motion extractor: a source frame", (pictures,), dtype),
        "stitch": ("S, stitching: a frame", (source, driving), torch.float32),
        "warp": ("W, warping: a frame", (volume, source, driving), dtype),
        "decoder": ("G, decoder: a frame", (feature,), dtype),
    }
    for name, (title, arguments, network_dtype) in inputs.items():
        network = random_network(name, size, device, network_dtype)
        yield title, lambda network=network, arguments=arguments: network(*arguments)
    yield "LMDM: one guided step, both halves", lmdm_step(size, machine)


def lmdm_step(size: Size, machine: Machine) -> Callable[[], Tensor]:
    lmdm = random_network("lmdm", size, machine.device)
    noisy = torch.randn(1, SEQ_FRAMES, MOTION_DIM, device=machine.device)
    cond = torch.randn(1, SEQ_FRAMES, CONDITION_DIM, device=machine.device)
    both = both_halves(lmdm, cond)
    times = torch.full((2,), 500, device=machine.device)
    return lambda: guided(lmdm, noisy, noisy[:, 0], times, both, 2.0)[0]


@torch.inference_mode()
def networks(machine: Machine, size: Size, report: Report, rate: float) -> None:
    dtype = torch.float16 if machine.on_gpu else torch.float32
    report.begin(
        f"Networks, eager, {dtype} (LMDM and S float32); published GFLOP: {PUBLISHED_GFLOP}",
        "call",
        "GFLOP",
        "ms",
        "TFLOP/s",
        "share",
    )
    for title, call in calls(size, machine, dtype):

        def cells(call: Callable[[], object] = call) -> list[str]:
            flops = counted(call)
            seconds = machine.seconds(call)
            share = f"{flops / seconds / rate:.1%}" if rate else "-"
            return [f"{flops / 1e9:.4g}", f"{seconds * 1e3:.3g}", f"{flops / seconds / 1e12:.3g}", share]

        report.measure(title, cells, machine)


def counted(call: Callable[[], object]) -> float:
    """Multiplications and additions of convolutions, products and attention."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


# --- frames

RATES = ("ms a frame", "frames/s", "real-time factor", "share")


@torch.inference_mode()
def rendering(machine: Machine, size: Size, report: Report, rate: float) -> None:
    """Key points to pictures on the device."""
    volumes = random_avatar(size).features
    flops = counted(renderer_call(machine, size, variants_on(machine)[0], 1, volumes)())
    report.begin(f"Rendering (goals: {GOALS})", "variant", *RATES, "x one at a time, by round", "peak GiB")
    for variant in variants_on(machine):
        for batch in BATCHES if machine.on_gpu else CPU_BATCHES:
            builds = [renderer_call(machine, size, variant, frames, volumes) for frames in (1, batch)]

            def cells(builds: Sequence[Callable[..., Any]] = builds, batch: int = batch) -> list[str]:
                one, together = map(lazily, builds)
                rounds = machine.seconds_in_turn(lambda: [one() for _ in range(batch)], together)
                gains = (one_s / together_s for one_s, together_s in zip(*rounds, strict=True))
                rates = speed(statistics.median(rounds[1]) / batch, flops, rate)
                return [*rates, ", ".join(f"{gain:.2f}" for gain in gains), machine.peak()]

            report.measure(f"{variant.name}, {batch} at once", cells, machine)
        torch.compiler.reset()


def speed(seconds: float, flops: float, rate: float) -> list[str]:
    """Of a frame."""
    share = f"{flops / seconds / rate:.1%}" if rate else "-"
    return [f"{seconds * 1e3:.4g}", f"{1 / seconds:.4g}", f"{seconds * FPS:.3f}", share]


def renderer_call(
    machine: Machine, size: Size, variant: Variant, batch: int, features: Any
) -> Callable[[], Callable[[], object]]:
    def build() -> Callable[[], object]:
        renderer = random_renderer(size, machine, variant, batch)
        volumes = renderer.volumes(features)
        source, driven = random_key_points(batch)
        return lambda: renderer.render(volumes, source, driven, [0] * batch)

    return build


def decode(machine: Machine, size: Size, report: Report, rate: float) -> None:
    """As a table's clips are rendered: pictures in main memory, put back into the source."""
    report.begin("Decode with putback", "batch", *RATES[:3])
    frames = 100 if machine.on_gpu else 5
    variant = rendered_variant(machine)
    avatar, (source, driven) = random_avatar(size), random_key_points(frames)
    composer = Composer([random_picture()], avatar.crop_to_picture, None)
    motion = {"x_s": source, "x_d": driven, "source_frames": np.zeros(frames, int)}

    def clip(renderer: Renderer, batch: int) -> None:
        for _ in rendered_frames(renderer, composer, avatar.tensors(), motion, batch):
            pass

    for batch in (1, 5):

        def cells(batch: int = batch) -> list[str]:
            renderer = random_renderer(size, machine, variant, batch)
            return speed(machine.seconds(lambda: clip(renderer, batch)) / frames, 0, 0)[:3]

        report.measure(f"{variant.name}, {batch} at once", cells, machine)


# --- motion


def motion(machine: Machine, size: Size, report: Report, _: float) -> None:
    """A window of the sampler, as the backend calls it."""
    report.begin("Motion", "window", "ms", "ms a frame", "real-time factor")
    lmdm = random_network("lmdm", size, machine.device)
    cond_frame = np.zeros((1, MOTION_DIM), np.float32)
    cond = np.random.default_rng(0).standard_normal((1, SEQ_FRAMES, CONDITION_DIM)).astype(np.float32)
    for (name, (num_steps, overlap)), graphed in product(CHAINS.items(), graphs_on(machine)):
        generator = torch.Generator().manual_seed(0)

        def cells(
            num_steps: int = num_steps,
            overlap: int = overlap,
            graphed: bool = graphed,
            generator: torch.Generator = generator,
        ) -> list[str]:
            sampler = ClipSampler(lmdm, num_steps, 2.0, generator, cuda_graph=graphed)
            seconds = machine.seconds(lambda: sampler(cond_frame, cond))
            each = seconds / (SEQ_FRAMES - overlap)
            return [f"{seconds * 1e3:.4g}", f"{each * 1e3:.3g}", f"{each * FPS:.3f}"]

        report.measure(f"{name}{', CUDA graph' if graphed else ''}", cells, machine)


def graphs_on(machine: Machine) -> tuple[bool, ...]:
    return (False, True) if machine.on_gpu else (False,)


# --- the whole


Part = Callable[[Machine, Size, Report, float], None]

PARTS: dict[str, Part] = {
    "networks": networks,
    "rendering": rendering,
    "motion": motion,
    "decode": decode,
    "stream": stream,
    "cold": cold,
}


def main() -> None:
    options = arguments().parse_args()
    size, on_cpu = (TINY if options.tiny else FULL), options.tiny or options.cpu
    if not (on_cpu or torch.cuda.is_available()):
        sys.exit("no CUDA device found; --tiny runs all of it at toy size on the CPU, --cpu at full size")
    machine = Machine("cpu" if on_cpu else "cuda:0", size, options.repeats)
    report = Report(time.monotonic() + 60 * options.minutes)
    for line in about(machine):
        console.print(line, markup=False)
    rate = 0.0 if options.cpu else gemm_rate(machine, report)
    for name in options.only:
        try:
            PARTS[name](machine, size, report, rate)
        except torch.OutOfMemoryError:
            report.add(f"the rest of {name}", "does not fit into memory")
        torch.compiler.reset()
    if options.save:
        path = Path(__file__).resolve().parent / "results" / "ditto.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(as_markdown("Ditto's speed", machine, report), encoding="utf-8")
        console.print(f"kept in {path}", soft_wrap=True)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=30, help="begin nothing new after so long")
    parser.add_argument("--repeats", type=int, default=1, help="of every call, after one that does not count")
    parser.add_argument("--cpu", action="store_true", help="full size on the CPU")
    parser.add_argument("--tiny", action="store_true", help="toy size on the CPU")
    parser.add_argument("--save", action="store_true")
    return parser


if __name__ == "__main__":
    main()
