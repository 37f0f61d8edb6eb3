import tracemalloc
import wave
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from avatar_core.errors import InputError
from avatar_core.media.speakers import combined_duration_s, mix_blocks, speaker_tracks

RATE = 16_000


def write(path: Path, level: float, duration_s: float, rate: int = RATE) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        for _ in range(round(duration_s * 10)):
            file.writeframes(np.full(rate // 10, level * 32767, "<i2").tobytes())
    return path


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / "one.wav", 0.8, 2.0), write(tmp_path / "two.wav", 0.6, 3.5)]


def mixed(paths: list[Path], how: str | None, channels: int = 1, **window: float) -> NDArray[np.float32]:
    return np.concatenate(
        [np.zeros((0, channels), np.float32), *mix_blocks(paths, how, RATE, channels, **window)]
    )


def at(track: NDArray[np.float32], *times_s: float) -> list[float]:
    return [round(float(track[round(time_s * RATE)]), 2) for time_s in times_s]


def test_one_recording(pair: list[Path]) -> None:
    (track,) = speaker_tracks(pair[:1], None, RATE)
    assert track.shape == (2 * RATE,)
    np.testing.assert_array_equal(mixed(pair[:1], None)[:, 0], track)
    assert combined_duration_s([2.0], None) == 2.0


def test_at_the_same_time(pair: list[Path]) -> None:
    first, second = speaker_tracks(pair, "para", RATE)
    assert len(first) == len(second) == 3.5 * RATE
    assert at(first, 0.0, 1.9, 2.1) == [0.8, 0.8, 0.0]
    assert at(second, 0.0, 3.4) == [0.6, 0.6]
    sound = mixed(pair, "para", 2)
    assert sound.shape == (3.5 * RATE, 2)
    assert at(sound[:, 1], 1.0, 3.0) == [0.7, 0.3]
    assert combined_duration_s([2.0, 3.5], "para") == 3.5


def test_one_after_the_other(pair: list[Path]) -> None:
    first, second = speaker_tracks(pair, "add", RATE)
    assert len(first) == len(second) == 5.5 * RATE
    assert at(first, 1.9, 2.1, 5.4) == [0.8, 0.0, 0.0]
    assert at(second, 0.0, 1.9, 2.1, 5.4) == [0.0, 0.0, 0.6, 0.6]
    assert at(mixed(pair, "add")[:, 0], 1.9, 2.1) == [0.8, 0.6]
    assert combined_duration_s([2.0, 3.5], "add") == 5.5


@pytest.mark.parametrize("how", ["para", "add"])
@pytest.mark.parametrize(
    ("start_s", "duration_s"), [(0, 1), (1.23, 2.345), (2.0, 1.0), (3.0, 9.0), (5.5, 1.0), (7.0, 1.0)]
)
def test_a_window_is_a_part_of_the_whole(
    pair: list[Path], how: str, start_s: float, duration_s: float
) -> None:
    window = slice(round(start_s * RATE), round(start_s * RATE) + round(duration_s * RATE))
    parts = speaker_tracks(pair, how, RATE, start_s, duration_s)
    for part, whole in zip(parts, speaker_tracks(pair, how, RATE), strict=True):
        np.testing.assert_array_equal(part, whole[window])
    part = mixed(pair, how, start_s=start_s, duration_s=duration_s)
    np.testing.assert_array_equal(part, mixed(pair, how)[window])


def test_full_scale_together_does_not_clip(tmp_path: Path) -> None:
    loud = [write(tmp_path / f"{index}.wav", 1.0, 1.0) for index in range(3)]
    assert np.abs(mixed(loud, "para")).max() <= 1


def test_recordings_of_different_rates_share_a_timeline(tmp_path: Path) -> None:
    paths = [write(tmp_path / "one.wav", 0.5, 1.3, 44_100), write(tmp_path / "two.wav", 0.5, 0.7, 8_000)]
    for rate in (16_000, 48_000):
        assert [len(track) for track in speaker_tracks(paths, "add", rate)] == [2 * rate] * 2


@pytest.mark.drill
def test_memory_does_not_grow_with_length(tmp_path: Path) -> None:
    paths = [write(tmp_path / "one.wav", 0.5, 120.0), write(tmp_path / "two.wav", 0.5, 60.0)]
    for block in mix_blocks(paths, "add", RATE, 1, duration_s=0.1):
        assert len(block) == RATE // 10
    tracemalloc.start()
    for block in mix_blocks(paths, "add", RATE, 2):
        assert len(block) == RATE
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 180 * RATE * 2 * 4 / 4


@pytest.mark.parametrize(
    ("count", "how", "message"),
    [(2, None, "2 recordings"), (0, "para", "0 recordings"), (2, "mix", "allowed: para, add")],
)
def test_wrong_combinations(pair: list[Path], count: int, how: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        speaker_tracks(pair[:count], how, RATE)
    with pytest.raises(InputError, match=message):
        list(mix_blocks(pair[:count], how, RATE, 1))
    with pytest.raises(InputError, match=message):
        combined_duration_s([1.0] * count, how)
