"""Typed calls of OpenCV's resampling: every pixel of the result names the place it comes from."""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Picture = NDArray[np.uint8]


def warp_picture(picture: Picture, sources: FloatArray, interpolation: int = cv2.INTER_CUBIC) -> Picture:
    """`sources` (height, width, 2) holds x, y; beyond its border the picture's outermost pixels repeat."""
    # OpenCV takes one array of pairs and no second map; its type stubs do not know.
    warped: Picture = cv2.remap(picture, sources, None, interpolation, borderMode=cv2.BORDER_REPLICATE)  # type: ignore[call-overload]
    return warped


def warp_values(values: FloatArray, sources: FloatArray) -> FloatArray:
    """Linear interpolation of one or more channels."""
    warped: FloatArray = cv2.remap(values, sources, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)  # type: ignore[call-overload]
    return warped


def resize(values: FloatArray, size: tuple[int, int], interpolation: int = cv2.INTER_LINEAR) -> FloatArray:
    """`size` = width, height."""
    return np.asarray(cv2.resize(values, size, interpolation=interpolation), np.float32)


def weighted_sum(weights: Sequence[float], fields: FloatArray) -> FloatArray:
    """Zero weights cost nothing, and no threads are started for such small sums."""
    total: FloatArray = np.zeros(fields.shape[1:], np.float32)
    for weight, field in zip(weights, fields, strict=True):
        if weight:
            cv2.scaleAdd(field, float(weight), total, dst=total)
    return total
