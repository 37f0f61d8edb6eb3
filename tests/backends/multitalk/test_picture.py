from collections.abc import Sequence

import numpy as np
import pytest
import torch

from avatar_core.backends.multitalk.picture import (
    BUCKETS,
    Boxes,
    boxes_of_faces,
    covering,
    fit_picture,
    halves,
    nearest,
    speaker_masks,
    video_size,
)
from avatar_core.errors import InputError
from avatar_core.media.face import Face

WIDTH, HEIGHT = 1216, 896
LEFT, RIGHT = (50, 50, 500, 850), (700, 50, 1150, 850)


def masks_of(boxes: Boxes | None, image_size: int = 480) -> np.ndarray:
    return speaker_masks(WIDTH, HEIGHT, boxes, 2, image_size)


def face(x: float, y: float, side: float) -> Face:
    box = np.array([x, y, x + side, y + side], np.float32)
    return Face(box, 1.0, np.zeros((5, 2), np.float32))


# --- sizes


@pytest.mark.parametrize(
    ("size", "image_size", "expected"),
    [
        ((640, 640), 480, (640, 640)),
        ((832, 480), 480, (448, 896)),  # 480 / 832 = 0.577 is nearer to 0.50 than to 0.67
        ((4000, 100), 480, (320, 1216)),
        ((100, 4000), 480, (1280, 320)),
        ((1280, 720), 720, (704, 1280)),
        ((64, 64), 64, (96, 96)),
        ((64, 640), 64, (256, 64)),
        ((4000, 100), 64, (64, 544)),
    ],
)
def test_the_size_follows_the_picture_s_shape(
    size: tuple[int, int], image_size: int, expected: tuple[int, int]
) -> None:
    assert video_size(*size, image_size) == expected


@pytest.mark.parametrize("image_size", [64, 200, 480, 600, 720, 960])
def test_every_size_suits_the_model(image_size: int) -> None:
    for width in range(40, 4000, 97):
        sides = video_size(width, 700, image_size)
        assert all(side >= 64 and side % 32 == 0 for side in sides)
        if image_size in BUCKETS:
            assert 0.7 < np.prod(sides) / (image_size * 4 / 3) ** 2 < 1.15


@pytest.mark.parametrize("size", [(37, 41), (1, 300), (300, 1), (641, 639), (2000, 333)])
def test_a_picture_of_any_size_covers_the_video(size: tuple[int, int]) -> None:
    rows, columns = np.indices(size)
    picture = np.stack([rows * 255 / max(size), columns * 255 / max(size), rows * 0], axis=2).astype(np.uint8)
    fitted = fit_picture(picture, 480)
    assert fitted.shape[:2] == video_size(size[1], size[0], 480)
    assert fitted.dtype == np.uint8
    assert fitted.flags.c_contiguous


def test_as_much_is_cut_on_both_sides() -> None:
    picture = np.zeros((100, 400, 3), np.uint8)
    picture[:, 180:220] = 255
    columns = fit_picture(picture, 480)[:, :, 0].mean(axis=0)
    centre = (columns * np.arange(len(columns))).sum() / columns.sum()
    assert centre == pytest.approx(len(columns) / 2, abs=1)


def test_rounding_of_sizes_is_that_of_floats() -> None:
    assert covering(328, 656, (448, 896))[0] == (449, 897)  # 448 and 896 but for the last bit


# --- masks


def test_one_speaker_is_everywhere() -> None:
    masks = speaker_masks(WIDTH, HEIGHT, None, 1, 480)
    assert masks.shape == (3, 64, 96)
    assert masks.min() == 1


