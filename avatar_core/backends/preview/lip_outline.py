"""Fits the template's lips to the line between them, or to the gap of an open mouth, in the picture."""

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from avatar_core.backends.preview.gap_outline import Gap
from avatar_core.backends.preview.lowest_path import lowest_path
from avatar_core.backends.preview.mouth_gap import Plane, Strip, find_gap
from avatar_core.media.face import Picture

Points = NDArray[np.float64]

HALF = 64  # strip pixels per half mouth width, and per height unit
TOP, BOTTOM = -0.7, 0.9  # the strip's heights, in height units below the corners' line
ROWS = int((BOTTOM - TOP) * HALF)
REACH = 1.4  # half mouth widths to either side: the detector's corners may lie inside or outside the mouth's
HEIGHT_UNIT = 0.45  # of the eye-mouth distance
ACROSS = np.linspace(-0.96, 0.96, 11)  # where the inner lips' points stand, in half mouth widths
# The same for an open mouth, in shares from corner to corner: closer where its edges turn.
ACROSS_GAP = np.sin(np.linspace(-0.46, 0.46, 11) * np.pi)
MIDDLE = 5  # index of a lip's middle point
LIP_ROWS = 25  # about the thickness of a lip in the strip
SHADOW_BELOW, SHADOW_HEIGHT = 0.1, 0.2  # height units: a gap lower and narrower than this is a shadow
SEAM_REACH = 0.3  # height units the seam may lie away from the template's
LOWER_LIP, JAW_DROP = 0.2, 0.3  # height units: of a lower lip in the window; that lips sink in an open mouth
CORNER = 0.06  # half mouth widths from a gap's end to the corner of the lips
LEAST_HALF_WIDTH = 0.75  # of the detector's: as far as round lips are believed to be narrower than it says


@dataclass(frozen=True)
class LipCurves:
    """Curves (11, 2) in picture pixels, left to right."""

    upper_inner: Points
    lower_inner: Points
    upper_outer: Points
    lower_outer: Points


