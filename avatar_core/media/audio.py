"""Recordings: what they hold, and their samples at any rate, block by block."""

import math
import struct
import wave
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet
from numpy.typing import NDArray

from avatar_core.errors import InputError
from avatar_core.media.container import chosen_stream, codec_name, open_media
from avatar_core.media.declared import (
    TOLERANCE_S,
    check_matroska,
    check_ogg,
    mp3_samples,
    truncated,
    wav_data_bytes,
)
from avatar_core.media.files import sniff

Samples = NDArray[np.float32]

MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 8_000, 192_000
MAX_CHANNELS = 8

_CODECS = ("flac", "alac", "mp3", "aac", "vorbis", "opus")
_PCM = ("pcm_", "adpcm_")
_TAGS = (b"ID3", b"TAG", b"APETAGEX", b"LYRICS")
_EXACT = ("wav", "flac")
_EDITED = ("mp4", "mov")  # their edit list puts padding before time 0
_EXACT_TOLERANCE_S = 0.01
_WHOLE_FILE = {"webm": check_matroska, "ogg": check_ogg}

# Left and right weight of a channel by its name, after ITU-R BS.775; low-frequency effects are left out.
_SIDE = math.sqrt(0.5)
_STEREO_WEIGHTS = {
    "FL": (1.0, 0.0),
    "FR": (0.0, 1.0),
    "FC": (_SIDE, _SIDE),
    "LFE": (0.0, 0.0),
    "BL": (_SIDE, 0.0),
    "BR": (0.0, _SIDE),
    "SL": (_SIDE, 0.0),
    "SR": (0.0, _SIDE),
}


@dataclass(frozen=True)
class AudioLimits:
    max_duration_s: float = 3600.0
    min_duration_s: float = 0.1


@dataclass(frozen=True)
class AudioProbe:
    """`samples` per channel, at the recording's own `sample_rate`, without a codec's padding."""

    format: str
    codec: str
    sample_rate: int
    channels: int
    samples: int
    duration_s: float


def probe_audio(path: str | Path, limits: AudioLimits | None = None) -> AudioProbe:
    """Reads every packet and decodes none. A file shorter than its header says raises `InputError`."""
    if check := _WHOLE_FILE.get(sniff(path) or ""):
        check(path)
    with open_media(path) as (container, kind):
        stream = _sound_of(container)
        codec = stream.codec_context.codec.canonical_name
        samples, skipped, size = _count(container, stream, kind)
        rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
        promised = _promised_samples(path, kind, stream, samples + skipped, size) - skipped
    duration_s = samples / rate
    if promised / rate - duration_s > _tolerance_s(kind):
        raise truncated(promised / rate, duration_s)
    _check_duration(duration_s, limits or AudioLimits(math.inf, 0.0))
    return AudioProbe(kind, codec, rate, channels, samples, duration_s)


def _sound_of(container: InputContainer) -> AudioStream:
    """Of several tracks the one that a player takes."""
    stream = chosen_stream(container.streams.audio, _CODECS, _PCM)
    if stream is None:
        raise InputError("has no sound, or was cut off; give a complete recording")
    codec = codec_name(stream)
    if codec is None:
        raise InputError(f"has sound in an unknown codec; allowed: PCM, {', '.join(_CODECS)}")
    if not codec.startswith(_PCM) and codec not in _CODECS:
        raise InputError(f"has sound in the codec {codec}; allowed: PCM, {', '.join(_CODECS)}")
    rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
    if not MIN_SAMPLE_RATE <= rate <= MAX_SAMPLE_RATE:
        raise InputError(f"has {rate} samples a second, allowed are {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE}")
    if not 1 <= channels <= MAX_CHANNELS:
        raise InputError(f"has {channels} channels, allowed are 1 to {MAX_CHANNELS}")
    return stream


