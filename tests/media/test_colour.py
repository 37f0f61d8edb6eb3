"""Colours of pictures: every kind of profile, and what PNG says in place of one."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from avatar_core.media.image import load_image, probe_image
from tests.media import profiles
from tests.media.profiles import (
    ADOBE_GAMMA,
    ADOBE_PRIMARIES,
    BT2020_PRIMARIES,
    P3_PRIMARIES,
    SRGB_PRIMARIES,
    cmyk_profile,
    curve_tag,
    gamma_tag,
    grey_profile,
    in_srgb,
    lab_in_srgb,
    rgb_profile,
    srgb_to_linear,
)

SKIN = (200, 120, 90)
DISPLAY_P3 = rgb_profile(P3_PRIMARIES, curve_tag(srgb_to_linear))
ADOBE_RGB = rgb_profile(ADOBE_PRIMARIES, gamma_tag(ADOBE_GAMMA))
LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "WEBP": {"lossless": True},
    "JPEG": {"quality": 100, "subsampling": 0},
}


def write(path: Path, picture: Image.Image, kind: str = "PNG", **options: Any) -> Path:
    picture.save(path, kind, **LOSSLESS[kind], **options)
    return path


def plain(colour: Any, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (64, 48), colour)


def colour_of(path: Path) -> list[int]:
    pixels = load_image(path)
    assert (pixels == pixels[0, 0]).all()
    return [int(value) for value in pixels[0, 0]]


def with_chunks(path: Path, picture: Image.Image, *chunks: tuple[bytes, bytes]) -> Path:
    """A PNG with chunks before its pixels, whatever Pillow writes of itself."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    content = buffer.getvalue()
    extra = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    path.write_bytes(content[:33] + extra + content[33:])
    return path


def power(gamma: float) -> Any:
    return lambda value: value**gamma


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("colour", [SKIN, (255, 255, 255), (0, 0, 0), (128, 128, 128), (40, 200, 60)])
def test_a_display_p3_picture_is_shown_in_srgb(tmp_path: Path, kind: str, colour: tuple[int, ...]) -> None:
    path = write(tmp_path / "a", plain(colour), kind, icc_profile=DISPLAY_P3)
    np.testing.assert_allclose(colour_of(path), in_srgb(colour, P3_PRIMARIES, srgb_to_linear), atol=2)
    assert probe_image(path).warning is None


@pytest.mark.parametrize("colour", [SKIN, (255, 255, 255), (20, 20, 20), (90, 140, 90)])
def test_an_adobe_rgb_picture_is_shown_in_srgb(tmp_path: Path, colour: tuple[int, ...]) -> None:
    path = write(tmp_path / "a", plain(colour), "JPEG", icc_profile=ADOBE_RGB)
    np.testing.assert_allclose(colour_of(path), in_srgb(colour, ADOBE_PRIMARIES, power(ADOBE_GAMMA)), atol=2)


def test_conversion_keeps_transparency_and_turns_the_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = plain((*SKIN, 128), "RGBA")
    picture.paste((*SKIN, 255), (0, 0, 32, 48))
    path = write(tmp_path / "a", picture, icc_profile=DISPLAY_P3, exif=exif)
    pixels, expected = load_image(path), in_srgb(SKIN, P3_PRIMARIES, srgb_to_linear)
    assert pixels.shape == (64, 48, 3)
    np.testing.assert_allclose(pixels[0, 0], expected, atol=2)
    np.testing.assert_allclose(pixels[-1, 0], (expected * 128 + 255 * 127) / 255, atol=2)


def test_a_palette_has_a_profile_too(tmp_path: Path) -> None:
    palette = Image.new("P", (64, 48))
    palette.putpalette([*SKIN, 0, 0, 255])
    expected = in_srgb(SKIN, P3_PRIMARIES, srgb_to_linear)
    path = write(tmp_path / "a", palette, icc_profile=DISPLAY_P3)
    np.testing.assert_allclose(colour_of(path), expected, atol=2)
    palette.paste(1, (0, 0, 32, 48))
    pixels = load_image(write(tmp_path / "b", palette, icc_profile=DISPLAY_P3, transparency=1))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    np.testing.assert_allclose(pixels[0, 40], expected, atol=2)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_profiles(tmp_path: Path, mode: str) -> None:
    expected = 255 * profiles.linear_to_srgb((100 / 255) ** 1.8)
    value = {"L": 100, "LA": (100, 255), "I;16": 100 * 257}[mode]
    path = write(tmp_path / "a", plain(value, mode), icc_profile=grey_profile(1.8))
    np.testing.assert_allclose(colour_of(path), [expected] * 3, atol=1)
    assert abs(expected - 100) > 15


