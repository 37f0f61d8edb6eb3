"""HDR and wide gamuts of video as sRGB."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from av.video.reformatter import ColorPrimaries, ColorTrc
from numpy.typing import NDArray

from avatar_core.media.icc import BT2020, DISPLAY_P3, SRGB, to_d50

HDR: Mapping[int, str] = {int(ColorTrc.SMPTE2084): "PQ", int(ColorTrc.ARIB_STD_B67): "HLG"}

WHITE_NITS = 203
"""What white on paper is in HDR (ITU-R BT.2408); it becomes white, and what is brighter is cut."""

_DCI_P3 = (0.314, 0.351, *DISPLAY_P3[2:])
_PRIMARIES = {
    ColorPrimaries.BT2020: BT2020,
    ColorPrimaries.SMPTE431: _DCI_P3,
    ColorPrimaries.SMPTE432: DISPLAY_P3,
}
_HLG_PEAK_NITS, _HLG_GAMMA = 1000, 1.2
_HLG_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)
_ROWS = 128  # at a time

Values = NDArray[np.float64]


def is_wide(transfer: int, primaries: int) -> bool:
    return transfer in HDR or primaries in _PRIMARIES


class WideToSrgb:
    """Converts pictures of a transfer function and primaries, as FFmpeg numbers them."""

    def __init__(self, transfer: int, primaries: int) -> None:
        curve = _CURVES.get(HDR.get(transfer, ""), _srgb_linear)
        self._linear = curve(np.arange(65536) / 65535).astype(np.float32)
        self._is_hlg = HDR.get(transfer) == "HLG"
        default = BT2020 if transfer in HDR else SRGB
        gamut = _PRIMARIES.get(primaries, default)  # type: ignore[call-overload]
        self._matrix = np.linalg.solve(to_d50(SRGB), to_d50(gamut)).T.astype(np.float32)
        self._encoded = np.rint(255 * _srgb_signal(np.arange(65536) / 65535)).astype(np.uint8)

    def __call__(self, signal: NDArray[np.uint16]) -> NDArray[np.uint8]:
        """RGB [H, W, 3] of full range, in 16 and in 8 bits."""
        pixels = np.empty(signal.shape, np.uint8)
        for start in range(0, len(signal), _ROWS):
            light = self._linear[signal[start : start + _ROWS]]
            if self._is_hlg:
                luminance = light @ _HLG_LUMINANCE
                light *= (_HLG_PEAK_NITS / WHITE_NITS * luminance ** (_HLG_GAMMA - 1))[..., None]
            levels = np.clip(light @ self._matrix, 0, 1) * 65535 + 0.5
            pixels[start : start + _ROWS] = self._encoded[levels.astype(np.uint16)]
        return pixels


def _pq_light(signal: Values) -> Values:
    """By SMPTE ST 2084; 1 is white."""
    power = signal ** (32 / 2523)
    return np.asarray(
        (np.maximum(power - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * power)) ** (16384 / 2610)
        * (10_000 / WHITE_NITS)
    )


def _hlg_light(signal: Values) -> Values:
    """Of the scene, by ARIB STD-B67; 1 is its brightest."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def _srgb_linear(signal: Values) -> Values:
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def _srgb_signal(light: Values) -> Values:
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


_CURVES: Mapping[str, Callable[[Any], Values]] = {"PQ": _pq_light, "HLG": _hlg_light}
