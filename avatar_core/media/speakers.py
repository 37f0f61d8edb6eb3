"""The recordings of one clip on one timeline: each speaker alone, and all of them together."""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from avatar_core.errors import InputError
from avatar_core.media.audio import Samples, decode_blocks, probe_audio, regroup

BLOCK_S = 1.0


def combined_duration_s(durations_s: Sequence[float], how: str | None) -> float:
    """`how`: None for one recording, "para" = at the same time, "add" = one after the other, "turns" = at the
    same time, but with speech in one of them only at once."""
    _check(len(durations_s), how)
    return sum(durations_s) if how == "add" else max(durations_s)


def speaker_tracks(
    paths: Sequence[str | Path],
    how: str | None,
    sample_rate: int,
    start_s: float = 0.0,
    duration_s: float | None = None,
) -> list[Samples]:
    """float32 [n] mono per recording, equally long; zeros where a speaker's recording does not play."""
    tracks: list[list[Samples]] = [[np.zeros((0, 1), np.float32)] for _ in paths]
    for blocks in _in_step(paths, how, sample_rate, 1, start_s, duration_s):
        for track, block in zip(tracks, blocks, strict=True):
            track.append(block)
    return [np.concatenate(track)[:, 0] for track in tracks]


def mix_blocks(
    paths: Sequence[str | Path],
    how: str | None,
    sample_rate: int,
    channels: int,
    start_s: float = 0.0,
    duration_s: float | None = None,
) -> Iterator[Samples]:
    """float32 [n, channels]. Recordings at the same time are each scaled by 1 / their number, so that the
    sum cannot clip, wherever the clip is cut."""
    gain = np.float32(1 / max(1, len(paths)) if how == "para" else 1)
    for blocks in _in_step(paths, how, sample_rate, channels, start_s, duration_s):
        yield sum(blocks[1:], blocks[0]) * gain


def _in_step(
    paths: Sequence[str | Path],
    how: str | None,
    sample_rate: int,
    channels: int,
    start_s: float,
    duration_s: float | None,
) -> Iterator[tuple[Samples, ...]]:
    _check(len(paths), how)
    lengths = [round(probe_audio(path).duration_s * sample_rate) for path in paths]
    offsets = [sum(lengths[:index]) if how == "add" else 0 for index in range(len(paths))]
    total = max(offset + length for offset, length in zip(offsets, lengths, strict=True))
    first = round(start_s * sample_rate)
    last = total if duration_s is None else min(total, first + round(duration_s * sample_rate))
    tracks = [
        _placed(path, offset, length, sample_rate, channels, first, last)
        for path, offset, length in zip(paths, offsets, lengths, strict=True)
    ]
    yield from zip(*tracks, strict=True)


def _placed(
    path: str | Path, offset: int, length: int, sample_rate: int, channels: int, first: int, last: int
) -> Iterator[Samples]:
    """Samples `first` to `last` of the timeline, of a recording that plays from `offset` on."""
    step = round(BLOCK_S * sample_rate)
    begin = min(max(first, offset), last)
    end = max(begin, min(last, offset + length))
    window = ((begin - offset) / sample_rate, (end - begin) / sample_rate)
    sound = decode_blocks(path, sample_rate, channels, *window) if end > begin else ()
    silences = (_silence(begin - first, channels, step), _silence(last - end, channels, step))
    yield from regroup(chain(silences[0], sound, silences[1]), step)


def _silence(length: int, channels: int, step: int) -> Iterator[Samples]:
    for position in range(0, length, step):
        yield np.zeros((min(step, length - position), channels), np.float32)


def _check(count: int, how: str | None) -> None:
    if how not in (None, "para", "add", "turns"):
        raise InputError(f"recordings cannot be combined by {how!r}; allowed: para, add")
    if count < 1 or (how is None and count > 1):
        raise InputError(f"{count} recordings with audio_type {how!r}; give one, or say para or add")
