"""MP4 files: H.264 pictures with AAC sound, written frame by frame; and reading them back."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from av.audio.stream import AudioStream
from av.codec.context import Flags
from av.container import InputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from avatar_core.errors import InputError
from avatar_core.media.audio import Samples
from avatar_core.media.container import open_media

AAC_SAMPLE_RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
AAC_BITS_PER_CHANNEL = 96_000


def frame_rate(fps: float) -> Fraction:
    """29.97 means 30000/1001, as do its kin 23.976 and 59.94; other rates to a denominator of 1001."""
    ntsc = Fraction(round(fps) * 1000, 1001)
    return ntsc if abs(fps - ntsc) < 0.0002 * fps else Fraction(fps).limit_denominator(1001)


def aac_sample_rate(sample_rate: int) -> int:
    """The recording's own rate where AAC has it, else 48 kHz."""
    return sample_rate if sample_rate in AAC_SAMPLE_RATES else 48_000


@dataclass(frozen=True)
class Sound:
    """`blocks`: float32 [n, channels], pulled while the frames are written."""

    blocks: Iterator[Samples]
    sample_rate: int
    channels: int


class VideoWriter:
    """Writes beside `path` and renames at the end, so that `path` is either complete or untouched.

    Sound that lasts longer than the frames is cut at the end of the last one. The same frames, sound and
    settings give the same bytes on one machine. Width and height must be even (yuv420p); colours are
    tagged BT.709, limited range. The profile of H.264 is High at most, which players and hardware know;
    `crf`, 1 (best) to 51, has no 0, since lossless pictures need another profile.
    """

    def __init__(
        self,
        path: str | Path,
        width: int,
        height: int,
        fps: Fraction | float,
        sound: Sound | None = None,
        *,
        crf: int = 18,
        preset: str = "medium",
        threads: int = 1,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        if width % 2 or height % 2:
            raise ValueError(f"a video of {width}x{height}: both sides must be even")
        if not 1 <= crf <= 51:
            raise ValueError(
                f"a video of crf {crf}; allowed: 1 to 51 (0, lossless, is a profile few players know)"
            )
        if sound and (sound.sample_rate not in AAC_SAMPLE_RATES or sound.channels not in (1, 2)):
            raise ValueError(
                f"AAC sound with {sound.channels} channels at {sound.sample_rate} Hz; allowed: 1 or 2 at "
                f"{', '.join(map(str, AAC_SAMPLE_RATES))}"
            )
        self.path = Path(path)
        self.fps = fps if isinstance(fps, Fraction) else frame_rate(fps)
        self.shape = (height, width, 3)
        self.num_frames = 0
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        self._sound = sound
        self._samples = 0
        self._held = np.zeros((0, sound.channels if sound else 0), np.float32)
        options = {"movflags": "faststart+use_metadata_tags", "fflags": "bitexact"}
        self._container = av.open(self._partial.absolute(), "w", format="mp4", options=options)
        self._container.metadata.update(metadata or {})
        self._threads = threads
        self._reformatter = VideoReformatter()
        self._pictures = self._add_pictures(crf, preset, threads)
        self._voice = self._add_voice(sound) if sound else None

    def _add_pictures(self, crf: int, preset: str, threads: int) -> VideoStream:
        stream = self._container.add_stream("libx264", rate=self.fps)
        stream.options = {
            "crf": str(crf),
            "preset": preset,
            "profile": "high",
            # Otherwise x264's macroblock tree rounds as the CPU likes, and its AVX-512 code reads memory that
            # nobody wrote, so that equal frames give different files.
            "x264-params": "cpu-independent=1",
        }
        stream.height, stream.width = self.shape[:2]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.thread_count = threads
        context.flags |= Flags.bitexact
        context.color_primaries = ColorPrimaries.BT709
        context.color_trc = ColorTrc.BT709
        context.colorspace = Colorspace.ITU709
        context.color_range = ColorRange.MPEG
        return stream

    def _add_voice(self, sound: Sound) -> AudioStream:
        layout = "mono" if sound.channels == 1 else "stereo"
        stream = self._container.add_stream("aac", rate=sound.sample_rate, layout=layout)
        stream.bit_rate = AAC_BITS_PER_CHANNEL * sound.channels
        stream.codec_context.flags |= Flags.bitexact
        return stream

    def write_frame(self, frame: NDArray[np.uint8]) -> None:
        """uint8 RGB [H, W, 3]."""
        if frame.shape != self.shape or frame.dtype != np.uint8:
            raise ValueError(f"a frame is {frame.dtype} {frame.shape}; expected uint8 {self.shape}")
        picture = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            threads=self._threads,  # otherwise as many as there are cores
        )
        picture.pts, picture.time_base = self.num_frames, 1 / self.fps
        self._container.mux(self._pictures.encode(picture))
        self.num_frames += 1
        if self._sound and self._voice:
            self._write_sound(self._sound, self._voice)

    def _write_sound(self, sound: Sound, voice: AudioStream) -> None:
        """Sound up to the end of the last frame, so that neither runs ahead in memory."""
        wanted = round(self.num_frames / self.fps * sound.sample_rate) - self._samples
        while len(self._held) < wanted and (block := next(sound.blocks, None)) is not None:
            self._held = np.concatenate([self._held, block])
        block, self._held = self._held[:wanted], self._held[wanted:]
        if not len(block):
            return
        planes = np.ascontiguousarray(block.T)
        samples = av.AudioFrame.from_ndarray(planes, format="fltp", layout=voice.codec_context.layout.name)
        samples.sample_rate, samples.pts = sound.sample_rate, self._samples
        samples.time_base = Fraction(1, sound.sample_rate)
        self._container.mux(voice.encode(samples))
        self._samples += len(block)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._container.close()
            self._partial.unlink(missing_ok=True)

    def _finish(self) -> None:
        if not self.num_frames:
            raise ValueError("a video needs one frame or more")
        for stream in (self._pictures, self._voice):
            if stream:
                self._container.mux(stream.encode(None))
        self._container.close()
        self._partial.replace(self.path)


