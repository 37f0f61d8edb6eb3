"""Keeps outlines from folding: points in order from left to right, curves in order from top to bottom."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]

LEAST_STEP = 0.01  # of the width, between neighbouring points of a curve


def ordered_curves(curves: Sequence[Points], left: Points, right: Points) -> list[Points]:
    """The curves (n, 2), given from top to bottom, with every point not right of its predecessor moved
    right and every point above the curve before it moved down on to it; `left` and `right` are the
    corners. Curves in order come back as they are."""
    axes = corner_axes(left, right)
    ordered: list[Points] = []
    above = None
    for curve in curves:
        x, y = np.linalg.solve(axes, (curve - left).T)
        x = increasing(x)
        if above is not None:
            y = np.maximum(y, np.interp(x, *above, left=-np.inf, right=-np.inf))
        above = x, y
        ordered.append(np.column_stack([x, y]) @ axes.T + left)
    return ordered


def corner_axes(left: Points, right: Points) -> Points:
    """Columns: from corner to corner, and as far downwards."""
    across = right - left
    if np.linalg.norm(across) < 1e-3:
        across = np.array([1.0, 0.0])
    return np.column_stack([across, [-across[1], across[0]]])


def increasing(x: Points) -> Points:
    ramp = LEAST_STEP * np.arange(len(x))
    return np.asarray(np.maximum.accumulate(x - ramp) + ramp, np.float64)
