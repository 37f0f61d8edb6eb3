"""What frames of footage show: their shape, which way up, their colours."""

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from numpy.typing import NDArray

from avatar_core.errors import InputError
from avatar_core.media.footage import Footage, FootageLimits, probe_footage
from avatar_core.media.image import ImageLimits
from tests.media.profiles import BT2020_PRIMARIES, in_srgb, srgb_to_linear

Picture = NDArray[np.uint8]
ONE = 1 << 16
# Of a tkhd: a, b, u, c, d, v with x' = a x + c y, y' = b x + d y; and what it makes of a picture.
MATRICES: dict[str, tuple[tuple[int, ...], Any]] = {
    "as it is": ((ONE, 0, 0, 0, ONE, 0), lambda p: p),
    "clockwise": ((0, ONE, 0, -ONE, 0, 0), lambda p: np.rot90(p, -1)),
    "upside down": ((-ONE, 0, 0, 0, -ONE, 0), lambda p: np.rot90(p, 2)),
    "anticlockwise": ((0, -ONE, 0, ONE, 0, 0), lambda p: np.rot90(p)),
    "mirrored": ((-ONE, 0, 0, 0, ONE, 0), np.fliplr),
    "mirrored and upside down": ((ONE, 0, 0, 0, -ONE, 0), np.flipud),
    "transposed": ((0, ONE, 0, ONE, 0, 0), lambda p: p.transpose(1, 0, 2)),
    "transversed": ((0, -ONE, 0, -ONE, 0, 0), lambda p: np.rot90(p.transpose(1, 0, 2), 2)),
}


def corners(width: int = 96, height: int = 64) -> Picture:
    """Another colour in each corner."""
    picture = np.full((height, width, 3), 128, np.uint8)
    across, down = width // 3, height // 3
    picture[:down, :across] = (220, 30, 30)
    picture[:down, -across:] = (30, 220, 30)
    picture[-down:, :across] = (30, 30, 220)
    return picture


def write(
    path: Path,
    frames: list[av.VideoFrame],
    codec: str = "libx264",
    form: str = "mp4",
    aspect: Fraction | None = None,
    **options: str,
) -> Path:
    first = frames[0]
    with av.open(str(path), "w", format=form) as file:
        stream = file.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = first.width, first.height, first.format.name
        stream.options = dict(options)
        if codec.startswith("libx26"):
            stream.options = {"crf": "2", "preset": "ultrafast", **options}
        context = stream.codec_context
        context.colorspace, context.color_range = first.colorspace, first.color_range
        context.color_primaries, context.color_trc = first.color_primaries, first.color_trc
        if aspect:
            context.sample_aspect_ratio = aspect
        for index, frame in enumerate(frames):
            frame.pts, frame.time_base = index, Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def rgb_frame(picture: Picture, form: str = "yuv420p") -> av.VideoFrame:
    """Coded as BT.601, limited range, and tagged by nothing."""
    frame = VideoReformatter().reformat(av.VideoFrame.from_ndarray(picture, format="rgb24"), format=form)
    frame.colorspace, frame.color_range = 2, 0
    return frame


def first_of(path: Path) -> Picture:
    with Footage(path) as footage:
        picture: Picture = footage[0]
        return picture


def expect_near(found: Picture, expected: Picture, mean: float = 6) -> None:
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < mean


@pytest.mark.parametrize("form", ["mp4", "mov"])
@pytest.mark.parametrize("case", MATRICES)
def test_the_whole_matrix_of_a_video_is_obeyed(tmp_path: Path, form: str, case: str) -> None:
    matrix, turn = MATRICES[case]
    path = write(tmp_path / "a", [rgb_frame(corners())], form=form)
    content = bytearray(path.read_bytes())
    struct.pack_into(">6i", content, content.index(b"tkhd") + 44, *matrix)
    path.write_bytes(content)
    expected = turn(corners())
    expect_near(first_of(path), expected)
    probe = probe_footage(path)
    assert (probe.height, probe.width) == expected.shape[:2]


@pytest.mark.parametrize(
    ("size", "aspect", "expected"),
    [
        ((72, 64), Fraction(16, 11), (105, 64)),
        ((96, 64), Fraction(4, 3), (128, 64)),
        ((96, 64), Fraction(8, 9), (96, 72)),
        ((96, 64), Fraction(1, 2), (96, 128)),
        ((96, 64), Fraction(1), (96, 64)),
        ((96, 64), Fraction(1, 1000), (96, 64)),
    ],
)
@pytest.mark.parametrize("form", ["mp4", "mov", "matroska"])
def test_pixels_become_square(
    tmp_path: Path, form: str, size: tuple[int, int], aspect: Fraction, expected: tuple[int, int]
) -> None:
    path = write(tmp_path / "a", [rgb_frame(corners(*size))], form=form, aspect=aspect)
    probe = probe_footage(path)
    assert (probe.width, probe.height) == expected
    expect_near(first_of(path), corners(*expected), mean=9)