@dataclass(frozen=True)
class MouthFrame:
    """Coordinates over the mouth: `across` is half its width, `down` one height unit towards the chin."""

    centre: Points
    across: Points
    down: Points

    def strip(self, picture: Picture) -> Picture:
        """The mouth and its surroundings, from -REACH to REACH across and from TOP to BOTTOM."""
        half_columns = round(REACH * HALF)
        origin = self.centre - self.across * half_columns / HALF + self.down * TOP
        matrix = np.column_stack([self.across / HALF, self.down / HALF, origin])
        strip = cv2.warpAffine(
            picture,
            matrix,
            (2 * half_columns, ROWS),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        return np.asarray(strip, np.uint8)

    def heights(self, curve: Points) -> Points:
        axes = np.column_stack([self.across, self.down])
        return np.linalg.solve(axes, (curve - self.centre).T)[1]

    def to_picture(self, across: Points, height: Points) -> Points:
        return self.centre + np.outer(across, self.across) + np.outer(height, self.down)


def mouth_frame(lips: LipCurves, nose: Points, chin: Points, eye_mouth: float) -> MouthFrame:
    left, right = lips.upper_outer[0], lips.upper_outer[-1]
    across = (right - left) / 2
    length = float(np.linalg.norm(across))
    if length < 1:
        across, length = np.array([1.0, 0.0]), 1.0
    down = (chin - nose) / max(float(np.linalg.norm(chin - nose)), 1e-6)
    square = np.array([-across[1], across[0]]) / length
    # A chin far to the side (a bad pose) would shear the strip flat.
    down = down if down @ square > 0.5 else square
    return MouthFrame((left + right) / 2, across, down * HEIGHT_UNIT * eye_mouth)


def fitted_lips(picture: Picture, lips: LipCurves, frame: MouthFrame, *, closed: bool = True) -> LipCurves:
    """Lips moved round the gap of a mouth that the picture shows open; others, if `closed`, to its seam."""
    strip = mouth_strip(frame.strip(picture), lip_window(frame, lips))
    template = frame.heights((lips.upper_inner + lips.lower_inner) / 2)
    seam = np.clip(seam_heights(strip), template - SEAM_REACH, template + SEAM_REACH)
    gap = whole_gap(strip)
    if gap is not None and not _is_below_the_lips(seam[MIDDLE], gap):
        return opened_lips(lips, frame, gap)
    if not closed:
        return lips
    inner = frame.to_picture(ACROSS, seam)
    return LipCurves(
        inner,
        inner,
        inner + (lips.upper_outer - lips.upper_inner),
        inner + (lips.lower_outer - lips.lower_inner),
    )


def whole_gap(strip: Strip) -> Gap | None:
    """The gap; where it reaches the lower end of the window, which fits closed lips, one looked for further
    down."""
    gap = find_gap(strip)
    upper, lower = strip.window
    if gap is None or gap.edges(strip.across)[1].max() < lower - LOWER_LIP:
        return gap
    deeper = replace(strip, window=(upper, min(lower + JAW_DROP, BOTTOM - 0.05)))
    return find_gap(deeper) or gap


def opened_lips(lips: LipCurves, frame: MouthFrame, gap: Gap) -> LipCurves:
    """Lips round the gap. Its ends tell where the corners are; the detector's may lie elsewhere, above all
    in turned faces and round mouths."""
    corners = np.array([min(gap.left - CORNER, -LEAST_HALF_WIDTH), max(gap.right + CORNER, LEAST_HALF_WIDTH)])
    middle, half = corners.mean(), np.ptp(corners) / 2
    across = middle + half * ACROSS_GAP
    upper, lower = (frame.to_picture(across, height) for height in gap.edges(across))
    # The template's thickness, as wide as the mouth is seen to be.
    upper_outer, lower_outer = (
        inner + narrowed(outer - template, frame, half)
        for inner, outer, template in (
            (upper, lips.upper_outer, lips.upper_inner),
            (lower, lips.lower_outer, lips.lower_inner),
        )
    )
    for outer in (upper_outer, lower_outer):
        outer[[0, -1]] = frame.to_picture(corners, gap.ends)
    return LipCurves(upper, lower, upper_outer, lower_outer)


def _is_below_the_lips(seam: float, gap: Gap) -> bool:
    """A low and narrow gap under a closed mouth is the shadow of the lower lip."""
    (top,), (bottom,) = gap.edges(np.zeros(1))
    return bool(top - seam > SHADOW_BELOW and bottom - top < SHADOW_HEIGHT)


def narrowed(offset: Points, frame: MouthFrame, factor: float) -> Points:
    """Offsets (n, 2) with their part along the mouth multiplied by `factor`."""
    axes = np.column_stack([frame.across, frame.down])
    return np.asarray(offset @ (axes @ np.diag([factor, 1]) @ np.linalg.inv(axes)).T, np.float64)


def lip_window(frame: MouthFrame, lips: LipCurves) -> tuple[float, float]:
    """The heights between which lips are looked for."""
    upper = float(frame.heights(lips.upper_outer)[MIDDLE])
    lower = float(frame.heights(lips.lower_outer)[MIDDLE])
    return float(np.clip(upper - 0.25, -0.5, 0)), float(np.clip(lower + 0.15, 0.4, BOTTOM - 0.05))


def mouth_strip(strip: Picture, window: tuple[float, float]) -> Strip:
    lab = cv2.cvtColor(cv2.GaussianBlur(strip, (0, 0), 1.2), cv2.COLOR_RGB2LAB).astype(np.float32)
    return Strip(lab[..., 0], lab[..., 1], HALF, TOP + np.arange(ROWS) / HALF, window)


def seam_heights(strip: Strip) -> Points:
    """Height of the lips' seam over ACROSS: the darkest way between red lips through the strip from side
    to side, held near the corners' line and smoothed by a quartic."""
    strip = between_corners(strip)
    lightness = strip.lightness
    even = (lightness - np.median(lightness)) / (lightness.std() + 1e-3)
    valley = cv2.GaussianBlur(even, (0, 0), 9) - cv2.GaussianBlur(even, (0, 0), 1.5)
    row = np.arange(ROWS)
    path = lowest_path(0.00045 * (row[:, None] + TOP * HALF) ** 2 - valley - lip_likeness(strip))
    quartic = np.polyfit(strip.across, path / HALF + TOP, 4)
    return np.asarray(np.polyval(quartic, ACROSS), np.float64)


def between_corners(strip: Strip) -> Strip:
    columns = np.abs(strip.across) < 1
    return replace(strip, lightness=strip.lightness[:, columns], redness=strip.redness[:, columns])


def lip_likeness(strip: Strip) -> Plane:
    """0..1: how red the strip is close above and below; keeps the seam out of a dark moustache."""
    redness = cv2.morphologyEx(strip.redness, cv2.MORPH_CLOSE, np.ones((LIP_ROWS, 1), np.uint8))
    middle = strip.redness[strip.inside_window, strip.middle]
    low, high = np.percentile(middle, [20, 95])
    return np.clip((redness - low) / max(high - low, 6.0), 0, 1).astype(np.float32)
