"""The chunks of a PNG before its pixels: notes, which are left out, and what they say of its colours."""

import struct
import zlib
from collections.abc import Mapping, Sequence

from avatar_core.media.colour import MAX_PROFILE_BYTES, Colours
from avatar_core.media.icc import BT2020, DISPLAY_P3, SRGB, SRGB_CURVE, rgb_profile

_NOTES = (b"tEXt", b"zTXt", b"iTXt")
_COLOURS = (b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM")
_COMMON_GAMMA = 1 / 2.2
"""Written for sRGB, whose curve no single number describes."""
_CODED_PRIMARIES = {b"\1": SRGB, b"\2": SRGB, b"\x09": BT2020, b"\x0c": DISPLAY_P3}
_CODED_CURVES: Mapping[bytes, Sequence[float]] = {
    b"\4": (2.2,),
    b"\x08": (1.0,),
    **dict.fromkeys((b"\1", b"\2", b"\6", b"\x0d", b"\x0e", b"\x0f"), SRGB_CURVE),
}
"""Video's own curve is shown as sRGB's is, and counts as that."""


def read_png(content: bytes) -> tuple[bytes, Colours]:
    """The same picture without texts and colour profile, and its colours. Pillow refuses a whole picture for
    a long compressed note, and image generators write their workflow there."""
    parts, found, start = [content[:8]], dict[bytes, bytes](), 8
    while start + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, start)
        end = start + 12 + length
        if name in _COLOURS and not {b"PLTE", b"IDAT"} & found.keys():
            found.setdefault(name, content[start + 8 : end - 4])
        elif name in (b"PLTE", b"IDAT"):
            found[name] = b""
        if name not in _NOTES and name not in _COLOURS:
            parts.append(content[start:end])
        start = end
    return b"".join(parts), _colours(found)


def _colours(found: Mapping[bytes, bytes]) -> Colours:
    """By the precedence of the third edition of PNG's specification. A code that is not known, an HDR curve
    among them, counts as sRGB with a warning."""
    if b"cICP" in found:
        return _coded(found[b"cICP"])
    if b"iCCP" in found:
        return _embedded(found[b"iCCP"])
    if b"gAMA" in found and b"sRGB" not in found:
        return _measured(found[b"gAMA"], found.get(b"cHRM", b""))
    return Colours()


def _coded(data: bytes) -> Colours:
    primaries, curve = _CODED_PRIMARIES.get(data[:1]), _CODED_CURVES.get(data[1:2])
    if primaries is None or curve is None or data[2:] != b"\0\1":
        return Colours(warning=f"its colours (cICP {', '.join(map(str, data[:4]))}) are taken as sRGB")
    if primaries is SRGB and curve is SRGB_CURVE:
        return Colours()
    return Colours(rgb_profile(primaries, curve))


def _embedded(data: bytes) -> Colours:
    compressed = data.partition(b"\0")[2][1:]
    try:
        inflate = zlib.decompressobj()
        profile = inflate.decompress(compressed, MAX_PROFILE_BYTES + 1)
    except zlib.error as error:
        return Colours(warning=f"its colour profile is broken ({error}) and ignored")
    return Colours(profile)


def _measured(gamma: bytes, chromaticities: bytes) -> Colours:
    value = struct.unpack(">I", gamma)[0] / 100_000 if len(gamma) == 4 else 0
    if not 0.1 <= value <= 10:
        return Colours(warning=f"its gamma of {value:g} is ignored")
    numbers = (
        [n / 100_000 for n in struct.unpack(">8I", chromaticities)] if len(chromaticities) == 32 else SRGB
    )
    curve = SRGB_CURVE if abs(value / _COMMON_GAMMA - 1) < 0.05 else (1 / value,)
    try:
        return Colours(rgb_profile(numbers, curve))
    except ValueError as error:
        return Colours(warning=f"its colours are taken as sRGB: {error}")
