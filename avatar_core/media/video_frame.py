"""What a decoded frame shows: its colours as BT.709 or sRGB has them, with square pixels, upright."""

import struct
from fractions import Fraction
from typing import Any

import cv2
import numpy as np
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from avatar_core.media.wide_colour import WideToSrgb, is_wide

Picture = NDArray[np.uint8]

_UNTAGGED = (2, 3)  # AVCOL_SPC_UNSPECIFIED, AVCOL_SPC_RESERVED
_HD_WIDTH, _HD_HEIGHT = 1280, 720
_MAX_ASPECT = 10  # of a pixel; beyond it the header is wrong


def square_size(stream: VideoStream) -> tuple[int, int]:
    """Width and height with square pixels, before the frame is turned: one side grows and none shrinks."""
    width, height = stream.codec_context.width, stream.codec_context.height
    aspect = stream.sample_aspect_ratio or Fraction(1)
    if not Fraction(1, _MAX_ASPECT) <= aspect <= _MAX_ASPECT:
        return width, height
    return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


class UprightFrames:
    """Makes pictures of a stream's frames, all of one size even where the frames change theirs."""

    def __init__(self, stream: VideoStream) -> None:
        self._size = square_size(stream)
        self._reformatter = VideoReformatter()
        self._wide: dict[tuple[int, int], WideToSrgb] = {}

    def __call__(self, frame: VideoFrame) -> Picture:
        """RGB [H, W, 3]; what is transparent is put on white."""
        pixels = self._rgb(frame)
        if pixels.shape[1::-1] != self._size:
            pixels = cv2.resize(pixels, self._size, interpolation=cv2.INTER_CUBIC).astype(
                np.uint8, copy=False
            )
        return np.ascontiguousarray(_turned(pixels, frame))

    def _rgb(self, frame: VideoFrame) -> Picture:
        has_alpha = any(component.is_alpha for component in frame.format.components)
        wide = is_wide(frame.color_trc, frame.color_primaries)
        form = ("rgba64le" if has_alpha else "rgb48le") if wide else "rgba" if has_alpha else "rgb24"
        pixels: Any = self._reformatter.reformat(
            frame,
            format=form,
            src_colorspace=Colorspace.ITU709 if _is_untagged_hd(frame) else None,
            threads=1,  # otherwise as many as there are cores
        ).to_ndarray()
        colours = pixels[..., :3]
        if wide:
            colours = self._to_srgb(frame)(colours)
        if has_alpha:
            alpha = pixels[..., 3:].astype(np.float32) / np.iinfo(pixels.dtype).max
            colours = np.rint(colours * alpha + 255 * (1 - alpha))
        return np.asarray(colours, np.uint8)

    def _to_srgb(self, frame: VideoFrame) -> WideToSrgb:
        """Frames of a stream seldom differ."""
        kind = (frame.color_trc, frame.color_primaries)
        if kind not in self._wide:
            self._wide[kind] = WideToSrgb(*kind)
        return self._wide[kind]


def _is_untagged_hd(frame: VideoFrame) -> bool:
    """What says nothing of its colours is BT.709 from HD on, as players take it, and BT.601 below."""
    is_hd = frame.width >= _HD_WIDTH or frame.height >= _HD_HEIGHT
    return is_hd and frame.colorspace in _UNTAGGED and not frame.format.is_rgb


def _turned(pixels: Picture, frame: VideoFrame) -> Picture:
    """Phones film lying on their side, front cameras mirrored, and note it as a matrix: x' = a x + c y,
    y' = b x + d y."""
    side_data: Any = frame.side_data
    noted = side_data.get(Type.DISPLAYMATRIX)
    if noted is None:
        return pixels
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(noted))
    if abs(a) + abs(d) < abs(b) + abs(c):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
