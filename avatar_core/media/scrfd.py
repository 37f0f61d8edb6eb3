"""Faces in a picture by SCRFD (https://arxiv.org/abs/2105.04714) with five points, kept as an ONNX file.

The network sees a square of 512 pixels with blue first. Its nine outputs are scores, distances to the sides
of the box, and offsets of the points, each for the strides 8, 16 and 32, two anchors a cell.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from avatar_core.media.face import Face, Floats, Picture
from avatar_core.media.face_torchscript import Finds
from avatar_core.media.onnx_model import OnnxModel

SIDE = 512
STRIDES = (8, 16, 32)
MIN_SCORE = 0.5
MAX_OVERLAP = 0.4
_ANCHORS = 2


class ScrfdDetector:
    def __init__(self, path: Path, device: str = "cpu") -> None:
        self._model = OnnxModel(path, device)

    def detect(self, picture: Picture, *, min_face: int = 0) -> list[Face]:
        """All faces of at least `min_face` pixels on the longer side, best first; RGB [H, W, 3]."""
        batch, scale = network_input(picture)
        finds = finds_from_outputs(self._model.run(batch), scale)
        return [
            Face(box.astype(np.float32), float(score), points.astype(np.float32))
            for box, score, points in zip(*finds, strict=True)
            if np.max(box[2:] - box[:2]) >= min_face
        ]


def network_input(picture: Picture) -> tuple[NDArray[np.float32], float]:
    """[1, 3, 512, 512], the picture in its upper left corner, and the scale it has there."""
    height, width = picture.shape[:2]
    ratio = height / width
    size = (int(SIDE / ratio), SIDE) if ratio > 1 else (SIDE, int(SIDE * ratio))
    canvas = np.zeros((SIDE, SIDE, 3), np.uint8)
    canvas[: size[1], : size[0]] = cv2.resize(picture, size, interpolation=cv2.INTER_LINEAR)
    pixels = (canvas[..., ::-1].astype(np.float32) - np.float32(127.5)) / np.float32(128)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]), size[1] / height


def finds_from_outputs(outputs: Sequence[NDArray[np.float32]], scale: float) -> Finds:
    """Faces best first, in pixels of the picture."""
    levels = [_level(stride, *outputs[i :: len(STRIDES)]) for i, stride in enumerate(STRIDES)]
    boxes, scores, points = (np.concatenate(parts) for parts in zip(*levels, strict=True))
    boxes, points = boxes / scale, points / scale
    order = np.argsort(-scores, kind="stable")
    best = order[_kept(boxes[order])]
    return Finds(boxes[best], scores[best], points[best])


def _level(
    stride: int, scores: NDArray[np.float32], distances: NDArray[np.float32], offsets: NDArray[np.float32]
) -> tuple[Floats, Floats, Floats]:
    scores = scores.reshape(-1)
    sure = np.flatnonzero(scores >= MIN_SCORE)
    cell = sure // _ANCHORS
    cells_across = SIDE // stride
    centre = np.stack([cell % cells_across, cell // cells_across], axis=1) * float(stride)
    sides = distances.reshape(-1, 2, 2)[sure].astype(np.float64) * stride
    boxes = np.concatenate([centre - sides[:, 0], centre + sides[:, 1]], axis=1)
    points = centre[:, None] + offsets.reshape(-1, 5, 2)[sure].astype(np.float64) * stride
    return boxes, scores[sure].astype(np.float64), points


def _kept(boxes: Floats) -> list[int]:
    """Indices of boxes, best first, of which no better one covers too much. Sides count their last pixel."""
    areas = np.prod(boxes[:, 2:] - boxes[:, :2] + 1, axis=1)
    left, kept = np.arange(len(boxes)), []
    while len(left):
        best, left = int(left[0]), left[1:]
        kept.append(best)
        low, high = np.maximum(boxes[best, :2], boxes[left, :2]), np.minimum(boxes[best, 2:], boxes[left, 2:])
        shared = np.prod(np.maximum(high - low + 1, 0), axis=1)
        left = left[shared / (areas[best] + areas[left] - shared) <= MAX_OVERLAP]
    return kept