def _count(container: InputContainer, stream: AudioStream, kind: str) -> tuple[int, int, int]:
    """Samples per channel without what the file marks as padding, the padding, and bytes of all packets."""
    ticks = skipped = size = 0
    starts, ends = [], []
    for packet in _packets(container, stream):
        if packet.size == 0:
            continue
        start, length = packet.pts or 0, packet.duration or 0
        starts.append(start)
        ends.append(start + length)
        ticks += max(0, length + min(0, start)) if kind in _EDITED else length
        size += packet.size
        if packet.has_sidedata("skip_samples") and kind not in _EDITED:
            front, back = struct.unpack_from("<II", bytes(packet.get_sidedata("skip_samples")))
            skipped += front + (back if kind == "mp3" else 0)  # elsewhere the last packet is already shorter
    if kind in _EDITED:
        ticks = min(ticks, stream.duration or ticks)
    elif kind == "ogg" and stream.codec_context.codec.canonical_name == "vorbis":
        # Packet durations are wrong where the block size changes; the last page's position is exact.
        ticks = stream.duration or ticks
    elif kind == "webm" and ends:
        ticks = ends[-1] - starts[0]
    return round(ticks * (stream.time_base or 0) * stream.codec_context.sample_rate) - skipped, skipped, size


def _packets(container: InputContainer, stream: AudioStream) -> Iterator["Packet[AudioStream]"]:
    """Raw AAC may end within a frame, as a stream does that somebody recorded."""
    try:
        yield from container.demux(stream)
    except av.error.InvalidDataError:
        if container.format.name != "aac":
            raise


def _promised_samples(path: str | Path, kind: str, stream: AudioStream, samples: int, size: int) -> float:
    """What the header says, padding included, where it says anything exact; else 0."""
    if kind == "wav":
        promised = wav_data_bytes(path)
        return samples * promised / size if size and promised else 0
    if kind == "mp3":
        return mp3_samples(path) or 0
    if kind in ("flac", *_EDITED) and stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base * stream.codec_context.sample_rate)
    return 0


def _tolerance_s(kind: str) -> float:
    return _EXACT_TOLERANCE_S if kind in _EXACT else TOLERANCE_S


def _check_duration(duration_s: float, limits: AudioLimits) -> None:
    if duration_s <= 0:
        raise InputError("holds no samples; give a recording with sound")
    if duration_s < limits.min_duration_s:
        raise InputError(f"lasts {duration_s:.3f} s, allowed are {limits.min_duration_s:g} s or more")
    if duration_s > limits.max_duration_s:
        raise InputError(f"lasts {duration_s:.1f} s, allowed are {limits.max_duration_s:g} s at most; cut it")


def decode_blocks(
    path: str | Path,
    sample_rate: int,
    channels: int = 1,
    start_s: float = 0.0,
    duration_s: float | None = None,
    block_s: float = 1.0,
) -> Iterator[Samples]:
    """float32 [n, channels], n = block_s * sample_rate but for the last; full scale is 1.

    Always decodes from the beginning, so a window holds exactly the samples that the whole would have
    there. Up to its end a recording gives round(duration_s * sample_rate) samples. Float files may exceed
    full scale and are left so; NaN and infinity raise `InputError`.
    """
    probe = probe_audio(path)
    total = round(probe.samples * sample_rate / probe.sample_rate)
    first = round(start_s * sample_rate)
    last = total if duration_s is None else min(total, first + round(duration_s * sample_rate))
    blocks = _complete(
        _resampled(path, sample_rate, channels), total, sample_rate, _tolerance_s(probe.format)
    )
    yield from regroup(_cut(blocks, first, last), max(1, round(block_s * sample_rate)))


def load_mono(
    path: str | Path, sample_rate: int, start_s: float = 0.0, duration_s: float | None = None
) -> Samples:
    """float32 [n]."""
    return _joined(decode_blocks(path, sample_rate, 1, start_s, duration_s))


def _joined(blocks: Iterator[Samples]) -> Samples:
    return np.concatenate([np.zeros(0, np.float32), *(block[:, 0] for block in blocks)])


def _resampled(path: str | Path, sample_rate: int, channels: int) -> Iterator[Samples]:
    with open_media(path) as (container, _):
        stream = _sound_of(container)
        resampler = av.AudioResampler(format="flt", rate=sample_rate)
        for frame in _frames(container, stream):
            try:
                resampled = resampler.resample(frame)
            except ValueError as error:
                raise InputError(
                    "changes its sample rate or channels in the middle; make it again"
                ) from error
            for block in resampled:
                yield _downmix(block, channels)


