"""Which face is registered and followed, in which crop; faces are drawn squares."""

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from avatar_core.backends.ditto.crop import (
    Outline,
    crop_matrices,
    face_outline,
    fit_picture,
    fitted_size,
    mapped,
    network_input,
    outline,
)
from avatar_core.backends.ditto.motion_vector import WIDTHS
from avatar_core.backends.ditto.putback import Composer, Putback, blend_mask
from avatar_core.backends.ditto.registration import (
    Avatar,
    FaceFinder,
    RegistrationSettings,
    face_crop,
    register,
)
from avatar_core.errors import InputError
from avatar_core.media.face import Face, Picture
from tests.backends.ditto.toy import toy_avatar

Array = NDArray[np.float32]
MEAN_FACE = np.random.default_rng(0).uniform(-0.5, 0.5, (203, 2)).astype(np.float32)
MEAN_FACE[[0, 6, 12, 18]] = (-0.2, -0.2)
MEAN_FACE[[24, 30, 36, 42]] = (0.2, -0.2)
MEAN_FACE[[48, 66]] = (0, 0.3)


def picture_of(*centres: tuple[int, int], side: int = 60) -> Picture:
    """Bright squares on a dark ground, the later ones darker."""
    picture = np.full((240, 320, 3), 10, np.uint8)
    for i, (x, y) in enumerate(centres):
        cv2.rectangle(
            picture, (x - side // 2, y - side // 2), (x + side // 2, y + side // 2), [250 - 60 * i] * 3, -1
        )
    return picture


class SquareDetector:
    """Squares of any brightness, brightest first."""

    calls = 0

    def detect(self, picture: Picture) -> list[Face]:
        self.calls += 1
        faces = []
        for level in sorted({int(v) for v in np.unique(picture) if v > 50}, reverse=True):
            rows, columns = np.nonzero(picture[..., 0] == level)
            low, high = np.array([columns.min(), rows.min()]), np.array([columns.max(), rows.max()])
            points = ((low + high) / 2 + MEAN_FACE[[0, 24, 5, 48, 66]] * (high - low)).astype(np.float32)
            faces.append(Face(np.concatenate([low, high]).astype(np.float32), 1.0, points))
        return faces


class SquareLandmarks:
    """Round what is bright."""

    def find(self, crop: Picture) -> Array:
        rows, columns = np.nonzero(crop[..., 0] > 50)
        if not len(rows):
            return np.full((203, 2), 112, np.float32) + MEAN_FACE
        centre = np.array([columns.mean(), rows.mean()])
        return (centre + MEAN_FACE * np.sqrt(len(rows))).astype(np.float32)


class Mesh:
    def find(self, crop: Picture) -> Array:
        return np.random.default_rng(int(crop.sum())).random((478, 3), np.float32)


def finder(speaker: Face | None = None, *, parity: bool = False) -> FaceFinder:
    settings = RegistrationSettings(parity=parity)
    return FaceFinder(SquareDetector(), None, SquareLandmarks(), settings, speaker)


def test_the_largest_face_is_taken_unless_a_speaker_was_chosen() -> None:
    picture = picture_of((80, 120), (240, 120))
    left, right = SquareDetector().detect(picture)

    assert finder(left).find(picture).mean(axis=0)[0] < 160 < finder(right).find(picture).mean(axis=0)[0]
    assert finder(right, parity=True).find(picture).mean(axis=0)[0] < 160


def test_a_speaker_that_the_detector_misses_is_taken_from_where_it_was_chosen() -> None:
    (speaker,) = SquareDetector().detect(picture_of((200, 100)))
    dim = np.minimum(picture_of((200, 100)), 51).astype(np.uint8)
    dim[dim == 51] = 51

    found = finder(speaker).find(dim)

    assert found.mean(axis=0) == pytest.approx(speaker.points.mean(axis=0), abs=25)


def test_a_picture_without_a_face_is_refused() -> None:
    with pytest.raises(InputError, match="no face found; use a picture"):
        finder().find(picture_of())


def test_a_face_is_followed_and_found_again_when_lost() -> None:
    """A face that jumps is looked for again; the reference stays where it was."""
    frames = [picture_of((80, 120)), picture_of((90, 122)), picture_of((240, 100))]
    follower, stubborn = finder(), finder(parity=True)

    centres = [follower.find(frame).mean(axis=0)[0] for frame in frames]
    kept = [stubborn.find(frame).mean(axis=0)[0] for frame in frames]

    assert centres == pytest.approx([80, 90, 240], abs=10)
    assert kept[2] < 160


def motion_of(pixels: Array) -> dict[str, Array]:
    return {
        key: np.full((1, width), pixels.mean(), np.float32) for key, width in (WIDTHS | {"kp": 63}).items()
    }


def registered(frames: list[Picture], *, is_image: bool, **options: int) -> Avatar:
    settings = RegistrationSettings(**options)
    volume = lambda pixels: pixels[:, :, ::64, ::64]  # noqa: E731
    return register(frames, finder(), Mesh(), volume, motion_of, settings, is_image=is_image)


def test_footage_is_smoothed_but_for_its_first_key_points() -> None:
    frames = [picture_of((80 + 8 * i, 120), side=60 + 2 * i) for i in range(5)]

    plain = registered(frames, is_image=False, smo_k_s=1)
    smooth = registered(frames, is_image=False, smo_k_s=3)

    assert len(smooth) == 5
    assert smooth.motion["exp"][2] == pytest.approx(plain.motion["exp"][1:4].mean(axis=0), abs=1e-6)
    assert np.array_equal(smooth.sc, plain.motion["kp"][0])
    assert not np.array_equal(smooth.eye_open[0], smooth.eye_open[1])


def test_a_frame_without_a_face_is_named() -> None:
    with pytest.raises(InputError, match="frame 2: no face found"):
        registered([picture_of((80, 120)), picture_of()], is_image=False)
    with pytest.raises(InputError, match=r"^no face found"):
        registered([picture_of()], is_image=True)
    with pytest.raises(InputError, match="no frames"):
        registered([], is_image=False)


def test_an_avatar_comes_back_from_its_tensors() -> None:
    avatar = toy_avatar(3)

    again = Avatar.from_tensors(avatar.tensors())

    assert again.is_image is False
    assert np.array_equal(again.features, avatar.features)
    assert again.motion.keys() == avatar.motion.keys()
    assert np.array_equal(again.first_vector(), avatar.first_vector())


def test_the_crop_holds_the_face_where_the_matrices_say() -> None:
    picture = picture_of((80, 120))

    square, matrices = face_crop(picture, finder(), RegistrationSettings())

    middle = mapped(np.array([[80, 120]], np.float32), matrices.from_picture)[0].round().astype(int)
    assert square.shape == (512, 512, 3)
    assert square[middle[1], middle[0], 0] == 250
    assert matrices.from_picture @ matrices.to_picture == pytest.approx(np.eye(3), abs=1e-4)


def test_the_horizontal_ratio_moves_the_crop_except_in_parity() -> None:
    picture = picture_of((160, 120))
    centre = [
        mapped(
            np.array([[256, 256]]),
            face_crop(picture, finder(), RegistrationSettings(crop_vx_ratio=ratio, parity=parity))[
                1
            ].to_picture,
        )[0, 0]
        for ratio, parity in ((0.0, False), (0.2, False), (0.2, True))
    ]

    assert centre[1] > centre[0] + 10
    assert centre[2] == pytest.approx(centre[0], abs=1e-3)


def test_a_tilted_face_stands_upright_in_its_crop() -> None:
    angle = np.deg2rad(30)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]], np.float32)
    tilted = MEAN_FACE @ turn * 100 + 150

    matrices = crop_matrices(outline(tilted), 512, 2.3, 0.0)
    eyes = mapped(tilted[[0, 24]], matrices.from_picture)

    assert eyes[0, 1] == pytest.approx(eyes[1, 1], abs=0.5)
    assert eyes[0, 0] < eyes[1, 0]


