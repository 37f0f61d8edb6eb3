"""The mouth of one face: the picture's own lower face, warped in two layers that part at the lips."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from avatar_core.backends.preview.axes import Box, FaceAxes, smoothstep
from avatar_core.backends.preview.contours import Contours
from avatar_core.backends.preview.mouth_fields import TEETH_MARGIN, U_LIMIT, Lips, MouthFields
from avatar_core.backends.preview.mouth_warp import MouthWarp
from avatar_core.backends.preview.oral_cavity import FaceLight, draw_cavity, lip_shade
from avatar_core.backends.preview.own_inside import OwnInside
from avatar_core.backends.preview.warp import FloatArray, Picture, warp_picture, warp_sharply, warp_values

MAX_GAP = 0.62  # between the lips at mouth_open = 1, in v units
DETAIL_U, DETAIL_V = 1.25, 0.9  # what is drawn with the better interpolation: the lips
QUIET = 0.05  # smaller openings are noise of the audio track
CLOSED_GAP = 0.008
MOST_LIFT = 0.3  # of the lip line by any field, v units, with some reserve
DEPTH = 0.05  # v units over which the depth of an open mouth grows dark
TURNED_STIFFNESS = 0.55  # of the movement that a face in profile loses: its outline is not trusted


class Mouth:
    def __init__(self, picture: Picture, contours: Contours, axes: FaceAxes) -> None:
        chin_v = max(float(axes.mouth.to_uv(contours.chin)[1]), 0.6)
        nose_v = float(axes.mouth.to_uv(contours.nose)[1])
        top, bottom = 1.1 * nose_v - 0.1, 1.8 * chin_v
        corners = np.array([(side * U_LIMIT, v) for side in (-1, 1) for v in (top, bottom)])
        self.box = Box.around(axes.mouth.to_picture(corners), picture.shape, margin=2)
        if self.box.empty:
            return
        self._lips = Lips.measure(contours, axes)
        self._light = FaceLight.measure(picture, self.box, axes)
        self._teeth = 1 - float(smoothstep(np.array(axes.turn), 0.5, 1.0))
        self._freedom = 1 - TURNED_STIFFNESS * float(smoothstep(np.array(axes.turn), 0.35, 1.2))
        self._pixel = 1 / axes.unit_v  # one pixel in v units
        self._u, v = axes.mouth.grid(self.box)
        near = (np.abs(self._u) < DETAIL_U) & (np.abs(v) < DETAIL_V)
        self._detail = _bounds(near) or (slice(0, 0), slice(0, 0))
        upper, lower = self._lips.upper_at(self._u), self._lips.lower_at(self._u)
        self._below_lower, self._above_upper = v - lower, upper - v
        self._measure_inside(picture, axes)
        self._highest_above_lower = self._below_lower.min(axis=1)  # of each row
        below_upper = np.flatnonzero((self._above_upper < MOST_LIFT).any(axis=1))
        self._first_shared = int(below_upper[0]) if len(below_upper) else 0
        self._warp = MouthWarp(MouthFields.build(self._u, v, self._lips, chin_v, nose_v), axes, self.box)

    def _measure_inside(self, picture: Picture, axes: FaceAxes) -> None:
        """What the picture shows between open lips, and how much of its height moves with either lip."""
        self._own = OwnInside.measure(picture, self._lips, axes, self._light) if self._lips.gap else None
        if self._own is None:
            return
        gap, share = self._lips.own_gap_at(self._u), self._own.upper_share(self._u)
        self._on_upper = np.where(gap > 0.02, share * gap, -1).astype(np.float32)
        self._on_lower = np.where(gap > 0.02, (1 - share) * gap + TEETH_MARGIN, -1).astype(np.float32)

    def _rows_of_both_layers(self, gap: float) -> tuple[int, int]:
        """First row that may show the lower layer; first below all that may show the upper one."""
        above_lower = np.flatnonzero(self._highest_above_lower < gap + MOST_LIFT)
        last = int(above_lower[-1]) + 1 if len(above_lower) else len(self._u)
        return min(self._first_shared, last - 1), last

    def draw(self, frame: Picture, mouth_open: float, mouth_wide: float) -> None:
        if self.box.empty:
            return
        gap = MAX_GAP * max(0.0, (mouth_open - QUIET) / (1 - QUIET)) ** 1.15
        more_gap = gap - self._lips.gap
        # The picture's own opening is seen, not guessed: it may close further than a turned mouth may open.
        more_gap *= self._freedom if more_gap > 0 else (1 + self._freedom) / 2
        gap = self._lips.gap + more_gap
        upper_map, lower_map = self._warp.maps(more_gap, self._freedom * mouth_wide)
        first, last = self._rows_of_both_layers(gap)
        source = frame[self.box.slices]
        upper = self._layer(source, upper_map, 0, last)
        lower = self._layer(source, lower_map, first, len(lower_map))
        layers = _Layers(
            upper=upper[first:],
            lower=lower[: last - first],
            upper_map=upper_map[first:last],
            lower_map=lower_map[first:last],
            above=warp_values(self._above_upper, upper_map[first:last]),
            below=warp_values(self._below_lower, lower_map[first:last]),
        )
        shared = layers.joined(self._pixel)
        if gap > CLOSED_GAP:
            self._draw_inside(shared, layers, gap, mouth_wide)
        frame[self.box.slices] = np.concatenate([upper[:first], shared, lower[last - first :]])

    def _layer(self, source: Picture, sources: FloatArray, first: int, last: int) -> Picture:
        """Rows of one layer. Skin looks the same with the quicker interpolation; lips get the sharp one."""
        layer = warp_picture(source, sources[first:last], cv2.INTER_LINEAR)
        lips = slice(max(first, self._detail[0].start), min(last, self._detail[0].stop)), self._detail[1]
        if lips[0].start < lips[0].stop:
            rows = slice(lips[0].start - first, lips[0].stop - first)
            layer[rows, lips[1]] = warp_sharply(source, sources[lips])
        return layer

    def _draw_inside(self, shared: Picture, layers: "_Layers", gap: float, wide: float) -> None:
        inside = -np.maximum(layers.above, layers.below)
        opening = _bounds(inside > -0.1 * self._pixel)
        if opening is None:
            return
        u = warp_values(self._u, np.ascontiguousarray(layers.upper_map[opening]))
        depth, height = -layers.above[opening], -layers.below[opening]
        colours = self._inside(layers, opening, u, gap, wide)
        cover = smoothstep(inside[opening], -0.1 * self._pixel, 1.7 * self._pixel)
        # Thin wedges at the corners are where an outline errs first: they stay lip.
        cover = cover * smoothstep(depth + height, 0, 0.10) * (1 - smoothstep(np.abs(u), 0.97, 1.06))
        cover = cover[..., None]
        shared[opening] = np.clip(shared[opening] * (1 - cover) + colours * cover, 0, 255)

    def _inside(
        self, layers: "_Layers", opening: tuple[slice, slice], u: FloatArray, gap: float, wide: float
    ) -> FloatArray:
        """Colours (height, width, 3): drawn, but for what the picture shows on either jaw."""
        depth, height = -layers.above[opening], -layers.below[opening]
        own = self._own
        if own is None:
            colours = draw_cavity(self._light, u, depth, height, gap, wide, self._teeth)
            return np.asarray(colours * lip_shade(depth, height)[..., None], np.float32)
        own_upper = warp_values(self._on_upper, np.ascontiguousarray(layers.upper_map[opening]))
        on_upper = self._reaches(own_upper, depth)
        if own.depth is None:
            colours = draw_cavity(self._light, u, depth, height, gap, wide, self._teeth)
            colours = colours * (1 - on_upper) + layers.upper[opening] * on_upper
            return np.asarray(colours * lip_shade(depth, height)[..., None], np.float32)
        own_lower = warp_values(self._on_lower, np.ascontiguousarray(layers.lower_map[opening]))
        on_lower = self._reaches(own_lower, height)
        far = smoothstep(np.minimum(depth - own_upper, height - own_lower), 0, DEPTH)[..., None]
        colours = own.depth.near * (1 - far) + own.depth.far * far
        colours = colours * (1 - on_lower) + layers.lower[opening] * on_lower
        return np.asarray(colours * (1 - on_upper) + layers.upper[opening] * on_upper, np.float32)

    def _reaches(self, own: FloatArray, distance: FloatArray) -> FloatArray:
        """0..1: where `distance` from a lip is within what the picture shows there."""
        return np.asarray(1 - smoothstep(distance - own, -3.5 * self._pixel, -0.5 * self._pixel), np.float32)[
            ..., None
        ]


@dataclass(frozen=True)
class _Layers:
    """Both layers, warped for one frame, in the rows that they share."""

    upper: Picture
    lower: Picture
    upper_map: FloatArray
    lower_map: FloatArray
    above: FloatArray  # v units, > 0 on the upper lip, < 0 in the opening
    below: FloatArray  # v units, > 0 on the lower lip, < 0 in the opening

    def joined(self, pixel: float) -> Picture:
        """Each pixel from the layer it lies deeper in, with a soft edge."""
        share = np.clip((self.above - self.below) / (2.4 * pixel) + 0.5, 0, 1)
        return np.asarray(cv2.blendLinear(self.upper, self.lower, share, 1 - share), np.uint8)


def _bounds(mask: NDArray[np.bool_]) -> tuple[slice, slice] | None:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
