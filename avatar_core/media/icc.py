"""ICC profiles written from a few numbers, for pictures that give these in place of a profile."""

import struct
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

Chromaticities = Sequence[float]
"""x and y of white, red, green and blue."""

SRGB: Final = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
DISPLAY_P3: Final = (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)
BT2020: Final = (0.3127, 0.3290, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046)
SRGB_CURVE: Final = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
"""Exponent g and a, b, c, d of ICC's parametric curve: (a x + b)^g from d on, c x below."""

_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def rgb_profile(chromaticities: Chromaticities, curve: Sequence[float]) -> bytes:
    """A display's profile, version 4. `curve` is a gamma alone, or all five numbers as `SRGB_CURVE`. Raises
    `ValueError` for colours that span no gamut."""
    columns = to_d50(chromaticities).T
    tags = {b"wtpt": _xyz(_D50)}
    for name, column in zip((b"r", b"g", b"b"), columns, strict=True):
        tags[name + b"XYZ"] = _xyz(column)
        tags[name + b"TRC"] = _curve(curve)
    return _profile(tags)


def to_d50(chromaticities: Chromaticities) -> NDArray[np.float64]:
    """[3, 3]: linear RGB to XYZ, with white brought to D50."""
    pairs = np.array(chromaticities, float).reshape(4, 2)
    if pairs.min() < 0 or pairs[:, 1].min() <= 0:
        raise ValueError(f"chromaticities {pairs.tolist()} are none")
    xyz = np.column_stack([pairs[:, 0], pairs[:, 1], 1 - pairs.sum(axis=1)]) / pairs[:, 1:]
    white, primaries = xyz[0], xyz[1:].T
    if abs(np.linalg.det(primaries)) < 1e-6:
        raise ValueError(f"chromaticities {pairs.tolist()} span no gamut")
    to_xyz = primaries * np.linalg.solve(primaries, white)
    gains = (_BRADFORD @ _D50) / (_BRADFORD @ white)
    return np.asarray(np.linalg.inv(_BRADFORD) @ np.diag(gains) @ _BRADFORD @ to_xyz)


def _fixed(values: Sequence[float] | NDArray[np.float64]) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(float(value) * 65536) for value in values))


def _xyz(values: NDArray[np.float64]) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(values)


def _curve(curve: Sequence[float]) -> bytes:
    kind = {1: 0, 5: 3}[len(curve)]
    return b"para\0\0\0\0" + struct.pack(">HH", kind, 0) + _fixed(curve)


def _profile(tags: dict[bytes, bytes]) -> bytes:
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = start + len(body)
    header = struct.pack(">I4xI4s4s4s12x4s", size, 0x04300000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    header += bytes(68 - len(header)) + _fixed(_D50)
    return header + bytes(128 - len(header)) + table + body
