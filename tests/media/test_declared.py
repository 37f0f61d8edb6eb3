"""Recordings and videos that were cut off, told by what they declare; and whole ones that look like it."""

import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from avatar_core.errors import InputError
from avatar_core.media.audio import load_mono, probe_audio
from avatar_core.media.footage import probe_footage

ID3 = b"ID3\4\0\0\0\0\1\0" + bytes(128)
COVER = b"ID3\3\0\0\0\2\0\0" + bytes(2 << 14)
ID3V1 = b"TAG" + bytes(125)
APE = b"APETAGEX" + bytes(24) + b"Title\0song" * 200


def noise(rate: int, duration_s: float) -> NDArray[np.float32]:
    """Bursts: their bit rate changes."""
    samples = np.random.default_rng(0).standard_normal(round(rate * duration_s)) * 0.1
    return (samples * (np.arange(len(samples)) % (rate // 2) < rate // 4)).astype(np.float32)


def write(
    path: Path, codec: str, form: str, rate: int = 48_000, duration_s: float = 4.0, **options: str
) -> Path:
    of_file = ("live", "movflags", "write_xing", "rf64")
    form_options: dict[str, str] = {name: options.pop(name) for name in of_file if name in options}
    with av.open(str(path), "w", format=form, options=form_options) as file:
        stream = file.add_stream(codec, rate=rate, layout="mono", options=options)
        frame = av.AudioFrame.from_ndarray(noise(rate, duration_s)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        resampler = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=rate)
        for converted in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(converted))
        file.mux(stream.encode(None))
    return path


DECLARING: dict[str, Callable[[Path], Path]] = {
    "mp3 xing": lambda path: write(path, "libmp3lame", "mp3", q="2"),
    "mp3 info": lambda path: write(path, "libmp3lame", "mp3", 44_100),
    "mp3 of low rate": lambda path: write(path, "libmp3lame", "mp3", 8_000),
    "webm": lambda path: write(path, "libopus", "webm"),
    "matroska aac": lambda path: write(path, "aac", "matroska"),
    "matroska flac": lambda path: write(path, "flac", "matroska"),
    "matroska pcm": lambda path: write(path, "pcm_s16le", "matroska"),
    "ogg opus": lambda path: write(path, "libopus", "ogg"),
    "ogg flac": lambda path: write(path, "flac", "ogg"),
    "flac": lambda path: write(path, "flac", "flac"),
    "wav": lambda path: write(path, "pcm_s24le", "wav"),
    "rf64": lambda path: write(path, "pcm_s16le", "wav", rf64="always"),
    "m4a": lambda path: write(path, "aac", "mp4", movflags="faststart"),
    "fragmented m4a": lambda path: write(path, "aac", "mp4", movflags="frag_keyframe+empty_moov"),
}


@pytest.mark.parametrize("case", DECLARING)
def test_a_cut_recording_is_refused(tmp_path: Path, case: str) -> None:
    content = DECLARING[case](tmp_path / "a").read_bytes()
    assert probe_audio(tmp_path / "a").duration_s == pytest.approx(4, abs=0.09)
    for share in (0.4, 0.75, 0.95):
        (tmp_path / "b").write_bytes(content[: round(len(content) * share)])
        with pytest.raises(InputError, match="is truncated: "):
            probe_audio(tmp_path / "b")


def test_the_message_says_how_much_is_there(tmp_path: Path) -> None:
    content = write(tmp_path / "a", "libmp3lame", "mp3", 44_100).read_bytes()
    (tmp_path / "a").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError) as caught:
        probe_audio(tmp_path / "a")
    assert str(caught.value) == (
        "is truncated: its header says 4.02 s, 1.99 s could be decoded; copy it again"
    )


UNDECLARED: dict[str, Callable[[Path], Path]] = {
    "raw aac": lambda path: write(path, "aac", "adts"),
    "mp3 without header": lambda path: write(path, "libmp3lame", "mp3", write_xing="0"),
    "live webm": lambda path: write(path, "libopus", "webm", live="1"),
}


@pytest.mark.parametrize("case", UNDECLARED)
@pytest.mark.parametrize("share", [0.5, 0.6, 0.77, 0.9])
def test_what_declares_nothing_is_taken_as_it_is(tmp_path: Path, case: str, share: float) -> None:
    content = UNDECLARED[case](tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content[: round(len(content) * share)])
    probe = probe_audio(tmp_path / "a")
    assert 1.2 < probe.duration_s < 3.9
    assert len(load_mono(tmp_path / "a", 16_000)) == round(probe.duration_s * 16_000)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("options", [{}, {"q": "4"}, {"abr": "1"}], ids=["cbr", "vbr", "abr"])
def test_whole_mp3_pass(tmp_path: Path, rate: int, options: dict[str, str]) -> None:
    for duration_s in (0.13, 1.0, 2.037):
        path = write(tmp_path / "a", "libmp3lame", "mp3", rate, duration_s, **options)
        assert probe_audio(path).duration_s == pytest.approx(duration_s, abs=0.001)


@pytest.mark.parametrize(("codec", "form"), [("libopus", "webm"), ("libopus", "ogg"), ("aac", "matroska")])
@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_whole_webm_and_ogg_pass(tmp_path: Path, codec: str, form: str, rate: int) -> None:
    for duration_s in (0.13, 1.0, 2.037):
        path = write(tmp_path / "a", codec, form, rate, duration_s)
        assert probe_audio(path).duration_s == pytest.approx(duration_s, abs=2100 / rate)


@pytest.mark.parametrize("kind", ["VORBIS", "OPUS"])
def test_whole_ogg_of_other_writers_pass(tmp_path: Path, kind: str) -> None:
    soundfile.write(tmp_path / "a", noise(48_000, 3.3), 48_000, format="OGG", subtype=kind)
    assert probe_audio(tmp_path / "a").duration_s == pytest.approx(3.3, abs=0.001)
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content[:-1])
    with pytest.raises(InputError, match="is truncated: it ends in the middle of a page; copy it again"):
        probe_audio(tmp_path / "a")
    (tmp_path / "a").write_bytes(content + ID3V1)
    assert probe_audio(tmp_path / "a").duration_s == pytest.approx(3.3, abs=0.001)


