"""The detector's networks against torch, its finds on real pictures, alignment and choice."""

import hashlib
import pickle
from pathlib import Path

import cv2
import joblib
import lz4.frame
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from avatar_core.errors import InputError, WeightsError
from avatar_core.media import mtcnn
from avatar_core.media.face import ALIGNED_POINTS, Face, FaceDetector, align, choose, similarity

Picture = NDArray[np.uint8]

SAMPLES = Path(__file__).parents[2] / "data" / "samples"


def read(name: str) -> Picture:
    return cv2.cvtColor(cv2.imread(str(SAMPLES / name)), cv2.COLOR_BGR2RGB)


@pytest.fixture(scope="module")
def detector() -> FaceDetector:
    return FaceDetector(mtcnn.installed_weights())


@pytest.fixture(scope="module")
def portrait() -> Picture:
    return read("portrait.jpg")


def noise(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


class TorchNetwork:
    """The same weights through torch's own layers."""

    def __init__(self, name: str) -> None:
        arrays = joblib.load(mtcnn.installed_weights() / f"{name}.lz4")
        self.weights = iter([torch.from_numpy(array) for array in arrays])

    def conv(self, x: torch.Tensor) -> torch.Tensor:
        kernel, bias, slope = (next(self.weights) for _ in range(3))
        y = torch.nn.functional.conv2d(x, kernel.permute(3, 2, 0, 1), bias)
        return torch.nn.functional.prelu(y, slope.reshape(-1))

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias, slope = (next(self.weights) for _ in range(3))
        flat = x.permute(0, 3, 2, 1).flatten(1)
        return torch.nn.functional.prelu(flat @ weight + bias, slope)

    def head(self, x: torch.Tensor) -> NDArray[np.float32]:
        return (x @ next(self.weights).squeeze() + next(self.weights)).numpy()

    def face(self, x: torch.Tensor) -> NDArray[np.float32]:
        return torch.softmax(torch.from_numpy(self.head(x)), dim=-1)[..., 1].numpy()


def pool(x: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.max_pool2d(x, size, 2, ceil_mode=True)


def channels_first(x: NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [(37, 50), (64, 63), (12, 12)])
def test_proposal_network_agrees_with_torch(size: tuple[int, int]) -> None:
    x = noise(*size, 3)
    network = TorchNetwork("pnet")
    y = network.conv(network.conv(pool(network.conv(channels_first(x[None])), 2)))[0].permute(1, 2, 0)
    offsets, probability = mtcnn.MTCNN(mtcnn.installed_weights()).propose(x)
    np.testing.assert_allclose(offsets, network.head(y), atol=1e-4)
    np.testing.assert_allclose(probability, network.face(y), atol=1e-4)


def test_refinement_network_agrees_with_torch() -> None:
    x = noise(mtcnn.CROPS_PER_BATCH + 3, 24, 24, 3)
    network = TorchNetwork("rnet")
    y = pool(network.conv(pool(network.conv(channels_first(x)), 3)), 3)
    y = network.dense(network.conv(y))
    offsets, probability = mtcnn.MTCNN(mtcnn.installed_weights()).refine(x)
    np.testing.assert_allclose(offsets, network.head(y), atol=1e-4)
    np.testing.assert_allclose(probability, network.face(y), atol=1e-4)


def test_output_network_agrees_with_torch() -> None:
    x = noise(5, 48, 48, 3)
    network = TorchNetwork("onet")
    y = pool(network.conv(pool(network.conv(channels_first(x)), 3)), 3)
    y = network.dense(network.conv(pool(network.conv(y), 2)))
    offsets, points, probability = mtcnn.MTCNN(mtcnn.installed_weights()).output(x)
    np.testing.assert_allclose(offsets, network.head(y), atol=1e-4)
    np.testing.assert_allclose(points, network.head(y), atol=1e-4)
    np.testing.assert_allclose(probability, network.face(y), atol=1e-4)


def test_altered_weights_are_refused(tmp_path: Path) -> None:
    for name in mtcnn.MTCNN_SHA256:
        (tmp_path / name).write_bytes((mtcnn.installed_weights() / name).read_bytes())
    (tmp_path / "rnet.lz4").write_bytes(b"altered")
    with pytest.raises(WeightsError, match=r"rnet.lz4 is altered.*pip install"):
        FaceDetector(tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"pnet.lz4.*pip install"):
        FaceDetector(tmp_path)


class Evil:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_weight_file_cannot_call_functions(tmp_path: Path, protocol: int) -> None:
    witness = tmp_path / "called"
    path = tmp_path / "pnet.lz4"
    path.write_bytes(lz4.frame.compress(pickle.dumps([Evil(witness)], protocol)))
    with pytest.raises(WeightsError, match="refused"):
        mtcnn.load_arrays(path, hashlib.sha256(path.read_bytes()).hexdigest())
    assert not witness.exists()


@pytest.mark.parametrize("content", [[np.array([{}], object)], {"weights": 1}])
def test_a_weight_file_holds_float_arrays_only(tmp_path: Path, content: object) -> None:
    path = tmp_path / "pnet.lz4"
    joblib.dump(content, path, compress="lz4")
    with pytest.raises(WeightsError):
        mtcnn.load_arrays(path, hashlib.sha256(path.read_bytes()).hexdigest())


def test_portrait_has_one_face_with_its_points_in_place(detector: FaceDetector, portrait: Picture) -> None:
    (face,) = detector.detect(portrait)
    assert face.score > 0.99
    assert face.box.dtype == face.points.dtype == np.float32
    # The five points of this photograph, read by eye.
    expected = [[203, 101], [246, 104], [224, 127], [204, 140], [246, 139]]
    assert np.abs(face.points - expected).max() < 4


def test_detection_follows_a_flip_and_a_shift(detector: FaceDetector, portrait: Picture) -> None:
    (face,) = detector.detect(portrait)
    (flipped,) = detector.detect(np.ascontiguousarray(portrait[:, ::-1]))
    mirrored = flipped.points[[1, 0, 2, 4, 3]] * [-1, 1] + [portrait.shape[1] - 1, 0]
    assert np.abs(mirrored - face.points).max() < 3
    (shifted,) = detector.detect(np.ascontiguousarray(portrait[20:, 50:]))
    assert np.abs(shifted.points + np.array([50, 20]) - face.points).max() < 2


def test_detection_is_deterministic(detector: FaceDetector, portrait: Picture) -> None:
    first, second = (detector.detect(portrait)[0] for _ in range(2))
    assert np.array_equal(first.points, second.points)
    assert np.array_equal(first.box, second.box)


def test_faces_come_left_to_right_in_source_pixels(detector: FaceDetector, portrait: Picture) -> None:
    pair = np.hstack([portrait, portrait, portrait[:, :300]])
    faces = detector.detect(pair)
    assert len(faces) == 3
    assert np.abs(np.diff([face.points[2, 0] for face in faces]) - portrait.shape[1]).max() < 4


def test_a_large_picture_is_searched_at_a_reduced_size(detector: FaceDetector, portrait: Picture) -> None:
    (face,) = detector.detect(portrait)
    (large,) = detector.detect(cv2.resize(portrait, None, fx=3, fy=3))
    assert np.abs(large.points / 3 - face.points).max() < 3


def test_small_faces_down_to_the_limit_are_found(detector: FaceDetector, portrait: Picture) -> None:
    small = cv2.resize(portrait, None, fx=0.45, fy=0.45, interpolation=cv2.INTER_AREA)
    (face,) = detector.detect(small)
    assert np.abs(face.points - [224 * 0.45, 127 * 0.45]).max() < 14
    assert detector.detect(small, min_face=120) == []


def test_a_face_cut_by_the_border_gives_finite_points(detector: FaceDetector, portrait: Picture) -> None:
    for crop in (portrait[85:, 160:], portrait[:150, :], portrait[60:190, 165:285]):
        for face in detector.detect(np.ascontiguousarray(crop)):
            assert np.isfinite(face.points).all()
            assert (face.box[2:] > face.box[:2]).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (12, 12), (20, 20), (41, 39), (3000, 40)])