def _frames(container: InputContainer, stream: AudioStream) -> Iterator[AudioFrame | None]:
    """A packet that cannot be decoded is an error, except at the very end, where tags may be, and between
    MP3 that were joined, where they are too; the None after the last frame flushes."""
    broken: Exception | None = None
    for packet in _packets(container, stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError as error:
            if not bytes(packet).startswith(_TAGS):
                broken = error
            continue
        if frames and broken:
            raise InputError(f"is broken just before {frames[0].time or 0:.2f} s; make it again") from broken
        yield from frames
    yield None


def _downmix(frame: AudioFrame, channels: int) -> Samples:
    """[n, channels]. Frames are interleaved: PyAV reads past the end of one with 8 planes."""
    samples = frame.to_ndarray().reshape(-1, frame.layout.nb_channels).astype(np.float32, copy=False)
    if not np.isfinite(samples).all():
        raise InputError("holds NaN or infinite samples; make it again")
    if samples.shape[1] > 2:
        samples = samples @ _stereo_weights([channel.name for channel in frame.layout.channels])
    if channels == 1:
        samples = samples.mean(axis=1, keepdims=True, dtype=np.float32)
    return np.broadcast_to(samples, (len(samples), channels))


def _stereo_weights(names: Sequence[str]) -> Samples:
    """[channels, 2], scaled so that full scale cannot be exceeded. A file that names no channels counts as
    5.1 or 7.1 where it has 6 or 8, else all channels weigh the same."""
    if len(names) in (6, 8) and not set(names) & set(_STEREO_WEIGHTS):
        names = list(_STEREO_WEIGHTS)[: len(names)]
    weights = np.array([_STEREO_WEIGHTS.get(name, (0.5, 0.5)) for name in names], np.float32)
    return (weights / max(1.0, float(weights.sum(axis=0).max()))).astype(np.float32)


def _complete(
    blocks: Iterator[Samples], total: int, sample_rate: int, tolerance_s: float
) -> Iterator[Samples]:
    """`total` samples at least: the few that resampling may lack are zeros."""
    count, channels = 0, 1
    for block in blocks:
        channels = block.shape[1]
        yield block
        count += len(block)
    if (total - count) / sample_rate > tolerance_s:
        raise truncated(total / sample_rate, count / sample_rate)
    yield np.zeros((max(0, total - count), channels), np.float32)


def _cut(blocks: Iterator[Samples], first: int, last: int) -> Iterator[Samples]:
    position = 0
    for block in blocks:
        yield block[max(0, first - position) : max(0, last - position)]
        position += len(block)
        if position >= last:
            return


def regroup(blocks: Iterable[Samples], length: int) -> Iterator[Samples]:
    """The same samples in blocks of `length`, the last one shorter."""
    kept: list[Samples] = []
    held = 0
    for block in blocks:
        kept.append(block)
        held += len(block)
        while held >= length:
            joined = np.concatenate(kept)
            yield joined[:length]
            kept, held = [joined[length:]], held - length
    if held:
        yield np.concatenate(kept)


def write_silence_like(recording: str | Path, path: Path) -> None:
    """A mono WAV, exactly as long as the recording."""
    probe = probe_audio(recording)
    with _new_wav(path, probe.sample_rate) as file:
        for start in range(0, probe.samples, probe.sample_rate):
            file.writeframes(bytes(2 * min(probe.sample_rate, probe.samples - start)))


def write_wav(path: Path, samples: Samples, sample_rate: int) -> None:
    """Mono, 16 bits; what exceeds full scale is cut off."""
    with _new_wav(path, sample_rate) as file:
        file.writeframes(np.rint(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())


@contextmanager
def _new_wav(path: Path, sample_rate: int) -> Iterator[wave.Wave_write]:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        yield file


def loudness_db(samples: Samples) -> float:
    """Root mean square in dB of full scale; -inf for silence."""
    power = float(np.mean(np.square(samples, dtype=np.float64))) if samples.size else 0.0
    return 10 * math.log10(power) if power > 0 else -math.inf


def mono_and_stereo_db(path: str | Path, sample_rate: int) -> tuple[float, float]:
    """Loudness of a recording mixed to mono, and of its louder side."""
    powers = []
    for channels in (1, 2):
        energy, count = np.zeros(channels), 0
        for block in decode_blocks(path, sample_rate, channels):
            energy += np.square(block, dtype=np.float64).sum(axis=0)
            count += len(block)
        powers.append(float(energy.max()) / max(1, count))
    mono, stereo = (10 * math.log10(power) if power > 0 else -math.inf for power in powers)
    return mono, stereo
