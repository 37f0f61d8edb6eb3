from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from avatar_core.backends.preview.contours import Contours, contours_from_points
from avatar_core.backends.preview.renderer import Renderer
from avatar_core.media.face import Face, FaceDetector
from avatar_core.media.image import load_image
from avatar_core.media.mtcnn import installed_weights

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
STILL = np.zeros((1, 5), np.float32)
Picture = NDArray[np.uint8]


@cache
def portrait() -> Picture:
    return load_image(SAMPLES / "portrait.jpg")


@cache
def portrait_face() -> Face:
    (face,) = FaceDetector(installed_weights()).detect(portrait())
    return face


@cache
def portrait_contours() -> Contours:
    return contours_from_points(portrait(), portrait_face())


def moved(face: Face, scale: float, x: float = 0, y: float = 0) -> Face:
    shift = np.array([x, y], np.float32)
    return replace(face, points=face.points * np.float32(scale) + shift, box=face.box * scale)


def values(*numbers: float) -> NDArray[np.float32]:
    return np.array(numbers, np.float32)


def frame(
    renderer: Renderer,
    mouth_open: float = 0,
    wide: float = 0,
    blink: float = 0,
    head: NDArray[np.float32] = STILL,
) -> Picture:
    return renderer.frame(values(mouth_open), values(wide), values(blink), head)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(portrait(), [portrait_contours()])


def mouth_patch(picture: Picture, inset: int = 8) -> NDArray[np.float32]:
    """Pixels between the mouth corners, as float."""
    left, right = portrait_face().points[3:]
    x0, x1, y = int(left[0]) + inset, int(right[0]) - inset, int((left[1] + right[1]) / 2)
    return picture[y - 6 : y + 20, x0:x1].astype(np.float32)


def test_opening_shows_a_dark_inside(renderer: Renderer) -> None:
    dark = [(mouth_patch(frame(renderer, opening)).max(axis=2) < 60).sum() for opening in (0, 0.5, 0.8, 1)]
    assert dark == sorted(dark)
    assert dark[0] == 0
    assert dark[3] > 60


def test_a_toothy_smile_can_close(renderer: Renderer) -> None:
    teeth_at_rest = (mouth_patch(portrait()).min(axis=2) > 190).sum()
    teeth_closed = (mouth_patch(frame(renderer)).min(axis=2) > 190).sum()
    assert teeth_closed < 0.5 * teeth_at_rest


def test_opening_moves_the_chin_down_and_leaves_the_eyes() -> None:
    renderer = Renderer(portrait(), [portrait_contours()])
    closed, opened = frame(renderer), frame(renderer, 1.0)
    left, right = portrait_face().points[:2]
    eyes = np.s_[int(left[1]) - 10 : int(left[1]) + 10, int(left[0]) - 15 : int(right[0]) + 15]
    np.testing.assert_array_equal(closed[eyes], opened[eyes])
    x, y = portrait_contours().chin.astype(int)
    shift, _ = cv2.phaseCorrelate(
        cv2.cvtColor(closed[y - 12 : y + 4, x - 16 : x + 16], cv2.COLOR_RGB2GRAY).astype(np.float64),
        cv2.cvtColor(opened[y - 12 : y + 4, x - 16 : x + 16], cv2.COLOR_RGB2GRAY).astype(np.float64),
    )
    assert shift[1] > 1


def test_rounded_lips_are_narrower_than_spread_ones(renderer: Renderer) -> None:
    def dark_columns(wide: float) -> int:
        dark = mouth_patch(frame(renderer, 0.9, wide), inset=2).max(axis=2) < 70
        return int(dark.any(axis=0).sum())

    assert dark_columns(-1) < dark_columns(1) - 4


def test_blink_covers_the_eyes_and_keeps_the_brows(renderer: Renderer) -> None:
    opened, closed = frame(renderer), frame(renderer, blink=1)
    contours = portrait_contours()
    for points, brow in zip(
        portrait_face().points[:2], (contours.left_brow, contours.right_brow), strict=True
    ):
        x, y = points.astype(int)
        eye = np.s_[y - 2 : y + 3, x - 3 : x + 4]
        assert closed[eye].mean() > opened[eye].mean() + 15
        brow_y = int(brow[1])
        brow_rows = np.s_[brow_y - 3 : brow_y + 3, x - 8 : x + 8]
        np.testing.assert_allclose(closed[brow_rows].astype(int), opened[brow_rows].astype(int), atol=2)


