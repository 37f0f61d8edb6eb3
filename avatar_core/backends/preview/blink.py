"""The blink of one eye: the skin between brow and lashes slides down over it."""

from collections.abc import Callable

import cv2
import numpy as np
from numpy.polynomial import Polynomial
from numpy.typing import NDArray

from avatar_core.backends.preview.axes import Axes, Box, FaceAxes, smoothstep, unit_vector
from avatar_core.backends.preview.contours import Contours, Points
from avatar_core.backends.preview.warp import FloatArray, Picture, warp_picture

MIN_HALF_WIDTH_PX = 4.0
MIN_OPENING = 0.12  # height over half width: flatter eyes are closed already
MIN_RELATIVE_WIDTH = 0.55  # the far eye of a turned head is left alone
MIN_TURN_OF_ONE_EYE = 0.5  # see `FaceAxes.turn`
CLOSURE = 0.97
BROW_FREE = 0.5  # of the height up to the brow: this much skin stretches, the brow itself stays
LASH_HEIGHT = 0.12  # what is dark below it are lashes, which may travel
MIN_SKIN_HEIGHT = 0.16
DARK = 0.36  # of the skin's brightness


def blinking_eyes(picture: Picture, contours: Contours, axes: FaceAxes) -> list["Eye"]:
    lower_margin = 0.02 if contours.source == "mesh" else 0.12
    outlines = (
        (contours.left_eye_upper, contours.left_eye_lower, contours.left_brow),
        (contours.right_eye_upper, contours.right_eye_lower, contours.right_brow),
    )
    eyes = [Eye(picture, *outline, axes.down, lower_margin) for outline in outlines]
    widest = max(eye.half_width for eye in eyes)
    able = [
        eye
        for eye, trusted in zip(eyes, contours.eyes_trusted, strict=True)
        if trusted and eye.usable and eye.half_width > MIN_RELATIVE_WIDTH * widest
    ]
    # One eye alone would wink, unless the other is hidden by the turn of the head.
    return able if len(able) == 2 or axes.turn > MIN_TURN_OF_ONE_EYE else []


class Eye:
    """Coordinates: u = -1 .. 1 from corner to corner, v towards the chin in the same unit."""

    def __init__(
        self,
        picture: Picture,
        upper: Points,
        lower: Points,
        brow: Points,
        face_down: Points,
        lower_margin: float,
    ) -> None:
        left, right = upper[0], upper[-1]
        self.half_width = max(float(np.linalg.norm(right - left)) / 2, 1.0)
        across = unit_vector(right - left, np.array([1.0, 0.0]))
        down = np.array([-across[1], across[0]])
        down = down if down @ face_down > 0 else -down
        axes = Axes((left + right) / 2, across * self.half_width, down * self.half_width)
        corners = axes.to_picture(np.array([(u, v) for u in (-1.5, 1.5) for v in (-1.5, 0.9)]))
        self.box = Box.around(corners, picture.shape)
        self.usable = False
        if self.box.empty or self.half_width < MIN_HALF_WIDTH_PX:
            return
        u, v = axes.grid(self.box)
        lid = _curve(axes.to_uv(upper))(u) - 0.04
        lower_edge = np.maximum(_curve(axes.to_uv(lower))(u) + lower_margin, lid)
        self._inside = smoothstep(1.32 - np.abs(u), 0, 0.35)
        self._lashes = np.maximum(0, 1 - u**4)
        central = np.abs(u) < 0.3
        opening = float((lower_edge - lid)[central].mean()) if central.any() else 0.0
        self._above_lid = (lid - v).astype(np.float32)
        brow_height = abs(float((upper[len(upper) // 2] - brow) @ face_down)) / self.half_width
        to_brow = float(np.clip(BROW_FREE * brow_height, 0.25, 0.9))
        self._skin_height = _plain_height(
            picture[self.box.slices], self._above_lid, np.abs(u) < 0.85, to_brow
        )
        self.usable = opening > MIN_OPENING and self._skin_height > MIN_SKIN_HEIGHT
        self._travel = ((lower_edge - lid) * self._inside).astype(np.float32)
        self._down = (down * self.half_width).astype(np.float32)
        self._pixel = 1 / self.half_width
        self._fade = smoothstep(self.box.border_distance(), 0, 3)
        x, y = self.box.grid()
        self._pixels = np.dstack([x - self.box.x0, y - self.box.y0])

    def draw(self, frame: Picture, blink: float) -> None:
        if blink <= 0.01:
            return
        # The skin stretches evenly between the brow, which stays, and the lashes, which travel: a source
        # height h moves to h - travel * (1 - h / skin_height), inverted here.
        travel = CLOSURE * blink * self._travel
        height = (self._above_lid + travel) / (1 + travel / self._skin_height)
        rise = np.maximum(height - self._above_lid, 0)
        sources = self._pixels - rise[..., None] * self._down
        source = frame[self.box.slices]
        skin = warp_picture(source, sources)
        above_lashes = self._above_lid + travel
        lash_width = max(0.055, 1.3 * self._pixel)
        lashes = np.exp(-(((above_lashes - 1.2 * self._pixel) / lash_width) ** 2)) * self._lashes
        cover = smoothstep(above_lashes, -1.2 * self._pixel, 0.4 * self._pixel) * self._fade
        darkened = skin * (1 - 0.45 * blink * lashes)[..., None]
        cover = cover[..., None]
        frame[self.box.slices] = np.clip(source * (1 - cover) + darkened * cover, 0, 255)


def _plain_height(patch: Picture, above_lid: FloatArray, inner: NDArray[np.bool_], limit: float) -> float:
    """How far up from the lid nothing but skin reaches: rims of glasses, brows and hair are much darker."""
    grey = np.asarray(cv2.cvtColor(patch, cv2.COLOR_RGB2GRAY), np.float32)
    around = inner & (above_lid > 0) & (above_lid < limit)
    if not around.any():
        return limit
    dark = grey < DARK * np.percentile(grey[around], 75)
    for height in np.arange(LASH_HEIGHT, limit, 0.05):
        band = inner & (above_lid >= height) & (above_lid < height + 0.05)
        if band.any() and dark[band].mean() > 0.3:
            return float(height)
    return limit


def _curve(points: Points) -> Callable[[FloatArray], FloatArray]:
    """The lid line v(u), held constant beyond the corners."""
    fitted = Polynomial.fit(points[:, 0], points[:, 1], deg=4)
    return lambda u: np.asarray(fitted(np.clip(u, -1.02, 1.02)), np.float32)