@pytest.mark.parametrize("fill", [0, 255, "noise"])
def test_odd_pictures_are_searched_without_error(
    detector: FaceDetector, shape: tuple[int, int], fill: int | str
) -> None:
    if fill == "noise":
        picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    else:
        picture = np.full((*shape, 3), fill, np.uint8)
    assert all(np.isfinite(face.points).all() for face in detector.detect(picture))


def test_alignment_puts_the_points_in_place(detector: FaceDetector, portrait: Picture) -> None:
    (face,) = detector.detect(portrait)
    tilted = cv2.warpAffine(portrait, cv2.getRotationMatrix2D((224, 127), 25, 1.0), (512, 512))
    (tilted_face,) = detector.detect(tilted)
    upright, straightened = align(portrait, face.points, 128), align(tilted, tilted_face.points, 128)
    assert upright.shape == (128, 128, 3)
    assert upright.dtype == np.uint8
    assert np.abs(upright.astype(float) - straightened)[32:96, 32:96].mean() < 10
    assert np.abs(upright.astype(float) - 128).mean() > 10


def test_alignment_reads_a_very_wide_picture(detector: FaceDetector, portrait: Picture) -> None:
    (face,) = detector.detect(portrait)
    wide = np.zeros((512, 40_000, 3), np.uint8)
    wide[:, 35_000:35_512] = portrait
    moved = align(wide, face.points + np.array([35_000, 0]), 64)
    assert np.abs(moved.astype(float) - align(portrait, face.points, 64)).mean() < 1


