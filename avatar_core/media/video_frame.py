"""What a decoded frame shows: RGB in the colours of BT.709 or sRGB, with square pixels, upright."""

import struct
from fractions import Fraction

import cv2
import numpy as np
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

Picture = NDArray[np.uint8]

HDR = {int(ColorTrc.SMPTE2084): "PQ", int(ColorTrc.ARIB_STD_B67): "HLG"}

_WIDE_GAMUTS = (ColorPrimaries.BT2020, ColorPrimaries.SMPTE431, ColorPrimaries.SMPTE432)
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
        hdr, wide = frame.color_trc in HDR, frame.color_primaries in _WIDE_GAMUTS
        # Of HDR, a white of 203 nits becomes white (ITU-R BT.2408); what is brighter is cut.
        pixels = self._reformatter.reformat(
            frame,
            format="rgba" if has_alpha else "rgb24",
            src_colorspace=Colorspace.ITU709 if _is_untagged_hd(frame) else None,
            dst_color_trc=ColorTrc.IEC61966_2_1 if hdr else ColorTrc.BT709 if wide else None,
            dst_color_primaries=ColorPrimaries.BT709 if hdr or wide else None,
            threads=1,  # otherwise as many as there are cores
        ).to_ndarray()
        if has_alpha:
            alpha = pixels[..., 3:].astype(np.float32) / 255
            pixels = np.rint(pixels[..., :3] * alpha + 255 * (1 - alpha))
        return pixels.astype(np.uint8, copy=False)


def _is_untagged_hd(frame: VideoFrame) -> bool:
    """What says nothing of its colours is BT.709 from HD on, as players take it, and BT.601 below."""
    is_hd = frame.width >= _HD_WIDTH or frame.height >= _HD_HEIGHT
    return is_hd and frame.colorspace in _UNTAGGED and not frame.format.is_rgb


def _turned(pixels: Picture, frame: VideoFrame) -> Picture:
    """Phones film lying on their side, front cameras mirrored, and note it as a matrix: x' = a x + c y,
    y' = b x + d y."""
    noted = frame.side_data.get(Type.DISPLAYMATRIX)
    if noted is None:
        return pixels
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(noted))
    if abs(a) + abs(d) < abs(b) + abs(c):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
