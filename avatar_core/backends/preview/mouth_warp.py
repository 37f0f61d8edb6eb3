"""Where each pixel of the lower face comes from, for the two layers that part at the lips."""

import cv2
import numpy as np
from numpy.typing import NDArray

from avatar_core.backends.preview.axes import Box, FaceAxes, smoothstep
from avatar_core.backends.preview.mouth_fields import MouthFields
from avatar_core.backends.preview.warp import FloatArray, resize, warp_values, weighted_sum

INVERSION_STEPS = 3


class MouthWarp:
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
            [
                self._coarse(fields.open * fade, down),
                self._coarse(fields.open_round * fade, down),
                self._coarse(fields.close * fade, down),
                self._coarse(fields.lift * fade, down),
                self._coarse(fields.flatten * fade, down),
                self._coarse(fields.drop * fade, down),
                self._coarse(fields.spread * fade, across),
            ]
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
