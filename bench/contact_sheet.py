"""One picture that shows how a clip of the preview backend looks.

Upper row: the first frame, then the frames at the 5, 35, 60, 80, 92 and 100 % quantiles of the measured
mouth opening. Lower row: seven consecutive frames of the mouth around its fastest opening.

python bench/contact_sheet.py VIDEO -o sheet.jpg
python bench/contact_sheet.py PICTURE RECORDING -o sheet.jpg
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from avatar_core.backends.preview.contours import contours_from_points
from avatar_core.backends.preview.motion import make_motion
from avatar_core.backends.preview.renderer import Renderer
from avatar_core.backends.preview.visemes import make_visemes
from avatar_core.media.audio import load_mono
from avatar_core.media.face import Face, FaceDetector, choose
from avatar_core.media.image import load_image
from avatar_core.media.mtcnn import installed_weights
from avatar_core.media.video import read_frames
from avatar_core.stages.score.sync import jaw_opening

FPS, SAMPLE_RATE, DURATION_S = 25, 16_000, 3.0
QUANTILES = (0.05, 0.35, 0.60, 0.80, 0.92, 1.0)
TILE = 220  # px
FACE_SHARE, MOUTH_SHARE = 3.2, 1.5  # side of a tile in eye-mouth distances

Picture = NDArray[np.uint8]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a video, or a picture")
    parser.add_argument("recording", nargs="?", type=Path, help="with a picture")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    if options.recording:
        frames = render(load_image(options.source), options.recording)
    else:
        frames = list(read_frames(options.source))[: int(DURATION_S * FPS)]
    sheet = contact_sheet(frames, find_face(frames[0]))
    cv2.imwrite(str(options.output), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 88])


def find_face(picture: Picture) -> Face:
    return choose(FaceDetector(installed_weights()).detect(picture), "largest")[0]


def render(picture: Picture, recording: Path) -> list[Picture]:
    speech = load_mono(recording, SAMPLE_RATE, duration_s=DURATION_S)
    num_frames = int(len(speech) / SAMPLE_RATE * FPS)
    motion = make_motion(make_visemes(speech, SAMPLE_RATE, FPS, num_frames), FPS, seed=1)
    renderer = Renderer(picture, [contours_from_points(picture, find_face(picture))])
    tracks = (motion.mouth_open, motion.mouth_wide, motion.blink, motion.head)
    return [renderer.frame(*(track[i : i + 1] for track in tracks)) for i in range(num_frames)]


def contact_sheet(frames: list[Picture], face: Face) -> Picture:
    grey = (np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), np.uint8) for frame in frames)
    opening = jaw_opening(grey, face.points)
    by_opening = np.argsort(opening)
    chosen = [0, *(int(by_opening[round(q * (len(frames) - 1))]) for q in QUANTILES)]
    fastest = int(np.argmax(np.diff(opening)))
    count = len(chosen)
    first = int(np.clip(fastest - count // 2, 0, len(frames) - count))
    eyes, mouth = face.points[:2].mean(axis=0), face.points[3:].mean(axis=0)
    size = float(np.linalg.norm(mouth - eyes))
    upper = [tile(frames[i], (eyes + mouth) / 2, FACE_SHARE * size) for i in chosen]
    lower = [tile(frame, mouth, MOUTH_SHARE * size) for frame in frames[first : first + count]]
    return np.vstack([np.hstack(upper), np.hstack(lower)])


def tile(frame: Picture, centre: NDArray[np.float32], side: float) -> Picture:
    scale = TILE / side
    shift = TILE / 2 - scale * centre
    matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
    return np.asarray(cv2.warpAffine(frame, matrix, (TILE, TILE), flags=cv2.INTER_CUBIC), np.uint8)


if __name__ == "__main__":
    main()
