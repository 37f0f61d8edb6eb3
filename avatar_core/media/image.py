"""Pictures: header, upright sRGB pixels, size for video."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Transpose

from avatar_core.errors import InputError
from avatar_core.media.colour import Colours, ToSrgb
from avatar_core.media.files import HEAD_BYTES, open_regular, refuse, sniff_head
from avatar_core.media.png import read_png

FORMATS = ("png", "jpeg", "webp")

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_QUARTER_TURNS = (5, 6, 7, 8)


@dataclass(frozen=True)
class ImageLimits:
    """`max_pixels` = width x height; Pillow itself refuses more than 178 million."""

    max_pixels: int = 50_000_000
    min_side: int = 32


@dataclass(frozen=True)
class ImageProbe:
    """Width and height of the upright picture; `mode` as Pillow names it; `frames` above 1 = animated;
    `warning`: what of its colours is not obeyed."""

    format: str
    width: int
    height: int
    mode: str
    frames: int
    warning: str | None = None


def probe_image(path: str | Path) -> ImageProbe:
    """Reads the header only."""
    with _open_image(path) as (image, format_name, colours):
        width, height = image.size
        if _orientation(image) in _QUARTER_TURNS:
            width, height = height, width
        frames, warning = getattr(image, "n_frames", 1), ToSrgb(colours, image.mode).warning
        return ImageProbe(format_name, width, height, image.mode, frames, warning)


def check_size(width: int, height: int, limits: ImageLimits) -> None:
    if width * height > limits.max_pixels:
        raise InputError(f"has {width}x{height} pixels, allowed are {limits.max_pixels} in all")
    if min(width, height) < limits.min_side:
        raise InputError(f"has {width}x{height} pixels, each side needs {limits.min_side} or more")


def load_image(path: str | Path, limits: ImageLimits | None = None) -> NDArray[np.uint8]:
    """RGB [H, W, 3] in sRGB, upright, transparency over white; the first frame of an animation."""
    with _open_image(path) as (image, _, colours):
        check_size(*image.size, limits or ImageLimits())
        orientation = _orientation(image)
        image.load()
        to_srgb = ToSrgb(colours, image.mode)
        picture = to_srgb(_grey(image) if image.mode.startswith("I") or image.mode == "F" else image)
        if orientation in _UPRIGHT:
            picture = picture.transpose(_UPRIGHT[orientation])
        return np.array(picture, dtype=np.uint8)


@contextmanager
def _open_image(path: str | Path) -> Iterator[tuple[Image.Image, str, Colours]]:
    with open_regular(path) as file:
        kind = sniff_head(file.read(HEAD_BYTES))
        if kind not in FORMATS:
            raise refuse(kind, "PNG, JPEG, WebP")
        file.seek(0)
        content: IO[bytes] = file
        colours = Colours()
        if kind == "png":
            picture, colours = read_png(file.read())
            content = io.BytesIO(picture)
        with _plain_errors(kind), Image.open(content, formats=[kind.upper()]) as image:
            if kind != "png":
                colours = Colours(image.info.get("icc_profile"))
            yield image, kind, colours


@contextmanager
def _plain_errors(kind: str) -> Iterator[None]:
    """Pillow's size warning is silenced: `check_size` decides."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"has too many pixels ({error})") from error
    except Exception as error:  # broken files make Pillow raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"is a broken {kind.upper()} picture ({reason}); save it again") from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1


def _grey(image: Image.Image) -> Image.Image:
    """Of 16 bits, which Pillow would clip at 255 rather than scale."""
    grey = np.asarray(image).astype(np.float32)
    transparent = image.info.get("transparency")
    scaled = np.clip(np.rint(grey / 257), 0, 255).astype(np.uint8)
    if isinstance(transparent, int):
        scaled[grey == transparent] = 255
    return Image.fromarray(scaled)


def fit_size(width: int, height: int, max_side: int) -> tuple[int, int]:
    """Even sizes, the longer at most `max_side`; never larger than the picture."""
    scale = min(1.0, max_side / max(width, height))
    return tuple(max(2, round(side * scale) // 2 * 2) for side in (width, height))  # type: ignore[return-value]


def fit(picture: NDArray[np.uint8], max_side: int) -> NDArray[np.uint8]:
    """Scaled down to `max_side`, then made even by cutting the last column or row, as yuv420p asks."""
    height, width = picture.shape[:2]
    scale = max_side / max(width, height)
    if scale < 1:
        size = (max(2, round(width * scale)), max(2, round(height * scale)))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    even_width, even_height = fit_size(width, height, max_side)
    return np.ascontiguousarray(picture[:even_height, :even_width])
