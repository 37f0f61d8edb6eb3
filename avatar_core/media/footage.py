"""Footage: a video that is a source of pictures, as a sequence of upright frames."""

import statistics
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from avatar_core.errors import InputError
from avatar_core.media.container import chosen_stream, codec_name, open_media
from avatar_core.media.declared import check_matroska
from avatar_core.media.files import refuse, sniff
from avatar_core.media.image import ImageLimits, check_size
from avatar_core.media.video import frame_rate
from avatar_core.media.video_frame import Picture, UprightFrames, square_size
from avatar_core.media.wide_colour import HDR

CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg", "prores")
MIN_FPS, MAX_FPS = 1, 240
FRAMES_HELD = 64

_FORMATS = ("mp4", "mov", "webm")


@dataclass(frozen=True)
class FootageLimits:
    picture: ImageLimits = field(default_factory=ImageLimits)
    max_duration_s: float = 3600.0


@dataclass(frozen=True)
class FootageProbe:
    """Width and height of the upright pictures; `fps` is the mean where frames last unequally long. `warning`
    says what of its colours is lost."""

    format: str
    codec: str
    width: int
    height: int
    fps: float
    num_frames: int
    duration_s: float
    warning: str | None = None


def probe_footage(path: str | Path, limits: FootageLimits | None = None) -> FootageProbe:
    """Frames are counted by packets; the first is decoded. Raises `InputError`."""
    limits = limits or FootageLimits()
    if (kind := sniff(path)) not in _FORMATS:
        raise refuse(kind, "MP4, MOV, WebM")
    if kind == "webm":
        check_matroska(path)
    with open_media(path) as (container, _):
        stream = _pictures_of(container)
        check_size(*square_size(stream), limits.picture)
        codec, transfer = str(codec_name(stream)), stream.codec_context.color_trc
    with Footage(path) as footage:
        if kind != "webm" and footage.num_promised > footage.num_packets:
            raise InputError(
                f"is truncated: its header says {footage.num_promised} frames, {footage.num_packets} are "
                "there; copy it again"
            )
        fps, duration_s = float(footage.fps), float(footage.duration_s)
        if not MIN_FPS <= fps <= MAX_FPS:
            raise InputError(f"has {fps:g} frames a second, allowed are {MIN_FPS} to {MAX_FPS}")
        if duration_s > limits.max_duration_s:
            raise InputError(
                f"lasts {duration_s:.1f} s, allowed are {limits.max_duration_s:g} s at most; cut it"
            )
        height, width = footage[0].shape[:2]
    warning = None
    if transfer in HDR:
        warning = f"is HDR ({HDR[transfer]}): what is brighter than white is cut; give SDR for other colours"
    return FootageProbe(str(kind), codec, width, height, fps, len(footage), duration_s, warning)


def _pictures_of(container: InputContainer) -> VideoStream:
    stream = chosen_stream(container.streams.video, CODECS)
    if stream is None or stream.codec_context is None:
        raise InputError("has no moving pictures, or was cut off; give a complete video")
    if (codec := codec_name(stream)) not in CODECS:
        raise InputError(f"has pictures in the codec {codec}; allowed: {', '.join(CODECS)}")
    return stream


