"""How well the jaw follows the voice in a finished video, measured without any model.

A patch of the chin is tracked against a patch of the nose bridge, both cut from the first frame. Their
distance along the face is correlated with the loudness of the sound track. This sees the jaw, which the lips
share, and no nodding of the head; it does not see the line between the lips.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from avatar_core.errors import InputError
from avatar_core.media.audio import decode_blocks
from avatar_core.media.container import open_media
from avatar_core.media.envelope import SAMPLE_RATE, in_pieces, speech_envelope

MAX_LAG_FRAMES = 8
MIN_PATCH_PX = 6
# Patches in eye-mouth distances: place along the face from the mouth (chin) or the eyes (nose bridge),
# half width, half height, search radius.
CHIN = (0.52, 0.34, 0.20, 0.30)
NOSE_BRIDGE = (0.30, 0.40, 0.26, 0.22)

Gray = NDArray[np.uint8]


@dataclass(frozen=True)
class SyncScore:
    r: float  # correlation of opening and loudness at the best lag
    lag_frames: float  # positive: the mouth is late
    spread: float  # standard deviation of the opening, in eye-mouth distances


def measure_sync(
    video: Path, points: NDArray[np.floating], *, audio: NDArray[np.float32] | None = None
) -> SyncScore:
    """`points` (5, 2): left eye, right eye, nose, mouth corners of the face in the first frame, in pixels.
    `audio` is the speaker's own mono 16 kHz track where the video's sound mixes several."""
    with open_media(video) as (container, _):
        stream = container.streams.video[0]
        fps = float(stream.average_rate or 0)
        frames = (np.asarray(frame.to_ndarray(format="gray"), np.uint8) for frame in container.decode(stream))
        opening = jaw_opening(frames, points)
    sound = (block[:, 0] for block in decode_blocks(video, SAMPLE_RATE))
    loudness = speech_envelope(sound if audio is None else in_pieces(audio), len(opening), fps)
    r, lag_frames = best_correlation(opening, loudness)
    return SyncScore(r, lag_frames, float(opening.std()))


def jaw_opening(frames: Iterator[Gray], points: NDArray[np.floating]) -> NDArray[np.float64]:
    """Distance of chin and nose bridge along the face per frame, less that of the first, in eye-mouth
    distances."""
    eyes, mouth = points[:2].mean(axis=0), points[3:].mean(axis=0)
    size = float(np.linalg.norm(mouth - eyes))
    down = (mouth - eyes) / max(size, 1e-6)
    first = next(frames)
    chin = Patch(first, mouth + CHIN[0] * size * down, size, CHIN[1:])
    nose = Patch(first, eyes + NOSE_BRIDGE[0] * size * down, size, NOSE_BRIDGE[1:])
    shifts = [(chin.shift(frame) - nose.shift(frame)) @ down / size for frame in frames]
    return np.array([0.0, *shifts])


class Patch:
    """A rectangle of the first frame that is found again in later ones."""

    def __init__(
        self, frame: Gray, centre: NDArray[np.floating], size: float, shape: tuple[float, ...]
    ) -> None:
        half_width, half_height, radius = (share * size for share in shape)
        self._x, self._y = int(max(0, centre[0] - half_width)), int(max(0, centre[1] - half_height))
        self._template = frame[
            self._y : int(centre[1] + half_height), self._x : int(centre[0] + half_width)
        ].copy()
        if min(self._template.shape) < MIN_PATCH_PX:
            raise InputError(
                f"the face is too small or too near the picture's border to measure sync: a part of it is "
                f"{self._template.shape[1]}x{self._template.shape[0]} px, "
                f"at least {MIN_PATCH_PX}x{MIN_PATCH_PX} are needed"
            )
        self._radius = int(radius) + 2

    def shift(self, frame: Gray) -> NDArray[np.float64]:
        """x, y in pixels from the place in the first frame, to a fraction of a pixel."""
        x0, y0 = max(0, self._x - self._radius), max(0, self._y - self._radius)
        height, width = self._template.shape
        region = frame[y0 : self._y + height + self._radius, x0 : self._x + width + self._radius]
        match = np.asarray(cv2.matchTemplate(region, self._template, cv2.TM_CCOEFF_NORMED), np.float32)
        _, _, _, (x, y) = cv2.minMaxLoc(match)
        return np.array([x0 + x + _peak(match[y], x) - self._x, y0 + y + _peak(match[:, x], y) - self._y])


def _peak(values: NDArray[np.floating], index: int) -> float:
    """Offset of a parabola's top from the highest of three neighbouring values."""
    if not 0 < index < len(values) - 1:
        return 0.0
    before, top, after = values[index - 1 : index + 2].astype(float)
    return float(0.5 * (before - after) / min(before - 2 * top + after, -1e-9))


def best_correlation(opening: NDArray[np.floating], loudness: NDArray[np.floating]) -> tuple[float, float]:
    """r and the lag in frames (positive: the opening is late) where they agree best."""
    max_lag = min(MAX_LAG_FRAMES, len(opening) // 4)
    if opening.std() < 1e-9 or loudness.std() < 1e-9:
        return 0.0, 0.0
    a, b = (opening - opening.mean()) / opening.std(), (loudness - loudness.mean()) / loudness.std()
    n = len(a)
    lags = range(-max_lag, max_lag + 1)
    r = np.array([(a[max(0, k) : n + min(0, k)] * b[max(0, -k) : n - max(0, k)]).mean() for k in lags])
    best = int(r.argmax())
    return float(r[best]), lags[best] + _peak(r, best)
