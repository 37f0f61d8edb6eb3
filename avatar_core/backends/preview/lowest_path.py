"""The cheapest way through a cost plane from its left to its right side."""

import numpy as np
from numpy.typing import NDArray

STEPS = np.array([-2, -1, 0, 1, 2])  # rows the path may move from one column to the next
STEP_COST = 0.15


def lowest_path(cost: NDArray[np.floating]) -> NDArray[np.intp]:
    """The row per column (columns,) of the path with the least sum; `cost` is [rows, columns]."""
    rows, columns = cost.shape
    row = np.arange(rows)
    source = row - STEPS[:, None]
    outside = (source < 0) | (source >= rows)
    source = source.clip(0, rows - 1)
    step_cost = np.where(outside, np.inf, STEP_COST * np.abs(STEPS)[:, None])
    came_from = np.zeros((columns, rows), np.intp)
    total = cost[:, 0].astype(np.float64)
    for column in range(1, columns):
        ways = total[source] + step_cost
        best = ways.argmin(axis=0)
        came_from[column] = source[best, row]
        total = ways[best, row] + cost[:, column]
    path = np.empty(columns, np.intp)
    path[-1] = total.argmin()
    for column in range(columns - 1, 0, -1):
        path[column - 1] = came_from[column, path[column]]
    return path
