"""The TorchScript detector: what the network is given, which of its finds are faces, and the rule that goes
with it. The network is a small module of the real signature that returns what it was made with."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from avatar_core.errors import WeightsError
from avatar_core.media.face import Face, choose
from avatar_core.media.face_torchscript import TorchScriptFaceDetector, grids, network_size


class Network(nn.Module):
    """`rows` are given back; what the network was called with is kept in its buffers."""

    pixels: Tensor
    cells: Tensor

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.register_buffer("rows", torch.tensor(rows).reshape(1, -1, 16))
        self.register_buffer("pixels", torch.zeros(0))
        self.register_buffer("cells", torch.zeros(0))

    def forward(self, pixels: Tensor, grids: list[Tensor]) -> Tensor:
        self.pixels = pixels
        self.cells = torch.tensor([float(grid.numel()) for grid in grids])
        return self.rows


def row(x, y, width, height, sure=0.9, is_face=1.0) -> list[float]:
    """Centre, size and certainty of one find; the points lie on its diagonal."""
    points = [place for k in range(5) for place in (x + k, y + k)]
    return [x, y, width, height, sure, *points, is_face]


@pytest.fixture
def detector(tmp_path):
    def make(*rows: list[float]) -> TorchScriptFaceDetector:
        torch.jit.script(Network(list(rows))).save(str(tmp_path / "detface.pt"))
        return TorchScriptFaceDetector(tmp_path / "detface.pt")

    return make


def picture(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((640, 480), (576, 416)),
        ((480, 640), (416, 576)),
        ((416, 416), (416, 416)),
        ((1000, 100), (4160, 416)),
    ],
)
def test_the_network_sees_416_pixels_on_the_short_side_and_whole_cells(size, wanted):
    assert network_size(*size) == wanted


def test_a_grid_holds_the_column_and_row_of_every_cell():
    first, second, third = grids(576, 416)
    assert first.shape == (1, 1, 52, 72, 2)
    assert second.shape == (1, 1, 26, 36, 2)
    assert third.shape == (1, 1, 13, 18, 2)
    assert third[0, 0, 4, 7].tolist() == [7.0, 4.0]


def test_the_network_gets_rgb_between_0_and_1(detector):
    network = detector(row(100, 100, 40, 40))
    flat = np.zeros((480, 640, 3), np.uint8)
    flat[:] = (255, 51, 0)
    network.detect(flat)
    pixels = network._network.pixels
    assert pixels.shape == (1, 3, 416, 576)
    assert pixels[0, :, 0, 0].tolist() == pytest.approx([1, 0.2, 0])
    assert network._network.cells.tolist() == [52 * 72 * 2, 26 * 36 * 2, 13 * 18 * 2]


def test_finds_are_told_in_pixels_of_the_picture(detector):
    (face,) = detector(row(288, 208, 57.6, 41.6)).detect(picture(640, 480))
    assert face.box == pytest.approx([288, 216, 352, 264], abs=1e-3)
    assert face.points[1] == pytest.approx([289 * 640 / 576, 209 * 480 / 416], abs=1e-3)
    assert face.score == pytest.approx(0.9)


@pytest.mark.parametrize(("sure", "is_face", "found"), [(0.9, 0.9, 1), (0.5, 1.0, 0), (0.8, 0.6, 0)])
def test_a_face_is_sure_alone_and_by_its_product(detector, sure, is_face, found):
    assert len(detector(row(100, 100, 40, 40, sure, is_face)).detect(picture(640, 480))) == found


def test_of_overlapping_finds_the_surest_stays(detector):
    rows = row(100, 100, 40, 40, 0.8), row(104, 100, 40, 40, 0.95), row(120, 100, 40, 40, 0.7)
    faces = detector(*rows).detect(picture(416, 416))
    assert [face.score for face in faces] == pytest.approx([0.95, 0.7])


def test_faces_come_left_to_right_and_small_ones_can_be_left_out(detector):
    network = detector(row(300, 50, 40, 60), row(100, 50, 20, 20, 0.95))
    assert [round(face.box[0]) for face in network.detect(picture(416, 416))] == [90, 280]
    assert [round(face.box[0]) for face in network.detect(picture(416, 416), min_face=50)] == [280]


def test_no_face(detector):
    assert detector(row(100, 100, 40, 40, 0.1)).detect(picture(416, 416)) == []


def face(x: float, side: float, score: float) -> Face:
    return Face(np.array([x, 0, x + side, side], np.float32), score, np.zeros((5, 2), np.float32))


def test_the_reference_takes_the_least_sure_of_those_larger_than_the_surest():
    faces = [face(0, 90, 0.7), face(100, 30, 0.9), face(200, 20, 0.6), face(300, 50, 0.65)]
    assert choose(faces, "reference") == [faces[3]]
    assert choose(faces, "largest") == [faces[0]]


def test_the_reference_keeps_the_surest_where_none_is_larger():
    faces = [face(0, 20, 0.7), face(100, 30, 0.9)]
    assert choose(faces, "reference") == [faces[1]]


def test_a_file_that_is_no_torchscript(tmp_path):
    path = tmp_path / "detface.pt"
    path.write_bytes(b"not a model")
    with pytest.raises(WeightsError, match="cannot be read as a TorchScript file"):
        TorchScriptFaceDetector(path)
    with pytest.raises(WeightsError, match="cannot be read as a TorchScript file"):
        TorchScriptFaceDetector(tmp_path / "absent.pt")
