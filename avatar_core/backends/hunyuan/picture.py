"""What the models see of the picture: its size, its pixels, and where the face is."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Resampling

from avatar_core.errors import InputError

Picture = NDArray[np.uint8]

SIZE_STEP = 64  # px: every side of a video is a multiple
LATENT_PIXELS = 8  # side of the square of pixels that becomes one latent
AREA_FACTOR = 3.0  # by which the face box grows to the region that the speech moves

# The longer side that belongs to a shorter one; of others it is 1.5 times as long.
_LONG_SIDES = {704: 1216, 512: 768, 384: 576, 256: 384}

# Of CLIP's training pictures, RGB.
_CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.4082107], np.float32)
_CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def video_size(width: int, height: int, image_size: int = 704) -> tuple[int, int]:
    """Width and height nearest to the picture's shape, the shorter side about `image_size`, of no more pixels
    than the largest video of that size. Raises `InputError` for a picture too narrow for any."""
    max_pixels = image_size * _LONG_SIDES.get(image_size, 1.5 * image_size)
    size = _scaled(width, height, image_size / min(width, height))
    if math.prod(size) > max_pixels:
        size = _scaled(width, height, math.sqrt(max_pixels / width / height))
    if 0 in size:
        raise InputError(f"has {width}x{height} pixels, too narrow for a video; cut it to a squarer shape")
    return size


def _scaled(width: int, height: int, scale: float) -> tuple[int, int]:
    return round(width * scale / SIZE_STEP) * SIZE_STEP, round(height * scale / SIZE_STEP) * SIZE_STEP


def fit_picture(picture: Picture, image_size: int = 704) -> Picture:
    """RGB [H, W, 3] at `video_size`: neither cut nor padded, so the shape may change a little."""
    size = video_size(picture.shape[1], picture.shape[0], image_size)
    return np.array(Image.fromarray(picture).resize(size, Resampling.LANCZOS))


def llava_pixels(picture: Picture, side: int = 336) -> NDArray[np.float16]:
    """The fitted picture as LLaVA's vision tower takes it: [1, 3, side, side], normalised."""
    square = np.asarray(Image.fromarray(picture).resize((side, side), Resampling.BILINEAR))
    normalised = (square.astype(np.float32) / np.float32(255) - _CLIP_MEAN) / _CLIP_STD
    return normalised.transpose(2, 0, 1)[None].astype(np.float16)


def face_mask(
    box: Sequence[float] | NDArray[np.floating] | None, width: int, height: int
) -> NDArray[np.uint8]:
    """1 in and around the face, else 0; [H, W]. `box` = x_min, y_min, x_max, y_max in pixels of the fitted
    picture; without one the whole picture counts as face."""
    x_min, y_min, x_max, y_max = map(float, (0, 0, width, height) if box is None else box)
    left, right = _grown(x_min, x_max, width)
    top, bottom = _grown(y_min, y_max, height)
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def _grown(low: float, high: float, end: int) -> tuple[int, int]:
    """The stretch of `AREA_FACTOR` times the length round the same centre, inside the picture."""
    centre, reach = (low + high) // 2, AREA_FACTOR * (high - low) // 2
    return int(max(centre - reach, 0)), int(min(centre + reach, end))


def latent_mask(mask: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[1, 1, 1, H / 8, W / 8]: bilinear reduction by eight, which reads the four pixels in the middle of each
    square; 0.5 or 0.25 where an edge runs between them."""
    first, second = LATENT_PIXELS // 2 - 1, LATENT_PIXELS // 2
    rows = mask[first::LATENT_PIXELS].astype(np.float32) + mask[second::LATENT_PIXELS]
    squares = (rows[:, first::LATENT_PIXELS] + rows[:, second::LATENT_PIXELS]) / 4
    return np.asarray(squares[None, None, None], np.float32)
