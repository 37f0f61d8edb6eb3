import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from typer.testing import CliRunner

from avatar_core import weights
from avatar_core.backends.ditto.config_reader import ARRAYS, SETTINGS, read_config, read_official_config
from avatar_core.backends.ditto.conversion import convert, converted_config, write_config
from avatar_core.backends.ditto.tiny_config import tiny_config
from avatar_core.errors import WeightsError
from flows.cli import app

PICKLE = "ditto_cfg/v0.4_hubert_cfg_pytorch.pkl"


@pytest.fixture
def published() -> dict[str, Any]:
    return tiny_config(0)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: dict[str, Any]) -> Path:
    """The weights `ditto` with their configuration alone."""
    monkeypatch.setenv("AVATAR_WEIGHTS", str(tmp_path))
    place(tmp_path / "ditto", published)
    return tmp_path / "ditto"


def place(home: Path, published: Any) -> None:
    (home / PICKLE).parent.mkdir(parents=True, exist_ok=True)
    (home / PICKLE).write_bytes(pickle.dumps(published, protocol=4))


def test_command_converts_and_the_reader_gives_it_back(home: Path, published: dict[str, Any]) -> None:
    result = CliRunner().invoke(app, ["weights", "convert", "ditto"])
    assert result.exit_code == 0, result.output
    defaults, character = published["default_kwargs"], published["default_kwargs"]["ch_info"]
    config = read_official_config("ditto")
    assert config.defaults["sampling_timesteps"] == defaults["sampling_timesteps"]
    assert config.defaults["fix_kp_cond_dim"] == [0, 202]
    assert config.defaults["overall_ctrl_info"] == {"delta_pitch": 2}
    for name in ("emo", "delta_eye_arr", "v_min_max_for_clip"):
        assert np.array_equal(config.arrays[name], defaults[name])
    assert config.character is not None
    for key, values in character["x_s_info_lst"][0].items():
        assert np.array_equal(config.character.motion[key], values)
    assert np.array_equal(config.character.sc, character["sc"])
    assert np.array_equal(config.character.eye_ball, character["eye_ball_lst"][0])
    assert config.condition == dict.fromkeys(["use_emo", "use_eye_open", "use_eye_ball", "use_sc"], True)


def test_a_link_to_the_folder_stays(published: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "large-disk").mkdir()
    (tmp_path / "config").symlink_to("large-disk")
    for _ in range(2):
        write_config(published, tmp_path / "config")
    assert (tmp_path / "config").is_symlink()
    assert {path.name for path in (tmp_path / "large-disk").iterdir()} == {SETTINGS, ARRAYS}


def test_files_are_text_and_arrays_only(home: Path) -> None:
    folder = convert("ditto/config")
    assert {path.name for path in folder.iterdir()} >= {SETTINGS, ARRAYS}
    assert not list(folder.glob("*.pkl"))
    assert yaml.safe_load((folder / SETTINGS).read_text())["arrays"] == ARRAYS
    names = load_file(folder / ARRAYS)
    assert {"default.delta_eye_arr", "ch_info.x_s_info.0.exp", "ch_info.sc"} <= names.keys()


def test_results_have_the_key_of_the_published_file(home: Path) -> None:
    before = weights.fingerprint("ditto/config")
    convert("ditto")
    assert weights.fingerprint("ditto/config") == before
    (home / PICKLE).unlink()
    assert weights.fingerprint("ditto/config") == before
    assert read_official_config("ditto").character is not None
    with pytest.raises(WeightsError, match="official file is gone"):
        convert("ditto")


def test_render_asks_for_the_conversion(home: Path, published: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match="avatar weights convert ditto"):
        read_official_config("ditto")
    convert("ditto")
    published["default_kwargs"]["overlap_v2"] = 40
    place(home, published)
    with pytest.raises(WeightsError, match="has changed since"):
        read_official_config("ditto")
    convert("ditto")
    assert read_official_config("ditto").defaults["overlap_v2"] == 40


