"""What the picture itself shows between open lips: what hangs on the upper jaw, what lies on the lower."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from avatar_core.backends.preview.axes import FaceAxes
from avatar_core.backends.preview.lowest_path import lowest_path
from avatar_core.backends.preview.mouth_fields import Lips
from avatar_core.backends.preview.oral_cavity import LUMINANCE, FaceLight
from avatar_core.backends.preview.warp import FloatArray, Picture, warp_picture

ACROSS = np.linspace(-0.85, 0.85, 48, dtype=np.float32)  # columns looked at, in half mouth widths
DOWN = np.linspace(0.04, 0.96, 32)  # rows looked at, in shares of the opening's height
# The shadow under the upper lip is dark too: so much of the height hangs on the upper jaw at least.
UPPER_JAW = 0.3
DARK = 0.45  # of the skin's luminance: darker is the depth of the mouth, brighter a gap between teeth
DEEPEST = 0.13  # of the skin's luminance
CONTRAST = 4.0  # cost of a row as bright as skin, against steps of the path


@dataclass(frozen=True)
class Depth:
    """RGB of the depth of the mouth, `near` what the picture shows of it and `far` from that."""

    near: FloatArray
    far: FloatArray


@dataclass(frozen=True)
class OwnInside:
    """`parting`: polynomial in u of the share of the opening's height above the darkest line, which parts
    the jaws; `depth` is None where teeth fill the opening, which all hang on the upper jaw."""

    parting: NDArray[np.float64]
    depth: Depth | None

    @classmethod
    def measure(cls, picture: Picture, lips: Lips, axes: FaceAxes, light: FaceLight) -> "OwnInside":
        top, height = lips.upper_at(ACROSS), lips.own_gap_at(ACROSS)
        v = top + DOWN[:, None] * height
        uv = np.dstack([np.broadcast_to(ACROSS, v.shape), v])
        places = axes.mouth.to_picture(uv.reshape(-1, 2)).reshape(uv.shape)
        inside = warp_picture(picture, places.astype(np.float32), cv2.INTER_LINEAR)
        brightness = cv2.GaussianBlur(inside.astype(np.float32) @ LUMINANCE, (0, 0), 1) / light.skin
        cost = CONTRAST * brightness + np.where(DOWN < UPPER_JAW, 99.0, 0.0)[:, None]
        path = lowest_path(cost.astype(np.float64))
        columns = np.arange(len(ACROSS))
        if np.median(brightness[path, columns]) > DARK:
            return cls(np.ones(1), None)
        parting = np.polyfit(ACROSS, DOWN[path], 2, w=np.maximum(height, 1e-3))
        near = np.median(inside[path, columns], axis=0).astype(np.float32)
        far = near * np.float32(min(1.0, DEEPEST * light.skin / max(float(near @ LUMINANCE), 1.0)))
        return cls(parting, Depth(near, far))

    def upper_share(self, u: FloatArray) -> FloatArray:
        """Share of the opening's height that hangs on the upper jaw, 0..1."""
        return np.clip(np.polyval(self.parting, np.clip(u, ACROSS[0], ACROSS[-1])), 0, 1).astype(np.float32)
