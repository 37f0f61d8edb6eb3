"""A small configuration of the kind that Ditto publishes, with a character, blinks, moods and limits."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avatar_core.backends.ditto.condition import EMOTIONS
from avatar_core.backends.ditto.files import FILES
from avatar_core.backends.ditto.motion_vector import MOTION_DIM, NUM_POINTS, WIDTHS

Array = NDArray[np.float32]

_STEPS = 4
_BLINK_FRAMES, _MOODS = 15, 40
_LIMITS = {"scale": 0.6, "pitch": 0.5, "yaw": 0.5, "roll": 0.5, "t": 0.05, "exp": 0.15}

_MODELS = {
    "insightface_det_cfg": "detector",
    "landmark106_cfg": "landmark106",
    "landmark203_cfg": "landmark203",
    "appearance_extractor_cfg": "appearance",
    "motion_extractor_cfg": "motion",
    "stitch_network_cfg": "stitch",
    "warp_network_cfg": "warp",
    "decoder_cfg": "decoder",
    "hubert_cfg": "hubert",
}


def tiny_config(seed: int) -> dict[str, Any]:
    """As the pickle holds it."""
    generator = np.random.default_rng(seed)
    models = {name: {"model_path": FILES[part][0], "device": "cuda"} for name, part in _MODELS.items()}
    return {
        "base_cfg": {
            **models,
            "landmark478_cfg": {"task_path": "face_landmarker.task", "force_ori_type": True},
        },
        "audio2motion_cfg": {
            "model_path": FILES["lmdm"][0],
            "device": "cuda",
            "motion_feat_dim": MOTION_DIM,
            "audio_feat_dim": 1103,
            "seq_frames": 80,
            "use_emo": True,
            "use_sc": True,
            "use_eye_open": True,
            "use_eye_ball": True,
            "w2f_type": "hubert",
        },
        "default_kwargs": {
            "sampling_timesteps": _STEPS,
            "emo": _moods(),
            "delta_eye_arr": _blink(generator),
            "v_min_max_for_clip": _limits(),
            "ch_info": _character(generator),
            "fix_kp_cond": 1,
            "fix_kp_cond_dim": [0, 202],
            "overall_ctrl_info": {"delta_pitch": 2},
        },
    }


def key_points() -> Array:
    """[63] canonical points of a face: round it, nearer in the middle."""
    angles = np.arange(NUM_POINTS) * (2 * np.pi / NUM_POINTS)
    radius = np.where(np.arange(NUM_POINTS) % 2 == 0, 0.35, 0.2)
    points = np.stack([radius * np.cos(angles), radius * np.sin(angles), 0.1 - radius], axis=1)
    return points.reshape(-1).astype(np.float32)


def _moods() -> Array:
    """[m, 8], from one mood to another and back."""
    weights = np.zeros((_MOODS, len(EMOTIONS)), np.float32)
    share = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_MOODS) / _MOODS)
    weights[:, EMOTIONS.index("happy")], weights[:, EMOTIONS.index("neutral")] = share, 1 - share
    return weights


def _blink(generator: np.random.Generator) -> Array:
    """[n, 63], closing and opening."""
    closed = np.sin(math.pi * np.arange(_BLINK_FRAMES) / (_BLINK_FRAMES - 1))
    return (0.05 * closed[:, None] * generator.standard_normal(3 * NUM_POINTS)).astype(np.float32)


def _limits() -> Array:
    """[2, 265], least and largest values."""
    largest = np.concatenate([np.full(width, _LIMITS[key], np.float32) for key, width in WIDTHS.items()])
    return np.stack([-largest, largest])


def _character(generator: np.random.Generator) -> dict[str, Any]:
    info = {
        key: (0.1 * generator.standard_normal((1, width))).astype(np.float32) for key, width in WIDTHS.items()
    }
    info["scale"] = np.full((1, 1), 1.5, np.float32)
    info["kp"] = key_points()[None]
    return {
        "x_s_info_lst": [info],
        "sc": key_points(),
        "eye_open_lst": [np.full((1, 2), 0.8, np.float32)],
        "eye_ball_lst": [np.full((1, 6), 0.01, np.float32)],
        "is_image_flag": True,
    }
