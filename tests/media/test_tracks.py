"""Files with several tracks of sound or pictures: the one that a player takes."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from avatar_core.errors import InputError
from avatar_core.media.audio import load_mono, probe_audio
from avatar_core.media.footage import Footage, probe_footage

RATE = 48_000
FORMS = ["mp4", "mov", "matroska"]


def add_sound(file: av.container.OutputContainer, codec: str, default: bool) -> av.audio.stream.AudioStream:
    stream = file.add_stream(codec, rate=RATE, layout="mono")
    stream.disposition = Disposition.default if default else Disposition(0)
    return stream


def write_sound(file: av.container.OutputContainer, stream: av.audio.stream.AudioStream, hertz: int) -> None:
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(RATE) / RATE).astype(np.float32)
    frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
    resampler = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=RATE)
    for converted in [*resampler.resample(frame), *resampler.resample(None)]:
        file.mux(stream.encode(converted))
    file.mux(stream.encode(None))


def sounds(path: Path, form: str, *tracks: tuple[str, bool]) -> Path:
    """Track k, a codec and whether it is the default, sounds at 400 (k + 1) Hz."""
    with av.open(
        str(path),
        "w",
        format=form,
        options={"default_mode": "passthrough"} if form in ("matroska", "webm") else {},
    ) as file:
        streams = [add_sound(file, *track) for track in tracks]
        for number, stream in enumerate(streams):
            write_sound(file, stream, 400 * (number + 1))
    return path


def heard(path: Path) -> int:
    """The number of the track that is heard."""
    samples = load_mono(path, 16_000)
    spectrum = np.abs(np.fft.rfft(samples[:16_000]))
    return round(int(np.argmax(spectrum)) / (400 * len(samples[:16_000]) / 16_000)) - 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("defaults", "expected"),
    [((False, True), 1), ((True, False), 0), ((False, False, True), 2), ((False, True, True), 1)],
)
def test_the_sound_marked_as_default_is_heard(
    tmp_path: Path, form: str, defaults: tuple[bool, ...], expected: int
) -> None:
    path = sounds(tmp_path / "a", form, *(("aac", default) for default in defaults))
    assert heard(path) == expected


@pytest.mark.parametrize("form", ["mp4", "matroska"])
def test_of_sounds_that_are_all_or_none_default_the_first_is_heard(tmp_path: Path, form: str) -> None:
    for default in (True, False):
        path = sounds(tmp_path / "a", form, ("aac", default), ("aac", default))
        assert heard(path) == 0


def test_the_default_of_a_webm_is_heard(tmp_path: Path) -> None:
    assert heard(sounds(tmp_path / "a", "webm", ("libopus", False), ("libopus", True))) == 1


@pytest.mark.parametrize("form", ["mp4", "matroska"])
def test_sound_that_cannot_be_used_is_passed_over(tmp_path: Path, form: str) -> None:
    path = sounds(tmp_path / "a", form, ("ac3", True), ("aac", False))
    assert heard(path) == 1
    assert probe_audio(path).codec == "aac"
    with pytest.raises(InputError, match="has sound in the codec ac3"):
        probe_audio(sounds(tmp_path / "b", form, ("ac3", True), ("ac3", False)))


def films(path: Path, form: str, *tracks: tuple[str, Disposition]) -> Path:
    """Track k is grey of level 50 (k + 1)."""
    options = {"default_mode": "passthrough"} if form == "matroska" else {}
    with av.open(str(path), "w", format=form, options=options) as file:
        streams = []
        for codec, disposition in tracks:
            stream = file.add_stream(codec, rate=25)
            stream.width, stream.height = 64, 48
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.disposition = disposition
            streams.append(stream)
        for number, stream in enumerate(streams):
            count = 1 if stream.disposition & Disposition.attached_pic else 5
            for index in range(count):
                grey = np.full((48, 64, 3), 50 * (number + 1), np.uint8)
                frame = av.VideoFrame.from_ndarray(grey, format="rgb24").reformat(format=stream.pix_fmt)
                frame.pts, frame.time_base = index, Fraction(1, 25)
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
    return path


def seen(path: Path) -> int:
    with Footage(path) as footage:
        return round(float(footage[0].mean()) / 50) - 1


@pytest.mark.parametrize("form", FORMS)
def test_the_pictures_marked_as_default_are_seen(tmp_path: Path, form: str) -> None:
    none, default = Disposition(0), Disposition.default
    assert seen(films(tmp_path / "a", form, ("libx264", none), ("libx264", default))) == 1
    assert seen(films(tmp_path / "a", form, ("libx264", default), ("libx264", none))) == 0
    assert seen(films(tmp_path / "a", form, ("libx264", none), ("libx264", none))) == 0


@pytest.mark.parametrize("form", FORMS)
def test_pictures_that_cannot_be_used_are_passed_over(tmp_path: Path, form: str) -> None:
    path = films(tmp_path / "a", form, ("mpeg2video", Disposition.default), ("libx264", Disposition(0)))
    assert seen(path) == 1
    assert probe_footage(path).codec == "h264"


def test_a_cover_is_never_footage(tmp_path: Path) -> None:
    path = films(tmp_path / "a", "mp4", ("mjpeg", Disposition.attached_pic), ("libx264", Disposition(0)))
    assert seen(path) == 1
    assert probe_footage(path).num_frames == 5


@pytest.mark.parametrize("form", ["mp4", "mp3"])
def test_a_recording_with_a_cover(tmp_path: Path, form: str) -> None:
    """The cover alone is no footage."""
    codec = {"mp4": "aac", "mp3": "libmp3lame"}[form]
    with av.open(str(tmp_path / "a"), "w", format=form) as file:
        sound = add_sound(file, codec, default=True)
        cover = file.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 90, np.uint8), format="rgb24")
        file.mux(cover.encode(picture.reformat(format="yuvj420p")))
        file.mux(cover.encode(None))
        write_sound(file, sound, 400)
    assert probe_audio(tmp_path / "a").duration_s == pytest.approx(1, abs=0.03)
    assert heard(tmp_path / "a") == 0
    with pytest.raises(InputError, match=r"has no moving pictures|is in the format MP3"):
        probe_footage(tmp_path / "a")
