"""The inside of an open mouth, drawn: dark cavity, tongue, upper teeth."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from avatar_core.backends.preview.axes import Box, FaceAxes, smoothstep
from avatar_core.backends.preview.warp import FloatArray, Picture

LUMINANCE = np.array([0.30, 0.59, 0.11], np.float32)
CAVITY_TOP, CAVITY_BOTTOM = np.array([66, 26, 24], np.float32), np.array([30, 9, 10], np.float32)
TONGUE = np.array([146, 66, 62], np.float32)
TEETH = np.array([232, 226, 210], np.float32)
TEETH_HEIGHT = 0.17
SKIN_CHROMA = 0.2  # (max - min) / mean of the colours of pale skin
SKIN_PLACES = np.array([(-1.3, -0.9), (1.3, -0.9), (0, -1.2)])  # u, v of both cheeks and the nose: no beard


@dataclass(frozen=True)
class FaceLight:
    """How bright and how coloured the light on this face is, read from its skin."""

    skin: float  # luminance, 1..255
    brightness: float
    tint: FloatArray  # (3,)
    from_right: float  # -.5 .. .5
    saturation: float  # 0 in a grey picture .. 1

    @classmethod
    def measure(cls, picture: Picture, lower_face: Box, axes: FaceAxes) -> "FaceLight":
        patches = np.array([_patch_mean(picture, point) for point in axes.mouth.to_picture(SKIN_PLACES)])
        skin = np.median(patches, axis=0)
        warm = skin / max(skin.mean(), 1)
        left, right = patches[:2] @ LUMINANCE
        return cls(
            skin=max(float(skin @ LUMINANCE), 1.0),
            brightness=float(np.clip(skin @ LUMINANCE / 190, 0.25, 1.15)),
            tint=(0.62 + 0.38 * warm / max(warm.max(), 1e-3)).astype(np.float32),
            from_right=float(np.clip((right - left) / (right + left + 1), -0.5, 0.5)),
            saturation=_saturation(picture[lower_face.slices]),
        )


def _saturation(lower_face: Picture) -> float:
    """By the most coloured pixels, for overexposed skin is white."""
    colours = lower_face.reshape(-1, 3).astype(np.float32)
    chroma = np.ptp(colours, axis=1) / np.maximum(colours.mean(axis=1), 1)
    return float(np.clip(np.percentile(chroma, 90) / SKIN_CHROMA, 0, 1))


def _patch_mean(picture: Picture, point: NDArray[np.float64]) -> NDArray[np.float64]:
    height, width = picture.shape[:2]
    x, y = int(np.clip(point[0], 0, width - 1)), int(np.clip(point[1], 0, height - 1))
    patch = picture[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3].reshape(-1, 3)
    return np.asarray(patch.mean(axis=0), np.float64)


def draw_cavity(
    light: FaceLight,
    u: FloatArray,
    below_upper: FloatArray,
    above_lower: FloatArray,
    gap: float,
    wide: float,
    teeth_opacity: float,
) -> FloatArray:
    """Colours (height, width, 3) at `u` along the mouth, `below_upper` and `above_lower` lip (v units)."""
    height = below_upper + above_lower
    depth = np.clip(below_upper / np.maximum(height, 1e-3), 0, 1)[..., None]
    cavity = (CAVITY_TOP * (1 - depth) + CAVITY_BOTTOM * depth) * light.brightness

    dome = np.clip(0.42 * height - 0.02, 0, 0.22) * np.clip(1 - (u / 0.62) ** 2, 0, 1)
    tongue = smoothstep(dome - above_lower, -0.06, 0.10)[..., None] * float(
        smoothstep(np.array(gap), 0.10, 0.25)
    )
    colour = TONGUE * light.brightness * (0.72 + 0.28 * (1 - depth))
    cavity = cavity * (1 - tongue) + colour * tongue

    spread = wide > -0.2  # rounded lips hide most of the teeth
    edge = TEETH_HEIGHT * (1.0 if spread else 0.6) * np.clip(1 - (np.abs(u) / 0.74) ** 3, 0, 1)
    teeth = smoothstep(edge - below_upper, -0.012, 0.02) * smoothstep(height, 0.03, 0.10)
    teeth = teeth[..., None] * (teeth_opacity * (0.92 if spread else 0.55))
    coloured = cavity * (1 - teeth) + _teeth_colour(light, u, below_upper) * teeth
    if light.saturation == 1:
        return np.asarray(coloured, np.float32)
    grey = (coloured @ LUMINANCE)[..., None]
    return np.asarray(grey + light.saturation * (coloured - grey), np.float32)


def _teeth_colour(light: FaceLight, u: FloatArray, below_upper: FloatArray) -> FloatArray:
    base = TEETH * light.tint * (0.97 * min(1.0, 1.02 * light.brightness**0.8))
    arch = 0.80 + 0.20 * np.clip(1 - (np.abs(u) / 0.8) ** 2, 0, 1)
    between = 1 - 0.07 * np.exp(-(((((u * 4.2) + 0.5) % 1 - 0.5) / 0.07) ** 2))
    side = 1 + 0.6 * light.from_right * u
    under_lip = 0.88 + 0.12 * smoothstep(below_upper, 0, 0.08)
    return np.asarray(base * (arch * between * side * under_lip)[..., None], np.float32)


def lip_shade(below_upper: FloatArray, above_lower: FloatArray) -> FloatArray:
    """How much light reaches the inside: little under the lips."""
    upper = 0.36 * np.exp(-np.maximum(below_upper, 0) / 0.05)
    lower = 0.30 * np.exp(-np.maximum(above_lower, 0) / 0.05)
    return np.asarray(np.clip(1 - upper - lower, 0.3, 1), np.float32)
