"""Loudness of speech over time, on a 100 Hz grid and per video frame."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

SAMPLE_RATE = 16_000
STEP_RATE = 100  # steps per second of every track in this module
STEP_SAMPLES = SAMPLE_RATE // STEP_RATE
WINDOW_SAMPLES = 400  # 25 ms
FFT_SAMPLES = 512
PIECE_SAMPLES = 5 * SAMPLE_RATE
SPEECH_BAND_HZ = (80.0, 8000.0)
SILENCE_POWER = 1e-7  # -70 dB relative to full scale: nobody speaks in this recording


def num_steps(num_samples: int) -> int:
    return 1 + num_samples // STEP_SAMPLES


def in_pieces(speech: FloatArray) -> Iterator[FloatArray]:
    for start in range(0, len(speech), PIECE_SAMPLES):
        yield speech[start : start + PIECE_SAMPLES]


def windows_of(pieces: Iterable[FloatArray]) -> Iterator[FloatArray]:
    """(steps, WINDOW_SAMPLES) centred on each step of the joined pieces, with zeros beyond the ends."""
    half = WINDOW_SAMPLES // 2
    pending = np.zeros(half, np.float32)
    num_samples = steps_done = 0
    for piece in pieces:
        num_samples += len(piece)
        pending = np.concatenate([pending, piece])
        steps = max(0, (len(pending) - WINDOW_SAMPLES) // STEP_SAMPLES + 1)
        if steps:
            yield _strided(pending)[:steps]
        pending, steps_done = pending[steps * STEP_SAMPLES :], steps_done + steps
    rest = num_steps(num_samples) - steps_done
    if rest:
        yield _strided(np.pad(pending, (0, WINDOW_SAMPLES)))[:rest]


def _strided(samples: FloatArray) -> FloatArray:
    return np.lib.stride_tricks.sliding_window_view(samples, WINDOW_SAMPLES)[::STEP_SAMPLES]


def band_powers(pieces: Iterable[FloatArray], bands_hz: Sequence[tuple[float, float]]) -> FloatArray:
    """Mean square amplitude in each band at each step, shape (steps, bands).

    `pieces` are consecutive parts of mono 16 kHz speech: memory stays small for a recording of any length.
    """
    window = np.hanning(WINDOW_SAMPLES).astype(np.float32)
    frequencies_hz = np.fft.rfftfreq(FFT_SAMPLES, 1 / SAMPLE_RATE)
    scale = np.float32(2 / (FFT_SAMPLES * np.square(window).sum()))
    selection = np.array([(frequencies_hz >= low) & (frequencies_hz < high) for low, high in bands_hz])
    weights = selection.T.astype(np.float32) * scale
    powers = []
    for windows in windows_of(pieces):
        spectrum = np.fft.rfft(windows * window, FFT_SAMPLES)
        powers.append((spectrum.real**2 + spectrum.imag**2).astype(np.float32) @ weights)
    return np.concatenate(powers)


def normalised_envelope(power: FloatArray) -> FloatArray:
    """Log energy from 0 (the recording's own background) to about 1 (its loud speech)."""
    loud_power = float(np.percentile(power, 95))
    if loud_power < SILENCE_POWER:
        return np.zeros_like(power)
    decibels = 10 * np.log10(power + 1e-10)
    loud = np.percentile(decibels, 95)
    # A recording without pauses has no background to measure: assume one 12 dB down.
    floor = min(max(np.percentile(decibels, 8), loud - 48), loud - 12) + 6
    return np.asarray(np.clip((decibels - floor) / (loud - floor), 0, 1.1), np.float32)


def smooth(track: FloatArray, sigma: float) -> FloatArray:
    """Gaussian smoothing; `sigma` in elements of the track."""
    radius = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    padded = np.pad(track, radius, mode="edge")
    return np.convolve(padded, kernel / kernel.sum(), mode="valid").astype(np.float32)


def per_video_frame(track: FloatArray, num_frames: int, fps: float) -> FloatArray:
    """Mean of a 100 Hz track over the time that each video frame is shown; 0 after its end."""
    edges = np.round(np.arange(num_frames + 1) * (STEP_RATE / fps)).astype(int)
    starts, stops = edges[:-1], np.maximum(edges[1:], edges[:-1] + 1)
    total = np.concatenate([[0.0], np.cumsum(track, dtype=np.float64)])
    starts, stops = np.minimum(starts, len(track)), np.minimum(stops, len(track))
    return np.asarray((total[stops] - total[starts]) / np.maximum(stops - starts, 1), np.float32)


def speech_envelope(
    pieces: Iterable[FloatArray], num_frames: int, fps: float, sigma: float = 2.2
) -> FloatArray:
    """Loudness per video frame of mono 16 kHz speech; `sigma` in steps of 10 ms."""
    envelope = normalised_envelope(band_powers(pieces, [SPEECH_BAND_HZ])[:, 0])
    return per_video_frame(smooth(envelope, sigma), num_frames, fps)
