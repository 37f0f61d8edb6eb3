"""Portraits drawn with an open mouth of known geometry, from the front and turned, grow no second mouth when
they speak."""

from dataclasses import dataclass
from functools import cache
from itertools import groupby

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from avatar_core.backends.preview.contours import Contours, contours_from_points
from avatar_core.backends.preview.renderer import Renderer
from avatar_core.media.face import Face

Picture = NDArray[np.uint8]
Floats = NDArray[np.float64]

SKIN, LIP, TEETH, DARK, TONGUE = (226, 178, 150), (196, 80, 84), (226, 218, 204), (38, 16, 16), (120, 54, 54)
SIDE, CENTRE = 480, (240.0, 230.0)
RADIUS = 120.0  # px, of the cylinder that the face is drawn on
MOUTH_Y, HALF_MOUTH = 310.0, 44.0


@dataclass(frozen=True)
class DrawnFace:
    """A face on a cylinder, turned by `yaw` degrees. `width`: of the opening, in half mouths; the detector
    says that the corners are at 1. `teeth`: share of the opening's height that upper teeth fill."""

    yaw: float
    opening: float  # px
    width: float
    teeth: float

    def x(self, across: Floats) -> Floats:
        """Picture x of places at `across` half mouths from the face's middle."""
        angle = np.arcsin(np.asarray(across) * HALF_MOUTH / RADIUS) + np.radians(self.yaw)
        return np.asarray(CENTRE[0] + RADIUS * np.sin(angle), np.float64)

    def edges(self, across: Floats) -> tuple[Floats, Floats]:
        """y of the opening's upper and lower edge."""
        arch = np.sqrt(np.clip(1 - (across / self.width) ** 2, 0, 1))
        return MOUTH_Y - 0.3 * self.opening * arch, MOUTH_Y + 0.7 * self.opening * arch

    def columns(self, share: float) -> NDArray[np.intp]:
        """Picture columns that cross that share of the opening's width."""
        ends = self.x(np.array([-share, share]) * self.width)
        return np.arange(round(ends[0]), round(ends[1]) + 1)

    def face(self) -> Face:
        depth = 0.2 * RADIUS * np.sin(np.radians(self.yaw))  # the nose stands out
        eyes, corners = self.x(np.array([-1.05, 1.05])), self.x(np.array([-1.0, 1.0]))
        nose = self.x(np.zeros(1))[0] + depth
        points = [(eyes[0], 200), (eyes[1], 200), (nose, 260), (corners[0], MOUTH_Y), (corners[1], MOUTH_Y)]
        return Face(np.array([130, 110, 350, 400], np.float32), 1.0, np.array(points, np.float32))

    def picture(self) -> Picture:
        picture = np.full((SIDE, SIDE, 3), (120, 130, 140), np.uint8)
        cv2.ellipse(picture, (240, 230), (125, 170), 0, 0, 360, SKIN, -1)
        for eye in self.face().points[:2]:
            cv2.ellipse(picture, (int(eye[0]), 200), (13, 6), 0, 0, 360, (70, 50, 45), -1)
        across = np.linspace(-1, 1, 81)
        arch = 1 - across**2
        upper, lower = self.edges(across)
        self._fill(picture, across, upper - 15 * arch, lower + 18 * arch, LIP)
        self._fill(picture, across, MOUTH_Y - 0.8, MOUTH_Y + 0.8 + 0 * across, (110, 50, 48))
        inside = np.linspace(-self.width, self.width, 81)
        upper, lower = self.edges(inside)
        self._fill(picture, inside, upper, lower, DARK)
        if self.teeth < 1:
            self._fill(picture, inside, lower - 0.2 * (lower - upper), lower, TONGUE)
        if self.teeth:
            self._fill(picture, inside, upper, upper + self.teeth * (lower - upper), TEETH)
        return np.asarray(cv2.GaussianBlur(picture, (0, 0), 0.8), np.uint8)

    def _fill(
        self, picture: Picture, across: Floats, top: Floats, bottom: Floats, colour: tuple[int, ...]
    ) -> None:
        x = self.x(across)
        outline = np.concatenate(
            [np.column_stack([x, top + 0 * x]), np.column_stack([x, bottom + 0 * x])[::-1]]
        )
        cv2.fillPoly(picture, [np.round(outline * 16).astype(np.int32)], colour, cv2.LINE_AA, 4)


