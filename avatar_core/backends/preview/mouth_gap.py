"""Sees in a rectified mouth strip whether the mouth is open, and where its inside begins and ends.

Between the lips redness falls, whether teeth or a dark cavity show; the fall is measured against the lip
above and below in the same column, so neither light nor skin colour has to be known.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from avatar_core.backends.preview.gap_outline import Gap, fitted_gap, is_flaring, longest_run
from avatar_core.backends.preview.lowest_path import lowest_path

Floats = NDArray[np.float64]
Plane = NDArray[np.float32]

WIDEST_GAP = 1.1  # height units; deeper valleys are not seen as one
LEAST_GAP = 0.1  # height of a gap in its middle
LINE_HEIGHT, LINE_LIGHTNESS = 0.14, 0.65  # height, and share of the skin's lightness: less is a closed mouth
NOT_LIP, NOT_SEARCHED = -0.6, 50.0
HOLE = 0.3  # half mouth widths without evidence that do not end a gap: gums before a dark corner
DARK_CORNER, LINE_ROWS = 0.45, 4  # of the skin's lightness; rows of a line that may not grow


@dataclass(frozen=True)
class Strip:
    """Lightness and redness (0..255) of a mouth strip, the mouth's middle in its middle column; `half`
    columns are half the mouth's width and as many rows one height unit. `height` is each row's height,
    and the lips lie within `window` heights."""

    lightness: Plane
    redness: Plane
    half: int
    height: Floats
    window: tuple[float, float]

    @property
    def inside_window(self) -> NDArray[np.bool_]:
        return (self.height >= self.window[0]) & (self.height <= self.window[1])

    @property
    def across(self) -> Floats:
        """Each column's place in half mouth widths."""
        columns = self.lightness.shape[1]
        return (np.arange(columns) + 0.5 - columns / 2) / self.half

    @property
    def middle(self) -> slice:
        """The columns of the mouth's middle half."""
        centre = self.lightness.shape[1] // 2
        return slice(centre - self.half // 2, centre + self.half // 2)


def find_gap(strip: Strip) -> Gap | None:
    """None: the mouth is closed."""
    evidence = inside_evidence(strip)
    upper, lower = gap_rows(strip, evidence)
    rows = strip.height[0] + np.stack([upper, lower]) / strip.half
    size = rows[1] - rows[0]
    total = np.array([evidence[a:b, x].sum() for x, (a, b) in enumerate(zip(upper, lower, strict=True))])
    mean = total / np.maximum(lower - upper, 1)
    seen = (size > 0.03) & (mean > 0.1)
    middle = np.abs(strip.across) < 0.75
    centre = seen & (np.abs(strip.across) < 0.35)
    if (seen & middle).sum() < 0.7 * middle.sum() or not centre.any():
        return None
    if np.median(size[centre]) < LEAST_GAP or mean[middle].mean() < 0.4:
        return None
    if np.median(size[centre]) < LINE_HEIGHT and is_dark(strip, (upper + lower)[centre] // 2, centre):
        return None
    if is_ragged(strip.across[seen & middle], rows[:, seen & middle].mean(axis=0)):
        return None
    seen &= ~is_flaring(strip.across, size)
    first, last = longest_run(seen, round(HOLE * strip.half))
    seen[:first], seen[last + 1 :] = False, False
    edges = np.stack([upper, lower])
    for end, step in ((first, -1), (last, 1)):
        seen |= follow_dark_corner(strip, edges, end, step)
    return fitted_gap(strip.across[seen], strip.height[0] + edges[:, seen] / strip.half)


def is_dark(strip: Strip, rows: NDArray[np.intp], columns: NDArray[np.bool_]) -> bool:
    """Whether the line between closed lips, and not teeth, is what a narrow gap shows."""
    lightness = strip.lightness[rows, np.flatnonzero(columns)]
    return bool(np.median(lightness) < LINE_LIGHTNESS * rim_median(strip, strip.lightness))


def is_ragged(across: Floats, line: Floats) -> bool:
    """Whether a gap's middle line strays too far from a parabola to be a mouth's."""
    away = line - np.polyval(np.polyfit(across, line, 2), across)
    return bool(np.sqrt((away**2).mean()) > 0.08)


def follow_dark_corner(strip: Strip, edges: NDArray[np.intp], end: int, step: int) -> NDArray[np.bool_]:
    """Columns beyond `end` where the gap goes on as a dark line that does not grow: lips are too thin there
    to show by their colour. Writes that line's first row and first row below it into `edges` (2, columns)."""
    dark = strip.lightness < DARK_CORNER * rim_median(strip, strip.lightness)
    followed = np.zeros(dark.shape[1], bool)
    top, bottom = edges[:, end]
    most = max(0.75 * np.median((edges[1] - edges[0])[edges[1] > edges[0]]), LINE_ROWS)
    for column in range(end + step, int(np.clip(end + step * strip.half // 3, -1, dark.shape[1])), step):
        rows = np.arange(top - 1, bottom + 1).clip(0, len(dark) - 1)
        touching = rows[dark[rows, column]]
        if not len(touching):
            break
        light = np.flatnonzero(~dark[:, column])
        above, below = light[light < touching[0]], light[light > touching[-1]]
        if not len(above) or not len(below) or below[0] - above[-1] > most + 1:
            break
        top, bottom = above[-1] + 1, below[0]
        most = min(most, max(bottom - top, LINE_ROWS))
        edges[:, column], followed[column] = (top, bottom), True
    return followed


def gap_rows(strip: Strip, evidence: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """First row of the inside and first row below it, per column: from the ridge of the evidence
    outwards, the rows that gather the most of it."""
    height = strip.height[:, None]
    low, high = strip.window
    off = np.where((height < low + 0.1) | (height > high - 0.15), 3.0, 0.0)
    ridge = lowest_path(0.9 * height**2 + off - cv2.GaussianBlur(evidence, (0, 0), 2.5))
    gathered = np.vstack([np.zeros((1, evidence.shape[1])), np.cumsum(evidence, axis=0)]) / 6
    row = np.arange(len(gathered))[:, None]
    edge = strip.height[0] + row / strip.half
    upper = lowest_path(np.where((row <= ridge) & (edge >= low), gathered, NOT_SEARCHED))
    lower = lowest_path(np.where((row > ridge) & (edge <= high), -gathered, NOT_SEARCHED))
    return upper, np.maximum(upper, lower)


def inside_evidence(strip: Strip) -> Floats:
    """-1..1 per pixel, above 0 where it looks like teeth or cavity between two lips."""
    skin = rim_median(strip, strip.lightness)
    middle = strip.inside_window, strip.middle
    low, high = np.percentile(strip.redness[middle], [5, 95])
    evidence = np.maximum(pale_evidence(strip, middle, low, high), dark_evidence(strip, skin, high))
    # Without colour, lips brighter than a beard would pass for teeth.
    if high - low < 4 and skin >= 0.9 * np.median(strip.lightness[middle]):
        evidence = np.maximum(evidence, bright_evidence(strip, skin))
    evidence[~strip.inside_window] = NOT_LIP
    return np.clip(evidence, NOT_LIP, 1).astype(np.float64)


def pale_evidence(
    strip: Strip, middle: tuple[NDArray[np.bool_], slice], least_red: float, most_red: float
) -> Plane:
    """Less red than both sides, which themselves are red: a beard below skin is no gap."""
    fall = valley_depth(strip, strip.redness)
    fall[strip.redness + fall < least_red + 0.3 * (most_red - least_red)] = 0
    skin = rim_median(strip, strip.lightness)
    limit = max(0.025 * skin, 0.25 * float(np.percentile(fall[middle], 95)), 1.0)
    return (fall - limit) / (0.5 * limit)


def dark_evidence(strip: Strip, skin: float, most_red: float) -> Plane:
    """A cavity is dark and has brighter lips round it, unlike the background beside a turned face; where
    lips are much redder than skin, they are so on both sides, unlike round a moustache."""
    enclosed = valley_depth(strip, strip.lightness) / (0.2 * skin) - 1
    evidence = np.minimum((0.38 * skin - strip.lightness) / (0.08 * skin), enclosed)
    skin_red = rim_median(strip, strip.redness)
    if most_red - skin_red > 12:
        sides = strip.redness + valley_depth(strip, strip.redness)
        evidence[sides < skin_red + 0.25 * (most_red - skin_red)] = NOT_LIP
    return evidence


def bright_evidence(strip: Strip, skin: float) -> Plane:
    """Teeth in a picture without colour: brighter than both lips."""
    return (valley_depth(strip, -strip.lightness) - 0.14 * skin) / (0.07 * skin)


def rim_median(strip: Strip, values: Plane) -> float:
    """The skin's value, from the strip's upper and lower rim; at least 1."""
    middle = values[:, strip.middle]
    return max(float(np.median(np.concatenate([middle[:6], middle[-6:]]))), 1.0)


def valley_depth(strip: Strip, values: Plane) -> Plane:
    """How far each pixel lies below the lower of the two peaks above and below it in its column."""
    inside = strip.inside_window
    bottom = float(values.min())
    margin = round(WIDEST_GAP * strip.half)
    # Nothing outside the window may be a peak: nostrils and chin are red too.
    padded = np.full((len(values) + 2 * margin, values.shape[1]), bottom, np.float32)
    padded[margin:-margin][inside] = values[inside]
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, np.ones((margin, 1), np.uint8))
    return np.where(inside[:, None], np.maximum(closed[margin:-margin] - values, 0), 0).astype(np.float32)
