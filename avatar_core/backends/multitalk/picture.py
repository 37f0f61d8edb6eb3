"""The picture at the size of the video, and where it shows each speaker. No model is imported here."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Resampling

from avatar_core.errors import InputError
from avatar_core.media.face import Face

Picture = NDArray[np.uint8]
Boxes = Sequence[Sequence[float]]
Masks = NDArray[np.bool_]

LATENT_PIXELS, TOKEN_PIXELS = 8, 16
SIDE_STEP = 32
SMALLEST_SIDE = 64

_FACES_WIDE = 3
_REACH = 0.4  # of the way to the next face belongs to a person

# Height to width, and both in pixels. The ratios are the rounded ones that a picture's is compared with.
_SIZES_480 = """0.26:320x1216 0.38:384x1024 0.50:448x896 0.67:512x768 0.82:576x704 1.00:640x640 1.22:704x576
1.50:768x512 1.86:832x448 2.00:896x448 2.50:960x384 2.83:1088x384 3.60:1152x320 3.80:1216x320 4.00:1280x320"""
_SIZES_720 = """0.22:448x2048 0.29:512x1792 0.36:576x1600 0.45:640x1408 0.55:704x1280 0.63:768x1216
0.76:832x1088 0.88:896x1024 1.00:960x960 1.14:1024x896 1.31:1088x832 1.50:1152x768 1.58:1216x768 1.82:1280x704
1.91:1344x704 2.20:1408x640 2.30:1472x640 2.67:1536x576 2.89:1664x576 3.62:1856x512 3.75:1920x512"""


def _table(text: str) -> dict[float, tuple[int, int]]:
    entries = (entry.split(":") for entry in text.split())
    return {float(ratio): (int(size.split("x")[0]), int(size.split("x")[1])) for ratio, size in entries}


BUCKETS = {480: _table(_SIZES_480), 720: _table(_SIZES_720)}


def video_size(width: int, height: int, image_size: int) -> tuple[int, int]:
    """Height and width. Sizes without a table are of the same kind: sides in steps of 32, a constant area."""
    ratio = height / width
    if buckets := BUCKETS.get(image_size):
        return nearest_size(ratio, buckets)
    side = image_size * 4 / 3
    sides = (side * math.sqrt(ratio), side / math.sqrt(ratio))
    down, across = (max(SMALLEST_SIDE, round(each / SIDE_STEP) * SIDE_STEP) for each in sides)
    return down, across


def nearest_size(ratio: float, buckets: Mapping[float, tuple[int, int]]) -> tuple[int, int]:
    return buckets[nearest_key(ratio, buckets)]


def nearest_key(ratio: float, buckets: Mapping[float, tuple[int, int]]) -> float:
    return min(buckets, key=lambda key: abs(key - ratio))


def fit_picture(picture: Picture, image_size: int) -> Picture:
    height, width = picture.shape[:2]
    return cover(picture, video_size(width, height, image_size))


def cover(picture: Picture, target: tuple[int, int]) -> Picture:
    """RGB [H, W, 3], scaled to cover the height and width of `target` and cut on both sides."""
    height, width = picture.shape[:2]
    resized, top, left = covering(height, width, target)
    pixels = np.asarray(Image.fromarray(picture).resize(resized[::-1], Resampling.BILINEAR))
    return np.ascontiguousarray(pixels[top : top + target[0], left : left + target[1]])


def speaker_masks(
    source_width: int, source_height: int, boxes: Boxes | None, speakers: int, image_size: int
) -> NDArray[np.float32]:
    """1 where the latents of the video show the first speaker, the second, and neither; [3, h, w]. `boxes` in
    pixels of the source, without them two share the picture by halves. Raises `InputError` where the model
    would find no token of one of the three, or one of two speakers."""
    target = video_size(source_width, source_height, image_size)
    masks = masks_within(target, source_width, source_height, boxes, speakers)
    if speakers > 1:
        tokens = nearest(masks > 0, (target[0] // TOKEN_PIXELS, target[1] // TOKEN_PIXELS))
        _check(tokens, boxes or halves(source_width, source_height))
    return masks


def masks_within(
    target: tuple[int, int], source_width: int, source_height: int, boxes: Boxes | None, speakers: int
) -> NDArray[np.float32]:
    """As `speaker_masks`, for a video of any height and width and boxes of any kind."""
    latent = (target[0] // LATENT_PIXELS, target[1] // LATENT_PIXELS)
    if speakers == 1:
        return np.ones((3, *latent), np.float32)
    given = boxes or halves(source_width, source_height)
    return nearest(pixel_masks(target, source_width, source_height, given), latent).astype(np.float32)


def pixel_masks(target: tuple[int, int], source_width: int, source_height: int, given: Boxes) -> Masks:
    """[3, H, W] of two boxes and what is in neither."""
    masks = np.zeros((3, source_height, source_width), np.bool_)
    for mask, box in zip(masks, given, strict=False):
        x_min, y_min, x_max, y_max = (max(0, int(value)) for value in box)
        mask[y_min:y_max, x_min:x_max] = True
    masks[2] = ~masks[:2].any(axis=0)
    resized, top, left = covering(source_height, source_width, target)
    return nearest(masks, resized)[:, top : top + target[0], left : left + target[1]]


def boxes_of_faces(faces: Sequence[Face], width: int, height: int) -> list[tuple[float, float, float, float]]:
    """A person round each face, [x_min, y_min, x_max, y_max]: three faces wide, from above it to the lower
    edge, and not quite half way to the next, so that background is left between them."""
    boxes = []
    centres = [((face.box[:2] + face.box[2:]) / 2).tolist() for face in faces]
    for face, centre in zip(faces, centres, strict=True):
        x_min, y_min, x_max, y_max = face.box.tolist()
        half = (x_max - x_min) * _FACES_WIDE / 2
        box = [max(0.0, centre[0] - half), max(0.0, y_min - (y_max - y_min) / 2)]
        box += [min(float(width), centre[0] + half), float(height)]
        for other in (each for each in centres if each != centre):
            away = [other[axis] - centre[axis] for axis in (0, 1)]
            axis = 0 if abs(away[0]) >= abs(away[1]) else 1
            limit = centre[axis] + _REACH * away[axis]
            if away[axis] > 0:
                box[axis + 2] = min(box[axis + 2], limit)
            else:
                box[axis] = max(box[axis], limit)
        boxes.append((box[0], box[1], box[2], box[3]))
    return boxes


def covering(height: int, width: int, target: tuple[int, int]) -> tuple[tuple[int, int], int, int]:
    """Height and width to which the picture is scaled, and what is cut above and on the left."""
    scale = max(target[0] / height, target[1] / width)
    resized = (math.ceil(scale * height), math.ceil(scale * width))
    return resized, round((resized[0] - target[0]) / 2), round((resized[1] - target[1]) / 2)


def halves(width: int, height: int) -> Boxes:
    half = width // 2
    border, end = 0.05, 1 - 0.05
    rows = int(border * height), int(end * height)
    return [
        (int(border * half), rows[0], int(end * half), rows[1]),
        (int(border * half + half), rows[0], int(end * half + half), rows[1]),
    ]


def nearest(masks: Masks, size: tuple[int, int]) -> Masks:
    """As torch resizes, which reckons places in float32."""
    rows, columns = (_places(old, new) for old, new in zip(masks.shape[1:], size, strict=True))
    return masks[:, rows][:, :, columns]


def _places(old: int, new: int) -> NDArray[np.intp]:
    places = np.arange(new, dtype=np.float32) * (np.float32(old) / np.float32(new))
    return np.minimum(places.astype(np.intp), old - 1)


def _check(token_masks: Masks, boxes: Boxes) -> None:
    listed = [[round(float(value)) for value in box] for box in boxes]
    for number in (0, 1):
        if not token_masks[number].any():
            raise InputError(
                f"bbox: box {number + 1} {listed[number]} shows nobody: it is too thin, or lies outside what "
                "of the picture becomes the video; boxes are x_min, y_min, x_max, y_max in picture pixels"
            )
    if (token_masks[0] & token_masks[1]).any():
        raise InputError(f"bbox: the boxes {listed[0]} and {listed[1]} overlap; give boxes that do not")
    if not token_masks[2].any():
        raise InputError(f"bbox: {listed} leave no background; give smaller boxes")
