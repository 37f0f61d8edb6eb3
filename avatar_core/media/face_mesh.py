"""478 landmarks of a face in a picture, irises included, by BlazeFace (https://arxiv.org/abs/1907.05047) and
Face Mesh (https://arxiv.org/abs/1907.06724), kept as ONNX files. Both take [1, height, width, 3]."""

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from avatar_core.errors import InputError
from avatar_core.media.face import Floats, Picture
from avatar_core.media.onnx_model import OnnxModel

Points = NDArray[np.float32]

BLAZE_SIDE, MESH_SIDE = 128, 256
MIN_SCORE = 0.5
MAX_OVERLAP = 0.3
_GRIDS = ((16, 2), (8, 6))  # cells a side, anchors a cell
_LOGIT_RANGE = (-50, 100)
_ROI_SCALE = 1.5
_NUM_POINTS = 478


class FaceMesh:
    def __init__(self, blaze_face: Path, face_mesh: Path, device: str = "cpu") -> None:
        self._detector, self._mesh = OnnxModel(blaze_face, device), OnnxModel(face_mesh, device)

    def find(self, picture: Picture) -> Points:
        """[478, 3], x and z as parts of the picture's width, y of its height; RGB [H, W, 3]. Raises
        `InputError` where there is no face."""
        height, width = picture.shape[:2]
        logits, regressors = sorted(self._detector.run(blaze_input(picture)), key=np.size)
        faces = faces_from_outputs(regressors, logits)
        if not len(faces.scores):
            raise InputError(
                "no face found where the eyes were looked for; use a picture with a face turned to the camera"
            )
        region = face_region(faces.boxes[0], faces.points[0], width, height)
        outputs = self._mesh.run(mesh_input(picture, region))
        points = mesh_points(max(outputs, key=np.size), region)
        return np.asarray(points / np.array([width, height, width]), np.float32)


class BlazeFaces(NamedTuple):
    """Best first: `boxes` x_min, y_min, x_max, y_max [n, 4] and six `points` [n, 6, 2], both as parts of the
    picture's sides; `scores` [n]."""

    boxes: Floats
    scores: Floats
    points: Floats


class Region(NamedTuple):
    """A square turned by `angle` (radians) round x, y; picture pixels."""

    x: float
    y: float
    side: float
    angle: float


def blaze_input(picture: Picture) -> NDArray[np.float32]:
    small = cv2.resize(picture, (BLAZE_SIDE, BLAZE_SIDE), interpolation=cv2.INTER_LINEAR)
    return np.asarray(small[None] / np.float32(127.5) - np.float32(1), np.float32)


def anchors() -> Floats:
    """[896, 2] centres, 0..1."""
    levels = []
    for side, repeats in _GRIDS:
        row, column = np.mgrid[:side, :side]
        centres = (np.stack([column, row], axis=-1).reshape(-1, 2) + 0.5) / side
        levels.append(np.repeat(centres, repeats, axis=0))
    return np.concatenate(levels)


def faces_from_outputs(regressors: NDArray[np.float32], logits: NDArray[np.float32]) -> BlazeFaces:
    scores = 1 / (1 + np.exp(-np.clip(logits.reshape(-1).astype(np.float64), *_LOGIT_RANGE)))
    sure = np.flatnonzero(scores >= MIN_SCORE)
    raw = regressors.reshape(-1, 8, 2)[sure].astype(np.float64) / BLAZE_SIDE
    centres = anchors()[sure]
    middle, half = raw[:, 0] + centres, raw[:, 1] / 2
    values = np.concatenate(
        [middle - half, middle + half, (raw[:, 2:] + centres[:, None]).reshape(-1, 12)], axis=1
    )
    order = np.argsort(-scores[sure], kind="stable")
    blended, best = _blended(values[order], scores[sure][order])
    return BlazeFaces(blended[:, :4], best, blended[:, 4:].reshape(-1, 6, 2))


def _blended(values: Floats, scores: Floats) -> tuple[Floats, Floats]:
    """Overlapping faces become their mean by score, with the score of the best."""
    left, faces, best = np.arange(len(values)), [], []
    while len(left):
        together = _overlap(values[left[0], :4], values[left, :4]) > MAX_OVERLAP
        together[0] = True
        group = left[together]
        faces.append(np.average(values[group], axis=0, weights=scores[group]))
        best.append(scores[left[0]])
        left = left[~together]
    return np.array(faces).reshape(-1, values.shape[1]), np.array(best)


def _overlap(box: Floats, others: Floats) -> Floats:
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=1)
    whole = np.prod(box[2:] - box[:2]) + np.prod(others[:, 2:] - others[:, :2], axis=1) - shared
    return np.asarray(shared / np.maximum(whole, 1e-12), np.float64)


def face_region(box: Floats, points: Floats, width: int, height: int) -> Region:
    """Half as large again as the box's longer side, turned so that the eyes lie level."""
    size = np.array([width, height])
    corners, (one_eye, other_eye) = box.reshape(2, 2) * size, points[:2] * size
    x, y = corners.mean(axis=0)
    across = other_eye - one_eye
    angle = -np.arctan2(-across[1], across[0])
    angle -= 2 * np.pi * np.floor((angle + np.pi) / (2 * np.pi))
    return Region(float(x), float(y), float((corners[1] - corners[0]).max() * _ROI_SCALE), float(angle))


def mesh_input(picture: Picture, region: Region) -> NDArray[np.float32]:
    """[1, 256, 256, 3], 0..1."""
    square = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]) * region.side
    corners = square @ _turn(region.angle) + (region.x, region.y)
    target = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32) * MESH_SIDE
    matrix = cv2.getPerspectiveTransform(corners.astype(np.float32), target)
    crop = cv2.warpPerspective(picture, matrix, (MESH_SIDE, MESH_SIDE), flags=cv2.INTER_LINEAR)
    return np.asarray(crop[None] / np.float32(255), np.float32)


def mesh_points(output: NDArray[np.float32], region: Region) -> Points:
    """[478, 3] in picture pixels."""
    points = output.reshape(_NUM_POINTS, 3).astype(np.float64) / MESH_SIDE - (0.5, 0.5, 0)
    points[:, :2] = points[:, :2] @ _turn(region.angle)
    return np.asarray(points * region.side + (region.x, region.y, 0), np.float32)


def _turn(angle: float) -> Floats:
    """[2, 2], for row vectors."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[cosine, sine], [-sine, cosine]])
