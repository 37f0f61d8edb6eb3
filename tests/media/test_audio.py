import math
import os
import struct
import wave
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from PIL import Image

from avatar_core.errors import InputError
from avatar_core.media.audio import (
    AudioLimits,
    AudioProbe,
    decode_blocks,
    load_mono,
    loudness_db,
    probe_audio,
)
from avatar_core.media.files import sniff

Samples = NDArray[np.float32]
FORMATS = [
    ("mp3", "libmp3lame", "mp3", 44_100),
    ("m4a", "aac", "mp4", 44_100),
    ("aac", "aac", "adts", 44_100),
    ("ogg", "libopus", "ogg", 48_000),
    ("webm", "libopus", "webm", 48_000),
    ("flac", "flac", "flac", 44_100),
    ("mov", "pcm_s16le", "mov", 44_100),
    ("alac.m4a", "alac", "mp4", 44_100),
]


def speech(rate: int, duration_s: float = 2.0, channels: int = 1) -> Samples:
    """Low-passed noise [n, channels] under a slow envelope: correlates sharply, survives lossy codecs."""
    count = round(rate * duration_s)
    white = np.random.default_rng(0).standard_normal((count, channels))
    kernel = np.hanning(max(3, rate // 2000))
    smooth = np.stack([np.convolve(white[:, c], kernel, "same") for c in range(channels)], axis=1)
    envelope = 0.6 + 0.4 * np.sin(np.arange(count) / rate * 7)[:, None]
    return (0.5 * smooth / np.abs(smooth).max() * envelope).astype(np.float32)


def write_wav(path: Path, samples: Samples, rate: int, width: int = 2) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        if width == 1:
            file.writeframes((samples * 127 + 128).astype(np.uint8).tobytes())
        else:
            scaled = np.rint(samples.astype(np.float64) * (2 ** (8 * width - 1) - 1)).astype("<i4")
            file.writeframes(scaled[..., None].view(np.uint8)[..., :width].tobytes())
    return path


def write_float_wav(path: Path, samples: Samples, rate: int) -> Path:
    data = samples.astype("<f4").tobytes()
    channels = samples.shape[1]
    header = struct.pack("<HHIIHH", 3, channels, rate, rate * channels * 4, channels * 4, 32)
    body = b"WAVEfmt " + struct.pack("<I", 16) + header + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return path


def write_media(path: Path, samples: Samples, rate: int, codec: str, container: str) -> Path:
    layout = {1: "mono", 2: "stereo"}[samples.shape[1]]
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        resampler = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate)
        for converted in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(converted))
        file.mux(stream.encode(None))
    return path


def decode(path: Path, rate: int, channels: int = 1, **window: float) -> Samples:
    return np.concatenate(
        [np.zeros((0, channels), np.float32), *decode_blocks(path, rate, channels, **window)]
    )


def lag(reference: Samples, found: Samples) -> int:
    size = 2 * max(len(reference), len(found))
    product = np.fft.rfft(found, size) * np.fft.rfft(reference, size).conj()
    peak = int(np.argmax(np.fft.irfft(product)))
    return peak if peak < size // 2 else peak - size


def refusal(path: Path | str, limits: AudioLimits | None = None) -> str:
    with pytest.raises(InputError) as caught:
        probe_audio(path, limits)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (24_000, 2), (44_100, 6), (192_000, 8)])
