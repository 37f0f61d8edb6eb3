"""Fits the template's eye outlines to the lash line and lower lid seen in the picture."""

import cv2
import numpy as np
from numpy.typing import NDArray

from avatar_core.media.face import Picture

Points = NDArray[np.float64]

HALF = 40  # strip pixels per half eye width
MIDDLE = 4  # index of a lid's middle point
LEAST_OPEN, MOST_OPEN = 0.30, 0.68  # lid distance in half eye widths


def fitted_eye(picture: Picture, upper: Points, lower: Points) -> tuple[Points, Points] | None:
    """Lids (9, 2) moved up or down to the picture's own; None where no open eye is seen."""
    corner = upper[0]
    across = (upper[-1] - corner) / 2
    half_width = float(np.linalg.norm(across))
    if half_width < 2:
        return None
    down = np.array([-across[1], across[0]])
    centre = corner + across
    edges = dark_edges(darkness_profile(picture, centre, across, down))
    if edges is None:
        return None
    unit = down / half_width**2  # projects picture pixels to half eye widths
    lash, lid = edges
    upper = upper + down * np.clip(lash - (upper[MIDDLE] - centre) @ unit, -0.35, 0.35)
    lower = lower + down * np.clip(min(lid, lash + 0.95) - (lower[MIDDLE] - centre) @ unit, -0.3, 0.35)
    opening = float((lower[MIDDLE] - upper[MIDDLE]) @ unit)
    return upper, lower + down * (np.clip(opening, LEAST_OPEN, MOST_OPEN) - opening)


def darkness_profile(picture: Picture, centre: Points, across: Points, down: Points) -> Points:
    """How much darker than skin the middle of the eye is on each of 2 * HALF rows, top to bottom."""
    matrix = np.column_stack([across / HALF, down / HALF, centre - across - down])
    strip = cv2.warpAffine(
        picture,
        matrix,
        (2 * HALF, 2 * HALF),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    grey = cv2.GaussianBlur(cv2.cvtColor(strip, cv2.COLOR_RGB2GRAY).astype(np.float64), (0, 0), 1.5)
    rows = grey[:, int(0.55 * HALF) : int(1.45 * HALF)].mean(axis=1)
    return np.clip(np.percentile(rows, 85) - rows, 0, None)


def dark_edges(darkness: Points) -> tuple[float, float] | None:
    """Heights of the lash line and the lower lid, in half eye widths below the corners' line."""
    row = np.arange(2 * HALF)
    weight = darkness * np.exp(-(((row / HALF - 1) / 0.45) ** 2))
    if weight.sum() < 1e-6:
        return None
    iris = int((weight * row).sum() / weight.sum())
    start = max(0, int(iris - 0.55 * HALF))
    above = darkness[start : iris + 1]
    if len(above) < 3 or above.max() < 8:
        return None
    lash = start + np.flatnonzero(above > 0.55 * above.max())[0]
    below = np.flatnonzero(darkness[iris:] > 0.30 * darkness.max())
    lid = iris + (below[-1] if len(below) else 0)
    return lash / HALF - 1, lid / HALF - 1
