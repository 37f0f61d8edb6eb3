"""Where the default differs from the reference, and what is refused; the rest is in the golden cases."""

import random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from avatar_core.backends.ditto.motion_stitch import (
    EYE_POINTS,
    LIP_POINTS,
    MotionStitch,
    StitchSettings,
    blink_schedule,
    fades,
    point_mask,
)
from avatar_core.backends.ditto.motion_vector import degrees, frame, keypoints
from avatar_core.errors import ConfigError
from tests.backends.ditto.toy import toy_avatar

Array = NDArray[np.float32]
SOURCE = toy_avatar().motion
DRIVING = {key: values for key, values in toy_avatar(4, seed=3).motion.items() if key != "kp"}


def driven(control: dict[str, Any] | None = None, index: int = 1, **options: Any) -> Array:
    """Key points of a later frame."""
    stitch = MotionStitch(StitchSettings(**options), SOURCE, is_image=True)
    for i in range(index):
        stitch.pair(frame(DRIVING, i))
    return stitch.pair(frame(DRIVING, index), 0, control)[1]


def test_the_first_driven_frame_is_the_source_at_rest() -> None:
    options = {"drive_eye": False}

    assert driven(index=0, **options) == pytest.approx(keypoints(SOURCE)[0], abs=1e-6)
    assert not np.allclose(driven(**options), keypoints(SOURCE)[0], atol=1e-3)


def test_silence_fades_the_lips_alone() -> None:
    """The reference fades the whole expression, and with it the eyes."""
    options: dict[str, Any] = {"use_d_keys": ("exp",)}

    change = driven({"vad_alpha": 0.0}, **options) - driven(index=0, **options)
    parity = driven({"vad_alpha": 0.0}, parity=True, **options) - driven(index=0, **options)

    assert np.abs(change[list(LIP_POINTS)]).max() < 1e-6
    assert np.abs(change[list(EYE_POINTS)]).max() > 1e-3
    assert np.abs(parity).max() < 1e-6


def test_alpha_scales_degrees() -> None:
    options = {"use_d_keys": (), "drive_eye": False}
    turned = {**SOURCE, "yaw": degrees(SOURCE["yaw"]) * np.float32(0.5)}

    result = driven({"alpha_yaw": 0.5}, **options)

    assert result == pytest.approx(keypoints(turned)[0], abs=1e-6)
    assert not np.allclose(result, driven({"alpha_yaw": 0.5}, parity=True, **options), atol=1e-4)


def test_fading_after_a_turn_mixes_degrees_with_degrees() -> None:
    options = {"use_d_keys": (), "drive_eye": False, "fade_type": "s", "fade_out_keys": ("yaw",)}
    half = {**SOURCE, "yaw": degrees(SOURCE["yaw"]) + np.float32(5)}

    assert driven({"delta_yaw": 10, "fade_alpha": 0.5}, **options) == pytest.approx(
        keypoints(half)[0], abs=1e-6
    )


@pytest.mark.parametrize(("parity", "relative"), [(True, True), (False, False)])
def test_a_given_reference_makes_motion_relative_only_where_asked_for(parity: bool, relative: bool) -> None:
    settings = StitchSettings(relative_d=False, drive_eye=False, parity=parity)
    first = frame(DRIVING, 0)

    _, points = MotionStitch(settings, SOURCE, is_image=True, reference=first).pair(first)

    assert np.allclose(points, keypoints(SOURCE)[0], atol=1e-6) == relative


def test_blinks_come_round_again_and_change_the_eyes_alone() -> None:
    blink = np.ones((2, 63), np.float32)
    settings = StitchSettings(use_d_keys=(), delta_eye_open_n=3)
    stitch = MotionStitch(settings, SOURCE, is_image=True, delta_eye_arr=blink, num_frames=12)
    plain = MotionStitch(StitchSettings(use_d_keys=()), SOURCE, is_image=True)

    change = stitch.pair(frame(DRIVING, 0))[1] - plain.pair(frame(DRIVING, 0))[1]

    moved = np.abs(change).max(axis=1) > 1e-4
    assert set(np.flatnonzero(moved)) == set(EYE_POINTS)


def test_random_blinks_follow_the_seed() -> None:
    one, same, other = (blink_schedule(-1, 15, 0, random.Random(seed)).tolist() for seed in (1, 1, 2))

    assert one == same != other
    assert len(one) == 3000


def test_fades_leave_the_given_controls_alone() -> None:
    controls = {0: {"delta_yaw": 1.0}}

    faded = fades(5, 2, 2, controls)

    assert controls == {0: {"delta_yaw": 1.0}}
    assert faded[0] == {"delta_yaw": 1.0, "fade_alpha": 0.0}
    assert faded[4] == {"fade_alpha": 0.0}


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="use_d_keys has 'jaw'; choose from: scale, pitch"):
        MotionStitch(StitchSettings(use_d_keys=("exp", "jaw")), SOURCE, is_image=True)
    with pytest.raises(ConfigError, match="unknown control 'delta_nose'"):
        MotionStitch(StitchSettings(overall_ctrl_info={"delta_nose": 1}), SOURCE, is_image=True)


def test_masks_cover_three_components_of_a_point() -> None:
    assert np.flatnonzero(point_mask([2])).tolist() == [6, 7, 8]
