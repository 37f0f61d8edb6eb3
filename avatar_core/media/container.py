"""Opening recordings and videos with FFmpeg, hardened against files that name other files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
from av.container import InputContainer

from avatar_core.errors import InputError
from avatar_core.media.files import HEAD_BYTES, open_regular, refuse, sniff_head

TIMEOUT_S = 60.0
ALLOWED = "WAV, FLAC, MP3, AAC, Ogg, MP4, MOV, WebM"

_DEMUXERS = {
    "wav": "wav",
    "flac": "flac",
    "mp3": "mp3",
    "aac": "aac",
    "ogg": "ogg",
    "mp4": "mov,mp4,m4a,3gp,3g2,mj2",
    "mov": "mov,mp4,m4a,3gp,3g2,mj2",
    "webm": "matroska,webm",
}


@contextmanager
def open_media(path: str | Path) -> Iterator[tuple[InputContainer, str]]:
    """The open container and its sniffed format; every FFmpeg error inside becomes `InputError`.

    FFmpeg gets an open file, never a name, so no protocol is reachable, and one demuxer only, so a
    playlist under another name does not open.
    """
    with open_regular(path) as file:
        kind = sniff_head(file.read(HEAD_BYTES))
        file.seek(0)
        if kind not in _DEMUXERS:
            raise refuse(kind, ALLOWED)
        options = {"format_whitelist": _DEMUXERS[kind], "protocol_whitelist": "none"}
        try:
            with av.open(
                file, "r", options=options, timeout=TIMEOUT_S, metadata_errors="replace"
            ) as container:
                yield container, kind
        except av.error.FFmpegError as error:
            reason = error.strerror or type(error).__name__
            raise InputError(f"is a broken {kind.upper()} file ({reason}); make it again") from error
