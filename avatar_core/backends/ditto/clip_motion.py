"""The motion of a clip: from speech features and a registered source to key points of every frame."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from avatar_core.backends.ditto.chaining import ChainSettings, offline_motion
from avatar_core.backends.ditto.condition import EMOTIONS, Emotion
from avatar_core.backends.ditto.config import DenoiseConfig, chosen
from avatar_core.backends.ditto.config_reader import OfficialConfig
from avatar_core.backends.ditto.lmdm import MotionDecoder
from avatar_core.backends.ditto.motion_stitch import MotionStitch, StitchSettings, fades
from avatar_core.backends.ditto.motion_vector import Array, frame, mirror_index, unpack
from avatar_core.backends.ditto.registration import Avatar
from avatar_core.backends.ditto.sampling import ClipSampler
from avatar_core.stages.base import Report

_STITCHED = (
    "use_d_keys",
    "drive_eye",
    "relative_d",
    "delta_eye_open_n",
    "fade_type",
    "fade_out_keys",
    "overall_ctrl_info",
)


def chain_settings(options: Mapping[str, Any], *, online: bool = False) -> ChainSettings:
    """From options under their published names."""
    dims = options["fix_kp_cond_dim"]
    return ChainSettings(
        overlap=options["overlap_v2"],
        online=online,
        smooth_k=options["smo_k_d"],
        fix_kp_cond=options["fix_kp_cond"],
        fix_kp_cond_dims=None if dims is None else (int(dims[0]), int(dims[1])),
    )


def stitch_settings(options: Mapping[str, Any], *, parity: bool) -> StitchSettings:
    return StitchSettings(**{name: options[name] for name in _STITCHED}, parity=parity)


def emotion(config: DenoiseConfig, official: OfficialConfig) -> Emotion:
    """The one that was asked for, else the published course of emotions, if any."""
    if config.emo is None and "emo" in official.arrays:
        return np.asarray(official.arrays["emo"], np.float32)
    chosen_emotion = chosen(config, official.defaults)["emo"]
    return EMOTIONS.index(chosen_emotion) if isinstance(chosen_emotion, str) else chosen_emotion


class ClipMotion:
    def __init__(self, lmdm: MotionDecoder, official: OfficialConfig) -> None:
        self._lmdm = lmdm
        self._official = official

    def __call__(
        self, features: Array, avatar: Avatar, seed: int, config: DenoiseConfig, report: Report
    ) -> dict[str, NDArray[Any]]:
        """`motion` [n, 265] of n speech features; `source_frames` [n], and key points of the source `x_s` and
        of the driven face `x_d` [n, 21, 3], the latter not fitted to the picture yet."""
        parity = config.mode == "parity"
        options = chosen(config, self._official.defaults)
        character = self._official.character if config.character else None
        driver = character or avatar
        settings = chain_settings(options)
        generator = torch.Generator().manual_seed(seed)
        sample = ClipSampler(
            self._lmdm,
            options["sampling_timesteps"],
            config.guidance_scale,
            generator,
            parity=parity,
            cuda_graph=config.cuda_graph,
        )
        num_clips = -(-len(features) // settings.valid_frames)
        done = 0

        def sample_and_report(cond_frame: Array, cond: Array) -> Array:
            nonlocal done
            clip = sample(cond_frame, cond)
            report(done := done + 1, num_clips)
            return clip

        motion = offline_motion(
            features,
            driver.condition(
                emotion(config, self._official),
                eye_f0_mode=options["eye_f0_mode"],
                **self._official.condition,
            ),
            driver.first_vector(),
            sample_and_report,
            settings,
        )
        stitch = MotionStitch(
            stitch_settings(options, parity=parity),
            avatar.motion,
            is_image=avatar.is_image,
            delta_eye_arr=self._official.arrays.get("delta_eye_arr"),
            character=None if character is None else frame(character.motion, 0),
            num_frames=len(motion),
            seed=seed,
        )
        return {"motion": motion} | self._key_points(stitch, motion, len(avatar), config)

    def _key_points(
        self, stitch: MotionStitch, motion: Array, source_length: int, config: DenoiseConfig
    ) -> dict[str, NDArray[Any]]:
        limits = self._official.arrays.get("v_min_max_for_clip")
        driving = unpack(motion, None if limits is None else np.asarray(limits[:2], np.float32))
        controls = fades(len(motion), config.fade_in, config.fade_out, {})
        source_frames = [mirror_index(i, source_length) for i in range(len(motion))]
        pairs = [
            stitch.pair(frame(driving, i), source_frame, controls.get(i))
            for i, source_frame in enumerate(source_frames)
        ]
        x_s, x_d = (np.stack(points) for points in zip(*pairs, strict=True))
        return {"x_s": x_s, "x_d": x_d, "source_frames": np.array(source_frames)}
