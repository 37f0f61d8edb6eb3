"""Outlines on a real portrait and on drawn mouths whose truth is known."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load, save

from avatar_core.backends.preview import contours as c
from avatar_core.backends.preview.eye_outline import fitted_eye
from avatar_core.backends.preview.lip_outline import HALF, MouthFrame, mouth_strip, seam_heights
from avatar_core.backends.preview.lowest_path import lowest_path
from avatar_core.backends.preview.mesh import first_square, fitted_square, rotation
from avatar_core.backends.preview.mouth_gap import find_gap
from avatar_core.backends.preview.outline_order import ordered_curves
from avatar_core.backends.preview.pose import fitted_projection, posed_template, template
from avatar_core.errors import WeightsError
from avatar_core.media.face import Face, FaceDetector
from avatar_core.media.mtcnn import installed_weights

Picture = NDArray[np.uint8]
Points = NDArray[np.float64]

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
SKIN, LIP, TEETH, CAVITY, SEAM = (226, 178, 150), (190, 92, 90), (225, 216, 200), (45, 18, 18), (110, 50, 48)


@pytest.fixture(scope="module")
def portrait() -> Picture:
    return cv2.cvtColor(cv2.imread(str(SAMPLES / "portrait.jpg")), cv2.COLOR_BGR2RGB)


@pytest.fixture(scope="module")
def detector() -> FaceDetector:
    return FaceDetector(installed_weights())


@pytest.fixture(scope="module")
def face(detector: FaceDetector, portrait: Picture) -> Face:
    return detector.detect(portrait)[0]


def inner_gap(contours: c.Contours) -> float:
    """Pixels between the lips in the middle of the mouth."""
    apart = contours.lower_lip_inner[4:7] - contours.upper_lip_inner[4:7]
    return float(np.linalg.norm(apart, axis=1).mean())


def assert_sound(contours: c.Contours) -> None:
    """Finite, left to right, and top to bottom in the coordinates of the corners."""
    assert all(np.isfinite(getattr(contours, name)).all() for name in c.CURVES)
    for names in (c.LIPS, ("left_eye_upper", "left_eye_lower"), ("right_eye_upper", "right_eye_lower")):
        curves = [getattr(contours, name) for name in names]
        across = curves[0][-1] - curves[0][0]
        axes = np.column_stack([across, [-across[1], across[0]]])
        placed = [np.linalg.solve(axes, (curve - curves[0][0]).T) for curve in curves]
        assert all((np.diff(x) > 0).all() for x, _ in placed)
        for (x, y), (x_below, y_below) in pairwise(placed):
            common = (x_below >= x[0]) & (x_below <= x[-1])
            assert (y_below - np.interp(x_below, x, y))[common].min(initial=0) > -0.02


def test_template_faces_the_viewer_and_is_upright() -> None:
    mean = template()
    assert {name for name in mean if name != "detector_points"} == set(c.CURVES)
    assert mean["left_brow"][1] < mean["left_eye_upper"][4, 1] < mean["nose"][1] < mean["chin"][1]
    assert mean["detector_points"][1, 0] - mean["detector_points"][0, 0] == pytest.approx(1)


@pytest.mark.parametrize("yaw", [-45, -15, 0, 30, 50])
def test_pose_is_recovered_from_the_projection_of_a_turned_template(yaw: float) -> None:
    turn = cv2.Rodrigues(np.array([0, np.radians(yaw), 0]))[0]
    mean = template()
    project = fitted_projection(
        mean["detector_points"], 80 * (mean["detector_points"] @ turn.T)[:, :2] + [300, 200]
    )
    found = np.degrees(np.arctan2(project.rotation[0, 2], project.rotation[0, 0]))
    assert found == pytest.approx(yaw, abs=4)
    assert project.scale == pytest.approx(80, rel=0.05)


def test_posed_template_meets_eyes_and_corners(face: Face) -> None:
    curves = posed_template(face.points.astype(np.float64))
    eyes_and_corners = np.array(
        [
            (curves["left_eye_upper"] + curves["left_eye_lower"]).mean(axis=0) / 2,
            (curves["right_eye_upper"] + curves["right_eye_lower"]).mean(axis=0) / 2,
            curves["upper_lip_outer"][0],
            curves["upper_lip_outer"][-1],
        ]
    )
    assert np.abs(eyes_and_corners - face.points[[0, 1, 3, 4]]).max() < 3


def test_portrait_contours_lie_where_mouth_and_eyes_are(portrait: Picture, face: Face) -> None:
    contours = c.contours_from_points(portrait, face)
    assert_sound(contours)
    assert contours.source == "points"
    assert contours.eyes_trusted == (True, True)
    # Read by eye from this photograph: the teeth stand between y = 141 and 149 in the mouth's middle.
    assert contours.upper_lip_inner[5] == pytest.approx([224, 141.5], abs=2.5)
    assert contours.lower_lip_inner[5] == pytest.approx([224, 149], abs=2.5)
    assert contours.chin[1] == pytest.approx(176, abs=8)
    assert contours.left_eye_upper[4, 1] < 101 < contours.left_eye_lower[4, 1]
    assert contours.right_eye_upper[4, 1] < 104 < contours.right_eye_lower[4, 1]


@pytest.mark.parametrize("change", ["dark", "bright", "grey", "half", "double", "flipped", "jpeg"])
def test_the_smile_stays_open_under_changes_of_the_picture(
    detector: FaceDetector, portrait: Picture, face: Face, change: str
) -> None:
    zoom = {"half": 0.55, "double": 2.0}.get(change, 1.0)
    changed = {
        "dark": lambda: (portrait * 0.45).astype(np.uint8),
        "bright": lambda: np.clip(portrait * 1.2 + 10, 0, 255).astype(np.uint8),
        "grey": lambda: np.repeat(cv2.cvtColor(portrait, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2),
        "half": lambda: cv2.resize(portrait, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_AREA),
        "double": lambda: cv2.resize(portrait, None, fx=zoom, fy=zoom),
        "flipped": lambda: np.ascontiguousarray(portrait[:, ::-1]),
        "jpeg": lambda: cv2.imdecode(cv2.imencode(".jpg", portrait, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], 1),
    }[change]()
    (found,) = detector.detect(changed, min_face=30)
    contours = c.contours_from_points(changed, found)
    assert_sound(contours)
    original = inner_gap(c.contours_from_points(portrait, face))
    assert inner_gap(contours) / zoom == pytest.approx(original, rel=0.4)


def drawn_mouth(opening: int, inside: tuple[int, int, int]) -> Picture:
    """A mouth strip: lips round an opening (rows, at the middle) or a closed seam, its corners on y = 0."""
    rows, corner = int(1.6 * HALF), int(0.7 * HALF)
    strip = np.full((rows, 2 * HALF, 3), SKIN, np.uint8)
    x = np.linspace(-1, 1, 2 * HALF)
    arch = 1 - x**2
    row = np.arange(rows)[:, None]
    seam = corner + 8 * arch
    upper, lower = seam - opening / 2 * arch, seam + opening / 2 * arch
    strip[(row > upper - 13 * arch) & (row < lower + 16 * arch)] = LIP
    strip[(row >= upper) & (row < lower)] = inside
    if not opening:
        strip[np.abs(row - seam) < 2] = SEAM
    return strip


def gap_of(strip: Picture) -> tuple[Points, Points] | None:
    gap = find_gap(mouth_strip(strip, (-0.4, 0.8)))
    return gap and gap.edges(np.linspace(-0.96, 0.96, 11))


@pytest.mark.parametrize("inside", [TEETH, CAVITY])
@pytest.mark.parametrize("opening", [10, 20, 35])
@pytest.mark.parametrize("light", [0.3, 1.0])
def test_an_open_mouth_is_measured(inside: tuple[int, int, int], opening: int, light: float) -> None:
    gap = gap_of((drawn_mouth(opening, inside) * light).astype(np.uint8))
    assert gap is not None
    upper, lower = gap
    assert (lower[5] - upper[5]) * HALF == pytest.approx(opening, abs=4)
    assert (upper[5] + lower[5]) / 2 * HALF == pytest.approx(8, abs=3)


@pytest.mark.parametrize("light", [0.3, 1.0])
def test_a_closed_mouth_has_no_gap_but_a_seam(light: float) -> None:
    strip = (drawn_mouth(0, SEAM) * light).astype(np.uint8)
    assert gap_of(strip) is None
    heights = seam_heights(mouth_strip(strip, (-0.4, 0.8)))
    assert heights[5] * HALF == pytest.approx(8, abs=2)


def test_a_moustache_is_neither_gap_nor_seam() -> None:
    strip = drawn_mouth(0, SEAM)
    corner = int(0.7 * HALF)
    strip[corner - 22 : corner - 8] = (70, 55, 45)
    assert gap_of(strip) is None
    assert seam_heights(mouth_strip(strip, (-0.4, 0.8)))[5] * HALF == pytest.approx(8, abs=3)


def test_a_dark_background_beside_a_profile_is_no_gap() -> None:
    strip = drawn_mouth(0, SEAM)
    strip[:, HALF:] = (12, 14, 12)
    assert gap_of(strip) is None


@pytest.mark.parametrize("colour", [0, 128, 255])
def test_a_flat_strip_has_no_gap(colour: int) -> None:
    assert gap_of(np.full((int(1.6 * HALF), 2 * HALF, 3), colour, np.uint8)) is None


def test_mouth_frame_heights_invert_its_curve() -> None:
    frame = MouthFrame(np.array([50.0, 60.0]), np.array([20.0, 4.0]), np.array([-3.0, 15.0]))
    across, heights = np.linspace(-1, 1, 11), np.linspace(-0.3, 0.5, 11)
    np.testing.assert_allclose(frame.heights(frame.to_picture(across, heights)), heights)


def test_a_drawn_eye_is_met_and_a_shut_one_is_not_seen() -> None:
    picture = np.full((120, 160, 3), SKIN, np.uint8)
    cv2.ellipse(picture, (80, 66), (30, 12), 0, 0, 360, (70, 50, 45), -1)
    x = np.linspace(50, 110, 9)
    arch = 1 - ((x - 80) / 30) ** 2
    lids = fitted_eye(picture, np.column_stack([x, 60 - 8 * arch]), np.column_stack([x, 60 + 6 * arch]))
    assert lids is not None
    assert lids[0][4, 1] == pytest.approx(55, abs=3)
    assert lids[1][4, 1] == pytest.approx(76, abs=4)
    assert fitted_eye(np.full_like(picture, 180), *lids) is None


def test_lowest_path_follows_a_valley() -> None:
    truth = np.round(10 + 5 * np.sin(np.linspace(0, 3, 40))).astype(int)
    cost = np.ones((25, 40))
    cost[truth, np.arange(40)] = 0
    assert np.array_equal(lowest_path(cost), truth)


def test_ordered_curves_keep_sound_ones_and_unfold_others() -> None:
    x = np.linspace(0, 10, 11)
    upper, lower = np.column_stack([x, 5 - x * 0]), np.column_stack([x, 7 - x * 0])
    for kept, curve in zip(ordered_curves([upper, lower], upper[0], upper[-1]), (upper, lower), strict=True):
        np.testing.assert_allclose(kept, curve)
    folded = lower.copy()
    folded[4:7] = [[8, 7], [3, 2], [4, 7]]
    _, fixed = ordered_curves([upper, folded], upper[0], upper[-1])
    assert (np.diff(fixed[:, 0]) > 0).all()
    assert (fixed[:, 1] >= 5 - 1e-9).all()


def test_outlines_stay_sound_for_any_five_points(portrait: Picture, face: Face) -> None:
    generator = np.random.default_rng(3)
    for spread in (0.5, 5, 20, 200):
        for _ in range(6):
            points = (face.points + generator.normal(0, spread, (5, 2))).astype(np.float32)
            assert_sound(c.contours_from_points(portrait, replace(face, points=points)))


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (64, 48)])
def test_outlines_stay_sound_on_tiny_pictures_and_coinciding_points(
    shape: tuple[int, int], face: Face
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert_sound(c.contours_from_points(picture, face))
    assert_sound(c.contours_from_points(picture, replace(face, points=np.full((5, 2), 4, np.float32))))


def test_eyes_of_a_head_turned_away_do_not_blink(portrait: Picture, face: Face) -> None:
    turned = face.points.copy()
    turned[1, 0] = turned[0, 0] + 26
    turned[2, 0] = turned[1, 0] + 2  # the nose beyond the right eye
    assert c.contours_from_points(portrait, replace(face, points=turned)).eyes_trusted[1] is False
    turned[1, 0] = turned[0, 0] + 15
    contours = c.contours_from_points(portrait, replace(face, points=turned))
    assert contours.eyes_trusted == (False, False)


def test_contours_survive_a_safetensors_file(portrait: Picture, face: Face) -> None:
    first = c.contours_from_points(portrait, face)
    second = replace(first, chin=first.chin * 2, eyes_trusted=(False, True), source="mesh")
    tensors = c.contours_to_tensors([first, second])
    assert tensors["upper_lip_inner"].shape == (2, 11, 2)
    assert tensors["chin"].shape == (2, 1, 2)
    back = c.contours_from_tensors(load(save(tensors)))
    assert [contours.source for contours in back] == ["points", "mesh"]
    assert [contours.eyes_trusted for contours in back] == [first.eyes_trusted, (False, True)]
    for name in c.CURVES:
        np.testing.assert_allclose(getattr(back[1], name), getattr(second, name), atol=1e-3)


def test_no_faces_make_empty_tensors() -> None:
    assert c.contours_from_tensors(load(save(c.contours_to_tensors([])))) == []


def test_a_file_that_is_no_mesh_network_is_refused(portrait: Picture, face: Face, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"absent.tflite.*no such file"):
        c.contours_from_mesh(portrait, face, tmp_path / "absent.tflite")
    (tmp_path / "face_landmark.tflite").write_bytes(b"not a network")
    with pytest.raises(WeightsError, match="no face landmark network"):
        c.contours_from_mesh(portrait, face, tmp_path / "face_landmark.tflite")


def test_mesh_squares_cover_the_face_upright(face: Face) -> None:
    centre, side, roll = first_square(face.points.astype(np.float64))
    assert (np.abs(face.points - centre) < side / 2).all()
    assert abs(np.degrees(roll)) < 8
    turn = rotation(np.radians(30))
    mesh = np.random.default_rng(0).uniform(-50, 50, (468, 2))
    mesh[33], mesh[263] = [-30, 0], [30, 0]
    plain, tilted = fitted_square(mesh), fitted_square(mesh @ turn)
    np.testing.assert_allclose(plain[0] @ turn, tilted[0], atol=1e-9)
    assert tilted[1] == pytest.approx(plain[1])
    assert np.degrees(tilted[2] - plain[2]) == pytest.approx(30)