def test_untrusted_eyes_stay_open() -> None:
    contours = replace(portrait_contours(), eyes_trusted=(False, False))
    renderer = Renderer(portrait(), [contours])
    np.testing.assert_array_equal(frame(renderer, blink=1), frame(renderer))


@pytest.mark.parametrize("height_px", [1, 3])
def test_rims_of_glasses_are_not_dragged_over_the_eyes(height_px: int) -> None:
    contours = portrait_contours()
    picture = portrait().copy()
    for upper in (contours.left_eye_upper, contours.right_eye_upper):
        rim = np.round(upper - [0, height_px]).astype(np.int32)
        cv2.polylines(picture, [rim], isClosed=False, color=(15, 15, 15), thickness=2)
    renderer = Renderer(picture, [contours])
    black = [int((frame(renderer, blink=blink).max(axis=2) < 50).sum()) for blink in (0, 1)]
    assert black[1] <= black[0] + 2


def test_one_frontal_eye_alone_never_winks() -> None:
    contours = replace(portrait_contours(), eyes_trusted=(True, False))
    renderer = Renderer(portrait(), [contours])
    np.testing.assert_array_equal(frame(renderer, blink=1), frame(renderer))


def test_a_grey_picture_stays_grey() -> None:
    grey = cv2.cvtColor(cv2.cvtColor(portrait(), cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    drawn = frame(Renderer(grey, [portrait_contours()]), 0.9, blink=0.5).astype(int)
    assert np.ptp(drawn, axis=2).max() <= 2


def test_head_sway_moves_the_face_and_pins_the_border(renderer: Renderer) -> None:
    still = frame(renderer)
    swayed = frame(renderer, head=np.array([[0.05, 0, 0, 0, 0]], np.float32))
    x, y = portrait_face().points[2].astype(int)
    patch = np.s_[y - 32 : y + 32, x - 32 : x + 32]
    shift, _ = cv2.phaseCorrelate(
        cv2.cvtColor(still[patch], cv2.COLOR_RGB2GRAY).astype(np.float64),
        cv2.cvtColor(swayed[patch], cv2.COLOR_RGB2GRAY).astype(np.float64),
    )
    assert 1 < shift[0] < 4
    np.testing.assert_array_equal(still[:, 0], swayed[:, 0])
    np.testing.assert_array_equal(still[:, -1], swayed[:, -1])
    nodded = frame(renderer, head=np.array([[0, 0.05, 0, 0, 0.05]], np.float32))
    np.testing.assert_array_equal(still[0], nodded[0])


def test_far_background_never_moves(renderer: Renderer) -> None:
    heads = np.random.default_rng(0).uniform(-0.06, 0.06, (5, 1, 5)).astype(np.float32)
    for head in heads:
        np.testing.assert_array_equal(frame(renderer, 0.7, head=head)[:200, 420:], portrait()[:200, 420:])


def test_no_seam_at_the_border_of_the_mouth_box() -> None:
    """On a smooth gradient, warping leaves a smooth gradient: no step anywhere but at the lips."""
    y, x = np.mgrid[:512, :512]
    smooth = np.dstack([100 + x // 8, 100 + y // 8, 90 + (x + y) // 16]).astype(np.uint8)
    renderer = Renderer(smooth, [portrait_contours()])
    drawn = frame(renderer, 1.0, -0.8, head=np.array([[0.03, 0.02, 0.03, 0.05, 0.04]], np.float32)).astype(
        int
    )
    left, right = portrait_face().points[3:].astype(int)
    drawn[left[1] - 16 : right[1] + 40, left[0] - 12 : right[0] + 12] = 0
    steps = np.maximum(np.abs(np.diff(drawn, axis=0))[:, 1:], np.abs(np.diff(drawn, axis=1))[1:]).max(axis=2)
    steps[left[1] - 18 : right[1] + 42, left[0] - 14 : right[0] + 14] = 0
    assert steps.max() <= 3


def test_small_changes_give_small_changes(renderer: Renderer) -> None:
    """No popping between frames, at any opening."""
    openings = np.linspace(0, 1, 41)
    frames = [frame(renderer, opening).astype(np.float32) for opening in openings]
    changes = [np.abs(after - before).mean() for before, after in pairwise(frames)]
    assert max(changes) < 4 * np.median(changes)


def test_same_input_gives_same_bytes() -> None:
    head = np.array([[0.01, 0.02, 0.01, 0.03, 0.02]], np.float32)
    first, second = (
        frame(Renderer(portrait(), [portrait_contours()]), 0.6, 0.3, 0.4, head) for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


def test_two_faces_move_on_their_own() -> None:
    picture = load_image(SAMPLES / "two_people.jpg")
    faces = FaceDetector(installed_weights()).detect(picture)
    renderer = Renderer(picture, [contours_from_points(picture, face) for face in faces])
    heads = np.zeros((2, 5), np.float32)
    quiet = renderer.frame(values(0, 0), values(0, 0), values(0, 0), heads)
    second_speaks = renderer.frame(values(0, 1), values(0, 0), values(0, 0), heads)
    half = picture.shape[1] // 2
    np.testing.assert_array_equal(quiet[:, :half], second_speaks[:, :half])
    assert (quiet[:, half:] != second_speaks[:, half:]).any()


@pytest.mark.parametrize(
    ("x0", "y0", "width", "height"),
    [(0, 0, 230, 140), (190, 60, 61, 300), (0, 150, 511, 361), (216, 90, 40, 40), (300, 200, 33, 47)],
)
def test_faces_cut_by_the_border(x0: int, y0: int, width: int, height: int) -> None:
    crop = np.ascontiguousarray(portrait()[y0 : y0 + height, x0 : x0 + width])
    renderer = Renderer(crop, [contours_from_points(crop, moved(portrait_face(), 1, -x0, -y0))])
    drawn = frame(renderer, 0.8, 0.5, 1, np.full((1, 5), 0.04, np.float32))
    assert drawn.shape == crop.shape
    assert drawn.dtype == np.uint8


@pytest.mark.parametrize("scale", [0.08, 0.3, 0.6, 2.5])
def test_any_size_of_face(scale: float) -> None:
    picture = cv2.resize(portrait(), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    renderer = Renderer(picture, [contours_from_points(picture, moved(portrait_face(), scale))])
    drawn = frame(renderer, 0.9, -0.5, 0.7, np.full((1, 5), 0.03, np.float32))
    assert drawn.shape == picture.shape


def test_degenerate_outline_does_not_fail() -> None:
    spot = np.full(2, 60.0)
    curves = {
        name: np.tile(spot, (count, 1)) if count else spot
        for name, count in (
            *((f"{side}_lip_{edge}", 11) for side in ("upper", "lower") for edge in ("inner", "outer")),
            *((f"{side}_eye_{edge}", 9) for side in ("left", "right") for edge in ("upper", "lower")),
            *((name, 0) for name in ("chin", "nose", "left_brow", "right_brow")),
        )
    }
    contours = Contours(**curves, eyes_trusted=(True, True), source="points")
    picture = np.full((120, 120, 3), 128, np.uint8)
    assert frame(Renderer(picture, [contours]), 1, 1, 1).shape == picture.shape


def test_a_picture_without_faces_stays_as_it_is() -> None:
    none = np.zeros(0, np.float32)
    drawn = Renderer(portrait(), []).frame(none, none, none, np.zeros((0, 5), np.float32))
    np.testing.assert_array_equal(drawn, portrait())


def test_the_picture_itself_is_never_altered() -> None:
    picture = portrait().copy()
    renderer = Renderer(picture, [portrait_contours()])
    frame(renderer, 1, 1, 1, np.full((1, 5), 0.05, np.float32))
    np.testing.assert_array_equal(picture, portrait())
