"""Faces and landmarks out of the raw outputs of networks, and back to where they are in the picture."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from avatar_core.backends.ditto.tiny_onnx import (
    write_blaze_face,
    write_detector,
    write_face_mesh,
    write_landmark106,
    write_landmark203,
)
from avatar_core.errors import InputError, WeightsError
from avatar_core.media import face_mesh, landmarks, scrfd
from avatar_core.media.affine import warp_square
from avatar_core.media.onnx_model import OnnxModel

Array = NDArray[np.float32]


def scrfd_outputs(*faces: tuple[int, int, int, float, float]) -> list[Array]:
    """Of boxes of 40 x 60 px: stride, row and column of the anchor, score, shift of the points."""
    sizes = [2 * (scrfd.SIDE // stride) ** 2 for stride in scrfd.STRIDES]
    scores = [np.zeros((n, 1), np.float32) for n in sizes]
    boxes = [np.ones((n, 4), np.float32) for n in sizes]
    points = [np.zeros((n, 10), np.float32) for n in sizes]
    for stride, row, column, score, shift in faces:
        level, cell = scrfd.STRIDES.index(stride), 2 * (row * (scrfd.SIDE // stride) + column)
        scores[level][cell] = score
        boxes[level][cell] = np.array([20, 30, 20, 30]) / stride
        points[level][cell] = shift / stride
    return [*scores, *boxes, *points]


def test_a_box_lies_round_its_anchor_in_picture_pixels() -> None:
    finds = scrfd.finds_from_outputs(scrfd_outputs((16, 5, 7, 0.9, 4.0)), scale=0.5)

    assert finds.boxes.tolist() == [[2 * (112 - 20), 2 * (80 - 30), 2 * (112 + 20), 2 * (80 + 30)]]
    assert finds.scores == pytest.approx([0.9])
    assert finds.points[0].tolist() == [[2 * 116, 2 * 84]] * 5


def test_the_best_of_overlapping_boxes_stays_and_others_beside_it() -> None:
    outputs = scrfd_outputs(
        (8, 10, 10, 0.7, 0), (8, 10, 11, 0.8, 0), (8, 10, 40, 0.6, 0), (8, 30, 30, 0.49, 0)
    )

    finds = scrfd.finds_from_outputs(outputs, scale=1.0)

    assert finds.scores == pytest.approx([0.8, 0.6])
    assert finds.boxes[0, 0] == 11 * 8 - 20


@pytest.mark.parametrize(("height", "width"), [(300, 200), (200, 300), (512, 512), (1000, 90)])
def test_the_picture_lies_in_the_upper_left_corner_with_blue_first(height: int, width: int) -> None:
    picture = np.full((height, width, 3), (255, 0, 127), np.uint8)

    batch, scale = scrfd.network_input(picture)

    assert batch.shape == (1, 3, 512, 512)
    assert batch[0, :, 0, 0] == pytest.approx(np.array([127, 0, 255]) / 128 - 127.5 / 128, abs=1e-6)
    reached = batch[0, 2] > 0
    assert reached.any(axis=1).sum() == round(height * scale)
    assert reached.any(axis=0).sum() == pytest.approx(width * scale, abs=1)


def test_no_face_is_an_empty_list() -> None:
    assert len(scrfd.finds_from_outputs(scrfd_outputs(), 1.0).boxes) == 0


def test_landmarks_of_a_box_come_back_to_the_picture() -> None:
    box = np.array([100, 50, 180, 130])
    matrix = landmarks.box_matrix(box)
    corners = np.array([[100, 50], [180, 130]]) @ matrix[:, :2].T + matrix[:, 2]
    output = np.zeros((1, 212), np.float32)
    output[0, :4] = (corners / 96 - 1).reshape(-1)

    points = landmarks.points_106(output, matrix)

    assert points.shape == (106, 2)
    assert points[:2] == pytest.approx(np.array([[100, 50], [180, 130]]), abs=1e-3)
    assert points[2] == pytest.approx([140, 90], abs=1e-3)


def blaze_outputs(*faces: tuple[int, float, float]) -> tuple[Array, Array]:
    """Of faces 32 px wide at an anchor: its index, a shift in px of the view, the logit."""
    regressors, logits = np.zeros((1, 896, 16), np.float32), np.full((1, 896, 1), -60, np.float32)
    for anchor, shift, logit in faces:
        regressors[0, anchor] = [shift, 0, 32, 32, *[shift - 8, -8, shift + 8, -8], *[shift, 0] * 4]
        logits[0, anchor] = logit
    return regressors, logits


def test_anchors_are_cell_centres() -> None:
    centres = face_mesh.anchors()

    assert centres.shape == (896, 2)
    assert centres[0].tolist() == centres[1].tolist() == [0.5 / 16, 0.5 / 16]
    assert centres[2].tolist() == [1.5 / 16, 0.5 / 16]
    assert centres[512].tolist() == [0.5 / 8, 0.5 / 8]


def test_overlapping_faces_become_their_mean() -> None:
    anchor = 2 * (8 * 16 + 8)
    faces = face_mesh.faces_from_outputs(*blaze_outputs((anchor, 0, 2.0), (anchor + 1, 4, 2.0), (0, 0, 1.0)))

    assert len(faces.scores) == 2
    middle = faces.boxes[0].reshape(2, 2).mean(axis=0)
    assert middle == pytest.approx([(8.5 * 8 + 2) / 128, 8.5 / 16])
    assert faces.scores[0] == pytest.approx(1 / (1 + np.exp(-2)))


@pytest.mark.parametrize("tilt", [0.0, 0.4, -1.2, 3.0])
def test_mesh_points_are_where_the_view_saw_them(tilt: float) -> None:
    """A point drawn in the picture is seen somewhere in the view; from there it leads back."""
    eyes = np.array(
        [
            [0.5 - 0.1 * np.cos(tilt), 0.5 - 0.1 * np.sin(tilt)],
            [0.5 + 0.1 * np.cos(tilt), 0.5 + 0.1 * np.sin(tilt)],
        ]
    )
    region = face_mesh.face_region(np.array([0.3, 0.3, 0.7, 0.7]), eyes, 400, 400)
    picture = np.zeros((400, 400, 3), np.uint8)
    picture[228:233, 168:173] = 255

    view = face_mesh.mesh_input(picture, region)[0, ..., 0]
    rows, columns = np.nonzero(view > 0.5)
    output = np.zeros((1, 1434), np.float32)
    output[0, :3] = columns.mean(), rows.mean(), 10
    points = face_mesh.mesh_points(output, region)

    assert region.angle == pytest.approx(tilt, abs=1e-6)
    assert region.side == pytest.approx(1.5 * 160)
    assert points[0, :2] == pytest.approx([170, 230], abs=0.5)
    assert points[0, 2] == pytest.approx(10 / 256 * region.side)


def test_a_picture_without_a_face_for_the_mesh_is_refused(tmp_path: Path) -> None:
    blaze, mesh = tmp_path / "blaze_face.onnx", tmp_path / "face_mesh.onnx"
    write_blaze_face(blaze, np.random.default_rng(0))
    write_face_mesh(mesh, np.random.default_rng(0))
    picture = np.zeros((64, 64, 3), np.uint8)
    assert face_mesh.FaceMesh(blaze, mesh).find(picture).shape == (478, 3)

    sceptic = onnx.load(blaze)
    for constant in sceptic.graph.initializer:
        if constant.name == "classificators_still":
            constant.raw_data = np.full((1, 896, 1), -9, np.float32).tobytes()
    onnx.save(sceptic, blaze)

    with pytest.raises(InputError, match="no face found where the eyes were looked for"):
        face_mesh.FaceMesh(blaze, mesh).find(picture)


def test_the_published_files_names_and_shapes_are_read(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    write_detector(tmp_path / "detector.onnx")
    write_landmark106(tmp_path / "landmark106.onnx", np.random.default_rng(0))
    write_landmark203(tmp_path / "landmark203.onnx", np.random.default_rng(0))

    faces = scrfd.ScrfdDetector(tmp_path / "detector.onnx").detect(picture)
    points = landmarks.Landmark106(tmp_path / "landmark106.onnx").find(picture, np.array([10, 10, 60, 60]))
    more = landmarks.Landmark203(tmp_path / "landmark203.onnx").find(np.zeros((224, 224, 3), np.uint8))

    assert [face.points.shape for face in faces] == [(5, 2)]
    assert points.shape == (106, 2)
    assert more.shape == (203, 2)


def test_files_that_are_absent_or_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no model file .*absent\.onnx"):
        OnnxModel(tmp_path / "absent.onnx")
    write_landmark203(tmp_path / "landmark203.onnx", np.random.default_rng(0))
    with pytest.raises(
        WeightsError, match=r"landmark203\.onnx does not take an input of shape \(1, 3, 96, 96\)"
    ):
        OnnxModel(tmp_path / "landmark203.onnx").run(np.zeros((1, 3, 96, 96), np.float32))
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(WeightsError, match=r"text\.onnx cannot be read as an ONNX file"):
        OnnxModel(tmp_path / "text.onnx")


def test_a_warp_lies_exactly_where_the_matrix_says() -> None:
    """A third of a pixel to the right, of a slope of 9 a pixel."""
    picture = np.repeat((np.arange(20) * 9).astype(np.uint8)[None, :, None], 20, axis=0).repeat(3, axis=2)
    matrix = np.array([[1, 0, 1 / 3], [0, 1, 0]])

    square = warp_square(picture, matrix, 20)

    assert square[5, 1:, 0].tolist() == [round(9 * (i - 1 / 3)) for i in range(1, 20)]
    assert warp_square(picture, matrix, 24)[22, 22].tolist() == [0, 0, 0]
