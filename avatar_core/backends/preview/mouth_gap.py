"""Sees in a rectified mouth strip whether the mouth is open, and where its inside begins and ends.

Between the lips redness falls, whether teeth or a dark cavity show; the fall is measured against the lip
above and below in the same column, so neither light nor skin colour has to be known.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from avatar_core.backends.preview.lowest_path import lowest_path

Floats = NDArray[np.float64]
Plane = NDArray[np.float32]

WIDEST_GAP = 0.83  # height units; deeper valleys are not seen as one
LEAST_GAP = 0.1  # height of a gap in its middle
NOT_LIP, NOT_SEARCHED = -0.6, 50.0


@dataclass(frozen=True)
class Strip:
    """Lightness and redness (0..255) of a mouth strip; `half` columns are half the mouth's width and as
    many rows one height unit. `height` is each row's height, and the lips lie within `window` heights."""

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
        """Each column's place in half mouth widths, -1..1."""
        return (np.arange(2 * self.half) + 0.5) / self.half - 1


def find_gap(strip: Strip, at: Floats) -> tuple[Floats, Floats] | None:
    """Heights of the gap's upper and lower edge at the places `at` (half mouth widths); None: closed."""
    evidence = inside_evidence(strip)
    upper, lower = gap_rows(strip, evidence)
    rows = strip.height[0] + np.stack([upper, lower]) / strip.half
    size = rows[1] - rows[0]
    total = np.array([evidence[a:b, x].sum() for x, (a, b) in enumerate(zip(upper, lower, strict=True))])
    mean = total / np.maximum(lower - upper, 1)
    middle = np.abs(strip.across) < 0.75
    seen = middle & (size > 0.03) & (mean > 0.1)
    centre = seen & (np.abs(strip.across) < 0.35)
    if seen.sum() < 0.7 * middle.sum() or not centre.any():
        return None
    if np.median(size[centre]) < LEAST_GAP or mean[middle].mean() < 0.4:
        return None
    return smooth_edges(strip.across[seen], rows[:, seen], at)


def smooth_edges(across: Floats, edges: Floats, at: Floats) -> tuple[Floats, Floats] | None:
    """Parabolas through the edges; None when the gap's middle line is too ragged to be a mouth's."""
    line = edges.mean(axis=0)
    ragged = line - np.polyval(np.polyfit(across, line, 2), across)
    if np.sqrt((ragged**2).mean()) > 0.08:
        return None
    upper, lower = (np.asarray(np.polyval(np.polyfit(across, edge, 2), at), np.float64) for edge in edges)
    return upper, np.maximum(upper, lower)


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
    middle = strip.inside_window, slice(strip.half // 2, -strip.half // 2)
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
    middle = values[:, strip.half // 2 : -strip.half // 2]
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
