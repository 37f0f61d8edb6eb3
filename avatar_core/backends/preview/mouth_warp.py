"""The mouth of one face: the picture's own lower face, warped in two layers that part at the lips."""

import cv2
import numpy as np
from numpy.typing import NDArray

from avatar_core.backends.preview.axes import Box, FaceAxes, smoothstep
from avatar_core.backends.preview.contours import Contours
from avatar_core.backends.preview.mouth_fields import TEETH_MARGIN, U_LIMIT, Lips, MouthFields
from avatar_core.backends.preview.oral_cavity import FaceLight, draw_cavity
from avatar_core.backends.preview.warp import (
    FloatArray,
    Picture,
    resize,
    warp_picture,
    warp_values,
    weighted_sum,
)

MAX_GAP = 0.62  # between the lips at mouth_open = 1, in v units
QUIET = 0.05  # smaller openings are noise of the audio track
CLOSED_GAP = 0.008
MOST_LIFT = 0.3  # of the lip line by any field, v units, with some reserve
TURNED_STIFFNESS = 0.65  # of the movement that a face in profile loses: its outline is not trusted
INVERSION_STEPS = 3


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
        self._light = FaceLight.measure(picture, axes)
        self._teeth = 1 - float(smoothstep(np.array(axes.turn), 0.5, 1.0))
        self._freedom = 1 - TURNED_STIFFNESS * float(smoothstep(np.array(axes.turn), 0.35, 1.2))
        self._pixel = 1 / axes.unit_v  # one pixel in v units
        self._u, v = axes.mouth.grid(self.box)
        upper, lower = self._lips.upper_at(self._u), self._lips.lower_at(self._u)
        self._below_lower, self._above_upper = v - lower, upper - v
        self._own_gap = lower - upper - TEETH_MARGIN
        self._shared_rows = self._rows_of_both_layers()
        self._warp = _Warp(MouthFields.build(self._u, v, self._lips, chin_v, nose_v), axes, self.box)

    def _rows_of_both_layers(self) -> tuple[int, int]:
        """First row that any opening gives to the lower layer; first below all that keep the upper one."""
        below_upper = np.flatnonzero((self._above_upper < MOST_LIFT).any(axis=1))
        above_lower = np.flatnonzero((self._below_lower < MAX_GAP + MOST_LIFT).any(axis=1))
        if not len(below_upper) or not len(above_lower):
            return 0, len(self._u)
        return int(below_upper[0]), int(above_lower[-1]) + 1

    def draw(self, frame: Picture, mouth_open: float, mouth_wide: float) -> None:
        if self.box.empty:
            return
        gap = MAX_GAP * max(0.0, (mouth_open - QUIET) / (1 - QUIET)) ** 1.15
        more_gap = self._freedom * (gap - self._lips.gap)
        gap = self._lips.gap + more_gap
        upper_map, lower_map = self._warp.maps(more_gap, self._freedom * mouth_wide)
        source = frame[self.box.slices]
        first, last = self._shared_rows
        upper = warp_picture(source, upper_map[:last])
        lower = warp_picture(source, lower_map[first:])
        upper_map, lower_map = upper_map[first:last], lower_map[first:last]
        above = warp_values(self._above_upper, upper_map)  # > 0 on the upper lip, < 0 in the opening
        below = warp_values(self._below_lower, lower_map)  # > 0 on the lower lip, < 0 in the opening
        share = np.clip((above - below) / (2.4 * self._pixel) + 0.5, 0, 1)
        shared = np.asarray(cv2.blendLinear(upper[first:], lower[: last - first], share, 1 - share), np.uint8)
        if gap > CLOSED_GAP:
            self._draw_inside(shared, upper[first:], upper_map, above, below, gap, mouth_wide)
        frame[self.box.slices] = np.concatenate([upper[:first], shared, lower[last - first :]])

    def _draw_inside(
        self,
        shared: Picture,
        upper: Picture,
        upper_map: FloatArray,
        above: FloatArray,
        below: FloatArray,
        gap: float,
        wide: float,
    ) -> None:
        inside = -np.maximum(above, below)
        opening = _bounds(inside > -0.1 * self._pixel)
        if opening is None:
            return
        lip_map = np.ascontiguousarray(upper_map[opening])
        u = warp_values(self._u, lip_map)
        depth, height = -above[opening], -below[opening]
        colours = draw_cavity(self._light, u, depth, height, gap, wide, self._teeth)
        if self._lips.gap:
            own = self._own_teeth(warp_values(self._own_gap, lip_map), depth)[..., None]
            colours = np.asarray(colours * (1 - own) + upper[opening] * own, np.float32)
        shade = 1 - 0.45 * np.exp(-np.maximum(depth, 0) / 0.05) - 0.30 * np.exp(-np.maximum(height, 0) / 0.05)
        cover = smoothstep(inside[opening], -0.1 * self._pixel, 1.7 * self._pixel)
        # Thin wedges at the corners are where an outline errs first: they stay lip.
        cover = cover * smoothstep(depth + height, 0, 0.10) * (1 - smoothstep(np.abs(u), 0.97, 1.06))
        shaded = colours * np.clip(shade, 0.3, 1)[..., None]
        cover = cover[..., None]
        shared[opening] = np.clip(shared[opening] * (1 - cover) + shaded * cover, 0, 255)

    def _own_teeth(self, own_gap: FloatArray, depth: FloatArray) -> FloatArray:
        """Where the inside that the picture itself shows, moving with the upper lip, is used."""
        beyond = smoothstep(depth - own_gap, -3.5 * self._pixel, -0.5 * self._pixel)
        return np.asarray((1 - beyond) * (own_gap > 0.02), np.float32)


