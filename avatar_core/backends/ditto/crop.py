"""Pictures as the networks see them: the whole one reduced, a square round the face, its network input."""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from avatar_core.backends.ditto.motion_vector import Array
from avatar_core.errors import InputError
from avatar_core.media.face import Face, Picture

CROP_SIZE = 512
NETWORK_SIZE = 256

# Indices of a landmark set whose means are the left eye, the right eye, the corners of the mouth.
_EYES_AND_MOUTH = {
    106: ([33, 35, 40, 39], [87, 89, 94, 93], [52, 61]),
    203: ([0, 6, 12, 18], [24, 30, 36, 42], [48, 66]),
}


class Outline(NamedTuple):
    """What a square round a face is laid by: points that it holds [n, 2], the axis from `eyes` to `mouth`."""

    points: Array
    eyes: Array
    mouth: Array


def outline(landmarks: Array) -> Outline:
    """Of 106 or 203 landmarks [n, 2] in picture pixels."""
    left, right, mouth = (landmarks[rows].mean(axis=0) for rows in _EYES_AND_MOUTH[len(landmarks)])
    return Outline(landmarks, (left + right) / 2, mouth)


def face_outline(face: Face) -> Outline:
    """Of a detected face: the corners of its box, its eyes and the corners of its mouth."""
    x_min, y_min, x_max, y_max = face.box
    box = np.array([[x_min, y_min], [x_max, y_min], [x_max, y_max], [x_min, y_max]], np.float32)
    return Outline(box, face.points[:2].mean(axis=0), face.points[3:].mean(axis=0))


class CropMatrices(NamedTuple):
    """3 x 3 float32 matrices from picture to crop pixels and back."""

    from_picture: Array
    to_picture: Array


def crop_matrices(
    face: Outline,
    size: int,
    scale: float,
    vy_ratio: float,
    *,
    vx_ratio: float = 0.0,
    rotate: bool = True,
) -> CropMatrices:
    """Of a square of `size` pixels, upright in the face's own axes and `scale` times the face, its centre
    moved by the parts `vx_ratio` and `vy_ratio` of its side. Raises `InputError` for a face of no extent."""
    down = _direction(face.mouth - face.eyes)
    axes = np.array([[down[1], -down[0]], down], np.float32)  # of the face: to its right, downwards
    middle = face.points.mean(axis=0)
    seen = (face.points - middle) @ axes.T
    low, high = seen.min(axis=0), seen.max(axis=0)
    side = float((high - low).max()) * scale
    if not side > 0:
        raise InputError("the landmarks of the face fall into one point; use a picture with a larger face")
    shift = (low + high) / 2 + np.array([vx_ratio * side, vy_ratio * side])
    x, y = middle + shift @ axes
    zoom, (c, s) = size / side, _turn(axes[0]) if rotate else (1.0, 0.0)
    matrix = np.array(
        [
            [zoom * c, zoom * s, size / 2 - zoom * (c * x + s * y)],
            [-zoom * s, zoom * c, size / 2 - zoom * (c * y - s * x)],
            [0, 0, 1],
        ],
        np.float32,
    )
    return CropMatrices(matrix, np.linalg.inv(matrix).astype(np.float32))


def _direction(axis: Array) -> Array:
    length = np.linalg.norm(axis)
    return np.asarray(axis / length if length > 1e-3 else [0, 1], np.float32)


def _turn(across: Array) -> tuple[float, float]:
    """Cosine and sine of the face's tilt; rounding may leave the cosine a hair above 1."""
    angle = np.arccos(np.clip(across[0], -1, 1))
    angle = -angle if across[1] < 0 else angle
    return float(np.cos(angle)), float(np.sin(angle))


def mapped(points: Array, matrix: NDArray[np.floating]) -> Array:
    """Points [n, 2] through a 3 x 3 matrix."""
    return np.asarray(points @ matrix[:2, :2].T + matrix[:2, 2], np.float32)


def network_input(crop512: Picture) -> Array:
    """[1, 3, 256, 256], 0..1, for the appearance and the motion extractor."""
    reduced = cv2.resize(crop512, (NETWORK_SIZE, NETWORK_SIZE), interpolation=cv2.INTER_AREA)
    return np.asarray(reduced.transpose(2, 0, 1)[None] / np.float32(255), np.float32)


def fitted_size(height: int, width: int, max_dim: int, division: int = 2) -> tuple[int, int]:
    """Height and width of a picture's video: at most `max_dim` (0 or less: any), multiples of `division`."""
    if 0 < max_dim < max(height, width):
        if height > width:
            height, width = max_dim, round(width * max_dim / height)
        else:
            height, width = round(height * max_dim / width), max_dim
    return height - height % division, width - width % division


def fit_picture(picture: Picture, max_dim: int) -> Picture:
    height, width = fitted_size(picture.shape[0], picture.shape[1], max_dim)
    if min(height, width) < 2:
        raise InputError(
            f"is {picture.shape[1]} x {picture.shape[0]}, too narrow for a longer side of {max_dim}; "
            "use another picture"
        )
    if (height, width) == picture.shape[:2]:
        return picture
    return np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)