class Footage(Sequence[Any]):
    """The frames of a video, RGB [H, W, 3], upright, each after `fit`; to be used in a `with` block.

    With `fps` they are those of a clip at that rate: at each of its moments the frame whose time is nearest,
    of two equally near the earlier, the first frame's time being 0. So movement keeps its speed, whatever the
    footage's own rate and however unequal its frames. Without, every frame counts in turn.

    Any frame may be asked for at any time. One after the other costs least; going back costs decoding from
    the key frame before, once for some `FRAMES_HELD` frames, which is all that is kept in memory.
    """

    def __init__(
        self,
        path: str | Path,
        fit: Callable[[Picture], Picture] = lambda picture: picture,
        fps: float | None = None,
    ) -> None:
        self._fit = fit
        self._held: OrderedDict[int, Picture] = OrderedDict()
        with open_media(path) as (container, _):
            stream = _pictures_of(container)
            packets = [packet for packet in container.demux(stream) if packet.size]
            self.num_promised = sum(1 for entry in stream.index_entries if entry.size)
            shown = {
                int(packet.pts): packet
                for packet in packets
                if packet.pts is not None and not packet.is_discard
            }
            self._keys = sorted(int(packet.pts or 0) for packet in packets if packet.is_keyframe)
            self._pts = sorted(shown)
            if not self._pts:
                raise InputError("holds no pictures; give a complete video")
            self._measure(stream, shown[self._pts[0]].duration or 0)
        self.num_packets = len(packets)
        self._turns = range(len(self._pts)) if fps is None else self._nearest(float(frame_rate(fps)))
        self._needed = set(self._turns)
        self._index = {pts: index for index, pts in enumerate(self._pts)}
        self._open = ExitStack()
        self._container, _ = self._open.enter_context(open_media(path))
        self._stream = _pictures_of(self._container)
        self._upright = UprightFrames(self._stream)
        self._frames = self._decoded(self._keys[0] if self._keys else self._pts[0])
        self._next = 0

    def _measure(self, stream: VideoStream, only_length: int) -> None:
        """The footage's own rate and duration, by the times of its frames: headers name odd rates, and for
        the last frame odd lengths, so that it counts as long as most."""
        tick = stream.time_base or Fraction(1)
        rate = stream.average_rate
        gaps = [after - before for before, after in pairwise(self._pts)]
        only = only_length or 1 / (rate or 25) / tick
        self._tick, self._gap = tick, Fraction(statistics.median(gaps) if gaps else only)
        self.duration_s = (self._pts[-1] - self._pts[0] + self._gap) * tick
        self.fps = len(self._pts) / self.duration_s
        if rate and abs(len(self._pts) / rate - self.duration_s) <= 2 * tick:
            self.fps = rate  # of which the times are rounded, to milliseconds for example

    def _nearest(self, fps: float) -> Sequence[int]:
        """The frame of each moment of a clip. Rounded times are equally near up to what rounding does."""
        count = max(1, round(float(self.duration_s) * fps))
        if len(self._pts) == 1:
            return [0] * count
        wanted = np.arange(count) / fps / float(self._tick)
        times = np.array(self._pts) - self._pts[0]
        after = np.searchsorted(times, wanted).clip(1, len(times) - 1)
        rounding = min(1.0, float(self._gap) / 10)
        is_later = times[after] - wanted < wanted - times[after - 1] - rounding
        chosen: list[int] = np.where(is_later, after, after - 1).tolist()
        return chosen

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.clear()
        self._open.__exit__(kind, error, trace)

    def __len__(self) -> int:
        return len(self._turns)

    @overload
    def __getitem__(self, index: int) -> Picture: ...

    @overload
    def __getitem__(self, index: slice) -> list[Picture]: ...

    def __getitem__(self, index: int | slice) -> Picture | list[Picture]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        index = self._turns[range(len(self))[index]]
        if index not in self._held:
            self._read(index)
        return self._held[index]

    def __iter__(self) -> Iterator[Picture]:
        return (self[index] for index in range(len(self)))

    def _read(self, wanted: int) -> None:
        """Decode up to a frame, from the place reached or from the key frame before it."""
        before = [pts for pts in self._keys if pts <= self._pts[wanted]]
        reached = self._pts[self._next] if self._next < len(self._pts) else None
        if reached is None or self._next > wanted or (before and before[-1] > reached):
            start = before[-1] if before else self._pts[0]
            self._container.seek(start, stream=self._stream)
            self._frames = self._decoded(start)
        for index, frame in self._frames:
            self._next = index + 1
            if wanted - index < FRAMES_HELD and index in self._needed:
                self._hold(index, self._fit(self._upright(frame)))
            if index >= wanted:
                break
        if wanted not in self._held:
            raise InputError(
                f"is broken: frame {wanted} of {len(self._pts)} cannot be decoded; make it again"
            )

    def _hold(self, index: int, picture: Picture) -> None:
        self._held[index] = picture
        self._held.move_to_end(index)
        while len(self._held) > FRAMES_HELD:
            self._held.popitem(last=False)

    def _decoded(self, start: int) -> Iterator[tuple[int, VideoFrame]]:
        """Shown frames with their index. Those before the key frame `start` may lack what they refer to."""
        for frame in self._container.decode(self._stream):
            if frame.pts is not None and frame.pts >= start and frame.pts in self._index:
                yield self._index[frame.pts], frame
