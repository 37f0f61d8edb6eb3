"""The rendered face set back into its frame under a soft mask."""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from avatar_core.backends.ditto.crop import CROP_SIZE
from avatar_core.backends.ditto.motion_vector import Array
from avatar_core.media.face import Picture

_SOLID = 0.9  # part of the mask's sides that is all face


def blend_mask(height: int = CROP_SIZE, width: int = CROP_SIZE) -> Array:
    """[height, width]: 1 inside, falling to 0 towards the border, round at the corners."""
    down, across = _fall(height), _fall(width)
    mask = 1 - np.maximum(down[:, None], across[None])
    corner = (down[:, None] > 0) & (across[None] > 0)
    round_corner = 1 - np.minimum(1, np.hypot(down[:, None], across[None]))
    return np.where(corner, round_corner, mask).astype(np.float32)


def _fall(length: int) -> NDArray[np.float64]:
    """How far outside the solid part each pixel lies, 0..1."""
    solid = int(length * _SOLID)
    start = (length - solid) // 2
    fall = np.zeros(length)
    fall[:start] = np.linspace(1, 0, start)
    fall[start + solid :] = np.linspace(0, 1, length - solid - start)
    return fall


class Putback:
    """One frame of the source, RGB [height, width, 3], in which the crop lies by `crop_to_picture` [3, 3].

    Everything that does not depend on the render is made once; only the part of the frame that the mask
    reaches is blended.
    """

    def __init__(
        self, frame: Picture, crop_to_picture: NDArray[np.floating], mask: Array | None = None
    ) -> None:
        self.frame = frame
        mask = blend_mask() if mask is None else mask
        matrix = np.asarray(crop_to_picture, np.float64)[:2]
        corners = np.array([[0, 0], [0, mask.shape[0]], [mask.shape[1], 0], mask.shape[::-1]])
        reached = corners @ matrix[:, :2].T + matrix[:, 2]
        size = np.array(frame.shape[1::-1])
        # One pixel of the border is mixed with what lies outside.
        low = np.clip(np.floor(reached.min(axis=0)) - 1, 0, size).astype(int)
        high = np.clip(np.ceil(reached.max(axis=0)) + 2, low, size).astype(int)
        self.part = (slice(low[1], high[1]), slice(low[0], high[0]))
        self._size = (int(high[0] - low[0]), int(high[1] - low[1]))
        self._matrix = matrix - np.array([[0, 0, low[0]], [0, 0, low[1]]])
        self.mask = np.clip(self._warped(mask), 0, 1)[..., None]
        self._background = (1 - self.mask) * frame[self.part].astype(np.float32)

    def _warped(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        if 0 in self._size:
            return np.zeros((*self._size[::-1], *image.shape[2:]), np.float32)
        return np.asarray(cv2.warpAffine(image, self._matrix, self._size, flags=cv2.INTER_LINEAR), np.float32)

    def __call__(self, render: NDArray[np.float32]) -> Picture:
        """`render` [512, 512, 3], 0..255. Values are cut, not rounded, to whole ones."""
        blended = self.mask * self._warped(render) + self._background
        frame = self.frame.copy()
        frame[self.part] = np.clip(blended, 0, 255).astype(np.uint8)
        return frame


class Composer:
    """Frames of the video from renders: the whole frame of the source (`crop_size` None), or the render alone
    as a square of `crop_size` pixels. `pictures` are the source's frames, one for a still."""

    def __init__(
        self,
        pictures: Sequence[Picture],
        crop_to_picture: NDArray[np.floating],
        crop_size: int | None = None,
    ) -> None:
        self._pictures, self._matrices, self._crop_size = pictures, crop_to_picture, crop_size
        self._mask = blend_mask()
        self._still = self._putback(0) if crop_size is None and len(pictures) == 1 else None

    def _putback(self, source_frame: int) -> Putback:
        return Putback(self._pictures[source_frame], self._matrices[source_frame], self._mask)

    def compose(self, render: NDArray[np.float32], source_frame: int) -> Picture:
        """`render` [512, 512, 3], 0..255."""
        if self._crop_size is None:
            return (self._still or self._putback(source_frame))(render)
        square = np.clip(render, 0, 255).astype(np.uint8)
        if self._crop_size == len(square):
            return square
        return np.asarray(
            cv2.resize(square, (self._crop_size, self._crop_size), interpolation=cv2.INTER_AREA), np.uint8
        )
