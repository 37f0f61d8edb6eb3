"""The outline of an open mouth: two curves through what each column shows, which meet where the lips do."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BLUNTNESS = 0.6  # of a gap's ends: 0.5 makes it an ellipse, 1 a lens
CORNERS, FLARE = 0.88, 0.06  # half mouth widths from which on a gap may not grow, and by what
STRAY = 0.06  # height units off the edge from where on a column counts little
PULL = 0.1  # of the ends to the middle line, in parts of the columns' weight
LIP_SIDE, FITS = 0.8, 8  # weight of what lies on the lip's side of an edge; rounds of fitting


@dataclass(frozen=True)
class Gap:
    """The opening between two lips, in half mouth widths across and height units down: two curves that
    meet at its ends `left` and `right`. `ends`: their heights there; `upper`, `lower`: polynomials."""

    left: float
    right: float
    ends: Floats  # (2,)
    upper: Floats  # (3,)
    lower: Floats  # (3,)

    def edges(self, across: Floats) -> tuple[Floats, Floats]:
        """Heights of the upper and the lower edge; beyond its ends the gap has no height."""
        line, bulge = _shapes(_within(across, self.left, self.right))
        upper, lower = (line @ self.ends + bulge @ edge for edge in (self.upper, self.lower))
        return upper, np.maximum(upper, lower)


def _within(across: Floats, left: float, right: float) -> Floats:
    """-1 at `left` and before, 1 at `right` and beyond."""
    return np.clip((2 * across - left - right) / max(right - left, 1e-6), -1, 1)


def _shapes(place: Floats) -> tuple[Floats, Floats]:
    """What edges are sums of, at places -1..1: a line (n, 2) by its ends, and bulges (n, 3) of no height
    there."""
    line = np.stack([(1 - place) / 2, (1 + place) / 2], axis=1)
    return line, (1 - place**2)[:, None] ** BLUNTNESS * np.vander(place, 3)


def is_flaring(across: Floats, size: Floats) -> NDArray[np.bool_]:
    """Near and beyond the corners: where a gap, instead of closing, grows into a shadow or background."""
    flaring = np.zeros(len(across), bool)
    for side in (across < 0, across >= 0):
        outwards = np.flatnonzero(side)[np.argsort(np.abs(across[side]))]
        grown = size[outwards] > np.minimum.accumulate(size[outwards]) + FLARE
        flaring[outwards] = np.maximum.accumulate(grown & (np.abs(across[outwards]) > CORNERS))
    return flaring


def longest_run(seen: NDArray[np.bool_], hole: int) -> tuple[int, int]:
    """First and last index of the longest run of True, bridging up to `hole` False."""
    places = np.flatnonzero(seen)
    runs = np.split(places, np.flatnonzero(np.diff(places) > hole + 1) + 1)
    longest = max(runs, key=len)
    return int(longest[0]), int(longest[-1])


def fitted_gap(across: Floats, edges: Floats) -> Gap:
    """Curves through the edges (2, n), leaning to the lips: gums and shaded teeth look like lip, and what
    is left outside would stay visible when the mouth closes."""
    left, right = float(across[0]), float(across[-1])
    line, bulge = _shapes(_within(across, left, right))
    none = np.zeros_like(bulge)
    shapes = np.concatenate([np.hstack([line, bulge, none]), np.hstack([line, none, bulge])])
    target = edges.ravel()
    # What is seen of blunt ends comes in wedges: the ends are drawn to where the middle line leads.
    pull = np.sqrt(PULL * len(across)) * np.eye(2, shapes.shape[1])
    middle = np.polyval(np.polyfit(across, edges.mean(axis=0), 2), [left, right])
    outwards = np.repeat([-1.0, 1.0], len(across))
    weight = np.ones_like(target)
    for _ in range(FITS):
        root = np.sqrt(weight)
        fit, *_ = np.linalg.lstsq(
            np.vstack([shapes * root[:, None], pull]), np.append(target * root, pull[:, :2] @ middle)
        )
        away = (target - shapes @ fit) * outwards
        weight = np.where(away > 0, LIP_SIDE, 1 - LIP_SIDE) / (1 + (away / STRAY) ** 2)
    return Gap(left, right, fit[:2], fit[2:5], fit[5:])