def test_pcm(tmp_path: Path, width: int, rate: int, channels: int) -> None:
    samples = speech(rate, 0.5, channels)
    path = write_wav(tmp_path / "a.wav", samples, rate, width)
    codec = {1: "pcm_u8", 2: "pcm_s16le", 3: "pcm_s24le", 4: "pcm_s32le"}[width]
    assert probe_audio(path) == AudioProbe("wav", codec, rate, channels, rate // 2, 0.5)
    if channels <= 2:
        np.testing.assert_allclose(decode(path, rate, channels), samples, atol=2.0 ** (2 - 8 * width) + 1e-6)
        np.testing.assert_allclose(
            load_mono(path, rate), samples.mean(axis=1), atol=2.0 ** (2 - 8 * width) + 1e-6
        )
    for out_channels in (1, 2):
        found = decode(path, 16_000, out_channels)
        assert found.shape == (8_000, out_channels)
        assert np.abs(found).max() <= 1
        assert loudness_db(found) > -60


def test_mono_to_stereo_and_back(tmp_path: Path) -> None:
    samples = speech(16_000, 0.5)
    stereo = decode(write_wav(tmp_path / "a.wav", samples, 16_000), 16_000, 2)
    np.testing.assert_array_equal(stereo[:, 0], stereo[:, 1])
    np.testing.assert_allclose(stereo[:, :1], samples, atol=1e-4)


def test_surround_keeps_the_centre_audible_and_drops_nothing_at_the_sides(tmp_path: Path) -> None:
    """5.1 order: front left, front right, centre, low frequencies, back left, back right."""
    gains = []
    for channel in range(6):
        samples = np.zeros((8_000, 6), np.float32)
        samples[:, channel] = speech(16_000, 0.5)[:, 0]
        found = decode(write_wav(tmp_path / "a.wav", samples, 16_000), 16_000, 2)
        gains.append(np.sqrt((found**2).mean(axis=0) / (samples[:, channel] ** 2).mean()))
    left, right, centre, low, back_left, back_right = np.round(gains, 2)
    assert left[0] > 0.4
    assert left[1] == 0
    assert right.tolist() == left[::-1].tolist()
    assert centre[0] == centre[1] > 0.25
    assert low.tolist() == [0, 0]
    assert back_left[0] > 0.25
    assert back_left[1] == back_right[0] == 0


@pytest.mark.parametrize(("suffix", "codec", "container", "rate"), FORMATS)
@pytest.mark.parametrize("channels", [1, 2])
def test_formats_are_aligned_and_as_long_as_the_original(
    tmp_path: Path, suffix: str, codec: str, container: str, rate: int, channels: int
) -> None:
    samples = speech(rate, 2.0, channels)
    path = write_media(tmp_path / f"a.{suffix}", samples, rate, codec, container)
    probe = probe_audio(path)
    assert (probe.sample_rate, probe.channels) == (rate, channels)
    assert codec in (probe.codec, f"lib{probe.codec}", "libmp3lame")
    padding = {"adts": 3 * 1024, "webm": rate // 500}.get(container, 0)
    assert 0 <= probe.samples - len(samples) <= padding
    mono = load_mono(path, 16_000)
    assert len(mono) == round(probe.samples * 16_000 / rate)
    reference = load_mono(write_wav(tmp_path / "a.wav", samples, rate), 16_000)
    assert abs(lag(reference, mono)) <= (1100 * 16_000 // rate if container == "adts" else 8)


@pytest.mark.parametrize(
    ("padding", "duration_ms", "expected"), [(1024, 2000, 88_200), (2112, 2000, 87_112), (2112, 1000, 44_100)]
)
def test_edit_list_of_an_m4a(tmp_path: Path, padding: int, duration_ms: int, expected: int) -> None:
    """Encoders differ in the padding that the edit list leaves out, and editors cut by it alone."""
    samples = speech(44_100)
    path = write_media(tmp_path / "a.m4a", samples, 44_100, "aac", "mp4")
    content = bytearray(path.read_bytes())
    struct.pack_into(">Ii", content, content.index(b"elst") + 12, duration_ms, padding)
    path.write_bytes(content)
    assert probe_audio(path).samples == expected
    found = load_mono(path, 44_100)
    assert len(found) == expected
    assert abs(lag(samples[:, 0], found) + padding - 1024) <= 8


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3"])
def test_a_window_is_a_part_of_the_whole(tmp_path: Path, name: str) -> None:
    codec = {"a.wav": "pcm_s16le", "a.flac": "flac", "a.mp3": "libmp3lame"}[name]
    path = write_media(tmp_path / name, speech(44_100, 3.0, 2), 44_100, codec, name[2:])
    whole = decode(path, 16_000, 2)
    assert len(whole) == 48_000
    for start_s, duration_s in ((0.0, 0.5), (0.73, 1.111), (2.5, 9.0), (3.0, 1.0), (9.0, 1.0)):
        first = round(start_s * 16_000)
        part = decode(path, 16_000, 2, start_s=start_s, duration_s=duration_s, block_s=0.1)
        np.testing.assert_array_equal(part, whole[first : first + round(duration_s * 16_000)])


def test_blocks_have_the_asked_length(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", speech(44_100, 1.05), 44_100)
    assert [len(block) for block in decode_blocks(path, 10_000, block_s=0.25)] == [
        2500,
        2500,
        2500,
        2500,
        500,
    ]


def test_video_file_with_sound_and_without(tmp_path: Path) -> None:
    for has_sound in (True, False):
        path = tmp_path / f"{has_sound}.mp4"
        with av.open(str(path), "w") as file:
            pictures = file.add_stream("libx264", rate=25)
            pictures.width, pictures.height, pictures.pix_fmt = 64, 64, "yuv420p"
            sound = file.add_stream("aac", rate=44_100, layout="mono") if has_sound else None
            for _ in range(25):
                file.mux(pictures.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))))
            file.mux(pictures.encode(None))
            if sound:
                frame = av.AudioFrame.from_ndarray(speech(44_100, 1.0).T.copy(), format="fltp", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = 44_100, 0, Fraction(1, 44_100)
                file.mux(sound.encode(frame))
                file.mux(sound.encode(None))
    assert probe_audio(tmp_path / "True.mp4").samples == 44_100
    assert "has no sound, or was cut off; give a complete recording" in refusal(tmp_path / "False.mp4")


def test_content_counts_not_the_name(tmp_path: Path) -> None:
    assert probe_audio(write_wav(tmp_path / "a.png", speech(16_000), 16_000)).duration_s == 2.0
    Image.new("RGB", (64, 64)).save(tmp_path / "b.wav", "PNG")
    assert "is in the format PNG; allowed: WAV, FLAC" in refusal(tmp_path / "b.wav")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty (0 bytes)"),
        (b"R", "is a text"),
        (b"\x01", "is of no known format"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hosts\n", "is a playlist (a text that names other media)"),
        (b"\xef\xbb\xbf#EXTM3U\n", "is a playlist"),
        (b"ffconcat version 1.0\nfile a.wav\n", "is a playlist"),
        (b"v=0\no=- 0 0 IN IP4 127.0.0.1\n", "is a playlist"),
        (b"[playlist]\nFile1=http://127.0.0.1/\n", "is a playlist"),
        (b"<html>404 not found</html>", "is an HTML page"),
        (b"<?xml version='1.0'?><MPD/>", "is a text"),
        (b"RIFF", "is a text"),
        (b"RIFF\xff\xff\xff\xffWAVE", "is a broken WAV file"),
        (
            b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0\x80>\0\0\0}\0\0\x02\0\x10\0data\0\0\0\0",
            "holds no samples",
        ),
        (b"fLaC", "is a broken FLAC file"),
        (b"OggS" + bytes(100), "is a broken OGG file"),
        (b"ID3\x04\0\0\0\0\0\0", "is a broken MP3 file"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isomisom", "is a broken MP4 file"),
        (b"\x1aE\xdf\xa3" + bytes(100), "is a broken WEBM file"),
        (b"\xff\xfb\x90\x00" + bytes(20), "is a broken MP3 file"),
    ],
)
def test_refused_content(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    assert message in refusal(path)
    with pytest.raises(InputError):
        load_mono(path, 16_000)


def test_special_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    assert "is a pipe" in refusal(tmp_path / "pipe.wav")
    assert "is a folder" in refusal(tmp_path)
    assert "is a device" in refusal("/dev/zero")
    for name in ("absent.wav", "concat:a.wav|b.wav", "http://127.0.0.1:9/a.wav", "a\0.wav", "x" * 300):
        assert "cannot be opened" in refusal(name)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0])
