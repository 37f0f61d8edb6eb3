import io
import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from avatar_core.errors import InputError
from avatar_core.media.image import ImageLimits, check_size, fit, fit_size, load_image, probe_image

WIDTH, HEIGHT = 64, 48
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def picture() -> Image.Image:
    """Left half red, right half blue, a green top left corner."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, : WIDTH // 2] = RED
    pixels[:, WIDTH // 2 :] = BLUE
    pixels[:8, :8] = (0, 255, 0)
    return Image.fromarray(pixels)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def write(tmp_path: Path, content: bytes, name: str = "a.png") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def noise(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(extra)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("kind", "lossless"), [("PNG", True), ("JPEG", False), ("WEBP", False)])
def test_format_is_told_by_content(tmp_path: Path, picture: Image.Image, kind: str, lossless: bool) -> None:
    path = write(tmp_path, encoded(picture, kind), "picture.wav")
    probe = probe_image(path)
    assert (probe.format, probe.width, probe.height, probe.mode, probe.frames) == (
        kind.lower(),
        64,
        48,
        "RGB",
        1,
    )
    pixels = load_image(path)
    assert (pixels.shape, pixels.dtype) == ((HEIGHT, WIDTH, 3), np.uint8)
    np.testing.assert_allclose(pixels[40, 4], RED, atol=0 if lossless else 8)
    np.testing.assert_allclose(pixels[40, 60], BLUE, atol=0 if lossless else 8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path: Path, picture: Image.Image, kind: str, orientation: int) -> None:
    """The stored pixels are those of a camera held so that `orientation` makes them upright."""
    inverse = {
        1: lambda p: p,
        2: np.fliplr,
        3: lambda p: np.rot90(p, 2),
        4: np.flipud,
        5: lambda p: np.transpose(p, (1, 0, 2)),
        6: lambda p: np.rot90(p, 1),
        7: lambda p: np.rot90(np.transpose(p, (1, 0, 2)), 2),
        8: lambda p: np.rot90(p, -1),
    }[orientation]
    stored = Image.fromarray(np.ascontiguousarray(inverse(np.asarray(picture))))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = (
        {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    )
    path = write(tmp_path, encoded(stored, kind, exif=exif, **options))
    assert (probe_image(path).width, probe_image(path).height) == (WIDTH, HEIGHT)
    np.testing.assert_allclose(load_image(path), np.asarray(picture), atol=40 if kind == "JPEG" else 0)


def test_transparency_is_over_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (WIDTH, HEIGHT), (255, 0, 0, 128))
    for kind in ("PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        np.testing.assert_allclose(
            load_image(write(tmp_path, encoded(rgba, kind, **options)))[0, 0], (255, 127, 127), atol=1
        )
    grey = Image.new("LA", (WIDTH, HEIGHT), (0, 0))
    assert load_image(write(tmp_path, encoded(grey, "PNG"))).min() == 255


def test_palette_with_transparency(tmp_path: Path) -> None:
    palette = Image.new("P", (WIDTH, HEIGHT))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.paste(1, (0, 0, 32, HEIGHT))
    pixels = load_image(write(tmp_path, encoded(palette, "PNG", transparency=0)))
    assert pixels[0, 0].tolist() == list(BLUE)
    assert pixels[0, 40].tolist() == [255, 255, 255]


def test_colour_key_transparency(tmp_path: Path, picture: Image.Image) -> None:
    pixels = load_image(write(tmp_path, encoded(picture, "PNG", transparency=BLUE)))
    assert pixels[40, 60].tolist() == [255, 255, 255]
    assert pixels[40, 4].tolist() == list(RED)


@pytest.mark.parametrize(
    ("mode", "value", "expected"), [("1", 1, 255), ("L", 77, 77), ("CMYK", (0, 255, 255, 0), None)]
)
def test_other_modes(tmp_path: Path, mode: str, value: Any, expected: int | None) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    pixels = load_image(write(tmp_path, encoded(Image.new(mode, (WIDTH, HEIGHT), value), kind)))
    np.testing.assert_allclose(pixels[5, 5], RED if expected is None else [expected] * 3, atol=3)


def test_16_bit_grey_is_scaled(tmp_path: Path) -> None:
    grey = np.full((HEIGHT, WIDTH), 0xC000, np.uint16)
    grey[0, 0], grey[0, 1] = 65535, 255
    pixels = load_image(write(tmp_path, encoded(Image.fromarray(grey), "PNG")))
    assert (pixels[5, 5].tolist(), pixels[0, 0, 0], pixels[0, 1, 0]) == ([191, 191, 191], 255, 1)


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (6, 4), (4, 2), (0, 1)])
def test_16_bit_png_of_every_kind(tmp_path: Path, colour: int, channels: int) -> None:
    values = np.full((HEIGHT, WIDTH, channels), 0x8040, ">u2")
    if channels in (2, 4):
        values[..., -1] = 0xFFFF
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    np.testing.assert_allclose(load_image(write(tmp_path, png(WIDTH, HEIGHT, 16, colour, rows))), 128, atol=1)


def test_first_frame_of_an_animation(tmp_path: Path, picture: Image.Image) -> None:
    for kind in ("WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        path = write(
            tmp_path, encoded(picture, kind, save_all=True, append_images=[noise(), noise()], **options)
        )
        assert probe_image(path).frames >= 2
        np.testing.assert_array_equal(load_image(path), np.asarray(picture))


def test_long_notes_and_broken_profile_do_not_matter(tmp_path: Path, picture: Image.Image) -> None:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("workflow", "x" * 5_000_000, zip=True)
    notes.add_itxt("prompt", "y" * 5_000_000, zip=True)
    path = write(tmp_path, encoded(picture, "PNG", pnginfo=notes, icc_profile=b"z" * 5_000_000))
    np.testing.assert_array_equal(load_image(path), np.asarray(picture))
    for kind in ("JPEG", "WEBP"):
        path = write(
            tmp_path, encoded(picture, kind, icc_profile=b"not a profile" * 1000, exif=b"Exif\0\0broken")
        )
        assert load_image(path).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty (0 bytes)"),
        (b"\x89", "is of no known format; allowed: PNG, JPEG, WebP"),
        (b"just a text", "is a text; allowed: PNG, JPEG, WebP"),
        (b"<!DOCTYPE html><html>404</html>", "is an HTML page"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "is in the format SVG"),
        (b"%PDF-1.7\n", "is in the format PDF"),
        (b"#EXTM3U\nhttp://127.0.0.1/a.ts\n", "is a playlist"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "is in the format WAV"),
        (b"\0\0\0\x20ftypavif", "is in the format AVIF"),
        (b"\0\0\0\x20ftypheic", "is in the format HEIC"),
        (b"\x89PNG\r\n\x1a\n", "is a broken PNG picture"),
        (b"\xff\xd8\xff\xe0", "is a broken JPEG picture"),
        (b"RIFF\xff\xff\xff\xffWEBPVP8 ", "is a broken WEBP picture"),
        (png(40, 40, 8, 2, b"\0"), "is a broken PNG picture"),
        (png(40, 40, 8, 2, b"\0" * 200, chunk(b"PLTE", b"xx")), "is a broken PNG picture"),
        (png(40, 40, 3, 9, b"\0" * 200), "is a broken PNG picture"),
        (png(2**31 - 1, 2**31 - 1, 8, 2, b"\0"), "has too many pixels"),
        (
            png(12000, 12000, 1, 0, b"\0" * (1501 * 12000)),
            "has 12000x12000 pixels, allowed are 50000000 in all",
        ),
        (png(0, 10, 8, 2, b"\0"), "is a broken PNG picture"),
        (png(1, 1, 8, 0, b"\0\0"), "has 1x1 pixels, each side needs 32 or more"),
    ],
)
def test_refused_content(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_image(write(tmp_path, content))
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "ICO", "TGA", "PPM", "ICNS", "JPEG2000", "PDF"])
def test_refused_formats(tmp_path: Path, kind: str) -> None:
    with pytest.raises(InputError, match="allowed: PNG, JPEG, WebP"):
        load_image(write(tmp_path, encoded(noise(), kind)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_truncated(tmp_path: Path, kind: str, share: float) -> None:
    content = encoded(noise(), kind)
    with pytest.raises(InputError, match=f"is a broken {kind} picture|is of no known format"):
        load_image(write(tmp_path, content[: int(len(content) * share)]))
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_bytes_never_raise_anything_else(tmp_path: Path, kind: str) -> None:
    content = encoded(noise(), kind)
    random = np.random.default_rng(1)
    for attempt in range(60):
        damaged = bytearray(content)
        for position in random.integers(0, len(content) if attempt % 2 else 100, 5):
            damaged[position] = random.integers(256)
        with suppress(InputError):
            assert load_image(write(tmp_path, bytes(damaged))).dtype == np.uint8


def test_special_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path, message in (
        (tmp_path / "pipe.png", "is a pipe"),
        (tmp_path, "is a folder"),
        ("/dev/zero", "a device"),
    ):
        with pytest.raises(InputError, match=message):
            probe_image(path)
    with pytest.raises(InputError, match="cannot be opened"):
        probe_image(tmp_path / "absent.png")


def test_limits(tmp_path: Path, picture: Image.Image) -> None:
    path = write(tmp_path, encoded(picture, "PNG"))
    with pytest.raises(InputError, match="has 64x48 pixels, allowed are 1000 in all"):
        load_image(path, ImageLimits(max_pixels=1000))
    with pytest.raises(InputError, match="each side needs 50 or more"):
        load_image(path, ImageLimits(min_side=50))
    check_size(64, 48, ImageLimits(max_pixels=64 * 48, min_side=48))


@pytest.mark.parametrize(
    ("size", "max_side", "expected"),
    [
        ((64, 48), 512, (64, 48)),
        ((65, 49), 512, (64, 48)),
        ((2146, 1324), 512, (512, 316)),
        ((1432, 1432), 513, (512, 512)),
        ((5000, 32), 512, (512, 2)),
        ((32, 5000), 512, (2, 512)),
    ],
)
def test_fit(size: tuple[int, int], max_side: int, expected: tuple[int, int]) -> None:
    assert fit_size(*size, max_side) == expected
    pixels = np.full((size[1], size[0], 3), 9, np.uint8)
    fitted = fit(pixels, max_side)
    assert (fitted.shape, fitted.dtype, int(fitted.min())) == ((expected[1], expected[0], 3), np.uint8, 9)


def test_fit_cuts_right_and_bottom() -> None:
    pixels = np.asarray(noise(65, 49))
    np.testing.assert_array_equal(fit(pixels, 512), pixels[:48, :64])