FACES = {
    "wide": DrawnFace(0, 40, 0.92, 0.3),
    "round": DrawnFace(0, 36, 0.72, 0.3),
    "teeth": DrawnFace(0, 24, 0.92, 1.0),
    "dark": DrawnFace(0, 16, 0.92, 0.0),
    "turned left": DrawnFace(-42, 40, 0.92, 0.3),
    "turned right": DrawnFace(42, 40, 0.92, 0.3),
    "turned, teeth": DrawnFace(40, 26, 0.92, 1.0),
    "turned, hardly open": DrawnFace(-45, 14, 0.92, 0.0),
}
drawn_faces = pytest.mark.parametrize("name", FACES)


@cache
def drawn(name: str) -> tuple[Picture, Contours]:
    picture = FACES[name].picture()
    return picture, contours_from_points(picture, FACES[name].face())


def spoken(name: str, mouth_open: float, wide: float = 0) -> Picture:
    picture, contours = drawn(name)
    still = np.zeros((1, 5), np.float32)
    return Renderer(picture, [contours]).frame(
        np.float32([mouth_open]), np.float32([wide]), np.zeros(1, np.float32), still
    )


def kinds(picture: Picture, columns: NDArray[np.intp]) -> NDArray[np.str_]:
    """What each pixel between nose and chin shows: s(kin), l(ip), t(eeth), o for tongue, d(ark)."""
    pixels = picture[270:400, columns].astype(int)
    red, redness = pixels[..., 0], pixels[..., 0] - pixels[..., 1]
    choices = (redness > 85, (red > 170) & (redness > 30), pixels.min(axis=2) > 120, redness > 30)
    return np.select(choices, ("l", "s", "t", "o"), "d")


def bands(picture: Picture, columns: NDArray[np.intp]) -> list[str]:
    """Per column, what lies between the uppermost and the lowest lip, these included, from top to bottom;
    less than three pixels of a kind do not count."""
    found = []
    for column in kinds(picture, columns).T:
        shown = "".join(kind for kind, run in groupby(column) if len(list(run)) >= 3)
        found.append(shown[shown.index("l") : shown.rindex("l") + 1])
    return found


@drawn_faces
def test_outlines_follow_the_opening_to_its_ends(name: str) -> None:
    face, (_, contours) = FACES[name], drawn(name)
    across = np.linspace(-0.9, 0.9, 19) * face.width
    x = face.x(across)
    for truth, curve in zip(
        face.edges(across), (contours.upper_lip_inner, contours.lower_lip_inner), strict=True
    ):
        assert np.abs(np.interp(x, *curve.T) - truth).max() < 5


@drawn_faces
def test_a_silent_mouth_hides_what_the_picture_shows_inside(name: str) -> None:
    face = FACES[name]
    still_open = []
    for column in kinds(spoken(name, 0), face.columns(0.9)).T:
        lips = np.flatnonzero(column == "l")
        still_open.append(np.sum(column[lips[0] : lips[-1]] != "l"))
    assert np.mean(still_open) < (0.1 if face.yaw else 0.03) * face.opening


@drawn_faces
@pytest.mark.parametrize("mouth_open", [0.5, 0.75, 1.0])
def test_a_speaking_mouth_has_two_lips_and_one_row_of_teeth(name: str, mouth_open: float) -> None:
    for band in bands(spoken(name, mouth_open), FACES[name].columns(0.75)):
        assert band.count("l") == 2
        assert band.count("t") <= 1
        assert band.count("o") <= 1


@pytest.mark.parametrize("yaw", [-45, 0, 45])
def test_a_dark_line_between_closed_lips_is_no_opening(yaw: float) -> None:
    closed = DrawnFace(yaw, 0, 0.9, 0)
    contours = contours_from_points(closed.picture(), closed.face())
    np.testing.assert_array_equal(contours.upper_lip_inner, contours.lower_lip_inner)
    x = closed.x(np.linspace(-0.9, 0.9, 19))
    np.testing.assert_allclose(np.interp(x, *contours.upper_lip_inner.T), MOUTH_Y, atol=1)