def test_similarity_recovers_a_known_map() -> None:
    angle, zoom = 0.4, 2.5
    turn = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = similarity(ALIGNED_POINTS, ALIGNED_POINTS @ turn.T + [3, -7])
    np.testing.assert_allclose(matrix, np.column_stack([turn, [3, -7]]), atol=1e-9)


def test_alignment_of_coinciding_points_gives_a_picture(portrait: Picture) -> None:
    assert align(portrait, np.full((5, 2), 9.0), 64).shape == (64, 64, 3)


def face_at(x: float, y: float, side: float, score: float = 0.9) -> Face:
    box = np.array([x, y, x + side, y + side], np.float32)
    return Face(box, score, np.zeros((5, 2), np.float32))


LEFT, MIDDLE, RIGHT = face_at(0, 50, 60), face_at(100, 50, 40, score=0.99), face_at(200, 40, 90)
FACES = [LEFT, MIDDLE, RIGHT]


@pytest.mark.parametrize(
    ("rule", "expected"), [("largest", RIGHT), ("leftmost", LEFT), ("most_confident", MIDDLE)]
)
def test_rule_chooses_one_speaker(rule: str, expected: Face) -> None:
    assert choose(FACES, rule) == [expected]


def test_several_speakers_are_the_largest_from_left_to_right() -> None:
    assert choose(FACES, "leftmost", count=2) == [LEFT, RIGHT]
    assert choose(FACES[::-1], "largest", count=3) == FACES


def test_boxes_decide_who_speaks_and_in_which_order() -> None:
    assert choose(FACES, "largest", [[180, 0, 320, 200], [90, 40, 150, 100]], 2) == [RIGHT, MIDDLE]
    assert choose(FACES, "largest", [[95, 45, 110, 60]], 1) == [MIDDLE]


def test_no_face_speaks_twice() -> None:
    assert choose(FACES, "largest", [[0, 0, 150, 150], [0, 0, 150, 150]], 2) == [LEFT, MIDDLE]


def test_a_box_without_a_face_is_named() -> None:
    with pytest.raises(InputError, match=r"no face in box 2 \[400, 400, 500, 500\]"):
        choose(FACES, "largest", [[0, 0, 80, 120], [400, 400, 500, 500]], 2)


def test_missing_faces_are_counted() -> None:
    with pytest.raises(InputError, match=r"no face found in the picture .*face.required=false"):
        choose([], "largest")
    with pytest.raises(InputError, match="found 1 of the 2 faces"):
        choose([LEFT], "largest", count=2)
    with pytest.raises(InputError, match="1 face boxes for 2 speakers"):
        choose(FACES, "largest", [[0, 0, 1, 1]], 2)
    with pytest.raises(InputError, match=r"'biggest'.*largest, leftmost, most_confident"):
        choose(FACES, "biggest")