def test_pickle_is_not_read_by_a_render(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert("ditto")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle is opened")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr("avatar_core.backends.ditto.config_pickle.read_pickle", refuse)
    assert read_official_config("ditto").defaults


def test_pickle_with_code_leaves_nothing(home: Path) -> None:
    (home / PICKLE).write_bytes(b"cos\nmkdir\n(S'made'\ntR.")
    with pytest.raises(WeightsError, match=r"asks for os\.mkdir"):
        convert("ditto")
    assert not (home / "converted" / "config").exists()


def test_wrong_calls_are_told(home: Path) -> None:
    with pytest.raises(WeightsError, match="only the config does"):
        convert("ditto/decoder")
    with pytest.raises(WeightsError, match="not cast"):
        convert("ditto", "float16")


def changed(published: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    result: dict[str, Any] = copy.deepcopy(published)
    *parents, last = path.split("/")
    place: Any = result
    for parent in parents:
        place = place[int(parent) if isinstance(place, list) else parent]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return result


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("default_kwargs/overlap", 3, "default_kwargs has overlap, which this backend does not know"),
        ("audio2motion_cfg/use_mood", True, "audio2motion_cfg has use_mood"),
        ("base_cfg/wavlm_cfg", {}, "base_cfg has wavlm_cfg"),
        ("extra", 1, "the configuration has extra"),
        ("audio2motion_cfg", None, "lacks audio2motion_cfg"),
        ("audio2motion_cfg/w2f_type", "wavlm", "has w2f_type 'wavlm'; this backend knows 'hubert'"),
        ("audio2motion_cfg/seq_frames", 60, "has seq_frames 60"),
        ("default_kwargs/delta_eye_arr", np.zeros((15, 60)), r"shape \(15, 60\); allowed is \(n, 63\)"),
        ("default_kwargs/crop_scale", np.zeros(3), "has an array for crop_scale"),
        ("default_kwargs/emo", np.full((1, 8), np.nan), "not finite"),
        ("default_kwargs/ch_info/pose", 1, "ch_info has pose"),
        ("default_kwargs/ch_info/sc", None, "ch_info lacks sc"),
        ("default_kwargs/ch_info/eye_open_lst", [], "expected a list of frames"),
        ("default_kwargs/ch_info/x_s_info_lst/0/kp", np.zeros((1, 60)), r"x_s_info\.0\.kp is \(1, 60\)"),
        ("default_kwargs/ch_info/x_s_info_lst/0/exp", None, r"x_s_info\.0\.exp is NoneType"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    published: dict[str, Any], path: str, value: Any, message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        converted_config(changed(published, path, value))


def test_character_of_many_frames_keeps_their_order(published: dict[str, Any], tmp_path: Path) -> None:
    character = published["default_kwargs"]["ch_info"]
    frame = character["x_s_info_lst"][0]
    character["x_s_info_lst"] = [frame | {"t": np.full((1, 3), i, np.float32)} for i in range(12)]
    character["eye_open_lst"] = [np.full((1, 2), i, np.float32) for i in range(12)]
    write_config(published, tmp_path / "config")
    read = read_config(tmp_path / "config").character
    assert read is not None
    assert read.motion["t"][:, 0].tolist() == list(range(12))
    assert read.eye_open[:, 0].tolist() == list(range(12))


def test_settings_without_arrays_are_enough(published: dict[str, Any], tmp_path: Path) -> None:
    published["default_kwargs"] = {"emo": [[3, 4], [0]], "ctrl_info": {5: {"delta_exp": np.ones(2)}}}
    write_config(published, tmp_path / "config")
    config = read_config(tmp_path / "config")
    assert config.defaults == {"emo": [[3, 4], [0]], "ctrl_info": {5: {"delta_exp": [1.0, 1.0]}}}
    assert config.character is None
    assert config.arrays == {}
