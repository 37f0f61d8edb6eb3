"""From speech to the shape of the mouth, by the first two resonances (formants) of the voice.

The first formant rises as the jaw opens; the second rises as the lips spread and falls as they round.
Loudness decides how far either goes, and hissing sounds nearly close the teeth.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import soxr
from numpy.typing import NDArray

from avatar_core.media.envelope import (
    SAMPLE_RATE,
    SPEECH_BAND_HZ,
    STEP_RATE,
    STEP_SAMPLES,
    band_powers,
    in_pieces,
    normalised_envelope,
    num_steps,
    per_video_frame,
    smooth,
)

FloatArray = NDArray[np.float32]

HISS_BAND_HZ = (3500.0, 8000.0)
VOICED_LEVEL = 0.12  # of the normalised envelope
OPEN_SMOOTHING, WIDE_SMOOTHING = 3.2, 4.0  # Gaussian sigma in steps of 10 ms

LPC_ORDER = 12
LPC_RATE = 10_000
LPC_STEP, LPC_WINDOW = LPC_RATE // STEP_RATE, 250
LPC_MIN_POWER = 1e-3  # of the loud speech: quieter frames give noise for formants
BLOCK_STEPS = 5 * STEP_RATE  # formants are sought in blocks, whatever the length of the recording
RESAMPLE_CONTEXT_STEPS = 10
DEFAULT_FORMANTS_HZ = (500.0, 1500.0)


@dataclass(frozen=True)
class Visemes:
    """One value per video frame, each of shape (num_frames,), float32."""

    mouth_open: FloatArray  # 0 closed .. 1 wide open
    mouth_wide: FloatArray  # -1 rounded .. 1 spread
    energy: FloatArray  # loudness, 0 .. about 1


def make_visemes(speech: FloatArray, sample_rate: int, fps: float, num_frames: int) -> Visemes:
    """`speech` is mono, float32, of any length."""
    if sample_rate != SAMPLE_RATE:
        speech = soxr.resample(speech, sample_rate, SAMPLE_RATE)
    powers = band_powers(in_pieces(speech), [SPEECH_BAND_HZ, HISS_BAND_HZ])
    total, hiss = powers.T
    envelope = normalised_envelope(total)
    voiced = envelope > VOICED_LEVEL
    if not voiced.any():
        silence = np.zeros(num_frames, np.float32)
        return Visemes(silence, silence, silence)
    log_formants = np.log(_formants(speech, total > LPC_MIN_POWER * np.percentile(total, 95)))
    jaw = _standardised(log_formants[:, 0], voiced)
    lips = _standardised(log_formants[:, 1], voiced)
    hissing = np.clip((hiss / (total + 1e-10) - 0.35) / 0.4, 0, 1)
    opening = envelope * (0.30 + 0.85 / (1 + np.exp(-1.3 * jaw))) * (1 - 0.75 * hissing)
    width = np.tanh(0.6 * lips) * np.clip(1.6 * envelope, 0, 1)
    return Visemes(
        np.clip(per_video_frame(smooth(opening, OPEN_SMOOTHING), num_frames, fps), 0, 1),
        np.clip(per_video_frame(smooth(width, WIDE_SMOOTHING), num_frames, fps), -1, 1),
        per_video_frame(smooth(envelope, OPEN_SMOOTHING), num_frames, fps),
    )


def _standardised(values: FloatArray, voiced: NDArray[np.bool_]) -> FloatArray:
    """Distance from the voice's own median, in robust standard deviations, limited to 2.5."""
    median = np.median(values[voiced])
    deviation = 1.5 * np.median(np.abs(values[voiced] - median)) + 1e-6
    return np.asarray(np.clip((values - median) / deviation, -2.5, 2.5), np.float32)


def _formants(speech: FloatArray, loud: NDArray[np.bool_]) -> FloatArray:
    """First and second formant in Hz at each step, shape (steps, 2), interpolated where not `loud`."""
    formants = np.full((len(loud), 2), np.nan)
    for first, windows in _lpc_windows(speech):
        chosen = np.flatnonzero(loud[first : first + len(windows)])
        if len(chosen):
            formants[first + chosen] = _formants_of_windows(windows[chosen])
    steps = np.arange(len(formants))
    for track, default_hz in zip(formants.T, DEFAULT_FORMANTS_HZ, strict=True):
        known = ~np.isnan(track)
        track[:] = np.interp(steps, steps[known], track[known]) if known.any() else default_hz
    return formants.astype(np.float32)


def _lpc_windows(speech: FloatArray) -> Iterator[tuple[int, FloatArray]]:
    """First step and windows (steps, LPC_WINDOW) at LPC_RATE of each block."""
    margin = RESAMPLE_CONTEXT_STEPS
    for first in range(0, num_steps(len(speech)), BLOCK_STEPS):
        count = min(BLOCK_STEPS, num_steps(len(speech)) - first)
        start, stop = (first - margin) * STEP_SAMPLES, (first + count + margin) * STEP_SAMPLES
        block = soxr.resample(_padded_slice(speech, start, stop), SAMPLE_RATE, LPC_RATE)
        centred = block[margin * LPC_STEP - LPC_WINDOW // 2 :]
        windows = np.lib.stride_tricks.sliding_window_view(centred, LPC_WINDOW)[::LPC_STEP]
        yield first, windows[:count]


def _padded_slice(speech: FloatArray, start: int, stop: int) -> FloatArray:
    """`speech[start:stop]` with zeros before its beginning and after its end."""
    inside = speech[max(start, 0) : max(stop, 0)]
    before = min(max(-start, 0), stop - start)
    return np.pad(inside, (before, stop - start - before - len(inside)))


def _formants_of_windows(windows: FloatArray) -> NDArray[np.float64]:
    """NaN where a window has fewer than two clear resonances. Shape (windows, 2)."""
    emphasised = np.concatenate([windows[:, :1], windows[:, 1:] - 0.97 * windows[:, :-1]], axis=1)
    companion = np.zeros((len(windows), LPC_ORDER, LPC_ORDER))
    companion[:, 0, :] = _linear_predictor(emphasised * np.hamming(LPC_WINDOW))
    companion[:, np.arange(1, LPC_ORDER), np.arange(LPC_ORDER - 1)] = 1
    roots = np.linalg.eigvals(companion)
    frequency_hz = np.angle(roots) * LPC_RATE / (2 * np.pi)
    bandwidth_hz = -np.log(np.abs(roots) + 1e-12) * LPC_RATE / np.pi
    clear = (frequency_hz > 180) & (frequency_hz < 3600) & (bandwidth_hz < 600)
    lowest = np.sort(np.where(clear, frequency_hz, np.inf), axis=1)[:, :2]
    lowest[~np.isfinite(lowest).all(axis=1)] = np.nan
    return np.asarray(lowest, np.float64)


def _linear_predictor(windows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights (windows, LPC_ORDER) of the samples before, latest first, by the autocorrelation method."""
    spectrum = np.fft.rfft(windows, 2 * LPC_WINDOW)
    correlation = np.fft.irfft(np.abs(spectrum) ** 2)[:, : LPC_ORDER + 1]
    # A trace of white noise keeps the equations regular.
    correlation[:, 0] = (1 + 1e-6) * correlation[:, 0] + 1e-12
    lags = np.arange(LPC_ORDER)
    equations = correlation[:, np.abs(lags[:, None] - lags)]
    return np.asarray(np.linalg.solve(equations, correlation[:, 1:, None])[..., 0], np.float64)
