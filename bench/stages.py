"""CPU time of denoise + decode against encoding the same frames, for one face, one thread.

    python bench/stages.py [PICTURE] [--seconds 10]

The stages run as in a batch (frames, encoding, sound, hashing, committing); then the finished video's
frames are encoded again with the same settings.
"""

import argparse
import tempfile
import time
import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from avatar_core.config import VideoConfig
from avatar_core.execution.shard import one_thread, run_shard
from avatar_core.media.audio import load_mono
from avatar_core.media.face import FaceDetector
from avatar_core.media.image import load_image
from avatar_core.media.mtcnn import installed_weights
from avatar_core.media.video import VideoWriter, frame_rate, read_frames
from avatar_core.pipeline import consumed_rows
from avatar_core.planning.batch import Batch, open_batch

SAMPLES = Path(__file__).parent.parent / "data" / "samples"
SCENES = ((512, 512, 0.25), (512, 512, 0.45), (1280, 720, 0.125), (1280, 720, 0.25))  # width, height, face
SAMPLE_RATE = 16_000
RUNS = 3


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("picture", nargs="?", type=Path, default=SAMPLES / "portrait.jpg")
    arguments.add_argument("--seconds", type=float, default=10.0)
    options = arguments.parse_args()
    table = Table("size", "face width", "denoise", "decode", "encoding alone", "ratio")
    with tempfile.TemporaryDirectory() as name, one_thread():
        folder = Path(name)
        write_recording(folder / "speech.wav", options.seconds)
        for width, height, face in SCENES:
            write_scene(options.picture, folder / "scene.png", width, height, face)
            denoise, decode, encoding = measure(folder)
            table.add_row(
                f"{width}x{height}",
                f"{face:.1%}",
                *(f"{seconds:.2f} s" for seconds in (denoise, decode, encoding)),
                f"{(denoise + decode) / encoding:.2f}",
            )
    Console().print(f"{options.seconds:g} s of video, CPU seconds")
    Console().print(table)


def measure(folder: Path) -> tuple[float, float, float]:
    """CPU seconds of denoise, decode and of encoding alone, each the best of `RUNS`."""
    runs = [render(folder) for _ in range(RUNS)]
    frames = list(read_frames(folder / "clip.mp4"))
    encoding = min(encode(frames, folder / "again.mp4") for _ in range(RUNS))
    return min(run["denoise"] for run in runs), min(run["decode"] for run in runs), encoding


def render(folder: Path) -> dict[str, float]:
    """CPU seconds by stage; leaves the video as `clip.mp4`."""
    with tempfile.TemporaryDirectory(dir=folder) as store:
        row = {"image": str(folder / "scene.png"), "audio": str(folder / "speech.wav")}
        batch = open_batch({"rows": [row], "storage": {"root": store}})
        spent = {stage: run_stage(batch, stage) for stage in batch.backend.stages()}
        video = batch.results["decode"].ok(batch.clips[0].items["decode"].key)
        assert video is not None
        batch.storage.copy_out(video["data"], folder / "clip.mp4")
    return spent


def run_stage(batch: Batch, stage: str) -> float:
    items = list(batch.plan()[stage].to_do)
    start = time.process_time()
    for row in run_shard(batch.storage, batch.stages[stage], items, consumed_rows(batch, items)):
        batch.results[stage].add(row)
    return time.process_time() - start


def encode(frames: list[NDArray[np.uint8]], target: Path) -> float:
    height, width = frames[0].shape[:2]
    settings = VideoConfig()
    rate = frame_rate(settings.fps)
    start = time.process_time()
    with VideoWriter(target, width, height, rate, crf=settings.crf, preset=settings.x264_preset) as writer:
        for frame in frames:
            writer.write_frame(frame)
    return time.process_time() - start


def write_recording(path: Path, seconds: float) -> None:
    """The sample speech, repeated, as 16-bit WAV."""

    speech = load_mono(SAMPLES / "hello.wav", SAMPLE_RATE)
    samples = np.resize(speech, round(seconds * SAMPLE_RATE))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((samples * 32767).astype("<i2").tobytes())


def write_scene(picture: Path, path: Path, width: int, height: int, face: float) -> None:
    """The picture scaled so that its face has the wanted share of the width, centred on a plain ground."""
    pixels = load_image(picture)
    box = max(FaceDetector(installed_weights()).detect(pixels), key=lambda f: f.score).box
    scale = face * width / float(box[2] - box[0])
    image = Image.fromarray(pixels)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    scene = Image.new("RGB", (width, height), (90, 110, 130))
    left = round(width / 2 - float(box[0] + box[2]) / 2 * scale)
    top = round(height * 0.4 - float(box[1] + box[3]) / 2 * scale)
    scene.paste(image, (left, top))
    scene.save(path)


if __name__ == "__main__":
    main()