@pytest.mark.parametrize("image_size", [64, 480, 720])
def test_boxes_become_masks_in_their_order(image_size: int) -> None:
    first, second, nobody = masks_of([LEFT, RIGHT], image_size)
    height, width = video_size(WIDTH, HEIGHT, image_size)
    assert first.shape == (height // 8, width // 8)
    assert first[:, : width // 16].any()
    assert not first[:, width // 16 :].any()
    assert np.array_equal(masks_of([RIGHT, LEFT], image_size), np.stack([second, first, nobody]))
    assert np.array_equal(first + second + nobody, np.ones_like(first))


def test_a_mask_is_where_its_box_is() -> None:
    """Boxes have columns first, and the picture is scaled and cut before the mask is."""
    box = (304, 96, 608, 320)
    first = speaker_masks(WIDTH, HEIGHT, [box, RIGHT], 2, 720)[0]  # 832x1088, of 832x1130
    rows, columns = np.nonzero(first)
    scale = 832 / HEIGHT
    cut = (round(WIDTH * scale) - 1088) / 2
    assert [columns.min() * 8, columns.max() * 8 + 8] == pytest.approx(
        [304 * scale - cut, 608 * scale - cut], abs=8
    )
    assert [rows.min() * 8, rows.max() * 8 + 8] == pytest.approx([96 * scale, 320 * scale], abs=8)


def test_without_boxes_two_share_the_picture() -> None:
    first, second, nobody = masks_of(None)
    assert np.array_equal(masks_of(halves(WIDTH, HEIGHT)), np.stack([first, second, nobody]))
    half = first.shape[1] // 2
    assert first.any(axis=0).mean() == pytest.approx(0.45, abs=0.02)
    assert nobody[:, [0, half, -1]].min() == 1
    assert first[:, :half].any()
    assert second[:, half:].any()
    assert not first[:, half:].any()
    assert not second[:, :half].any()


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([(2000, 0, 2100, 100), RIGHT], r"box 1 \[2000, 0, 2100, 100\] shows nobody"),
        ([LEFT, (-300, -300, -10, -10)], r"box 2 \[-300, -300, -10, -10\] shows nobody"),
        ([LEFT, (900, 50, 902, 850)], "box 2 .* too thin"),
        ([LEFT, (1150, 850, 700, 50)], r"box 2 \[1150, 850, 700, 50\] shows nobody"),
        ([LEFT, LEFT], "overlap"),
        ([LEFT, (400, 50, 1150, 850)], r"\[50, 50, 500, 850\] and \[400, 50, 1150, 850\] overlap"),
        ([(0, 0, 608, HEIGHT), (608, 0, WIDTH, HEIGHT)], "leave no background"),
    ],
)
def test_boxes_that_bind_nobody_are_refused(boxes: Boxes, message: str) -> None:
    with pytest.raises(InputError, match=f"^bbox: .*{message}"):
        masks_of(boxes)


def test_a_person_who_is_cut_off_is_refused() -> None:
    boxes = [(0, 0, 60, 100), (1500, 0, 1900, 100)]
    with pytest.raises(InputError, match=r"box 1 .* outside what of the picture becomes the video"):
        speaker_masks(2000, 100, boxes, 2, 480)


def test_boxes_that_touch_are_two_people() -> None:
    first, second, _ = masks_of([(0, 100, 600, 800), (600, 100, 1216, 800)])
    assert not (first * second).any()
    assert (first + second)[20].min() == 1


def test_masks_are_resized_as_torch_does() -> None:
    """Places reckoned in float64 are others where they fall on whole numbers."""
    for old, new in [(60, 832), (62, 1144), (64, 976), (449, 448), (720, 480), (1000, 60), (5, 5), (7, 14)]:
        numbers = np.arange(old, dtype=np.float32)
        expected = torch.nn.functional.interpolate(torch.from_numpy(numbers)[None, None], size=new)[0, 0]
        places = nearest(np.tile(numbers, (1, 1, 1)), (1, new))[0, 0]
        assert np.array_equal(places, expected.numpy())


# --- people round faces


@pytest.mark.parametrize(
    "faces",
    [
        [face(200, 200, 150), face(800, 220, 150)],
        [face(800, 220, 150), face(200, 200, 150)],
        [face(0, 0, 400), face(700, 0, 500)],
        [face(500, 300, 60), face(570, 300, 60)],
        [face(500, 100, 100), face(500, 600, 100)],  # one above the other
        [face(560, 500, 100), face(480, 60, 100)],
    ],
    ids=["far", "right first", "large", "near", "stacked", "diagonal"],
)
def test_people_round_faces_can_be_told_apart(faces: Sequence[Face]) -> None:
    boxes = boxes_of_faces(faces, WIDTH, HEIGHT)
    masks = masks_of(boxes)
    for each, box in zip(faces, boxes, strict=True):
        centre = (each.box[:2] + each.box[2:]) / 2
        assert box[0] <= centre[0] <= box[2]
        assert box[1] <= centre[1] <= box[3]
        assert min(box) >= 0
        assert box[2] <= WIDTH
        assert box[3] <= HEIGHT
    assert masks.any(axis=(1, 2)).all()


def test_a_person_reaches_to_the_lower_edge() -> None:
    (box,) = boxes_of_faces([face(500, 300, 100)], WIDTH, HEIGHT)
    assert box == (400, 250, 700, HEIGHT)
