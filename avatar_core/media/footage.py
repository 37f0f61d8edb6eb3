"""Footage: a video that is a source of pictures, as a sequence of upright frames."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from avatar_core.errors import InputError
from avatar_core.media.container import open_media
from avatar_core.media.files import refuse, sniff
from avatar_core.media.image import ImageLimits, check_size

Picture = NDArray[np.uint8]

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
    """Width and height of the upright pictures."""

    format: str
    codec: str
    width: int
    height: int
    fps: float
    num_frames: int
    duration_s: float


def probe_footage(path: str | Path, limits: FootageLimits | None = None) -> FootageProbe:
    """Frames are counted by packets; the first is decoded. Raises `InputError`."""
    limits = limits or FootageLimits()
    if (kind := sniff(path)) not in _FORMATS:
        raise refuse(kind, "MP4, MOV, WebM")
    with open_media(path) as (container, _):
        stream = _pictures_of(container)
        check_size(stream.codec_context.width, stream.codec_context.height, limits.picture)
        fps = float(stream.average_rate or 0)
        if not MIN_FPS <= fps <= MAX_FPS:
            raise InputError(f"has {fps:g} frames a second, allowed are {MIN_FPS} to {MAX_FPS}")
        promised, codec = stream.frames, stream.codec_context.codec.canonical_name
    with Footage(path) as footage:
        if promised > footage.num_packets:
            raise InputError(
                f"is truncated: its header says {promised} frames, {footage.num_packets} are there; copy it "
                "again"
            )
        duration_s = len(footage) / fps
        if duration_s > limits.max_duration_s:
            raise InputError(
                f"lasts {duration_s:.1f} s, allowed are {limits.max_duration_s:g} s at most; cut it"
            )
        height, width = footage[0].shape[:2]
    return FootageProbe(str(kind), codec, width, height, fps, len(footage), duration_s)


def _pictures_of(container: InputContainer) -> VideoStream:
    streams = [
        stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic
    ]
    if not streams or streams[0].codec_context is None:
        raise InputError("has no moving pictures, or was cut off; give a complete video")
    codec = streams[0].codec_context.codec.canonical_name
    if codec not in CODECS:
        raise InputError(f"has pictures in the codec {codec}; allowed: {', '.join(CODECS)}")
    return streams[0]


class Footage(Sequence[Any]):
    """The frames of a video, RGB [H, W, 3], upright, each after `fit`; to be used in a `with` block.

    Any frame may be asked for at any time. One after the other costs least; going back costs decoding from
    the key frame before, once for some `FRAMES_HELD` frames, which is all that is kept in memory.
    """

    def __init__(self, path: str | Path, fit: Callable[[Picture], Picture] = lambda picture: picture) -> None:
        self._fit = fit
        self._held: OrderedDict[int, Picture] = OrderedDict()
        with open_media(path) as (container, _):
            packets = [packet for packet in container.demux(_pictures_of(container)) if packet.size]
            shown = [packet for packet in packets if packet.pts is not None and not packet.is_discard]
            self._pts = sorted({int(packet.pts or 0) for packet in shown})
            self._keys = sorted(int(packet.pts or 0) for packet in packets if packet.is_keyframe)
        self.num_packets = len(packets)
        if not self._pts:
            raise InputError("holds no pictures; give a complete video")
        self._index = {pts: index for index, pts in enumerate(self._pts)}
        self._open = ExitStack()
        self._container, _ = self._open.enter_context(open_media(path))
        self._stream = _pictures_of(self._container)
        self._frames = self._decoded(self._keys[0] if self._keys else self._pts[0])
        self._next = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.clear()
        self._open.__exit__(kind, error, trace)

    def __len__(self) -> int:
        return len(self._pts)

    @overload
    def __getitem__(self, index: int) -> Picture: ...

    @overload
    def __getitem__(self, index: slice) -> list[Picture]: ...

    def __getitem__(self, index: int | slice) -> Picture | list[Picture]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        index = range(len(self))[index]
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
            if wanted - index < FRAMES_HELD:
                self._hold(index, self._fit(_upright(frame)))
            if index >= wanted:
                break
        if wanted not in self._held:
            raise InputError(f"is broken: frame {wanted} of {len(self)} cannot be decoded; make it again")

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


def _upright(frame: VideoFrame) -> Picture:
    """Phones film lying on their side and note by how much."""
    pixels = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
