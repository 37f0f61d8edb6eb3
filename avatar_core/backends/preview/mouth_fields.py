"""How the lower face moves when the mouth opens, rounds, spreads or closes: constant displacement fields.

Everything is in the mouth's own coordinates (see `FaceAxes`): u along the mouth, v towards the chin.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from avatar_core.backends.preview.axes import FaceAxes, smoothstep
from avatar_core.backends.preview.contours import Contours, Points
from avatar_core.backends.preview.warp import FloatArray

U_LIMIT = 2.6  # the fields end here, well inside the cheeks
_TABLE_SIZE = 521
_TABLE_U = np.linspace(-U_LIMIT, U_LIMIT, _TABLE_SIZE)
_SOFT_ENDS = 8  # steps of the table
_CENTRE = np.abs(_TABLE_U) < 0.3
_CLOSED_GAP = 0.07  # narrower openings are a line between closed lips
TEETH_MARGIN = 0.05  # trimmed from the lower lip's edge, lest a rim of teeth travels with it


@dataclass(frozen=True)
class Lips:
    """The lips as the picture shows them. `upper` and `lower`: v of the inner edges at `_TABLE_U`."""

    upper: NDArray[np.float64]
    lower: NDArray[np.float64]
    gap: float  # between `upper` and `lower` in the middle; 0 for a closed mouth
    upper_thickness: float
    lower_thickness: float

    @classmethod
    def measure(cls, contours: Contours, axes: FaceAxes) -> "Lips":
        upper = _lip_edge(axes.mouth.to_uv(contours.upper_lip_inner))
        lower = _lip_edge(axes.mouth.to_uv(contours.lower_lip_inner))
        middle = (upper + lower) / 2
        half_gap = np.maximum(lower - upper, 0) / 2 * (1 - smoothstep(np.abs(_TABLE_U), 0.94, 1.02))
        gap = float(2 * half_gap[_CENTRE].mean())
        if gap < _CLOSED_GAP:
            half_gap, gap = np.zeros_like(half_gap), 0.0
        trim = TEETH_MARGIN * half_gap / max(half_gap.max(), 1e-3)
        upper, lower = middle - half_gap, middle + half_gap + trim
        gap += TEETH_MARGIN if gap else 0.0
        top = axes.mouth.to_uv(contours.upper_lip_outer)[5, 1]
        bottom = axes.mouth.to_uv(contours.lower_lip_outer)[5, 1]
        mid = _TABLE_SIZE // 2
        return cls(upper, lower, gap, max(0.2, upper[mid] - top), max(0.25, bottom - lower[mid]))

    def upper_at(self, u: FloatArray) -> FloatArray:
        return np.interp(u, _TABLE_U, self.upper).astype(np.float32)

    def lower_at(self, u: FloatArray) -> FloatArray:
        return np.interp(u, _TABLE_U, self.lower).astype(np.float32)

    def own_gap_at(self, u: FloatArray) -> FloatArray:
        """The opening's height without what is trimmed from the lower lip; none of a closed mouth."""
        return np.maximum(self.lower_at(u) - self.upper_at(u) - (TEETH_MARGIN if self.gap else 0), 0)

    def gap_profile_at(self, u: FloatArray) -> FloatArray:
        """Height of the opening relative to its middle, softened at the ends, where lips would shear."""
        profile = _smoothed(self.lower - self.upper, _SOFT_ENDS) / max(self.gap, 1e-3)
        return np.interp(u, _TABLE_U, profile).astype(np.float32)


def _lip_edge(curve: Points) -> NDArray[np.float64]:
    """Smooth continuation of a lip edge past the mouth corners, sampled at `_TABLE_U`."""
    u = np.concatenate([[-U_LIMIT, -1.25], curve[:, 0], [1.25, U_LIMIT]])
    ends = curve[0, 1], curve[-1, 1]
    v = np.concatenate([[ends[0] - 0.03, ends[0]], curve[:, 1], [ends[1], ends[1] - 0.03]])
    order = np.argsort(u)
    sampled = np.interp(_TABLE_U, u[order], v[order])
    return _smoothed(sampled, 3)


def _smoothed(table: NDArray[np.float64], sigma: int) -> NDArray[np.float64]:
    reach = 3 * sigma
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return np.convolve(np.pad(table, reach, mode="edge"), kernel / kernel.sum(), mode="valid")


@dataclass(frozen=True)
class MouthFields:
    """Forward displacements at rest coordinates, each (height, width); `spread` along u, the rest along v."""

    open: FloatArray  # lower lip and jaw, one unit of gap
    open_round: FloatArray  # the same with a narrow opening
    close: FloatArray  # undoes one unit of the picture's own gap
    lift: FloatArray  # upper lip
    flatten: FloatArray  # straightens the curve of the mouth: less of a smile
    drop: FloatArray  # corners down, as they go half-way with the jaw
    spread: FloatArray  # corners outwards

    @classmethod
    def build(cls, u: FloatArray, v: FloatArray, lips: Lips, chin_v: float, nose_v: float) -> "MouthFields":
        upper, lower = lips.upper_at(u), lips.lower_at(u)
        seam = (upper + lower) / 2
        on_lip = np.exp(-((np.maximum(0, v - lower) / (1.15 * lips.lower_thickness)) ** 2))
        above_neck = 1 - smoothstep(v, 0.98 * chin_v, 1.75 * chin_v)
        jaw = np.exp(-((np.abs(u) / 1.55) ** 3)) * (1 - on_lip) * above_neck
        opening = np.maximum(0, 1 - np.abs(u / 0.93) ** 2.2)
        round_opening = np.maximum(0, 1 - np.abs(u / 0.66) ** 2.2) ** 0.9
        open_field = opening * on_lip + 0.86 * jaw
        lifted = np.exp(-((np.maximum(0, upper - v) / (1.3 * lips.upper_thickness)) ** 2))
        if nose_v < -0.1:  # the nose itself stays
            lifted = lifted * smoothstep(v, nose_v, 0.45 * nose_v)
        middle_v = float((lips.upper + lips.lower)[_TABLE_SIZE // 2]) / 2
        return cls(
            open=open_field,
            open_round=round_opening * on_lip + 0.86 * jaw,
            close=lips.gap_profile_at(u) * on_lip + 0.7 * jaw if lips.gap else open_field,
            lift=-0.17 * opening * lifted,
            flatten=(middle_v - seam) * np.exp(-((u / 1.25) ** 4)) * np.exp(-(((v - seam) / 0.8) ** 2)),
            drop=np.exp(-(((np.abs(u) - 1) / 0.5) ** 2)) * np.exp(-(((v - seam) / 0.7) ** 2)),
            spread=u * np.exp(-((u / 1.35) ** 4)) * np.exp(-(((v - seam) / 0.85) ** 2)),
        )
