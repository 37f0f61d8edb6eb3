from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from avatar_core import weights
from avatar_core.backends.base import create_backend
from avatar_core.backends.hunyuan.backend import HunyuanBackend
from avatar_core.backends.hunyuan.config import HunyuanConfig
from avatar_core.backends.hunyuan.stages import _face_box
from avatar_core.backends.hunyuan.tiny import write_tiny_checkpoint
from avatar_core.errors import ConfigError, InputError, WeightsError
from avatar_core.media.face import Face
from tests.sample_rows import RunAvatar, write_picture, write_recording, write_table

FAST = {"checkpoint": "hunyuan-tiny"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The weights folder, empty."""
    monkeypatch.setenv("AVATAR_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


def hunyuan(**options: Any) -> Any:
    return create_backend({"name": "hunyuan", **options})


# --- weights


def test_first_use_of_the_random_checkpoint_writes_it_whole(home: Path) -> None:
    hunyuan(**FAST).resolve()
    assert weights.verify("hunyuan-tiny") == []
    assert [path.name for path in home.iterdir()] == ["hunyuan-tiny"]


def test_what_is_lost_of_the_random_checkpoint_is_written_again(home: Path) -> None:
    write_tiny_checkpoint(home / "hunyuan-tiny")
    before = weights.fingerprint("hunyuan-tiny/vae")
    (home / "hunyuan-tiny/ckpts/hunyuan-video-t2v-720p/vae/pytorch_model.pt").unlink()
    hunyuan(**FAST).resolve()
    assert weights.fingerprint("hunyuan-tiny/vae") == before


def test_absent_official_weights_are_one_line(home: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        hunyuan().resolve()
    assert str(caught.value) == (
        "weights 'hunyuan': whisper, llava, clip, vae, detector, transformer not found in "
        f"{home / 'hunyuan'}; run: avatar weights fetch hunyuan"
    )
    write_tiny_checkpoint(home / "hunyuan")
    hunyuan().resolve()
    for path in (home / "hunyuan").rglob("*_fp8*.pt"):
        path.unlink()
    hunyuan().resolve()
    with pytest.raises(WeightsError, match=r"run: avatar weights fetch hunyuan/transformer-fp8$"):
        hunyuan(denoise={"transformer": "fp8"}).resolve()


def test_command_without_weights_ends_before_any_work(avatar: RunAvatar, home: Path, tmp_path: Path) -> None:
    code, output = avatar("render", "no.csv", "backend=hunyuan", f"storage.root={tmp_path / 'store'}")
    assert code == 2
    assert len(output.splitlines()) == 1
    assert "run: avatar weights fetch hunyuan" in output
    assert not (tmp_path / "store").exists()


def test_a_machine_without_a_gpu_is_told_before_any_work(
    avatar: RunAvatar, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_tiny_checkpoint(home / "hunyuan")
    write_picture(tmp_path / "a.jpg")
    write_recording(tmp_path / "a.wav")
    table = write_table(tmp_path / "t.csv", [{"image": "a.jpg", "audio": "a.wav"}])
    words = [table, "backend=hunyuan", f"storage.root={tmp_path / 'store'}"]
    code, output = avatar("render", *words)
    assert code == 2
    assert "computes text, reference, denoise, decode on a GPU, and this machine shows none" in output
    assert not (tmp_path / "store/runs").exists()
    assert avatar("plan", *words)[0] == 0


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"decode": {"image_size": 128}},
            "backend.decode.image_size=128: set backend.image_size for all stages",
        ),
        ({"audio": {"mode": "parity"}}, "backend.audio.mode=parity: set backend.mode for all stages"),
        ({"denoise": {"steps": 3}}, "unknown option `backend.denoise.steps`"),
        ({"denoise": {"num_inference_steps": 0}}, "from 1 to 1000 (got 0)"),
        ({"image_size": 32}, "from 64 to 1280 (got 32)"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        hunyuan(**options)
    assert message in str(caught.value)


def test_shared_options_reach_their_stages() -> None:
    config = HunyuanConfig(mode="parity", image_size=128)
    assert {stage.mode for stage in (config.audio, config.reference, config.denoise)} == {"parity"}
    assert {stage.image_size for stage in (config.text, config.reference, config.decode)} == {128}


def test_random_weights_wait_where_the_real_ones_do_and_need_no_gpu() -> None:
    for backend in (hunyuan(), hunyuan(**FAST)):
        kinds = {name: stage.device_kind for name, stage in backend.stages().items()}
        assert {name for name in kinds if kinds[name] == "cpu"} == {"face", "audio"}
    assert hunyuan(**FAST).renders_on_cpu
    assert not hunyuan().renders_on_cpu


def test_the_large_models_have_memory_levels() -> None:
    levels = {name: stage.memory_levels("cpu") for name, stage in hunyuan(**FAST).stages().items()}
    assert {stage for stage in levels if levels[stage]} == {"text", "denoise"}
    assert levels["text"] == levels["denoise"] == ("h200", "80gb", "48gb", "24gb", "10gb")


# --- frames and faces


@pytest.mark.parametrize(
    ("duration_s", "fps", "frames"),
    [
        (1.0, 25.0, 25),
        (1.0, 12.5, 13),
        (1.01, 25.0, 26),
        (25 / 25 + 1e-5, 25.0, 25),
        (0.01, 25.0, 1),
        (20, 30, 600),
    ],
)
def test_video_is_as_long_as_the_speech(duration_s: float, fps: float, frames: int) -> None:
    assert HunyuanBackend(HunyuanConfig()).num_frames(duration_s, fps) == frames


def test_parity_ends_where_the_reference_ends() -> None:
    backend = HunyuanBackend(HunyuanConfig(mode="parity"))
    assert backend.num_frames(1.0, 25.0) == backend.num_frames(1.0, 12.5) == 25
    assert backend.num_frames(60.0, 25.0) == 405
    with pytest.raises(InputError, match=r"mode=parity knows 25 and 12\.5"):
        backend.num_frames(1.0, 24.0)


def face(*box: float, score: float = 0.9) -> Face:
    return Face(np.array(box, np.float32), score, np.zeros((5, 2), np.float32))


SMALL, LARGE = face(0, 0, 20, 20), face(40, 0, 90, 60)


def box(values: NDArray[np.float32] | None) -> list[float] | None:
    return None if values is None else values.tolist()


def test_the_box_is_the_detectors_of_the_face_that_speaks() -> None:
    chosen = [face(2, 3, 16, 22)]
    assert box(_face_box([LARGE, SMALL], chosen, parity=False)) == box(SMALL.box)
    assert box(_face_box([LARGE], chosen, parity=False)) == box(chosen[0].box)
    assert box(_face_box([SMALL, LARGE], [], parity=False)) == box(LARGE.box)
    assert _face_box([], [], parity=False) is None


def test_parity_asks_the_detector_alone() -> None:
    assert box(_face_box([SMALL], [LARGE], parity=True)) == box(SMALL.box)
    assert _face_box([], [LARGE], parity=True) is None
