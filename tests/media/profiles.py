"""ICC profiles written by hand, version 2, and what their colours are in sRGB."""

import struct
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

D50, D65 = np.array([0.9642, 1.0, 0.8249]), (0.3127, 0.3290)
SRGB_PRIMARIES = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
P3_PRIMARIES = (0.680, 0.320, 0.265, 0.690, 0.150, 0.060)
ADOBE_PRIMARIES = (0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
BT2020_PRIMARIES = (0.708, 0.292, 0.170, 0.797, 0.131, 0.046)
ADOBE_GAMMA = 563 / 256


def srgb_to_linear(value: Any) -> Array:
    value = np.asarray(value, float)
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(value: Any) -> Array:
    value = np.clip(value, 0, 1)
    return np.where(value <= 0.0031308, value * 12.92, 1.055 * value ** (1 / 2.4) - 0.055)


def to_xyz(primaries: Sequence[float]) -> Array:
    """[3, 3] of a D65 display; white is not adapted."""
    pairs = np.array([*D65, *primaries]).reshape(4, 2)
    white, *columns = [np.array([x / y, 1, (1 - x - y) / y]) for x, y in pairs]
    matrix = np.stack(columns, axis=1)
    return np.asarray(matrix * np.linalg.solve(matrix, white))


def in_srgb(colour: Sequence[int], primaries: Sequence[float], linear: Callable[[Array], Array]) -> Array:
    """A display's colour of 0..255 as sRGB, 0..255; what lies outside is cut."""
    light = linear(np.array(colour) / 255)
    return 255 * linear_to_srgb(np.linalg.solve(to_xyz(SRGB_PRIMARIES), to_xyz(primaries) @ light))


def adapted(primaries: Sequence[float]) -> Array:
    """[3, 3] with white at D50, as profiles hold it."""
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    matrix = to_xyz(primaries)
    gains = (bradford @ D50) / (bradford @ matrix.sum(axis=1))
    return np.asarray(np.linalg.inv(bradford) @ np.diag(gains) @ bradford @ matrix)


def xyz_tag(values: Array) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(float(value) * 65536) for value in values))


def gamma_tag(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def curve_tag(linear: Callable[[Array], Array], count: int = 1024) -> bytes:
    values = np.rint(65535 * linear(np.linspace(0, 1, count))).astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", count) + values.tobytes()


def profile(space: bytes, kind: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"wtpt": xyz_tag(D50), **tags}
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(
        ">I4xI4s4s4s12x4s", start + len(body), 0x02400000, kind, space.ljust(4), pcs.ljust(4), b"acsp"
    )
    header = header.ljust(68, b"\0") + xyz_tag(D50)[8:]
    return header.ljust(128, b"\0") + table + body


def rgb_profile(primaries: Sequence[float], curve: bytes) -> bytes:
    columns = adapted(primaries).T
    names = (b"r", b"g", b"b")
    tags = {name + b"XYZ": xyz_tag(column) for name, column in zip(names, columns, strict=True)}
    return profile(b"RGB", b"mntr", b"XYZ", tags | {name + b"TRC": curve for name in names})


def grey_profile(gamma: float) -> bytes:
    return profile(b"GRAY", b"mntr", b"XYZ", {b"kTRC": gamma_tag(gamma)})


def cmyk_profile(lab: Callable[[float, float, float, float], Sequence[float]]) -> bytes:
    """A printer whose 16 corners of no and full ink look as `lab` says; linear between them."""
    corners = b""
    for inks in product((0, 1), repeat=4):
        lightness, a, b = lab(*inks)
        corners += struct.pack(
            ">3H", round(lightness * 652.8), round((a + 128) * 256), round((b + 128) * 256)
        )
    identity = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    ramp = struct.pack(">2H", 0, 65535)
    lut = b"mft2\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + struct.pack(">2H", 2, 2)
    return profile(b"CMYK", b"prtr", b"Lab", {b"A2B0": lut + 4 * ramp + corners + 3 * ramp})


def lab_in_srgb(lightness: float, a: float, b: float) -> Array:
    """0..255, of Lab under D50."""
    y = (lightness + 16) / 116
    cubes = np.array([y + a / 500, y, y - b / 200])
    xyz = D50 * np.where(cubes > 6 / 29, cubes**3, (cubes - 4 / 29) * 3 * (6 / 29) ** 2)
    return 255 * linear_to_srgb(np.linalg.solve(adapted(SRGB_PRIMARIES), xyz))