@dataclass(frozen=True)
class VideoProbe:
    """`audio_duration_s` and `sample_rate` are None for a silent film."""

    width: int
    height: int
    fps: Fraction
    num_frames: int
    duration_s: float
    audio_duration_s: float | None
    sample_rate: int | None


def probe_video(path: str | Path) -> VideoProbe:
    """Frames are counted by packets, none is decoded."""
    with open_media(path) as (container, _):
        stream = _pictures_of(container)
        fps = stream.average_rate or Fraction(0)
        num_frames = sum(1 for packet in container.demux(stream) if packet.size)
        voice = container.streams.audio[0] if container.streams.audio else None
        voice_s = float((voice.duration or 0) * (voice.time_base or 0)) if voice else None
        return VideoProbe(
            width=stream.codec_context.width,
            height=stream.codec_context.height,
            fps=fps,
            num_frames=num_frames,
            duration_s=float(num_frames / fps) if fps else 0.0,
            audio_duration_s=voice_s,
            sample_rate=voice.codec_context.sample_rate if voice else None,
        )


def _pictures_of(container: InputContainer) -> VideoStream:
    if not container.streams.video or container.streams.video[0].codec_context is None:
        raise InputError("has no pictures, or was cut off; give a complete video")
    return container.streams.video[0]


def read_frames(path: str | Path) -> Iterator[NDArray[np.uint8]]:
    """uint8 RGB [H, W, 3]."""
    with open_media(path) as (container, _):
        for frame in container.decode(_pictures_of(container)):
            yield frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)


def read_metadata(path: str | Path) -> dict[str, str]:
    with open_media(path) as (container, _):
        return dict(container.metadata)
