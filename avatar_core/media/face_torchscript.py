"""Faces in a picture by a one-shot detector network kept as a TorchScript file.

The network takes pixels [1, 3, height, width] (RGB, 0..1) and for each of its strides the indices of its
cells [1, 1, rows, columns, 2] (column, row); it gives [1, n, 16]: centre x and y, width, height, how sure it
is that there is something, x and y of five points, how sure that it is a face; in pixels of its input.

A TorchScript file runs code: check its SHA-256 before it is given to this class.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from avatar_core.errors import WeightsError
from avatar_core.media.face import Face, Floats, Picture, keep_best

if TYPE_CHECKING:
    from torch import Tensor

SHORT_SIDE = 416  # px of the network's input
STRIDES = (8, 16, 32)
MIN_SCORE = 0.5
MAX_OVERLAP = 0.45  # of two boxes' union


class Finds(NamedTuple):
    """Faces best first: `boxes` x_min, y_min, x_max, y_max [n, 4], `scores` [n], `points` [n, 5, 2]."""

    boxes: Floats
    scores: Floats
    points: Floats


class TorchScriptFaceDetector:
    def __init__(self, path: Path) -> None:
        import torch

        try:
            self._network: Any = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise WeightsError(f"{path} cannot be read as a TorchScript file: {reason}") from error

    def detect(self, picture: Picture, *, min_face: int = 0) -> list[Face]:
        """All faces of at least `min_face` pixels on the longer side, left to right; RGB [H, W, 3]."""
        finds = self.find(picture)
        faces = [
            Face(box.astype(np.float32), float(score), points.astype(np.float32))
            for box, score, points in zip(*finds, strict=True)
            if np.max(box[2:] - box[:2]) >= min_face
        ]
        return sorted(faces, key=lambda face: (float(face.box[0]), float(face.box[1])))

    def find(self, picture: Picture) -> Finds:
        import torch

        height, width = picture.shape[:2]
        size = network_size(width, height)
        pixels = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_LINEAR))
        batch = torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255))
        with torch.inference_mode():
            output = self._network(batch, grids(*size))
        return finds_from_output(output[0].numpy(), (width, height), size)


def network_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of the network's input, multiples of 32: the shorter side is 416, the other one at
    least to scale."""
    scale, step = SHORT_SIDE / min(width, height), STRIDES[-1]
    return tuple(int(side * scale + step - 1) // step * step for side in (width, height))  # type: ignore[return-value]


def grids(width: int, height: int) -> "list[Tensor]":
    import torch

    cells = [np.meshgrid(np.arange(width // s), np.arange(height // s)) for s in STRIDES]
    return [torch.from_numpy(np.stack(xy, axis=-1)[None, None].astype(np.float32)) for xy in cells]


def finds_from_output(
    output: NDArray[np.float32], picture_size: tuple[int, int], input_size: tuple[int, int]
) -> Finds:
    """`output` [n, 16] of the network; sizes are width, height of the picture and of the network's input."""
    certainty = output[:, 4] * output[:, 15]
    sure = (output[:, 4] > MIN_SCORE) & (certainty > MIN_SCORE)
    rows, scores = output[sure], np.asarray(certainty[sure], np.float64)
    centre, half = rows[:, :2], rows[:, 2:4] / 2
    boxes = np.concatenate([centre - half, centre + half], axis=1)
    best = keep_best(boxes.astype(np.float64), scores, MAX_OVERLAP)
    # Times, then divided by, in float32: the last bit of a box may decide where its mask ends.
    scaled = boxes[best] * np.array(picture_size * 2, np.float32) / np.array(input_size * 2, np.float32)
    points = rows[best, 5:15].reshape(-1, 5, 2) * np.array(picture_size) / np.array(input_size)
    return Finds(scaled.astype(np.float64), scores[best], points)
