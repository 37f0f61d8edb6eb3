"""CPU time of the preview backend's frames, beside the CPU time of encoding them.

python bench/preview.py [PICTURE] [RECORDING]
"""

import argparse
import io
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from avatar_core.backends.preview.contours import contours_from_points
from avatar_core.backends.preview.motion import make_motion
from avatar_core.backends.preview.renderer import Renderer
from avatar_core.backends.preview.visemes import make_visemes
from avatar_core.media.audio import load_mono
from avatar_core.media.face import Face, FaceDetector
from avatar_core.media.image import load_image
from avatar_core.media.mtcnn import installed_weights

SAMPLES = Path(__file__).parent.parent / "data" / "samples"
FPS, SAMPLE_RATE = 25, 16_000
SCENES = ((512, 512, 0.25), (512, 512, 0.45), (1280, 720, 0.125), (1280, 720, 0.25))  # width, height, face

Picture = NDArray[np.uint8]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("picture", nargs="?", type=Path, default=SAMPLES / "portrait.jpg")
    arguments.add_argument("recording", nargs="?", type=Path, default=SAMPLES / "hello.wav")
    options = arguments.parse_args()
    cv2.setNumThreads(1)
    picture = load_image(options.picture)
    speech = load_mono(options.recording, SAMPLE_RATE)
    make_visemes(speech[:SAMPLE_RATE], SAMPLE_RATE, FPS, FPS)
    table = Table("size", "face width", "motion", "set-up", "frames", "encoding", "frames / encoding")
    for width, height, face_share in SCENES:
        table.add_row(
            f"{width}x{height}", f"{face_share:.1%}", *measure(picture, speech, width, height, face_share)
        )
    console = Console()
    console.print("CPU ms per frame (set-up: ms per clip)")
    console.print(table)


def measure(
    picture: Picture, speech: NDArray[np.float32], width: int, height: int, share: float
) -> list[str]:
    """Milliseconds as table cells."""
    face = detect(picture)
    scene, points = crop_to_face(picture, face, width, height, share)
    num_frames = int(len(speech) / SAMPLE_RATE * FPS)
    start = time.process_time()
    motion = make_motion(make_visemes(speech, SAMPLE_RATE, FPS, num_frames), FPS, seed=1)
    motion_s = time.process_time() - start
    start = time.process_time()
    renderer = Renderer(scene, [contours_from_points(scene, replace(face, points=points))])
    set_up_s = time.process_time() - start
    start = time.process_time()
    frames = [
        renderer.frame(
            *(track[i : i + 1] for track in (motion.mouth_open, motion.mouth_wide, motion.blink, motion.head))
        )
        for i in range(num_frames)
    ]
    frames_s = time.process_time() - start
    start = time.process_time()
    encode(frames)
    encoding_s = time.process_time() - start
    per_frame = (f"{1000 * seconds / num_frames:.2f}" for seconds in (motion_s, frames_s, encoding_s))
    motion_ms, frames_ms, encoding_ms = per_frame
    return [
        motion_ms,
        f"{1000 * set_up_s:.0f}",
        frames_ms,
        encoding_ms,
        f"{(motion_s + frames_s) / encoding_s:.2f}",
    ]


def detect(picture: Picture) -> Face:
    faces = FaceDetector(installed_weights()).detect(picture)
    return max(faces, key=lambda face: face.score)


def crop_to_face(
    picture: Picture, face: Face, width: int, height: int, share: float
) -> tuple[Picture, NDArray[np.float32]]:
    """The picture scaled until its face fills that share of the width; reflected where it ends."""
    x0, y0, x1, y1 = face.box
    scale = width * share / float(x1 - x0)
    shift = np.array([width / 2, 0.45 * height]) - scale * np.array([(x0 + x1) / 2, (y0 + y1) / 2])
    matrix = np.column_stack([scale * np.eye(2), shift])
    scene = cv2.warpAffine(
        picture, matrix, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT
    )
    return np.asarray(scene, np.uint8), (face.points * scale + shift).astype(np.float32)


def encode(frames: list[Picture]) -> None:
    height, width = frames[0].shape[:2]
    with av.open(io.BytesIO(), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "20", "threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    main()