def test_a_grey_picture_may_have_a_profile_of_colours(tmp_path: Path) -> None:
    path = write(tmp_path / "a", plain(30, "L"), "JPEG", icc_profile=ADOBE_RGB)
    expected = in_srgb((30, 30, 30), ADOBE_PRIMARIES, power(ADOBE_GAMMA))
    np.testing.assert_allclose(colour_of(path), expected, atol=1)
    assert abs(expected[0] - 30) > 3


def test_16_bit_colours_have_a_profile_too(tmp_path: Path) -> None:
    rows = (b"\0" + struct.pack(">3H", *(value * 257 for value in SKIN)) * 64) * 48
    header = struct.pack(">IIBBBBB", 64, 48, 16, 2, 0, 0, 0)
    compressed = b"a\0\0" + zlib.compress(DISPLAY_P3)
    chunks = ((b"IHDR", header), (b"iCCP", compressed), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    (tmp_path / "a").write_bytes(content)
    np.testing.assert_allclose(colour_of(tmp_path / "a"), in_srgb(SKIN, P3_PRIMARIES, srgb_to_linear), atol=2)


def printed(c: float, m: float, y: float, k: float) -> tuple[float, float, float]:
    """No ink is paper, magenta on yellow a dull red; black ink covers all."""
    if k:
        return (0.0, 0.0, 0.0)
    return (92 - 30 * c - 35 * m - 8 * y, 55 * m - 30 * c, 45 * y - 35 * c)


def test_a_cmyk_picture_is_shown_as_its_profile_prints_it(tmp_path: Path) -> None:
    cmyk = cmyk_profile(printed)
    red = write(tmp_path / "red", plain((0, 255, 255, 0), "CMYK"), "JPEG", icc_profile=cmyk)
    np.testing.assert_allclose(colour_of(red), lab_in_srgb(*printed(0, 1, 1, 0)), atol=6)
    assert np.abs(np.array(colour_of(red)) - (255, 0, 0)).max() > 60
    black = write(tmp_path / "black", plain((0, 0, 0, 255), "CMYK"), "JPEG", icc_profile=cmyk)
    paper = write(tmp_path / "paper", plain((0, 0, 0, 0), "CMYK"), "JPEG", icc_profile=cmyk)
    assert max(colour_of(black)) < 5
    assert min(colour_of(paper)) > 200


def every_colour() -> Image.Image:
    levels = np.arange(0, 256, 5, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1)
    return Image.fromarray(grid.reshape(-1, 52, 3)[: 52 * 52])


@pytest.mark.parametrize(
    "profile",
    [
        rgb_profile(SRGB_PRIMARIES, curve_tag(srgb_to_linear)),
        rgb_profile(SRGB_PRIMARIES, curve_tag(srgb_to_linear, 4096)),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    ],
    ids=["1024 entries", "4096 entries", "parametric"],
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_pixels_with_an_srgb_profile_stay_exactly_as_they_are(
    tmp_path: Path, profile: bytes, mode: str
) -> None:
    picture = every_colour().convert(mode)
    path = write(tmp_path / "a", picture, icc_profile=profile)
    np.testing.assert_array_equal(load_image(path), np.asarray(picture.convert("RGB")))
    assert probe_image(path).warning is None


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize(
    ("profile", "reason"),
    [
        (b"not a profile" * 100, "cannot open profile"),
        (DISPLAY_P3[:200], "profile"),
        (grey_profile(1.8), "it is one of GRAY pictures, this one is RGB"),
        (cmyk_profile(printed), "it is one of CMYK pictures, this one is RGB"),
        (DISPLAY_P3 + bytes(5 << 20), "allowed are 4194304 bytes"),
    ],
    ids=["garbage", "cut", "grey", "cmyk", "huge"],
)
def test_a_profile_that_does_not_fit_is_ignored_with_a_warning(
    tmp_path: Path, kind: str, profile: bytes, reason: str
) -> None:
    path = write(tmp_path / "a", plain(SKIN), kind, icc_profile=profile)
    np.testing.assert_allclose(colour_of(path), SKIN, atol=2)
    warning = probe_image(path).warning
    assert warning is not None
    assert warning.startswith("its colour profile is ignored: ")
    assert reason in warning


def test_a_broken_compressed_profile_is_ignored_with_a_warning(tmp_path: Path) -> None:
    path = with_chunks(tmp_path / "a", plain(SKIN), (b"iCCP", b"a\0\0no zlib"))
    assert colour_of(path) == list(SKIN)
    assert "its colour profile is broken" in str(probe_image(path).warning)


def test_a_bomb_in_a_profile_is_not_inflated(tmp_path: Path) -> None:
    bomb = zlib.compress(bytes(200 << 20))
    path = with_chunks(tmp_path / "a", plain(SKIN), (b"iCCP", b"a\0\0" + bomb))
    assert colour_of(path) == list(SKIN)
    assert "allowed are 4194304 bytes" in str(probe_image(path).warning)


def gama(gamma: float) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", round(100_000 / gamma))


def chrm(*values: float) -> tuple[bytes, bytes]:
    return b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in (0.3127, 0.3290, *values)))


