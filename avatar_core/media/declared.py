"""How long a recording or video is by what its file declares of itself, to tell when it was cut off."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from av.container import InputContainer

from avatar_core.errors import InputError
from avatar_core.media.container import open_media
from avatar_core.media.files import id3_length, open_regular

TOLERANCE_S = 0.1

_UNKNOWN_SIZES = (0, 0xFFFFFFFF)  # of a WAV that was written to a pipe
_PAGE = struct.Struct("<4sBBqIIIB")  # of Ogg
_MPEG_VERSIONS = (3, 2, 0)  # as a frame codes 1, 2 and 2.5
_MP3_HEAD_BYTES = 4096  # more than the first frame
_SEGMENT, _INFO, _CLUSTER, _DURATION, _SCALE = 0x18538067, 0x1549A966, 0x1F43B675, 0x4489, 0x2AD7B1
_MAX_ELEMENTS = 10_000


def truncated(promised_s: float, found_s: float) -> InputError:
    return InputError(
        f"is truncated: its header says {promised_s:.2f} s, {found_s:.2f} s could be decoded; copy it again"
    )


def wav_data_bytes(path: str | Path) -> int | None:
    """FFmpeg takes the smaller of header and file, which hides a cut file."""
    wide = None
    with open_regular(path) as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", head)
            if name == b"ds64" and len(sizes := file.read(16)) == 16:  # of RF64 and BW64
                wide = struct.unpack("<Q", sizes[8:])[0]
                size -= 16
            if name == b"data":
                return wide if size == 0xFFFFFFFF and wide else None if size in _UNKNOWN_SIZES else int(size)
            file.seek(size + size % 2, os.SEEK_CUR)
    return None


def mp3_samples(path: str | Path) -> int | None:
    """Samples per channel by the Xing, Info or VBRI header, encoder delay and padding included; None without
    such a header."""
    with open_regular(path) as file:
        start = 0
        while length := id3_length(head := file.read(_MP3_HEAD_BYTES)):
            start += length
            file.seek(start)
    at = next((at for at in range(len(head) - 4) if _is_mpeg_frame(head[at : at + 4])), None)
    if at is None:
        return None
    version, mono = head[at + 1] >> 3 & 3, head[at + 3] >> 6 == 3
    side_info = (17 if mono else 32) if version == 3 else (9 if mono else 17)
    frames = None
    xing = head[at + 4 + side_info :][:12]
    if xing[:4] in (b"Xing", b"Info") and len(xing) == 12 and xing[7] & 1:
        (frames,) = struct.unpack(">I", xing[8:])
    elif (vbri := head[at + 36 :][:18])[:4] == b"VBRI" and len(vbri) == 18:
        (frames,) = struct.unpack(">I", vbri[14:])
    return frames * (1152 if version == 3 else 576) if frames else None


def _is_mpeg_frame(head: bytes) -> bool:
    """Of layer III, with a known bit rate and sample rate."""
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3
    known = 0 < head[2] >> 4 < 15 and head[2] >> 2 & 3 < 3
    return head[0] == 0xFF and head[1] >= 0xE0 and version in _MPEG_VERSIONS and layer == 1 and known


def check_ogg(path: str | Path) -> None:
    """Raises `InputError` where the file ends in the middle of a page, or of a packet."""
    complete = True
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        while (head := file.read(_PAGE.size))[:4] == b"OggS":
            segments = file.read(head[-1]) if len(head) == _PAGE.size else b""
            whole = len(head) == _PAGE.size and len(segments) == head[-1]
            end = file.tell() + sum(segments)
            complete = whole and end <= size and segments[-1:] != b"\xff"
            file.seek(end)
    if not complete:
        raise InputError("is truncated: it ends in the middle of a page; copy it again")


class _Element(NamedTuple):
    """Of Matroska: where its content begins and ends; `end` is None where the file does not say."""

    name: int
    start: int
    end: int | None


def check_matroska(path: str | Path) -> None:
    """Raises `InputError` where the file is shorter than it says and its tracks end before their duration.
    What was recorded live does not know its size, and its duration, if any, was measured by a clock."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        segment = next((found for found in _elements(file, 0, size) if found.name == _SEGMENT), None)
        if segment is None or segment.end is None or segment.end <= size:
            return
        promised_s = _matroska_duration_s(file, segment, size)
    if promised_s:
        with open_media(path) as (container, _):
            found_s = _last_end_s(container)
        if promised_s - found_s > TOLERANCE_S:
            raise truncated(promised_s, found_s)


def _matroska_duration_s(file: BinaryIO, segment: _Element, size: int) -> float | None:
    info = None
    for element in _elements(file, segment.start, size):
        if element.name == _INFO:
            info = element
        if element.name in (_INFO, _CLUSTER):
            break
    if info is None or info.end is None:
        return None
    values = {}
    for element in _elements(file, info.start, min(info.end, size)):
        if element.name in (_DURATION, _SCALE) and element.end is not None:
            file.seek(element.start)
            values[element.name] = file.read(min(8, element.end - element.start))
    scale = int.from_bytes(values[_SCALE], "big") if _SCALE in values else 1_000_000
    duration = values.get(_DURATION, b"")
    form = {4: ">f", 8: ">d"}.get(len(duration))
    return struct.unpack(form, duration)[0] * scale / 1e9 if form else None


def _elements(file: BinaryIO, start: int, end: int) -> Iterator[_Element]:
    """The elements of one level, up to the first of unknown length."""
    for _ in range(_MAX_ELEMENTS):
        if start >= end:
            return
        file.seek(start)
        name, _ = _number(file, keep_marker=True)
        length, is_unknown = _number(file)
        if name is None or length is None:
            return
        begin = file.tell()
        yield _Element(name, begin, None if is_unknown else begin + length)
        if is_unknown:
            return
        start = begin + length


def _number(file: BinaryIO, keep_marker: bool = False) -> tuple[int | None, bool]:
    """A number of EBML's variable width, and whether all its bits are set, which means unknown."""
    first = file.read(1)
    width = 9 - first[0].bit_length() if first else 9
    rest = file.read(width - 1) if width < 9 else b""
    if width > 8 or len(rest) < width - 1:
        return None, False
    value, bits = int.from_bytes(first + rest, "big"), (1 << 7 * width) - 1
    return value if keep_marker else value & bits, value & bits == bits


def _last_end_s(container: InputContainer) -> float:
    """Where the last packet of any track ends; one without a duration lasts as long as the one before."""
    latest, before = 0.0, dict[int, float]()
    for packet in container.demux():
        if packet.size and packet.pts is not None and packet.time_base is not None:
            start = float(packet.pts * packet.time_base)
            gap = max(0.0, start - before.get(packet.stream_index, start))
            length = float(packet.duration * packet.time_base) if packet.duration else gap
            before[packet.stream_index] = start
            latest = max(latest, start + length)
    return latest
