"""Clips joined to motion of any length: where each begins, what is settled when, how many frames come."""

import numpy as np
import pytest
from numpy.typing import NDArray

from avatar_core.backends.ditto.chaining import (
    ChainSettings,
    ClipChain,
    OnlineMotion,
    offline_motion,
    smoothed,
)
from avatar_core.backends.ditto.condition import Condition, emotion_weights
from avatar_core.backends.ditto.motion_vector import MOTION_DIM
from avatar_core.errors import ConfigError

Array = NDArray[np.float32]
ONE = np.zeros((1, 6), np.float32)
CONDITION = Condition(emotion_weights(4), ONE[:, :2], ONE, np.zeros(63, np.float32))
SOURCE = np.zeros((1, MOTION_DIM), np.float32)


def heard(cond_frame: Array, cond: Array) -> Array:
    """A clip whose motion is the first column of the speech features: it shows which ones a frame heard."""
    return np.repeat(cond[:, :, :1], MOTION_DIM, axis=2)


def features(num_frames: int) -> Array:
    rows = np.zeros((num_frames, 1024), np.float32)
    rows[:, 0] = np.arange(num_frames)
    return rows


def online(overlap: int, num_features: int, piece: int, *, parity: bool = False) -> Array:
    settings = ChainSettings(overlap=overlap, online=True, smooth_k=1)
    silence = np.full((overlap, 1024), -1, np.float32)
    motion = OnlineMotion(CONDITION, SOURCE, heard, settings, silence, parity=parity)
    rows = features(num_features)
    blocks = [b for i in range(0, num_features, piece) for b in motion.feed(rows[i : i + piece])]
    return np.concatenate([*blocks, *motion.finish(), np.zeros((0, MOTION_DIM), np.float32)])


@pytest.mark.parametrize("overlap", [5, 30, 40, 60, 70, 75, 79])
@pytest.mark.parametrize("num_features", [1, 5, 19, 20, 80, 163])
def test_every_frame_follows_its_own_feature(overlap: int, num_features: int) -> None:
    motion = online(overlap, num_features, 5)

    assert motion[:, 0] == pytest.approx(np.arange(num_features), abs=1e-3)


@pytest.mark.parametrize("overlap", [1, 10, 70, 79])
@pytest.mark.parametrize("num_frames", [1, 70, 80, 81, 163])
def test_offline_every_frame_follows_its_own_feature(overlap: int, num_frames: int) -> None:
    settings = ChainSettings(overlap=overlap, smooth_k=1)

    motion = offline_motion(features(num_frames), CONDITION, SOURCE, heard, settings)

    assert motion[:, 0] == pytest.approx(np.arange(num_frames), abs=1e-3)


@pytest.mark.parametrize("piece", [1, 7, 163])
def test_pieces_of_features_do_not_matter(piece: int) -> None:
    assert np.array_equal(online(70, 163, piece), online(70, 163, 5))


@pytest.mark.parametrize(("overlap", "given", "made"), [(70, 65, 70), (75, 42, 45), (60, 55, 60)])
def test_parity_gives_the_frames_too_many_of_the_reference(overlap: int, given: int, made: int) -> None:
    assert len(online(overlap, given, 5, parity=True)) == made


def test_memory_of_the_online_driver_is_bounded() -> None:
    settings = ChainSettings(overlap=70, online=True)
    motion = OnlineMotion(CONDITION, SOURCE, heard, settings, features(70))
    for _ in range(200):
        list(motion.feed(features(5)))

    assert motion._chain.motion.shape[1] <= 2 * settings.seq_frames + settings.valid_frames
    assert len(motion._features) < settings.seq_frames


def test_fading_runs_from_the_old_clip_to_the_new_one() -> None:
    settings = ChainSettings(overlap=10, smooth_k=1)
    chain = ClipChain(settings, SOURCE)
    chain.append(np.zeros((1, 80, MOTION_DIM), np.float32))
    chain.append(np.ones((1, 80, MOTION_DIM), np.float32))

    assert chain.motion.shape[1] == 150
    assert chain.motion[0, 70:80, 0] == pytest.approx(np.arange(10) / 10)
    assert not chain.motion[0, :70].any()
    assert (chain.motion[0, 80:] == 1).all()


@pytest.mark.parametrize(("every", "sources"), [(0, [False] * 4), (1, [True] * 4), (2, [False, True] * 2)])
def test_every_so_many_clips_begin_from_the_source(every: int, sources: list[bool]) -> None:
    chain = ClipChain(ChainSettings(smooth_k=1, fix_kp_cond=every, fix_kp_cond_dims=(0, 202)), SOURCE)
    fixed = []
    for _ in range(4):
        chain.append(np.ones((1, 80, MOTION_DIM), np.float32))
        assert (chain.kp_cond[:, :202] == 1).all()
        fixed.append(not chain.kp_cond[:, 202:].any())

    assert fixed == sources


def test_the_expression_is_not_smoothed() -> None:
    motion = np.random.default_rng(0).standard_normal((20, MOTION_DIM)).astype(np.float32)

    result = smoothed(motion, 3)

    assert np.array_equal(result[:, 202:], motion[:, 202:])
    assert result[5, :202] == pytest.approx(motion[4:7, :202].mean(axis=0), abs=1e-6)
    assert result[0, :202] == pytest.approx(motion[:2, :202].mean(axis=0), abs=1e-6)


@pytest.mark.parametrize("overlap", [0, 80, -1])
def test_an_overlap_that_is_not_shorter_than_a_clip_is_refused(overlap: int) -> None:
    with pytest.raises(ConfigError, match=f"overlap={overlap}; allowed are 1 to 79"):
        ChainSettings(overlap=overlap)


def test_the_online_driver_wants_as_much_silence_as_overlap() -> None:
    with pytest.raises(ConfigError, match="60 frames of silence"):
        OnlineMotion(CONDITION, SOURCE, heard, ChainSettings(overlap=70, online=True), features(60))