def test_header_of_a_streamed_wav_says_nothing(tmp_path: Path, size: int) -> None:
    path = write_wav(tmp_path / "a.wav", speech(16_000), 16_000)
    content = path.read_bytes()
    path.write_bytes(content[:40] + struct.pack("<I", size) + content[44:])
    assert probe_audio(path).samples == 32_000


def test_wav_shorter_than_its_header(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", speech(16_000, 3.0), 16_000)
    path.write_bytes(path.read_bytes()[: 44 + 2 * 16_000 * 2 + 1])
    message = "is truncated: its header says 3.00 s, 2.00 s could be decoded; copy it again"
    assert refusal(path) == message
    with pytest.raises(InputError, match=r"header says 3\.00 s"):
        load_mono(path, 16_000)


def test_wav_with_an_odd_chunk_before_its_data(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", speech(16_000), 16_000)
    content = path.read_bytes()
    path.write_bytes(content[:36] + b"LIST" + struct.pack("<I", 5) + b"INFO!\0" + content[36:])
    assert probe_audio(path).samples == 32_000
    path.write_bytes(path.read_bytes()[:-16_000])
    assert refusal(path).startswith("is truncated: its header says 2.00 s, 1.50 s")


@pytest.mark.parametrize(("suffix", "codec", "container", "rate"), FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_cut_files_are_refused_or_shorter(
    tmp_path: Path, suffix: str, codec: str, container: str, rate: int, share: float
) -> None:
    path = write_media(tmp_path / f"a.{suffix}", speech(rate), rate, codec, container)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    if container in ("flac", "mp4", "mov"):
        assert any(word in refusal(path) for word in ("is truncated", "is a broken", "was cut off"))
    else:
        with suppress(InputError):
            assert len(load_mono(path, 16_000)) < 2.1 * 16_000 * share + 3_000


@pytest.mark.parametrize(
    ("suffix", "codec", "container", "rate"), [f for f in FORMATS if f[2] in ("flac", "mp3")]
)
def test_damage_in_the_middle(tmp_path: Path, suffix: str, codec: str, container: str, rate: int) -> None:
    path = write_media(tmp_path / f"a.{suffix}", speech(rate), rate, codec, container)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = np.random.default_rng(1).bytes(3000)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"is broken just before|is truncated"):
        load_mono(path, 16_000)


@pytest.mark.parametrize(
    ("suffix", "codec", "container", "rate"), [("wav", "pcm_s16le", "wav", 44_100), *FORMATS]
)
def test_damaged_bytes_never_raise_anything_else(
    tmp_path: Path, suffix: str, codec: str, container: str, rate: int
) -> None:
    path = write_media(tmp_path / f"a.{suffix}", speech(rate, 0.3), rate, codec, container)
    content = path.read_bytes()
    random = np.random.default_rng(2)
    for attempt in range(30):
        damaged = bytearray(content)
        for position in random.integers(0, len(content) if attempt % 2 else 200, 6):
            damaged[position] = random.integers(256)
        path.write_bytes(damaged)
        with suppress(InputError):
            assert np.isfinite(load_mono(path, 16_000)).all()


def test_tags_after_the_last_frame_of_an_mp3(tmp_path: Path) -> None:
    path = write_media(tmp_path / "a.mp3", speech(44_100), 44_100, "libmp3lame", "mp3")
    length = len(load_mono(path, 16_000))
    with path.open("ab") as file:
        file.write(b"APETAGEX" + bytes(24) + b"Title\0song" * 20 + b"TAG" + bytes(125))
    assert abs(len(load_mono(path, 16_000)) - length) < 1_600


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_float_wav_with_numbers_that_are_none(tmp_path: Path, value: float) -> None:
    samples = speech(16_000)
    np.testing.assert_allclose(decode(write_float_wav(tmp_path / "a.wav", samples, 16_000), 16_000), samples)
    samples[20_000] = value
    with pytest.raises(InputError, match="holds NaN or infinite samples"):
        load_mono(write_float_wav(tmp_path / "a.wav", samples, 16_000), 22_050)


def test_float_wav_above_full_scale_is_left_so(tmp_path: Path) -> None:
    path = write_float_wav(tmp_path / "a.wav", np.full((16_000, 1), 2.5, np.float32), 16_000)
    np.testing.assert_array_equal(load_mono(path, 16_000), 2.5)


@pytest.mark.parametrize(
    ("rate", "channels", "message"),
    [
        (4_000, 1, "has 4000 samples a second, allowed are 8000 to 192000"),
        (384_000, 1, "has 384000 samples a second"),
        (16_000, 9, "has 9 channels, allowed are 1 to 8"),
    ],
)
def test_unusual_rates_and_channels(tmp_path: Path, rate: int, channels: int, message: str) -> None:
    assert message in refusal(write_wav(tmp_path / "a.wav", np.zeros((1000, channels), np.float32), rate))


def test_other_codecs_are_refused(tmp_path: Path) -> None:
    path = write_media(tmp_path / "a.mov", speech(48_000), 48_000, "ac3", "mov")
    assert "has sound in the codec ac3; allowed: PCM, flac" in refusal(path)


def test_limits(tmp_path: Path) -> None:
    one = write_wav(tmp_path / "one.wav", np.ones((1, 1), np.float32), 16_000)
    assert probe_audio(one).samples == 1
    assert len(load_mono(one, 48_000)) == 3
    assert refusal(one, AudioLimits()) == "lasts 0.000 s, allowed are 0.1 s or more"
    path = write_wav(tmp_path / "a.wav", speech(16_000), 16_000)
    assert "lasts 2.0 s, allowed are 1.5 s at most; cut it" in refusal(path, AudioLimits(max_duration_s=1.5))


def test_loudness(tmp_path: Path) -> None:
    sine = np.sin(np.arange(16_000) / 10).astype(np.float32)
    assert loudness_db(sine) == pytest.approx(-3.01, abs=0.01)
    assert loudness_db(sine / 10) == pytest.approx(-23.01, abs=0.01)
    silence = load_mono(write_wav(tmp_path / "a.wav", np.zeros((16_000, 1), np.float32), 16_000), 16_000)
    assert loudness_db(silence) == -math.inf
    assert loudness_db(silence) < -60
    assert loudness_db(np.zeros(0, np.float32)) < -60
    assert loudness_db(sine / 10) > -60


def test_sniff(tmp_path: Path) -> None:
    names = {
        "mp3": "mp3",
        "m4a": "mp4",
        "aac": "aac",
        "ogg": "ogg",
        "webm": "webm",
        "flac": "flac",
        "mov": "mov",
    }
    for suffix, codec, container, rate in FORMATS[:7]:
        path = write_media(tmp_path / "media", speech(rate, 0.2), rate, codec, container)
        assert sniff(path) == names[suffix]


@pytest.mark.parametrize(("samples", "rate"), [(8_000, 8_000), (54_150, 16_000), (30_001, 44_100)])
def test_vorbis_is_counted_to_the_sample_where_its_block_size_changes(tmp_path, samples, rate):
    sound = np.sin(np.arange(samples) ** 1.2 / 50).astype(np.float32) * 0.3
    sound[samples // 3 : samples // 2] = 0  # silence and clicks make the encoder change its block size
    soundfile.write(tmp_path / "a.ogg", sound, rate, format="OGG", subtype="VORBIS")

    assert probe_audio(tmp_path / "a.ogg").samples == samples
    expected, _ = soundfile.read(tmp_path / "a.ogg", dtype="float32")
    # FFmpeg's decoder may leave out a last short block, which is then silence.
    np.testing.assert_allclose(load_mono(tmp_path / "a.ogg", rate)[:-1024], expected[:-1024], atol=1e-4)
