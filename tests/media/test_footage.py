"""Footage: which videos are taken, and their frames in any order."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from avatar_core.errors import InputError
from avatar_core.media import footage as module
from avatar_core.media.footage import Footage, FootageLimits, probe_footage
from avatar_core.media.image import ImageLimits

WIDTH, HEIGHT = 96, 64


def numbered(index: int) -> NDArray[np.uint8]:
    """Tells its number by its grey, and up from down and left from right by its corners."""
    picture = np.full((HEIGHT, WIDTH, 3), 30 + 3 * index, np.uint8)
    picture[:16, :16] = (255, 0, 0)
    picture[-16:, -16:] = (0, 0, 255)
    return picture


def number(picture: NDArray[np.uint8]) -> int:
    height, width = picture.shape[:2]
    return round((float(picture[height // 2, width // 2].mean()) - 30) / 3)


def write(
    path: Path,
    num_frames: int = 20,
    fps: int = 25,
    codec: str = "libx264",
    key_every: int = 250,
    form: str = "mp4",
) -> Path:
    with av.open(str(path), "w", format=form) as file:
        stream = file.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size = key_every
        stream.options = {"crf": "4"} if codec == "libx264" else {}
        stream.bit_rate = 4_000_000
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(numbered(index), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("footage") / "talk.mp4", 60, key_every=12)


@pytest.mark.parametrize(
    ("codec", "form", "kind"),
    [
        ("libx264", "mp4", "mp4"),
        ("libx264", "mov", "mov"),
        ("libx265", "mp4", "mp4"),
        ("libvpx-vp9", "webm", "webm"),
        ("libx264", "matroska", "webm"),
        ("mpeg4", "mp4", "mp4"),
    ],
)
def test_probe_and_frames_of_each_kind(tmp_path: Path, codec: str, form: str, kind: str) -> None:
    path = write(tmp_path / "a.bin", 20, codec=codec, form=form)
    probe = probe_footage(path)
    assert (probe.format, probe.width, probe.height, probe.num_frames) == (kind, WIDTH, HEIGHT, 20)
    assert (probe.fps, probe.duration_s) == (25, 0.8)
    with Footage(path) as footage:
        assert [number(picture) for picture in footage] == list(range(20))


@pytest.mark.parametrize(
    "order",
    [
        range(60),
        range(59, -1, -1),
        [30, 5, 59, 0, 31, 29, 12, 11, 13],
        [*range(60), *range(58, -1, -1), *range(1, 60)],
    ],
    ids=["forward", "backward", "anyhow", "to and fro"],
)
@pytest.mark.parametrize("held", [4, 64])
def test_frames_in_any_order(
    talk: Path, order: list[int], held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FRAMES_HELD", held)
    with Footage(talk) as footage:
        assert [number(footage[index]) for index in order] == list(order)


def test_it_is_a_sequence(talk: Path) -> None:
    with Footage(talk) as footage:
        assert len(footage) == 60
        assert number(footage[-1]) == 59
        assert [number(picture) for picture in footage[10:16:2]] == [10, 12, 14]
        with pytest.raises(IndexError):
            footage[60]


def test_every_frame_is_fitted(talk: Path) -> None:
    with Footage(talk, lambda picture: picture[::2, ::2]) as footage:
        assert footage[3].shape == footage[50].shape == (HEIGHT // 2, WIDTH // 2, 3)
        assert footage[3].dtype == np.uint8


def turned(path: Path, clockwise: bool) -> Path:
    """Notes a quarter turn in the header, as phones do."""
    content = path.read_bytes()
    start = content.index(b"tkhd") + 4 + 40  # version 0: the matrix stands behind 40 bytes
    one = 1 << 16
    turn = (0, one, 0, -one, 0, 0) if clockwise else (0, -one, 0, one, 0, 0)
    changed = content[:start] + struct.pack(">6i", *turn) + content[start + 24 :]
    turned_path = path.with_name("turned.mp4")
    turned_path.write_bytes(changed)
    return turned_path


@pytest.mark.parametrize("clockwise", [True, False])
def test_footage_of_a_turned_phone_is_upright(tmp_path: Path, clockwise: bool) -> None:
    path = turned(write(tmp_path / "a.mp4", 3), clockwise)
    probe = probe_footage(path)
    assert (probe.width, probe.height) == (HEIGHT, WIDTH)
    with Footage(path) as footage:
        expected = np.rot90(numbered(0), -1 if clockwise else 1)
        assert np.abs(footage[0].astype(int) - expected).mean() < 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is in the format PNG; allowed: MP4, MOV, WebM"),
        (
            b"#EXTM3U\nfile:///etc/passwd\n",
            "is a playlist (a text that names other media); allowed: MP4, MOV, WebM",
        ),
        (b"RIFF\0\0\0\0AVI LIST", "is in the format AVI; allowed: MP4, MOV, WebM"),
        (b"\0\0\0\x18ftypmp42" + bytes(100), "broken MP4 file"),
    ],
)
def test_what_is_no_video_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(InputError) as caught:
        probe_footage(tmp_path / "a.mp4")
    assert message in str(caught.value)


def test_sound_alone_is_no_footage(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.m4a"), "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=16_000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 16_000
        file.mux(stream.encode(samples))
        file.mux(stream.encode(None))
    with pytest.raises(InputError, match="has no moving pictures"):
        probe_footage(tmp_path / "a.m4a")


def test_limits(talk: Path) -> None:
    with pytest.raises(InputError, match=r"lasts 2\.4 s, allowed are 2 s at most; cut it"):
        probe_footage(talk, FootageLimits(max_duration_s=2))
    with pytest.raises(InputError, match="has 96x64 pixels, allowed are 1000 in all"):
        probe_footage(talk, FootageLimits(ImageLimits(max_pixels=1000)))
    with pytest.raises(InputError, match="each side needs 80 or more"):
        probe_footage(talk, FootageLimits(ImageLimits(min_side=80)))


def test_an_unusual_codec_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", 3, codec="ffv1", form="matroska")
    with pytest.raises(InputError, match="has pictures in the codec ffv1; allowed: h264, hevc"):
        probe_footage(path)


def test_truncated_footage_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", 60)
    options = {"movflags": "faststart"}
    with av.open(str(path)) as source, av.open(str(tmp_path / "b.mp4"), "w", options=options) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    content = (tmp_path / "b.mp4").read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(InputError, match="is truncated: its header says 60 frames"):
        probe_footage(path)