def test_a_face_without_extent_is_refused() -> None:
    point = np.zeros((4, 2), np.float32)
    with pytest.raises(InputError, match="fall into one point"):
        crop_matrices(Outline(point, point[0], point[0]), 224, 1.5, 0.0)


def test_the_outline_of_a_detected_face_is_its_box() -> None:
    (face,) = SquareDetector().detect(picture_of((100, 100), side=40))

    assert np.ptp(face_outline(face).points, axis=0) == pytest.approx([40, 40])


@pytest.mark.parametrize(
    ("size", "max_dim", "fitted"),
    [((2160, 3840), 1920, (1080, 1920)), ((101, 55), -1, (100, 54)), ((500, 500), 320, (320, 320))],
)
def test_pictures_get_even_sides(size: tuple[int, int], max_dim: int, fitted: tuple[int, int]) -> None:
    assert fitted_size(*size, max_dim) == fitted
    assert fit_picture(np.zeros((*size, 3), np.uint8), max_dim).shape[:2] == fitted


def test_a_strip_is_refused() -> None:
    with pytest.raises(InputError, match="is 4000 x 2, too narrow"):
        fit_picture(np.zeros((2, 4000, 3), np.uint8), 1000)


def test_the_network_sees_the_mean_of_two_by_two_pixels() -> None:
    square = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)

    pixels = network_input(square)

    mean = square[:2, :2].astype(float).mean(axis=(0, 1)) / 255
    assert pixels[0, :, 0, 0] == pytest.approx(mean, abs=0.6 / 255)


@pytest.mark.parametrize("offset", [(-300.0, -200.0), (5.5, 20.25), (150.0, 30.0), (900.0, 900.0)])
def test_only_the_part_that_the_mask_reaches_is_blended(offset: tuple[float, float]) -> None:
    """The same as warping over the whole frame, but for rounding."""
    generator = np.random.default_rng(0)
    still = generator.integers(0, 256, (120, 160, 3), np.uint8)
    render = cv2.GaussianBlur(generator.uniform(0, 255, (512, 512, 3)).astype(np.float32), (0, 0), 9)
    matrix = np.array([[0.2, 0.05, offset[0]], [-0.05, 0.2, offset[1]], [0, 0, 1]])

    frame = Putback(still, matrix)(render)

    mask = np.clip(cv2.warpAffine(blend_mask(), matrix[:2], (160, 120)), 0, 1)[..., None]
    whole = mask * cv2.warpAffine(render, matrix[:2], (160, 120)) + (1 - mask) * still
    assert np.abs(frame.astype(int) - np.clip(whole, 0, 255).astype(np.uint8)).max() <= 1
    assert (frame != still).any() == (mask > 0.1).any()


def test_the_crop_alone_at_another_size() -> None:
    composer = Composer([picture_of()], np.eye(3)[None], crop_size=320)

    square = composer.compose(np.full((512, 512, 3), 99.9, np.float32), 0)

    assert square.shape == (320, 320, 3)
    assert (square == 99).all()
