import csv
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from avatar_core import weights
from avatar_core.backends.ditto.audio import WINDOW_SAMPLES, HubertEncoder
from avatar_core.backends.ditto.eyes import eye_ball, eye_open
from avatar_core.backends.ditto.files import FILES, model_file, model_files
from avatar_core.backends.ditto.official import NETWORKS, load_network, read_state
from avatar_core.backends.ditto.tiny import write_tiny_checkpoint
from avatar_core.checkpoint import read_checkpoint
from avatar_core.errors import WeightsError
from avatar_core.media.face_mesh import FaceMesh
from avatar_core.media.landmarks import SIDE_203, Landmark106, Landmark203
from avatar_core.media.scrfd import ScrfdDetector

MODELS = "ditto_pytorch/models"
STATE_DICTS = Path(__file__).parents[2] / "golden" / "ditto" / "state_dicts.csv"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "ditto-tiny"
    write_tiny_checkpoint(folder)
    return folder


@pytest.fixture(autouse=True)
def checkpoint(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AVATAR_WEIGHTS", str(tiny.parent))
    return tiny


def contents(folder: Path) -> dict[str, bytes]:
    """But for what is only noted about the files."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "sha256.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def portrait(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


def test_every_part_of_the_registry_is_there_and_has_its_files() -> None:
    registry = weights.load_registry()
    assert registry["ditto"].parts == registry["ditto-tiny"].parts
    assert {part: each.files for part, each in registry["ditto"].parts.items()} == FILES
    assert weights.present("ditto-tiny")
    assert weights.verify("ditto-tiny") == []
    assert weights.converted("ditto-tiny/config") is not None
    for part in FILES:
        assert all(path.is_file() for path in model_files("ditto-tiny", part))


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_generator_alone(
    tiny: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    write_tiny_checkpoint(tmp_path / "again")
    assert torch.equal(torch.rand(3), expected)
    assert contents(tmp_path / "again") == contents(tiny)
    write_tiny_checkpoint(tmp_path / "again", seed=1)
    other, same = contents(tmp_path / "again"), contents(tiny)
    fixed = {"RANDOM_WEIGHTS.txt", "ditto_pytorch/aux_models/det_10g.onnx", "converted/config/ditto.yaml"}
    assert {name for name in same if other[name] == same[name]} == fixed


def test_other_files_are_left_alone(tiny: Path, tmp_path: Path) -> None:
    official = tmp_path / MODELS / "decoder.pth"
    official.parent.mkdir(parents=True)
    official.write_bytes(b"222 MB")
    with pytest.raises(WeightsError, match="holds other files"):
        write_tiny_checkpoint(tmp_path)
    assert official.read_bytes() == b"222 MB"


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_official_names(name: str) -> None:
    """But for the numbers of their blocks; with as many axes."""
    stem = FILES[name][0].removesuffix(".pth").partition("_v0")[0]
    with STATE_DICTS.open() as file:
        rows = [row for row in csv.DictReader(file) if row["network"] == stem]
    published = {(re.sub(r"\d+", "N", row["name"]), len(re.findall(r"\d+", row["shape"]))) for row in rows}
    state = read_state(name, model_file("ditto-tiny", name))
    assert {(re.sub(r"\d+", "N", tensor), values.dim()) for tensor, values in state.items()} == published


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_load(name: str) -> None:
    model = load_network(name, model_file("ditto-tiny", name))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_files_with_more_than_one_state_are_like_the_published_ones(tiny: Path) -> None:
    assert torch.load(tiny / MODELS / "stitch_network.pth").keys() == {"retarget_shoulder"}
    assert torch.load(tiny / MODELS / "lmdm_v0.4_hubert.pth").keys() == {"model_state_dict"}
    triple = read_checkpoint(tiny / MODELS / "decoder.pth")
    orig, u, v = (triple[f"up_0.conv_0.weight_{each}"] for each in ("orig", "u", "v"))
    largest = torch.linalg.matrix_norm(orig.flatten(1), 2)
    assert torch.dot(u, orig.flatten(1) @ v) == pytest.approx(float(largest), rel=1e-5)


def test_onnx_files_have_the_published_inputs_and_outputs(tiny: Path) -> None:
    def described(part: str, index: int = 0) -> tuple[list[tuple[str, list[Any]]], list[list[Any]]]:
        session = onnxruntime.InferenceSession(str(model_files("ditto-tiny", part)[index]))
        return (
            [(each.name, each.shape) for each in session.get_inputs()],
            [each.shape for each in session.get_outputs()],
        )

    rows = [2 * (512 // stride) ** 2 for stride in (8, 16, 32)]
    inputs, outputs = described("detector")
    assert inputs[0][1] == [1, 3, 512, 512]
    assert outputs == [[n, width] for width in (1, 4, 10) for n in rows]
    assert described("landmark203")[0] == [("input", [1, 3, 224, 224])]
    assert described("landmark203")[1][2] == [1, 406]
    assert described("landmark106")[1] == [[1, 212]]
    assert described("landmark478", 0)[1] == [[1, 896, 16], [1, 896, 1]]
    assert described("hubert") == ([("input_values", [1, "samples"])], [["time", 1024]])


@pytest.mark.parametrize(("height", "width"), [(600, 400), (300, 500), (512, 512)])
def test_a_face_is_found_in_the_middle_of_any_picture(height: int, width: int) -> None:
    picture = portrait(height, width)
    (face,) = ScrfdDetector(model_file("ditto-tiny", "detector")).detect(picture)
    centre = (face.box[:2] + face.box[2:]) / 2
    assert centre == pytest.approx([0.5 * width, 0.45 * height], abs=3)
    points = Landmark106(model_file("ditto-tiny", "landmark106")).find(picture, face.box)
    side = max(face.box[2:] - face.box[:2])
    assert np.abs(points.mean(axis=0) - centre).max() < 0.2 * side
    assert np.ptp(points, axis=0).min() > 0.6 * side


def test_landmarks_lie_in_the_crop_and_move_with_the_picture() -> None:
    finder = Landmark203(model_file("ditto-tiny", "landmark203"))
    bright, dark = (finder.find(np.full((SIDE_203, SIDE_203, 3), value, np.uint8)) for value in (250, 10))
    assert bright.min() >= 0
    assert bright.max() <= SIDE_203
    assert 0 < np.abs(bright - dark).max() < 30
    mesh = FaceMesh(*model_files("ditto-tiny", "landmark478"))
    points = mesh.find(portrait(512, 512))
    assert np.all((points[:, :2] > 0) & (points[:, :2] < 1))
    assert np.all(eye_open(points) > 0.1)
    assert np.all(np.isfinite(eye_ball(points)))


def test_speech_model_hears_twenty_states_in_a_window() -> None:
    hubert = HubertEncoder(model_file("ditto-tiny", "hubert"))
    generator = np.random.default_rng(0)
    loud, other = (0.1 * generator.standard_normal((2, WINDOW_SAMPLES))).astype(np.float32)
    states = hubert(loud)
    assert states.shape == (20, 1024)
    assert np.abs(states - hubert(other)).mean() > 0.1
    assert np.ptp(states, axis=0).mean() > 0.1
    assert np.all(hubert(np.zeros(WINDOW_SAMPLES, np.float32)) == 0)


def test_checkpoint_is_small(tiny: Path) -> None:
    assert sum(map(len, contents(tiny).values())) < 4e6


def test_tampered_file_is_told(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVATAR_WEIGHTS", str(tmp_path))
    shutil.copytree(tiny, tmp_path / "ditto-tiny")
    (tmp_path / "ditto-tiny" / MODELS / "warp_network.pth").unlink()
    with pytest.raises(WeightsError, match="avatar weights tiny ditto"):
        model_file("ditto-tiny", "warp")
    model_file("ditto-tiny", "hubert").write_bytes(b"no model")
    with pytest.raises(WeightsError, match="cannot be read as an ONNX file"):
        HubertEncoder(model_file("ditto-tiny", "hubert"))
