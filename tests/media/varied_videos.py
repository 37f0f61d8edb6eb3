"""Writes varied videos with sound and prints their SHA-256 as JSON: `python -m tests.media.varied_videos
FOLDER 832x480:veryfast ...`"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from avatar_core.media.video import Sound, VideoWriter

SAMPLE_RATE = 44_100


def pictures(width: int, height: int) -> Iterator[NDArray[np.uint8]]:
    """A moving texture, a flat colour that changes, a turning gradient, noise: more than is looked ahead."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (height // 8 + 4, width // 8 + 10, 3), np.uint8)
    texture = coarse.repeat(8, axis=0).repeat(8, axis=1)
    y, x = np.mgrid[:height, :width]
    for step in range(24):
        yield texture[step : step + height, 3 * step : 3 * step + width]
    for step in range(12):
        yield np.full((height, width, 3), (8 * step, 100, 50), np.uint8)
    for step in range(20):
        yield np.stack([x + 3 * step, y + 2 * step, x + step * y // 16], axis=2).astype(np.uint8)
    for _ in range(8):
        yield generator.integers(0, 256, (height, width, 3), np.uint8)


def sound() -> Sound:
    """Noise that swells, in blocks of an odd size, longer than the frames last."""
    generator = np.random.default_rng(1)
    blocks = (
        generator.uniform(-level, level, (5001, 2)).astype(np.float32) for level in np.linspace(0, 1, 30)
    )
    return Sound(blocks, SAMPLE_RATE, 2)


def main() -> None:
    folder, hashes = Path(sys.argv[1]), {}
    for case in sys.argv[2:]:
        size, preset = case.split(":")
        width, height = map(int, size.split("x"))
        path = folder / "video.mp4"
        with VideoWriter(path, width, height, 25, sound(), preset=preset) as writer:
            for picture in pictures(width, height):
                writer.write_frame(picture)
        hashes[case] = hashlib.sha256(path.read_bytes()).hexdigest()
    json.dump(hashes, sys.stdout)


if __name__ == "__main__":
    main()
