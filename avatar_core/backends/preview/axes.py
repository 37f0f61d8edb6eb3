"""Places in and around a face: its own axes, and boxes of pixels."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from avatar_core.backends.preview.contours import Contours, Points
from avatar_core.backends.preview.warp import FloatArray


def smoothstep(values: NDArray[np.floating], low: float, high: float) -> FloatArray:
    """0 at `low` (and before), 1 at `high` (and beyond), flat at both ends."""
    t = np.clip((np.asarray(values, np.float32) - low) / (high - low), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


class Box(NamedTuple):
    """Pixels x0 <= x < x1, y0 <= y < y1 inside the picture."""

    x0: int
    y0: int
    x1: int
    y1: int

    @classmethod
    def around(cls, corners: Points, picture_shape: tuple[int, ...], margin: int = 0) -> "Box":
        height, width = picture_shape[:2]
        x0, y0 = np.floor(corners.min(axis=0)).astype(int) - margin
        x1, y1 = np.ceil(corners.max(axis=0)).astype(int) + margin
        return cls(max(0, int(x0)), max(0, int(y0)), min(width, int(x1)), min(height, int(y1)))

    @property
    def empty(self) -> bool:
        return self.x1 - self.x0 < 2 or self.y1 - self.y0 < 2

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.y0, self.y1), slice(self.x0, self.x1)

    def grid(self) -> tuple[FloatArray, FloatArray]:
        """x and y of every pixel, each of shape (height, width)."""
        x, y = np.meshgrid(np.arange(self.x0, self.x1), np.arange(self.y0, self.y1))
        return x.astype(np.float32), y.astype(np.float32)

    def border_distance(self) -> FloatArray:
        """Pixels from each pixel to the nearest side of the box."""
        x, y = self.grid()
        sides = (x - self.x0, self.x1 - 1 - x, y - self.y0, self.y1 - 1 - y)
        return np.asarray(np.minimum.reduce(sides), np.float32)


class Axes:
    """A skewed frame: `u` runs along `origin + u * across`, `v` along `origin + v * down` (pixel vectors)."""

    def __init__(self, origin: Points, across: Points, down: Points) -> None:
        self.origin, self.across, self.down = origin, across, down
        self._inverse = np.linalg.inv(np.stack([across, down], axis=1))

    def to_uv(self, points: Points) -> Points:
        """Picture points (n, 2) or (2,) -> u, v."""
        return (points - self.origin) @ self._inverse.T

    def to_picture(self, uv: Points) -> Points:
        return self.origin + uv @ np.stack([self.across, self.down])

    def grid(self, box: Box) -> tuple[FloatArray, FloatArray]:
        """u and v of every pixel of the box."""
        x, y = box.grid()
        x, y = x - self.origin[0], y - self.origin[1]
        (xu, yu), (xv, yv) = self._inverse
        return (xu * x + yu * y).astype(np.float32), (xv * x + yv * y).astype(np.float32)


class FaceAxes:
    """`mouth`: u = 1 at the picture-right mouth corner, v towards the chin in units of about .46 of
    `eye_mouth`, the distance in pixels from between the eyes to the mouth."""

    def __init__(self, contours: Contours) -> None:
        left, right = contours.upper_lip_outer[0], contours.upper_lip_outer[-1]
        centre = (left + right) / 2
        self.eyes = (contours.left_eye_upper.mean(axis=0) + contours.right_eye_upper.mean(axis=0)) / 2
        self.half_mouth = max(float(np.linalg.norm(right - left)) / 2, 1.0)
        self.eye_mouth = max(float(np.linalg.norm(centre - self.eyes)), 2.0)
        self.unit_v = max(0.46 * self.eye_mouth, 0.8 * self.half_mouth)
        self.across = unit_vector(right - left, np.array([1.0, 0.0]))
        perpendicular = np.array([-self.across[1], self.across[0]])
        self.down = unit_vector(contours.chin - (self.eyes + contours.nose) / 2, perpendicular)
        self.mouth = Axes(centre, self.across * self.half_mouth, self.down * self.unit_v)
        self.turn = self._turn(contours)

    def _turn(self, contours: Contours) -> float:
        """0 for a face seen from the front, about 1 where the nose stands below an eye, more in profile."""
        left, right = contours.left_eye_upper.mean(axis=0), contours.right_eye_upper.mean(axis=0)
        to_left, to_right = (contours.nose - left) @ self.across, (right - contours.nose) @ self.across
        return abs(float(to_left - to_right)) / max(float(to_left + to_right), 1.0)


def unit_vector(vector: Points, fallback: Points) -> Points:
    length = float(np.linalg.norm(vector))
    return vector / length if length > 1e-6 else fallback
