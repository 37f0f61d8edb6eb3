"""Opening a local file without surprises, and telling its format by its first bytes.

Messages leave the file's name out: by the time a file is read it is often a copy named by its hash, so
whoever knows the name that the user wrote puts it in front.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from avatar_core.errors import InputError

HEAD_BYTES = 1024

_SIGNATURES = (
    (0, b"\x89PNG\r\n\x1a\n", "png"),
    (0, b"\xff\xd8\xff", "jpeg"),
    (8, b"WEBP", "webp"),
    (8, b"WAVE", "wav"),
    (8, b"AVI ", "avi"),
    (0, b"fLaC", "flac"),
    (0, b"OggS", "ogg"),
    (0, b"ID3", "mp3"),
    (0, b"\x1aE\xdf\xa3", "webm"),
    (4, b"ftypqt", "mov"),
    (4, b"ftypavi", "avif"),
    (4, b"ftyphe", "heic"),
    (4, b"ftypmif1", "heic"),
    (4, b"ftypmsf1", "heic"),
    (4, b"ftyp", "mp4"),
    (4, b"moov", "mov"),
    (4, b"mdat", "mov"),
    (4, b"wide", "mov"),
    (4, b"JXL ", "jpeg xl"),
    (0, b"\xff\x0a", "jpeg xl"),
    (4, b"jP  ", "jpeg 2000"),
    (0, b"GIF8", "gif"),
    (0, b"BM", "bmp"),
    (0, b"II*\0", "tiff"),
    (0, b"MM\0*", "tiff"),
    (0, b"8BPS", "psd"),
    (0, b"%PDF", "pdf"),
    (0, b"PK\x03\x04", "zip"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"PAR1", "parquet"),
    (0, b"FORM", "aiff"),
)
_PLAYLISTS = ("#extm3u", "ffconcat", "[playlist]", "v=0")


def open_regular(path: str | Path, follow_links: bool = True) -> BinaryIO:
    """Only a non-empty regular file opens: a folder, pipe or device raises `InputError` at once."""
    try:
        path = os.path.realpath(path) if follow_links else path
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"cannot be opened ({reason}); give an existing file") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise InputError(f"is a {_kind(status.st_mode)}; give a regular file")
    if status.st_size == 0:
        os.close(descriptor)
        raise InputError("is empty (0 bytes)")
    return os.fdopen(descriptor, "rb")


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"))
    return next((name for test, name in kinds if test(mode)), "device")


def sniff(path: str | Path) -> str | None:
    """'png', 'jpeg', 'webp', 'wav', 'flac', 'mp3', 'aac', 'ogg', 'mp4', 'mov', 'webm', another known
    format, 'playlist', 'svg', 'html' or 'text'; None where the first bytes tell nothing."""
    with open_regular(path) as file:
        return sniff_file(file)


def sniff_file(file: BinaryIO) -> str | None:
    """The same of an open file. An ID3 tag may stand before AAC and FLAC, too."""
    head, start = file.read(HEAD_BYTES), 0
    kind = sniff_head(head)
    while length := id3_length(head):
        start += length
        file.seek(start)
        head = file.read(HEAD_BYTES)
    if start and (behind := sniff_head(head)) in ("aac", "flac"):
        kind = behind
    file.seek(0)
    return kind


def id3_length(head: bytes) -> int:
    """Bytes of the ID3 tag that begins here; 0 if there is none."""
    if head[:3] != b"ID3" or len(head) < 10:
        return 0
    has_footer = head[5] & 0x10
    size = sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    return size + (20 if has_footer else 10)


def sniff_head(head: bytes) -> str | None:
    for offset, magic, name in _SIGNATURES:
        if head.startswith(magic, offset):
            return name
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:  # MPEG frame synchronisation
        return "aac" if head[1] & 0x06 == 0 else "mp3"
    return _sniff_text(head)


def _sniff_text(head: bytes) -> str | None:
    try:
        text = head.decode("utf-8-sig", errors="ignore" if len(head) == HEAD_BYTES else "strict")
    except UnicodeDecodeError:
        return None
    if any(ord(character) < 9 for character in text):
        return None
    start = text.lstrip().lower()
    if start.startswith(_PLAYLISTS):
        return "playlist"
    if start.startswith("<"):
        return "svg" if "<svg" in start else "html" if "<html" in start or "<!doctype" in start else "text"
    return "text" if start else None


def refuse(found: str | None, allowed: str) -> InputError:
    """The error for content of the wrong format; `allowed` says in words what is accepted."""
    names = {
        None: "of no known format",
        "playlist": "a playlist (a text that names other media)",
        "html": "an HTML page",
        "text": "a text",
    }
    return InputError(f"is {names.get(found, f'in the format {str(found).upper()}')}; allowed: {allowed}")