CICP = {name: (b"cICP", bytes(codes)) for name, codes in {
    "srgb": (1, 13, 0, 1), "video": (1, 1, 0, 1), "p3": (12, 13, 0, 1), "bt2020": (9, 13, 0, 1),
    "linear": (1, 8, 0, 1), "pq": (9, 16, 0, 1), "hlg": (9, 18, 0, 1), "limited": (1, 13, 0, 0),
}.items()}  # fmt: skip
ICCP = (b"iCCP", b"a\0\0" + zlib.compress(DISPLAY_P3))
IN_P3 = in_srgb(SKIN, P3_PRIMARIES, srgb_to_linear)


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ((gama(2.2),), SKIN),
        ((gama(2.2), chrm(*SRGB_PRIMARIES)), SKIN),
        ((chrm(*P3_PRIMARIES),), SKIN),
        ((gama(1.8),), in_srgb(SKIN, SRGB_PRIMARIES, power(1.8))),
        ((gama(1.0),), in_srgb(SKIN, SRGB_PRIMARIES, power(1.0))),
        ((gama(2.2), chrm(*P3_PRIMARIES)), IN_P3),
        ((gama(1.8), chrm(*ADOBE_PRIMARIES)), in_srgb(SKIN, ADOBE_PRIMARIES, power(1.8))),
        (((b"sRGB", b"\0"), gama(1.0)), SKIN),
        ((ICCP, gama(1.0)), IN_P3),
        ((CICP["p3"],), IN_P3),
        ((CICP["p3"], (b"sRGB", b"\0")), IN_P3),
        ((CICP["srgb"], ICCP), SKIN),
        ((CICP["video"],), SKIN),
        ((CICP["bt2020"],), in_srgb(SKIN, BT2020_PRIMARIES, srgb_to_linear)),
        ((CICP["linear"],), in_srgb(SKIN, SRGB_PRIMARIES, power(1.0))),
    ],
)
def test_what_a_png_says_of_its_colours(
    tmp_path: Path, chunks: tuple[tuple[bytes, bytes], ...], expected: Any
) -> None:
    path = with_chunks(tmp_path / "a", plain(SKIN), *chunks)
    np.testing.assert_allclose(colour_of(path), expected, atol=0 if expected is SKIN else 2)
    assert probe_image(path).warning is None


@pytest.mark.parametrize(
    ("chunk", "warning"),
    [
        (CICP["pq"], "its colours (cICP 9, 16, 0, 1) are taken as sRGB"),
        (CICP["hlg"], "its colours (cICP 9, 18, 0, 1) are taken as sRGB"),
        (CICP["limited"], "its colours (cICP 1, 13, 0, 0) are taken as sRGB"),
        ((b"cICP", b"\1"), "its colours (cICP 1) are taken as sRGB"),
        ((b"gAMA", bytes(4)), "its gamma of 0 is ignored"),
        ((b"gAMA", b"\1"), "its gamma of 0 is ignored"),
    ],
)
def test_colours_that_are_not_obeyed_are_warned_of(
    tmp_path: Path, chunk: tuple[bytes, bytes], warning: str
) -> None:
    path = with_chunks(tmp_path / "a", plain(SKIN), chunk)
    assert colour_of(path) == list(SKIN)
    assert probe_image(path).warning == warning


def test_impossible_chromaticities_are_warned_of(tmp_path: Path) -> None:
    path = with_chunks(tmp_path / "a", plain(SKIN), gama(2.2), chrm(0.3, 0.3, 0.3, 0.3, 0.3, 0.3))
    assert colour_of(path) == list(SKIN)
    assert "span no gamut" in str(probe_image(path).warning)