class _Warp:
    """Inverse maps of the two layers for a given opening and width."""

    def __init__(self, fields: MouthFields, axes: FaceAxes, box: Box) -> None:
        x, y = box.grid()
        self._pixels = np.dstack([x - box.x0, y - box.y0])
        height, width = x.shape
        # The fields are smooth: a coarser grid loses nothing and is faster.
        coarseness = int(np.clip(round(width / 115), 1, 4))
        self._size = -(-width // coarseness), -(-height // coarseness)
        self._scale = np.array([self._size[0] / width, self._size[1] / height], np.float32)
        fade = smoothstep(box.border_distance(), 0, 4)
        down, across = axes.mouth.down, axes.mouth.across
        self._fields = np.stack(
            [self._coarse(field * fade, down) for field in (fields.open, fields.open_round, fields.close)]
            + [self._coarse(field * fade, down) for field in (fields.lift, fields.flatten, fields.drop)]
            + [self._coarse(fields.spread * fade, across)]
        )
        coarse_x, coarse_y = np.meshgrid(np.arange(self._size[0]), np.arange(self._size[1]))
        self._coarse_pixels = np.dstack([coarse_x, coarse_y]).astype(np.float32)

    def _coarse(self, field: FloatArray, direction: NDArray[np.float64]) -> FloatArray:
        """Displacement (height, width, 2) in coarse pixels."""
        displacement = np.dstack([field * direction[0], field * direction[1]]).astype(np.float32)
        return resize(displacement, self._size, cv2.INTER_AREA) * self._scale

    def maps(self, more_gap: float, wide: float) -> tuple[FloatArray, FloatArray]:
        """Upper and lower layer; `more_gap` than the picture shows, negative to close it."""
        opened, closed = max(more_gap, 0.0), min(more_gap, 0.0)
        rounded = min(1.0, max(0.0, -wide))
        flatten = 0.8 * min(1.0, 0.55 * rounded + 0.7 * opened)
        spread = 0.10 * max(wide, 0.0) - 0.30 * rounded - 0.16 * opened
        drop = 0.35 * opened
        lift = opened * (1 + 0.6 * rounded)
        upper_weights = (0, 0, 0, lift, flatten, drop, spread)
        lower_weights = (opened * (1 - rounded), opened * rounded, closed, 0, flatten, drop, spread)
        upper, lower = (weighted_sum(weights, self._fields) for weights in (upper_weights, lower_weights))
        return self._inverted(upper), self._inverted(lower)

    def _inverted(self, displacement: FloatArray) -> FloatArray:
        """Where each pixel comes from, by fixed-point iteration."""
        sources = self._coarse_pixels - displacement
        for _ in range(INVERSION_STEPS):
            sources = self._coarse_pixels - warp_values(displacement, sources)
        back = np.asarray((self._coarse_pixels - sources) / self._scale, np.float32)
        height, width = self._pixels.shape[:2]
        if back.shape[:2] != (height, width):
            back = resize(back, (width, height))
        return self._pixels - back


def _bounds(mask: NDArray[np.bool_]) -> tuple[slice, slice] | None:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
