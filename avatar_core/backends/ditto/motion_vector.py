"""The motion of a face: key points moved by pose and expression, and the vector that the model makes.

A `Motion` holds n frames: `scale` [n, 1], `pitch`, `yaw`, `roll` [n, 66] (logits of bins of 3 degrees), `t`
[n, 3], `exp` [n, 63], and for a source `kp` [n, 63], all float32; 63 is 21 points by x, y, z. A pose that has
been turned into degrees is [n] instead.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Motion = Mapping[str, Array]

WIDTHS = {"scale": 1, "pitch": 66, "yaw": 66, "roll": 66, "t": 3, "exp": 63}
MOTION_DIM = sum(WIDTHS.values())
POSE = ("pitch", "yaw", "roll")
NUM_POINTS = 21

_BIN_DEGREES = 3.0
_FIRST_BIN_DEGREES = -97.5
_STARTS = dict(zip(WIDTHS, np.cumsum([0, *WIDTHS.values()]).tolist(), strict=False))


def pack(motion: Motion) -> Array:
    """[n, 265], in which the scale is kept less one."""
    columns = [np.asarray(motion[key], np.float32).reshape(-1, width) for key, width in WIDTHS.items()]
    columns[0] = columns[0] - np.float32(1)
    return np.concatenate(columns, axis=1)


def unpack(vectors: Array, limits: Array | None = None) -> dict[str, Array]:
    """The frames of [n, 265]; `limits` [2, 265] are the least and the largest value of every component."""
    if limits is not None:
        vectors = np.clip(vectors, limits[0], limits[1])
    motion = {key: vectors[:, _STARTS[key] : _STARTS[key] + width] for key, width in WIDTHS.items()}
    return motion | {"scale": motion["scale"] + np.float32(1)}


def frame(motion: Motion, index: int) -> dict[str, Array]:
    """One frame of many, still with its first axis."""
    return {key: values[index : index + 1] for key, values in motion.items()}


def is_logits(angle: Array) -> bool:
    return angle.ndim > 1 and angle.shape[1] == WIDTHS["pitch"]


def degrees(angle: Array) -> Array:
    """[n] from logits [n, 66]; anything else is in degrees already."""
    if not is_logits(angle):
        return angle
    weights = np.exp(angle - angle.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    bins = np.arange(angle.shape[1], dtype=np.float32)
    return np.asarray((weights * bins).sum(axis=1) * _BIN_DEGREES + _FIRST_BIN_DEGREES, np.float32)


def rotation(pitch: Array, yaw: Array, roll: Array) -> Array:
    """[n, 3, 3] from degrees [n], to be multiplied from the right: (Rz Ry Rx) transposed."""
    angles = np.deg2rad(np.stack([pitch, yaw, roll])).astype(np.float32)
    (cos_x, cos_y, cos_z), (sin_x, sin_y, sin_z) = np.cos(angles), np.sin(angles)
    entries = [
        cos_z * cos_y,
        sin_z * cos_y,
        -sin_y,
        cos_z * sin_y * sin_x - sin_z * cos_x,
        sin_z * sin_y * sin_x + cos_z * cos_x,
        cos_y * sin_x,
        cos_z * sin_y * cos_x + sin_z * sin_x,
        sin_z * sin_y * cos_x - cos_z * sin_x,
        cos_y * cos_x,
    ]
    return np.stack(entries, axis=-1).reshape(-1, 3, 3)


def keypoints(motion: Motion) -> Array:
    """[n, 21, 3]: the canonical points turned, bent by the expression, scaled, then shifted in the plane."""
    turn = rotation(*(degrees(motion[key]) for key in POSE))
    points = motion["kp"].reshape(-1, NUM_POINTS, 3) @ turn + motion["exp"].reshape(-1, NUM_POINTS, 3)
    points = points * motion["scale"].reshape(-1, 1, 1)
    points[..., :2] += motion["t"].reshape(-1, 1, 3)[..., :2]
    return np.asarray(points, np.float32)


def mirror_index(index: int, size: int) -> int:
    """Which of `size` frames is shown at `index` if they run forth and back; those at the ends come twice."""
    turn, rest = divmod(index, size)
    return rest if turn % 2 == 0 else size - 1 - rest


def smooth(rows: Array, width: int) -> Array:
    """Mean over `width` rows (odd) round each of [n, ...]; at the ends over those that there are."""
    half = width // 2
    means = [rows[max(0, i - half) : i + half + 1].mean(axis=0) for i in range(len(rows))]
    return np.asarray(means, np.float32).reshape(rows.shape)


def smooth_motion(motion: Motion, width: int) -> dict[str, Array]:
    return {key: smooth(values, width) for key, values in motion.items()}
