"""From the published configuration, a pickle, to settings in YAML with arrays beside them as safetensors."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors.numpy import save_file

from avatar_core import weights
from avatar_core.backends.ditto.condition import EMOTIONS
from avatar_core.backends.ditto.config_pickle import read_pickle
from avatar_core.backends.ditto.config_reader import ARRAYS, CHARACTER, DEFAULT, SETTINGS
from avatar_core.backends.ditto.files import FILES
from avatar_core.backends.ditto.motion_vector import MOTION_DIM, NUM_POINTS, WIDTHS
from avatar_core.errors import WeightsError

Arrays = dict[str, NDArray[np.float32]]

_PART = "config"
_SEQUENCE_FRAMES = 80
_SWITCHES = ("use_emo", "use_eye_open", "use_eye_ball", "use_sc")
_SECTIONS = ("base_cfg", "audio2motion_cfg", "default_kwargs")
_MODELS = (
    *("insightface_det_cfg", "landmark106_cfg", "landmark203_cfg", "landmark478_cfg"),
    *("appearance_extractor_cfg", "motion_extractor_cfg", "stitch_network_cfg", "warp_network_cfg"),
    *("decoder_cfg", "hubert_cfg"),
)
_MOTION = ("model_path", "device", "motion_feat_dim", "audio_feat_dim", "seq_frames", "w2f_type", *_SWITCHES)
_DEFAULTS = (
    *("max_size", "template_n_frames", "crop_scale", "crop_vx_ratio", "crop_vy_ratio", "crop_flag_do_rot"),
    *("smo_k_s", "emo", "eye_f0_mode", "ch_info", "overlap_v2", "fix_kp_cond", "fix_kp_cond_dim"),
    *("v_min_max_for_clip", "N_d", "use_d_keys", "relative_d", "drive_eye", "delta_eye_arr"),
    *("delta_eye_open_n", "fade_type", "fade_out_keys", "flag_stitching", "ctrl_info", "overall_ctrl_info"),
    *("sampling_timesteps", "online_mode", "smo_k_d"),
)
_WIDTHS = {"delta_eye_arr": 3 * NUM_POINTS, "v_min_max_for_clip": MOTION_DIM, "emo": len(EMOTIONS)}
_SOURCE_WIDTHS = {**WIDTHS, "kp": 3 * NUM_POINTS}
_CHARACTER = ("x_s_info_lst", "sc", "eye_open_lst", "eye_ball_lst")
_NOT_NEEDED = ("f_s_lst", "M_c2o_lst", "img_rgb_lst", "is_image_flag")  # of a character: it is not rendered


def convert(name: str, dtype: str | None = None) -> Path:
    """Write the settings of the weights `ditto` (or of another checkpoint) and return their folder; a render
    reads nothing else. Raises `WeightsError`, also for a pickle that could run code or holds what is not
    known here."""
    checkpoint, _, part = name.partition("/")
    if part not in ("", _PART):
        raise WeightsError(f"weights {name!r} need no conversion; of {checkpoint!r} only the {_PART} does")
    if dtype is not None:
        raise WeightsError(f"got dtype {dtype!r}; a configuration is not cast: leave it out")
    name = f"{checkpoint}/{_PART}"
    folder, copy = weights.locate(name), weights.conversion_folder(name)
    if folder == copy:
        raise WeightsError(f"weights {name!r}: the official file is gone, only its copy is left in {copy}")
    write_config(read_pickle(folder / FILES[_PART][0]), copy)
    weights.record_conversion(name)
    return copy


def write_config(published: Any, folder: Path) -> None:
    """`published` as the pickle holds it; the folder replaces one of an earlier call; a link to it stays."""
    folder = folder.resolve()
    settings, arrays = converted_config(published)
    scratch = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        (scratch / SETTINGS).write_text(text, encoding="utf-8")
        save_file(arrays, scratch / ARRAYS)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.replace(folder)
    except OSError as error:
        raise WeightsError(f"the configuration cannot be written to {folder}: {error}") from error


def converted_config(published: Any) -> tuple[dict[str, Any], Arrays]:
    """Settings and arrays. Raises `WeightsError`."""
    sections = _mapping(published, "the configuration", _SECTIONS)
    if absent := [section for section in _SECTIONS if section not in sections]:
        raise WeightsError(f"the configuration lacks {', '.join(absent)}")
    _mapping(sections["base_cfg"], "base_cfg", _MODELS)
    motion = _mapping(sections["audio2motion_cfg"], "audio2motion_cfg", _MOTION)
    wanted = {"motion_feat_dim": MOTION_DIM, "seq_frames": _SEQUENCE_FRAMES, "w2f_type": "hubert"}
    for key, value in wanted.items():
        if motion.get(key, value) != value:
            raise WeightsError(
                f"audio2motion_cfg has {key} {motion[key]!r}; this backend knows {value!r} only"
            )
    given = _mapping(sections["default_kwargs"], "default_kwargs", _DEFAULTS)
    tables = {key: value for key, value in given.items() if _is_table(key, value)}
    arrays = {DEFAULT + key: _rows(np.asarray(value), key) for key, value in tables.items()}
    if given.get("ch_info") is not None:
        arrays |= {CHARACTER + key: values for key, values in _character(given["ch_info"]).items()}
    plain = {key: value for key, value in given.items() if key != "ch_info" and key not in tables}
    settings = {
        "condition": {switch: bool(motion.get(switch, True)) for switch in _SWITCHES},
        "arrays": ARRAYS,
        "defaults": _for_yaml(plain),
    }
    return settings, arrays


def _is_table(key: str, value: Any) -> bool:
    """Emotions may be a list too: of labels."""
    return isinstance(value, np.ndarray) or (key in _WIDTHS and key != "emo" and value is not None)


def _rows(values: NDArray[Any], key: str) -> NDArray[np.float32]:
    """[n, width]."""
    if key not in _WIDTHS:
        raise WeightsError(f"default_kwargs has an array for {key}; allowed are plain values")
    width = _WIDTHS[key]
    if values.ndim < 2 or values[0].size != width:
        raise WeightsError(f"{key} has the shape {values.shape}; allowed is (n, {width})")
    return _float32(values.reshape(len(values), width), key)


def _character(published: Any) -> Arrays:
    given = _mapping(published, "ch_info", (*_CHARACTER, *_NOT_NEEDED))
    if absent := [key for key in _CHARACTER if key not in given]:
        raise WeightsError(f"ch_info lacks {', '.join(absent)}")
    arrays = {"sc": _flat(given["sc"], 3 * NUM_POINTS, "ch_info.sc")}
    for index, info in enumerate(_frames(given["x_s_info_lst"], "x_s_info_lst")):
        where = f"x_s_info.{index}"
        frame = _mapping(info, f"ch_info.{where}", tuple(_SOURCE_WIDTHS))
        for key, width in _SOURCE_WIDTHS.items():
            arrays[f"{where}.{key}"] = _flat(frame.get(key), width, f"ch_info.{where}.{key}")
    for key, width in (("eye_open", 2), ("eye_ball", 6)):
        for index, values in enumerate(_frames(given[f"{key}_lst"], f"{key}_lst")):
            arrays[f"{key}.{index}"] = _flat(values, width, f"ch_info.{key}.{index}")
    return arrays


def _frames(value: Any, where: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise WeightsError(f"ch_info.{where} is {type(value).__name__}; expected a list of frames")
    return value


def _flat(values: Any, width: int, where: str) -> NDArray[np.float32]:
    if not isinstance(values, np.ndarray) or values.size != width:
        found = values.shape if isinstance(values, np.ndarray) else type(values).__name__
        raise WeightsError(f"{where} is {found}; expected an array of {width} values")
    return _float32(values.reshape(-1), where)


def _float32(values: NDArray[Any], where: str) -> NDArray[np.float32]:
    if not np.isfinite(values).all():
        raise WeightsError(f"{where} holds values that are not finite")
    return np.ascontiguousarray(values, np.float32)


def _mapping(value: Any, where: str, known: Iterable[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise WeightsError(f"{where} is {type(value).__name__}; expected values by name")
    if unknown := [str(key) for key in value if key not in set(known)]:
        raise WeightsError(
            f"{where} has {', '.join(unknown)}, which this backend does not know and will not leave out"
        )
    return value


def _for_yaml(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _for_yaml(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_for_yaml(each) for each in value]
    return value.tolist() if isinstance(value, np.ndarray) else value