def xing(content: bytes) -> int:
    return next(content.index(name) for name in (b"Xing", b"Info") if name in content)


def declaring(content: bytes, change: int) -> bytes:
    at = xing(content) + 8
    (frames,) = struct.unpack_from(">I", content, at)
    return content[:at] + struct.pack(">I", frames + change) + content[at + 4 :]


def as_vbri(content: bytes) -> bytes:
    """Fraunhofer's header in the place of Xing's."""
    at = xing(content)
    frame, frames = content.index(b"\xff\xfb"), content[at + 8 : at + 12]
    vbri = b"VBRI\0\1\0\0\0\0" + struct.pack(">I", len(content)) + frames
    changed = content[:at] + bytes(4) + content[at + 4 :]
    return changed[: frame + 36] + vbri + changed[frame + 36 + len(vbri) :]


@pytest.mark.parametrize(
    ("change", "duration_s"),
    [
        (lambda mp3: ID3 + mp3, 4.0),
        (lambda mp3: COVER + mp3, 4.0),
        (lambda mp3: ID3 + COVER + mp3, 4.0),
        (lambda mp3: mp3 + ID3V1, 4.0),
        (lambda mp3: mp3 + APE + ID3V1, 4.0),
        (lambda mp3: mp3 + mp3, 8.0),
        (lambda mp3: mp3 + ID3V1 + mp3 + APE, 8.0),
        (lambda mp3: declaring(mp3, -40), 4.0),
        (as_vbri, 4.0),
    ],
    ids=["id3", "cover", "two", "id3v1", "ape", "joined", "joined with tags", "fewer", "vbri"],
)
def test_mp3_that_are_whole(tmp_path: Path, change: Callable[[bytes], bytes], duration_s: float) -> None:
    content = write(tmp_path / "a", "libmp3lame", "mp3", 44_100).read_bytes()
    (tmp_path / "a").write_bytes(change(content))
    assert probe_audio(tmp_path / "a").duration_s == pytest.approx(duration_s, abs=0.1)
    assert len(load_mono(tmp_path / "a", 16_000)) / 16_000 == pytest.approx(duration_s, abs=0.1)