def with_display_size(path: Path, width: int, height: int) -> Path:
    """A WebM whose header names another size to be shown at; the tags behind make room for it."""
    content = bytearray(path.read_bytes())
    video, tracks, tags = (
        content.index(b"\xe0\x86\xb0\x81"),
        content.rindex(b"\x16\x54\xae\x6b"),
        content.rindex(b"\x12\x54\xc3\x67"),
    )
    entry = content.index(b"\xae\x01", tracks)
    size = b"\x54\xb0\x82" + struct.pack(">H", width) + b"\x54\xba\x82" + struct.pack(">H", height)
    end = tags + 5 + (content[tags + 4] & 0x7F)
    content[tags:end] = (
        b"\xec" + bytes([0x80 | (end - tags - 2 - len(size))]) + bytes(end - tags - 2 - len(size))
    )
    for length in (video + 1, entry + 8, tracks + 4):
        content[length] += len(size)
    content[video + 8 : video + 8] = size
    path.write_bytes(content)
    return path


def test_pixels_of_a_webm_become_square(tmp_path: Path) -> None:
    path = with_display_size(write(tmp_path / "a", [rgb_frame(corners())], "libvpx-vp9", "webm"), 128, 64)
    probe = probe_footage(path)
    assert (probe.width, probe.height, probe.num_frames) == (128, 64, 1)
    expect_near(first_of(path), corners(128, 64), mean=9)


def test_a_turned_video_of_oblong_pixels(tmp_path: Path) -> None:
    """A matrix is applied to the square pixels."""
    path = write(tmp_path / "a", [rgb_frame(corners())], aspect=Fraction(4, 3))
    content = bytearray(path.read_bytes())
    struct.pack_into(">6i", content, content.index(b"tkhd") + 44, *MATRICES["clockwise"][0])
    path.write_bytes(content)
    assert first_of(path).shape == (128, 64, 3)


def test_limits_are_those_of_the_square_pixels(tmp_path: Path) -> None:
    path = write(tmp_path / "a", [rgb_frame(corners())], aspect=Fraction(4, 1))
    with pytest.raises(InputError, match="has 384x64 pixels, allowed are 20000 in all"):
        probe_footage(path, FootageLimits(ImageLimits(max_pixels=20_000)))


def coded(
    colour: tuple[int, int, int], width: int, height: int, *, matrix: int, full: bool, tag: bool
) -> Any:
    """A plain picture, tagged with what it is coded as, or not."""
    picture = np.full((height, width, 3), colour, np.uint8)
    frame = VideoReformatter().reformat(
        av.VideoFrame.from_ndarray(picture, format="rgb24"),
        format="yuv420p",
        dst_colorspace=matrix,
        dst_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
    )
    code = {Colorspace.ITU709: 1, Colorspace.ITU601: 6, Colorspace.BT2020: 9}[Colorspace(matrix)]
    frame.colorspace, frame.color_range = (code if tag else 2), (2 if full else 1 if tag else 0)
    return frame


SKIN = (200, 120, 90)


@pytest.mark.parametrize(
    ("size", "matrix", "full", "tag"),
    [
        ((1280, 720), Colorspace.ITU709, False, False),
        ((720, 1280), Colorspace.ITU709, False, False),
        ((1280, 534), Colorspace.ITU709, False, False),
        ((720, 576), Colorspace.ITU601, False, False),
        ((640, 480), Colorspace.ITU601, False, False),
        ((1280, 720), Colorspace.ITU601, False, True),
        ((640, 480), Colorspace.ITU709, False, True),
        ((640, 480), Colorspace.ITU709, True, True),
        ((640, 480), Colorspace.BT2020, False, True),
    ],
)
def test_colours_are_as_tagged_or_as_players_take_them(
    tmp_path: Path, size: tuple[int, int], matrix: int, full: bool, tag: bool
) -> None:
    frame = coded(SKIN, *size, matrix=matrix, full=full, tag=tag)
    path = write(tmp_path / "a", [frame])
    np.testing.assert_allclose(first_of(path).mean(axis=(0, 1)), SKIN, atol=3)


