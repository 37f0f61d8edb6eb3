"""Landmarks of one face by networks kept as ONNX files: 106 points in a detector's box, 203 in a crop."""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from avatar_core.media.affine import warp_square
from avatar_core.media.face import Picture
from avatar_core.media.onnx_model import OnnxModel

Points = NDArray[np.float32]

SIDE_106, SIDE_203 = 192, 224
_BOX_SCALE = 1.5


class Landmark106:
    def __init__(self, path: Path, device: str = "cpu") -> None:
        self._model = OnnxModel(path, device)

    def find(self, picture: Picture, box: NDArray[np.floating]) -> Points:
        """[106, 2] in picture pixels; `box` is x_min, y_min, x_max, y_max, RGB [H, W, 3]."""
        matrix = box_matrix(box)
        return points_106(self._model.run(input_106(picture, matrix))[0], matrix)


def box_matrix(box: NDArray[np.floating]) -> NDArray[np.float64]:
    """[2, 3] from picture to network pixels: a square round the box's middle, half as large again."""
    x_min, y_min, x_max, y_max = (float(side) for side in box[:4])
    zoom = SIDE_106 / (max(x_max - x_min, y_max - y_min) * _BOX_SCALE)
    x, y = (x_min + x_max) / 2, (y_min + y_max) / 2
    return np.array([[zoom, 0, SIDE_106 / 2 - zoom * x], [0, zoom, SIDE_106 / 2 - zoom * y]])


def input_106(picture: Picture, matrix: NDArray[np.float64]) -> NDArray[np.float32]:
    """[1, 3, 192, 192], 0..255, blue first."""
    crop = warp_square(picture, matrix, SIDE_106)
    return np.ascontiguousarray(crop[..., ::-1].transpose(2, 0, 1)[None], np.float32)


def points_106(output: NDArray[np.float32], matrix: NDArray[np.float64]) -> Points:
    points = (output[0].reshape(-1, 2)[-106:] + 1) * (SIDE_106 / 2)
    back = cv2.invertAffineTransform(matrix)
    return np.asarray(points @ back[:, :2].T + back[:, 2], np.float32)


class Landmark203:
    """The landmarks are the last output, of three in the original file."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self._model = OnnxModel(path, device)

    def find(self, crop: Picture) -> Points:
        """[203, 2] in pixels of the crop, RGB [224, 224, 3]."""
        return points_203(self._model.run(input_203(crop))[-1])


def input_203(crop: Picture) -> NDArray[np.float32]:
    """[1, 3, 224, 224], 0..1."""
    return np.ascontiguousarray(crop.transpose(2, 0, 1)[None] / np.float32(255), np.float32)


def points_203(output: NDArray[np.float32]) -> Points:
    return np.asarray(output[0].reshape(-1, 2) * np.float32(SIDE_203), np.float32)