@pytest.mark.parametrize(
    "change",
    [
        lambda mp3: COVER + mp3[: len(mp3) * 3 // 4],
        lambda mp3: mp3[: len(mp3) * 3 // 4] + ID3V1,
        lambda mp3: declaring(mp3, 20),
        lambda mp3: as_vbri(mp3)[: len(mp3) * 3 // 4],
    ],
    ids=["cover", "id3v1", "more", "vbri"],
)
def test_mp3_that_are_cut(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    content = write(tmp_path / "a", "libmp3lame", "mp3", 44_100).read_bytes()
    (tmp_path / "a").write_bytes(change(content))
    with pytest.raises(InputError, match="is truncated: its header says"):
        probe_audio(tmp_path / "a")


@pytest.mark.parametrize(("codec", "form"), [("aac", "adts"), ("flac", "flac")])
def test_an_id3_tag_before_another_format(tmp_path: Path, codec: str, form: str) -> None:
    content = write(tmp_path / "a", codec, form).read_bytes()
    for tag in (ID3, COVER, ID3 + COVER):
        (tmp_path / "a").write_bytes(tag + content)
        probe = probe_audio(tmp_path / "a")
        assert (probe.codec, probe.duration_s) == (codec, pytest.approx(4, abs=0.05))


def film(path: Path, form: str, **options: str) -> Path:
    """Four seconds of pictures, and of sound that ends after two."""
    codecs = ("libvpx", "libopus") if form == "webm" else ("libx264", "aac")
    with av.open(str(path), "w", format=form, options=options) as file:
        pictures = file.add_stream(codecs[0], rate=25)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        pictures.codec_context.gop_size = 10
        sound = file.add_stream(codecs[1], rate=48_000, layout="mono")
        random, samples = np.random.default_rng(0), noise(48_000, 2)
        for index in range(100):
            picture = random.integers(0, 255, (48, 64, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            file.mux(pictures.encode(frame))
            block = samples[index * 1920 : (index + 1) * 1920]
            if len(block):
                spoken: Any = av.AudioFrame.from_ndarray(block[None], format="fltp", layout="mono")
                spoken.sample_rate, spoken.pts, spoken.time_base = 48_000, index * 1920, Fraction(1, 48_000)
                file.mux(sound.encode(spoken))
        for stream in (pictures, sound):
            file.mux(stream.encode(None))
    return path


FILMS = {
    "webm": ("webm", {}),
    "matroska": ("matroska", {}),
    "mp4": ("mp4", {"movflags": "faststart"}),
    "mov": ("mov", {"movflags": "faststart"}),
    "fragmented mp4": ("mp4", {"movflags": "frag_keyframe+empty_moov"}),
}


@pytest.mark.parametrize("case", FILMS)
def test_cut_footage_and_its_sound_are_refused(tmp_path: Path, case: str) -> None:
    form, options = FILMS[case]
    content = film(tmp_path / "a", form, **options).read_bytes()
    assert probe_footage(tmp_path / "a").duration_s == 4
    assert probe_audio(tmp_path / "a").duration_s == pytest.approx(2, abs=0.1)
    for share in (0.35, 0.7, 0.93):
        (tmp_path / "b").write_bytes(content[: round(len(content) * share)])
        with pytest.raises(InputError, match="is truncated"):
            probe_footage(tmp_path / "b")
    (tmp_path / "b").write_bytes(content[: len(content) // 4])
    with pytest.raises(InputError, match="is truncated"):
        probe_audio(tmp_path / "b")


def test_live_footage_is_taken_as_it_is(tmp_path: Path) -> None:
    content = film(tmp_path / "a", "webm", live="1").read_bytes()
    (tmp_path / "a").write_bytes(content[: len(content) * 7 // 10])
    assert 2 < probe_footage(tmp_path / "a").duration_s < 3.5


@pytest.mark.parametrize("seconds", [1, 2])
def test_a_trimmed_mp4_is_whole(tmp_path: Path, seconds: int) -> None:
    """Telephones trim by the edit list alone: frames outside it stay in the file."""
    path = film(tmp_path / "a", "mp4", movflags="faststart")
    content = bytearray(path.read_bytes())
    struct.pack_into(">I", content, content.index(b"elst") + 12, 1000 * seconds)
    path.write_bytes(content)
    probe = probe_footage(path)
    assert (probe.num_frames, probe.duration_s) == (25 * seconds, seconds)


def test_a_whole_webm_may_declare_more_than_its_tracks_hold(tmp_path: Path) -> None:
    """A screen that stands still gives no frames: as long as no bytes are missing, nothing was cut."""
    path = film(tmp_path / "a", "webm")
    content = bytearray(path.read_bytes())
    at = content.index(b"\x44\x89\x88") + 3
    struct.pack_into(">d", content, at, 9000.0)
    path.write_bytes(content)
    assert probe_footage(path).duration_s == 4
    path.write_bytes(content[: len(content) * 9 // 10])
    with pytest.raises(InputError, match=r"is truncated: its header says 9\.00 s"):
        probe_footage(path)
