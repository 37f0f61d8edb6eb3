"""Streams, timed as a user waits for them: in a process that is warm, and in one that begins."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from gpu_report import Machine, Report
from random_ditto import (
    TINY,
    Size,
    random_avatar,
    random_hubert,
    random_network,
    random_picture,
    random_speech,
)

from avatar_core.backends.ditto.audio import FPS, FRAME_SAMPLES, SAMPLE_RATE, WINDOW_SAMPLES
from avatar_core.backends.ditto.rendering import Renderer
from avatar_core.backends.ditto.stream import ONLINE_CHAIN, DittoStream, StreamModels, StreamSettings
from avatar_core.backends.ditto.tiny import write_tiny_checkpoint

FIRST_FRAME = Path(__file__).resolve().parent / "ditto_first_frame.py"
GOALS = "first frame <= 400 ms, real-time factor <= 0.25"
_SETTLE_S = 0.5  # in which an open stream has prepared itself
_MARKS = ("imports", "models", "registered", "first frame")


def stream(machine: Machine, size: Size, report: Report, _: float) -> None:
    """`first frame`: after the last sample that it needs has been fed."""
    lead = lead_samples()
    report.begin(
        f"Streams (goals: {GOALS}; lead {lead / SAMPLE_RATE * 1e3:.0f} ms)",
        "rendered at once",
        "first frame ms",
        "frames/s",
        "real-time factor",
        "peak GiB",
    )
    duration_s = 20.0 if machine.on_gpu else 1.2 if size is TINY else 0.4
    for batch in (1, 5, 10):
        settings = StreamSettings(batch_frames=batch)

        def cells(settings: StreamSettings = settings) -> list[str]:
            models = stream_models(machine, size)
            models.renderer.compile(settings.batch_frames)
            if machine.on_gpu:
                all_frames(models, size, settings, 2.0)  # warm
            first_s = first_frame_s(models, size, settings, lead)
            start = time.perf_counter()
            frames = all_frames(models, size, settings, duration_s)
            each = (time.perf_counter() - start) / frames
            return [f"{first_s * 1e3:.0f}", f"{1 / each:.4g}", f"{each * FPS:.3f}", machine.peak()]

        report.measure(str(batch), cells, machine)


def lead_samples() -> int:
    """Until the last window of the features that the first block of frames needs."""
    windows = -(-(ONLINE_CHAIN.valid_frames + ONLINE_CHAIN.fuse_frames) // 5)
    return (windows - 1) * 5 * FRAME_SAMPLES + WINDOW_SAMPLES - 3 * FRAME_SAMPLES


def stream_models(machine: Machine, size: Size) -> StreamModels:
    dtype = torch.float16 if machine.on_gpu else torch.float32
    networks = (random_network(name, size, machine.device, dtype) for name in ("warp", "decoder"))
    return StreamModels(
        random_hubert(size, machine.device),
        random_network("lmdm", size, machine.device),
        Renderer(random_network("stitch", size, machine.device), *networks),
    )


def all_frames(models: StreamModels, size: Size, settings: StreamSettings, duration_s: float) -> int:
    with DittoStream(random_avatar(size), [random_picture()], models, settings) as opened:
        return sum(1 for _ in opened.frames([random_speech(duration_s)]))


def first_frame_s(models: StreamModels, size: Size, settings: StreamSettings, lead: int) -> float:
    speech = random_speech(10.0)
    with DittoStream(random_avatar(size), [random_picture()], models, settings) as opened:
        opened.feed(speech[: lead - FRAME_SAMPLES])
        time.sleep(_SETTLE_S)
        start = time.perf_counter()
        opened.feed(speech[lead - FRAME_SAMPLES : lead])
        next(iter(opened))
        return time.perf_counter() - start


def cold(machine: Machine, size: Size, report: Report, _: float) -> None:
    """Seconds since the start of a process that loads the checkpoint's files and makes one frame."""
    report.begin("Cold start: seconds since the process began", "run", *_MARKS)
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_checkpoint(Path(folder) / "ditto", networks=size.builders())
        for run in range(1, 2 + machine.repeats):

            def cells() -> list[str]:
                return [f"{seconds:.2f}" for seconds in first_frame_marks(machine.device, folder)]

            report.measure(f"{run}{' (files not read before)' if run == 1 else ''}", cells, machine)


def first_frame_marks(device: str, weights_folder: str) -> list[float]:
    command = [sys.executable, str(FIRST_FRAME), device, str(time.time())]
    environment = {**os.environ, "AVATAR_WEIGHTS": weights_folder}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stderr.strip().splitlines()[-1])
    marks = json.loads(result.stdout)
    return [marks[name] for name in _MARKS]
