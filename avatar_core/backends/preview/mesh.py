"""468 face points by the MediaPipe face landmark network (a .tflite file), run with OpenCV."""

from functools import cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from avatar_core.errors import WeightsError
from avatar_core.media.face import Picture

Points = NDArray[np.float64]

SIDE = 192  # px, the network's picture
EYES = [33, 263]  # outer corners, picture left and right

# Where the mesh has the curves of `Contours`.
MESH_POINTS: dict[str, int | list[int]] = {
    "upper_lip_inner": [78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308],
    "lower_lip_inner": [78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308],
    "upper_lip_outer": [61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291],
    "lower_lip_outer": [61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291],
    "left_eye_upper": [33, 246, 161, 160, 159, 158, 157, 173, 133],
    "left_eye_lower": [33, 7, 163, 144, 145, 153, 154, 155, 133],
    "right_eye_upper": [362, 398, 384, 385, 386, 387, 388, 466, 263],
    "right_eye_lower": [362, 382, 381, 380, 374, 373, 390, 249, 263],
    "chin": 152,
    "nose": 2,
    "left_brow": 105,
    "right_brow": 334,
}


def mesh_curves(picture: Picture, points: Points, model: Path) -> dict[str, Points]:
    """Curves in picture pixels by their `Contours` name, from the five detector points (5, 2). The
    network sees a levelled square round the face, then a second one fitted to its first answer."""
    first = run_mesh(picture, *first_square(points), model)
    second = run_mesh(picture, *fitted_square(first), model)
    return {name: second[index] for name, index in MESH_POINTS.items()}


def first_square(points: Points) -> tuple[Points, float, float]:
    """Centre, side and roll (radians) of the square round the detector's points."""
    eyes, mouth = points[:2].mean(axis=0), points[3:].mean(axis=0)
    across = points[1] - points[0]
    extent = max(float(np.linalg.norm(mouth - eyes)), 0.9 * float(np.linalg.norm(across)), 1.0)
    return 0.45 * eyes + 0.55 * mouth, 4.0 * extent, float(np.arctan2(across[1], across[0]))


def fitted_square(mesh: Points) -> tuple[Points, float, float]:
    across = mesh[EYES[1]] - mesh[EYES[0]]
    roll = float(np.arctan2(across[1], across[0]))
    level = rotation(roll)
    turned = mesh @ level.T
    low, high = turned.min(axis=0), turned.max(axis=0)
    return (low + high) / 2 @ level, 1.5 * float((high - low).max()), roll


def rotation(roll: float) -> Points:
    """Turns a line that rises by `roll` level."""
    cosine, sine = np.cos(roll), np.sin(roll)
    return np.array([[cosine, sine], [-sine, cosine]])


def run_mesh(picture: Picture, centre: Points, side: float, roll: float, model: Path) -> Points:
    """Mesh points (468, 2) in picture pixels."""
    turn = rotation(roll) * SIDE / max(side, 1.0)
    matrix = np.column_stack([turn, SIDE / 2 - turn @ centre])
    network = load_mesh(model)
    network.setInput(cv2.dnn.blobFromImage(reduced_warp(picture, matrix), 1 / 255.0))
    output = np.asarray(network.forward(), np.float64)
    if output.size != 468 * 3:
        raise not_a_mesh(model, f"it puts out {output.size} numbers, not 468 points")
    mesh = output.reshape(468, 3)[:, :2]
    back = cv2.invertAffineTransform(matrix)
    return mesh @ back[:, :2].T + back[:, 2]


def reduced_warp(picture: Picture, matrix: Points) -> Picture:
    """The warped SIDE x SIDE picture, averaged instead of sampled where it is reduced by over two."""
    zoom = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    steps = 1 if zoom >= 0.5 else 2 if zoom > 0.25 else 4
    warped = cv2.warpAffine(picture, matrix * steps, (SIDE * steps, SIDE * steps))
    return np.asarray(cv2.resize(warped, (SIDE, SIDE), interpolation=cv2.INTER_AREA), np.uint8)


@cache
def load_mesh(model: Path) -> cv2.dnn.Net:
    if not model.is_file():
        raise not_a_mesh(model, "there is no such file")
    try:
        return cv2.dnn.readNetFromTFLite(str(model))
    except cv2.error as error:
        raise not_a_mesh(model, str(error.err)) from error


def not_a_mesh(model: Path, reason: str) -> WeightsError:
    return WeightsError(
        f"{model} is no face landmark network: {reason}; give face_landmark.tflite of mediapipe 0.10 "
        "or leave the mesh out"
    )