def test_ten_bits_are_footage_too(tmp_path: Path) -> None:
    picture = np.full((64, 96, 3), SKIN, np.uint8)
    path = write(tmp_path / "a", [rgb_frame(picture, "yuv420p10le")], "libx264")
    expect_near(first_of(path), picture, mean=3)


def ten_bits(colour: NDArray[np.float64], trc: ColorTrc) -> av.VideoFrame:
    """A plain BT.2020 picture of signal values in 0..1."""
    kr, kb = 0.2627, 0.0593
    y = float(colour @ (kr, 1 - kr - kb, kb))
    planes = (64 + 876 * y, 512 + 448 * (colour[2] - y) / (1 - kb), 512 + 448 * (colour[0] - y) / (1 - kr))
    frame = av.VideoFrame(96, 64, "yuv420p10le")
    for plane, value in zip(frame.planes, planes, strict=True):
        plane.update(np.full(plane.buffer_size // 2, round(value), "<u2").tobytes())
    frame.colorspace, frame.color_range = 9, 1
    frame.color_primaries, frame.color_trc = ColorPrimaries.BT2020, trc
    return frame


def pq(nits: float) -> float:
    power = (nits / 10_000) ** (2610 / 16384)
    return float(((3424 + 77216 * power) / (4096 + 76544 * power)) ** (2523 / 32))


def hlg(light: float) -> float:
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return float(np.sqrt(3 * light) if light <= 1 / 12 else a * np.log(12 * light - b) + c)


@pytest.mark.parametrize(
    ("trc", "signal", "name"),
    [
        (ColorTrc.SMPTE2084, pq, "PQ"),
        (ColorTrc.ARIB_STD_B67, lambda nits: hlg((nits / 1000) ** (1 / 1.2)), "HLG"),
    ],
)
def test_hdr_is_shown_with_its_white_as_white(tmp_path: Path, trc: ColorTrc, signal: Any, name: str) -> None:
    """203 nits are white in HDR; a fifth of it is a middle grey in sRGB."""
    for nits, expected in ((203, 255), (203 * 0.2159, 128), (900, 255), (0.001, 0)):
        grey = np.full(3, signal(nits))
        path = write(tmp_path / "a", [ten_bits(grey, trc)], "libx264")
        np.testing.assert_allclose(first_of(path)[32, 48], [expected] * 3, atol=4)
    assert f"is HDR ({name}): what is brighter than white is cut" in str(probe_footage(path).warning)


def test_wide_colours_without_hdr_become_those_of_bt709(tmp_path: Path) -> None:
    signal = np.array(SKIN) / 255
    path = write(tmp_path / "a", [ten_bits(signal, ColorTrc.BT2020_10)])
    expected = in_srgb(SKIN, BT2020_PRIMARIES, srgb_to_linear)
    np.testing.assert_allclose(first_of(path)[32, 48], expected, atol=3)
    assert np.abs(expected - SKIN).max() > 20
    assert probe_footage(path).warning is None


def test_what_is_transparent_is_put_on_white(tmp_path: Path) -> None:
    pixels = np.full((64, 96, 4), (*SKIN, 255), np.uint8)
    pixels[:, 48:, 3] = 0
    frame = VideoReformatter().reformat(
        av.VideoFrame.from_ndarray(pixels, format="rgba"), format="yuva444p10le"
    )
    path = write(tmp_path / "a.mov", [frame], "prores_ks", "mov", profile="4444")
    found = first_of(path)
    np.testing.assert_allclose(found[32, 8], SKIN, atol=4)
    np.testing.assert_allclose(found[32, 80], (255, 255, 255), atol=2)


def test_frames_that_change_their_size_are_shown_at_the_first_one(tmp_path: Path) -> None:
    """As calls do when the connection grows worse."""
    small = write(tmp_path / "b", [rgb_frame(corners(48, 32))] * 3, "libvpx", "webm")
    with av.open(str(tmp_path / "a"), "w", format="webm") as file, av.open(str(small)) as other:
        large = write(tmp_path / "c", [rgb_frame(corners())] * 3, "libvpx", "webm")
        with av.open(str(large)) as source:
            stream = file.add_stream_from_template(source.streams.video[0])
            for number, packet in enumerate(
                [p for part in (source, other) for p in part.demux(video=0) if p.size]
            ):
                packet.stream, packet.pts, packet.dts = stream, 40 * number, 40 * number
                packet.time_base = Fraction(1, 1000)
                file.mux(packet)
    with Footage(tmp_path / "a") as footage:
        assert [frame.shape for frame in footage] == [(64, 96, 3)] * 6
        expect_near(footage[5], corners(), mean=12)
