"""Opening recordings and videos with FFmpeg, hardened against files that name other files."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import av
from av.container import InputContainer
from av.stream import Disposition, Stream

from avatar_core.errors import InputError
from avatar_core.media.files import open_regular, refuse, sniff_file

AnyStream = TypeVar("AnyStream", bound=Stream)

TIMEOUT_S = 60.0
ALLOWED = "WAV, FLAC, MP3, AAC, Ogg, MP4, MOV, WebM"

_STILL = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
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
        kind = sniff_file(file)
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


def codec_name(stream: Stream) -> str | None:
    """None for a codec that FFmpeg does not know."""
    return stream.codec_context.codec.canonical_name if stream.codec_context else None


def chosen_stream(
    streams: Sequence[AnyStream], codecs: Collection[str], prefixes: tuple[str, ...] = ()
) -> AnyStream | None:
    """The stream that a player takes: one in a codec among `codecs`, or that begins with one of `prefixes`,
    before any other; of these the one marked as default, else the first. Never a cover picture."""
    moving = [stream for stream in streams if not stream.disposition & _STILL]

    def rank(stream: AnyStream) -> tuple[bool, bool]:
        codec = codec_name(stream) or ""
        usable = codec in codecs or (bool(prefixes) and codec.startswith(prefixes))
        return not usable, not stream.disposition & Disposition.default

    return min(moving, key=rank, default=None)
