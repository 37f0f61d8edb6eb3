import hashlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args, get_type_hints

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from avatar_core.config import VideoConfig
from avatar_core.errors import InputError
from avatar_core.media.audio import load_mono, probe_audio
from avatar_core.media.video import (
    AAC_SAMPLE_RATES,
    Sound,
    VideoWriter,
    aac_sample_rate,
    frame_rate,
    probe_video,
    read_frames,
    read_metadata,
)

WIDTH, HEIGHT = 64, 48


def frame(index: int) -> NDArray[np.uint8]:
    picture = np.full((HEIGHT, WIDTH, 3), (220, 40, 30), np.uint8)
    picture[:, WIDTH // 2 :] = (20, 60, 200 if index % 2 else 100)
    return picture


def voice(sample_rate: int, duration_s: float, channels: int = 1) -> NDArray[np.float32]:
    white = np.random.default_rng(3).standard_normal((round(duration_s * sample_rate), channels))
    kernel = np.hanning(max(3, sample_rate // 1500))
    smooth = np.stack([np.convolve(white[:, c], kernel, "same") for c in range(channels)], axis=1)
    return (0.5 * smooth / np.abs(smooth).max()).astype(np.float32)


def in_blocks(samples: NDArray[np.float32], size: int = 5000) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def write(
    path: Path, num_frames: int = 30, fps: float = 25, sound: Sound | None = None, **settings: object
) -> Path:
    with VideoWriter(path, WIDTH, HEIGHT, fps, sound, preset="veryfast", **settings) as writer:
        for index in range(num_frames):
            writer.write_frame(frame(index))
    return path


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def write_until(path: Path, error: type[BaseException]) -> None:
    with VideoWriter(path, WIDTH, HEIGHT, 25) as writer:
        writer.write_frame(frame(0))
        raise error


def lag(reference: NDArray[np.float32], found: NDArray[np.float32]) -> int:
    size = 2 * max(len(reference), len(found))
    peak = int(np.argmax(np.fft.irfft(np.fft.rfft(found, size) * np.fft.rfft(reference, size).conj())))
    return peak if peak < size // 2 else peak - size


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (25, Fraction(25)),
        (25.0, Fraction(25)),
        (29.97, Fraction(30000, 1001)),
        (30000 / 1001, Fraction(30000, 1001)),
        (23.976, Fraction(24000, 1001)),
        (23.98, Fraction(24000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (12.5, Fraction(25, 2)),
        (1, Fraction(1)),
        (120, Fraction(120)),
    ],
)
def test_frame_rate(fps: float, expected: Fraction) -> None:
    assert frame_rate(fps) == expected


def test_aac_sample_rate() -> None:
    assert [aac_sample_rate(rate) for rate in AAC_SAMPLE_RATES] == list(AAC_SAMPLE_RATES)
    assert [aac_sample_rate(rate) for rate in (96_000, 192_000, 37_800, 88_200)] == [48_000] * 4


@pytest.mark.parametrize("fps", [25, 29.97, 12.5, 60])
def test_frames_and_rate_survive(tmp_path: Path, fps: float) -> None:
    path = write(tmp_path / "a.mp4", 31, fps)
    probe = probe_video(path)
    assert (probe.width, probe.height, probe.num_frames, probe.fps) == (WIDTH, HEIGHT, 31, frame_rate(fps))
    assert probe.duration_s == pytest.approx(31 / frame_rate(fps))
    assert (probe.audio_duration_s, probe.sample_rate) == (None, None)
    assert sum(1 for _ in read_frames(path)) == 31


def test_colours_are_tagged_and_survive(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", 4, crf=1)
    for index, found in enumerate(read_frames(path)):
        assert found.dtype == np.uint8
        for column in (5, WIDTH - 5):
            np.testing.assert_allclose(found[20, column], frame(index)[20, column], atol=3)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        tags = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
        assert (context.pix_fmt, *tags) == ("yuv420p", 1, 1, 1, 1)


def stream_kind(path: Path) -> tuple[str, str, int]:
    """Profile, pixel format and level (times ten) that are written in the file."""
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert len(list(container.decode(video=0))) == 3
        return str(context.profile), str(context.pix_fmt), bytes(context.extradata or b"")[3]


@pytest.mark.parametrize("preset", get_args(get_type_hints(VideoConfig)["x264_preset"]))
@pytest.mark.parametrize("crf", [1, 20, 51])
def test_every_quality_is_of_a_profile_that_plays_everywhere(tmp_path: Path, preset: str, crf: int) -> None:
    profile = "Constrained Baseline" if preset == "ultrafast" else "High"
    path = write_noise(tmp_path / "a.mp4", 64, 48, preset=preset, crf=crf)
    assert stream_kind(path) == (profile, "yuv420p", 10)


@pytest.mark.parametrize(
    ("width", "height", "fps", "level"),
    [
        (2, 2, 1, 10),
        (2, 64, 120, 10),
        (64, 2, 29.97, 10),
        (322, 242, 25, 13),
        (1280, 720, 25, 31),
        (1280, 720, 120, 42),
        (8192, 64, 1, 51),
        (64, 8192, 120, 51),
    ],
)
def test_every_size_and_rate_is_of_a_profile_that_plays_everywhere(
    tmp_path: Path, width: int, height: int, fps: float, level: int
) -> None:
    path = write_noise(tmp_path / "a.mp4", width, height, fps)
    assert stream_kind(path) == ("High", "yuv420p", level)


def write_noise(path: Path, width: int, height: int, fps: float = 25, **settings: Any) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    with VideoWriter(path, width, height, fps, **{"preset": "veryfast", **settings}) as writer:
        for step in range(3):
            writer.write_frame(np.roll(noise, step, axis=1))
    return path


@pytest.mark.parametrize("sample_rate", AAC_SAMPLE_RATES)
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_is_aligned(tmp_path: Path, sample_rate: int, channels: int) -> None:
    samples = voice(sample_rate, 2.4, channels)
    sound = Sound(in_blocks(samples), sample_rate, channels)
    path = write(tmp_path / "a.mp4", 60, 25, sound)
    probe = probe_audio(path)
    assert (probe.sample_rate, probe.channels, probe.samples) == (sample_rate, channels, len(samples))
    found = load_mono(path, sample_rate)
    reference = samples.mean(axis=1)
    assert abs(lag(reference, found)) / sample_rate < 0.003
    assert np.corrcoef(reference, found)[0, 1] > 0.8
    with av.open(str(path)) as container:
        assert [stream.start_time for stream in container.streams] == [0, 0]


def test_a_click_stays_at_its_frame(tmp_path: Path) -> None:
    samples = np.zeros((48_000, 1), np.float32)
    samples[24_000:24_050] = 0.9
    found = load_mono(write(tmp_path / "a.mp4", 25, 25, Sound(in_blocks(samples), 48_000, 1)), 48_000)
    assert abs(int(np.argmax(np.abs(found))) - 24_025) < 0.003 * 48_000


@pytest.mark.parametrize(("duration_s", "expected_s"), [(2.0, 1.2), (0.5, 0.5), (0.0, None)])
def test_longer_sound_is_cut_and_shorter_kept(
    tmp_path: Path, duration_s: float, expected_s: float | None
) -> None:
    sound = Sound(in_blocks(voice(24_000, 2.0)[: round(duration_s * 24_000)]), 24_000, 1)
    probe = probe_video(write(tmp_path / "a.mp4", 30, 25, sound))
    assert probe.num_frames == 30
    assert probe.audio_duration_s == pytest.approx(expected_s, abs=1e-3)


def test_sound_is_pulled_while_frames_are_written(tmp_path: Path) -> None:
    pulled = 0

    def blocks() -> Iterator[NDArray[np.float32]]:
        nonlocal pulled
        for block in in_blocks(voice(16_000, 10), 1000):
            pulled += len(block)
            yield block

    with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 25, Sound(blocks(), 16_000, 1)) as writer:
        for index in range(20):
            writer.write_frame(frame(index))
            assert 0 <= pulled - (index + 1) * 640 < 1000


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    digests = set()
    for name in ("a.mp4", "b.mp4"):
        sound = Sound(in_blocks(voice(44_100, 2)), 44_100, 1)
        path = write(tmp_path / name, 40, 29.97, sound, threads=2, metadata={"avatar_key": "x"})
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_metadata_and_fast_start(tmp_path: Path) -> None:
    given = {
        "title": "Clip",
        "avatar_key": "0" * 64,
        "avatar_params": '{"prompt": "Ein Mädchen; \\n = 你好"}',
    }
    path = write(tmp_path / "a.mp4", metadata=given)
    found = read_metadata(path)
    assert {key: found[key] for key in given} == given
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    assert not {"creation_time", "encoder"} & set(found)


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[NDArray[np.float32]]:
        yield voice(16_000, 0.5)
        raise InputError("is broken")

    with pytest.raises(InputError, match="is broken"):
        write(tmp_path / "a.mp4", 30, 25, Sound(broken(), 16_000, 1))
    with pytest.raises(KeyboardInterrupt):
        write_until(tmp_path / "a.mp4", KeyboardInterrupt)
    with (
        pytest.raises(ValueError, match="one frame or more"),
        VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 25),
    ):
        pass
    assert names(tmp_path) == []


def test_an_error_keeps_the_former_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    before = path.read_bytes()
    with pytest.raises(RuntimeError):
        write_until(path, RuntimeError)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("name", ["a b.mp4", "concat:x.mp4", "%03d.mp4", "ünï.mp4", "no-suffix"])
def test_any_file_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path(name))
    assert names(tmp_path) == [name]
    assert probe_video(tmp_path / name).num_frames == 30


def test_wrong_frames_and_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="65x48: both sides must be even"):
        VideoWriter(tmp_path / "a.mp4", 65, 48, 25)
    with pytest.raises(ValueError, match="96000 Hz; allowed"):
        VideoWriter(tmp_path / "a.mp4", 64, 48, 25, Sound(iter(()), 96_000, 1))
    for crf in (0, 52):
        with pytest.raises(ValueError, match=f"crf {crf}; allowed: 1 to 51"):
            VideoWriter(tmp_path / "a.mp4", 64, 48, 25, crf=crf)
    for wrong in (
        np.zeros((48, 64), np.uint8),
        np.zeros((64, 48, 3), np.uint8),
        np.zeros((48, 64, 3), np.float32),
    ):
        with (
            pytest.raises(ValueError, match="expected uint8"),
            VideoWriter(tmp_path / "a.mp4", 64, 48, 25) as writer,
        ):
            writer.write_frame(wrong)
    assert names(tmp_path) == []


def test_broken_video_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    content = path.read_bytes()
    path.write_bytes(content[:300])
    with pytest.raises(InputError, match="was cut off; give a complete video"):
        probe_video(path)
    path.write_bytes(b"#EXTM3U\n")
    with pytest.raises(InputError, match="is a playlist"):
        next(read_frames(path))
