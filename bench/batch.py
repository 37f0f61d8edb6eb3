"""What a whole `avatar render` costs in CPU time, and how well it uses all cores, for about 60 s of video.

    python bench/batch.py [--seconds 60]

Renders the sample portraits with the sample recordings in a fresh store, then decodes the finished videos
and encodes their frames again with the same settings, both in one run on one machine. The ratio is what the
whole command (start, ingest, faces, speech, motion, frames, hashing, publishing) costs beside the encoder.

The same batch through `render()`, in one process and another store, gives the CPU time that the flow's wall
time is held against: from when it plans its stages to its end, on all cores. Give it 60 CPU seconds or more.
"""

import argparse
import csv
import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av

from avatar_core.config import VideoConfig
from avatar_core.media.audio import probe_audio
from avatar_core.media.video import VideoWriter, read_frames
from avatar_core.stages.face import FaceStage

ONE_PROCESS = """
import sys
from avatar_core.pipeline import render
render({"table": sys.argv[1], "storage": {"root": sys.argv[2]}})
"""
WARM_UP = "import avatar_core.execution.child, flows.render, prefect.server.api.server, uvicorn.main"
SAMPLES = Path(__file__).parent.parent / "data" / "samples"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--seconds", type=float, default=60.0)
    seconds = arguments.parse_args().seconds
    with tempfile.TemporaryDirectory() as folder:
        if (
            sys.dont_write_bytecode
        ):  # an installed package has its bytecode: every start would compile it anew
            os.environ["PYTHONPYCACHEPREFIX"] = f"{folder}/bytecode"
            del os.environ["PYTHONDONTWRITEBYTECODE"]
            subprocess.run([sys.executable, "-c", WARM_UP], check=True)
        table = Path(folder) / "batch.csv"
        write_table(table, seconds)
        command = [sys.executable, "-m", "flows.cli", "render", str(table), f"storage.root={folder}/store"]
        first, wall_s = usage(command)
        again, _ = usage(command)
        alone, _ = usage([sys.executable, "-c", ONE_PROCESS, str(table), f"{folder}/other"])
        videos = sorted(Path(folder).glob("store/datasets/batch/videos/*.mp4"))
        frames, encoding = encode_again(videos, Path(folder) / "again.mp4")
    video_s = frames / VideoConfig.fps
    print(f"PyAV {av.__version__}, {len(videos)} clips, {video_s:.1f} s of video")
    print(f"avatar render          {first:7.2f} CPU s   {first / video_s:.3f} per second of video")
    print(f"encoding alone         {encoding:7.2f} CPU s   {encoding / video_s:.3f} per second of video")
    print(f"ratio                  {first / encoding:7.2f}")
    print(f"render, nothing to do  {again:7.2f} CPU s")
    cores = len(os.sched_getaffinity(0))
    print(f"render() alone         {alone:7.2f} CPU s")
    print(f"flow after start-up    {wall_s:7.2f} s on {cores} cores: {wall_s / alone:.2f} of it")


def write_table(path: Path, seconds: float) -> None:
    pictures = [SAMPLES / "portrait.jpg", SAMPLES / "closeup.jpg"]
    recordings = [SAMPLES / name for name in ("hello.wav", "voice.flac", "story.ogg")]
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["name", "image", "audio", "seed"])
        for number, (recording, picture) in enumerate(
            itertools.cycle(itertools.product(recordings, pictures))
        ):
            if seconds <= 0:
                return
            rows.writerow([f"clip-{number}", picture, recording, number])
            seconds -= probe_audio(recording).duration_s


def usage(command: list[str]) -> tuple[float, float]:
    """CPU seconds of a command, and seconds from when it shows its first stage after ingest to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    planned_s = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith(f"{FaceStage.name}: ") and "to do" in line:
                planned_s = time.monotonic()
    wall_s = time.monotonic() - planned_s
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall_s


def encode_again(videos: list[Path], target: Path) -> tuple[int, float]:
    """Number of frames and CPU seconds of encoding them; decoding is not counted."""
    settings = VideoConfig()
    count, spent = 0, 0.0
    for video in videos:
        frames = list(read_frames(video))
        height, width = frames[0].shape[:2]
        start = time.process_time()
        with VideoWriter(
            target, width, height, settings.fps, crf=settings.crf, preset=settings.x264_preset
        ) as writer:
            for frame in frames:
                writer.write_frame(frame)
        spent += time.process_time() - start
        count += len(frames)
    return count, spent


if __name__ == "__main__":
    main()
