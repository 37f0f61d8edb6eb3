"""Footage at the rate of a clip: movement keeps its speed, whatever the rate it was filmed at."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from avatar_core.media import footage as module
from avatar_core.media.footage import Footage, probe_footage

MS = Fraction(1, 1000)


def write(
    path: Path, times: Sequence[int], time_base: Fraction, *, form: str = "mp4", live: bool = False
) -> Path:
    """Frames at the given times; each tells its number by its grey."""
    codec = "libvpx" if form == "webm" else "libx264"
    with av.open(str(path), "w", format=form, options={"live": "1"} if live else {}) as file:
        stream = file.add_stream(codec, rate=Fraction(1000 if live else 25))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = time_base
        stream.codec_context.gop_size = 12
        stream.bit_rate = 2_000_000
        for number, time in enumerate(times):
            grey = np.full((48, 64, 3), 20 + 3 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = time, time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def numbers(path: Path, fps: float | None) -> list[int]:
    with Footage(path, fps=fps) as footage:
        return [round((float(frame.mean()) - 20) / 3) for frame in footage]


@pytest.mark.parametrize(
    ("filmed", "fps", "expected"),
    [
        (25, 25, list(range(50))),
        (50, 25, list(range(0, 50, 2))),
        (
            30,
            25,
            [0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19, 20, 22, 23, 24, 25, 26, 28, 29],
        ),
        (24, 25, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23]),
        (15, 25, [0, 1, 1, 2, 2, 3, 4, 4, 5, 5, 6, 7, 7, 8, 8]),
        (25, 50, [i // 2 for i in range(40)]),
        (60, 25, [0, 2, 5, 7, 10, 12, 14, 17, 19, 22, 24, 26, 29, 31, 34]),
    ],
)
def test_each_moment_shows_the_nearest_frame(
    tmp_path: Path, filmed: int, fps: float, expected: list[int]
) -> None:
    count = {(24, 25): 24, (25, 50): 20, (30, 25): 30, (15, 25): 9, (60, 25): 36}.get((filmed, fps), 50)
    path = write(tmp_path / "a.mp4", range(count), Fraction(1, filmed))
    assert numbers(path, fps) == expected
    assert numbers(path, None) == list(range(count))
    probe = probe_footage(path)
    assert (probe.fps, probe.num_frames) == (filmed, count)
    assert probe.duration_s == pytest.approx(count / filmed)


def test_rounded_times_repeat_every_frame_equally_often(tmp_path: Path) -> None:
    """Milliseconds cannot say 30 frames a second: 0, 33, 67, 100, ..."""
    times = [round(i * 1000 / 30) for i in range(30)]
    path = write(tmp_path / "a.webm", times, MS, form="webm")
    assert numbers(path, 60) == [i // 2 for i in range(60)]


def test_footage_of_unequal_frames_keeps_their_times(tmp_path: Path) -> None:
    """A telephone in the dark: 25 frames a second, then a gap of 400 ms, then 50 a second."""
    times = [0, 40, 80, 120, 520, 540, 560, 580, 600, 620]
    path = write(tmp_path / "a.webm", times, MS, form="webm")
    # 0, 40, ... 600 ms; half way through the gap, at 320 ms, the earlier one.
    assert numbers(path, 25) == [0, 1, 2, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 6, 8]
    probe = probe_footage(path)
    assert probe.duration_s == pytest.approx(0.64, abs=0.02)
    assert probe.num_frames == 10


def test_ntsc_is_what_the_clip_means_by_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", [1001 * i for i in range(60)], Fraction(1, 30_000))
    assert numbers(path, 29.97) == list(range(60))
    assert probe_footage(path).fps == pytest.approx(29.97, abs=0.001)


def test_a_live_recording_has_the_rate_of_its_frames(tmp_path: Path) -> None:
    """Browsers name no rate, and readers guess 1000."""
    path = write(tmp_path / "a.webm", [40 * i for i in range(25)], MS, form="webm", live=True)
    probe = probe_footage(path)
    assert probe.fps == pytest.approx(25, rel=0.01)
    assert probe.duration_s == pytest.approx(1)
    assert numbers(path, 25) == list(range(25))


def test_a_single_frame_is_footage_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", [0], Fraction(1, 25))
    assert numbers(path, 25) == [0]
    assert numbers(path, 60) in ([0], [0, 0])


def test_resampled_footage_is_a_sequence_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.mp4", range(60), Fraction(1, 30))
    monkeypatch.setattr(module, "FRAMES_HELD", 4)
    with Footage(path, fps=25) as footage:
        assert len(footage) == 50
        order = [49, 0, 30, 29, 31, 5, 5, 48]
        found = [round((float(footage[index].mean()) - 20) / 3) for index in order]
    assert found == [numbers(path, 25)[index] for index in order]
    with Footage(path, fps=25) as footage, pytest.raises(IndexError):
        footage[50]
