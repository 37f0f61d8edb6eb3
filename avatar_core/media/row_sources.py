"""What the clips of a row are made from, as names: `image:<uri>`, `video:<uri>`, `audio:<uri>`, and
`speech:...` for what a voice says. Equal names mean the same picture or recording."""

from collections.abc import Iterable, Iterator

from avatar_core.media.documents import SILENCE
from avatar_core.media.table import TableRow, TableRows

Speech = tuple[str, tuple[str, ...], int]
"""A text, the voices that say it, and which of them is meant, from 0."""


def picture_of(row: TableRow) -> str:
    return f"image:{row.image}" if row.image else f"video:{row.video}"


def recordings_of(row: TableRow) -> tuple[str, ...]:
    """In the speakers' order."""
    if row.tts_text:
        return tuple(map(_speech_name, _spoken(row.tts_text, (row.voice, row.voice_2))))
    return tuple(f"audio:{uri}" for uri in (row.audio, row.audio_2) if uri)


def combination_of(row: TableRow) -> str | None:
    """How the recordings go together: as `audio_type` says, or `turns` where only one of them holds speech at
    once."""
    if not row.audio_2:
        return "turns" if row.voice_2 else None
    is_silent = any(uri.startswith(SILENCE) for uri in (row.audio, row.audio_2))
    return "turns" if is_silent and row.audio_type == "para" else row.audio_type


def source_names(rows: TableRows) -> Iterator[tuple[str, ...]]:
    """All that the clips of each row are made from, in order; nothing for a row with an error."""
    columns = ("image", "video", "audio", "audio_2", "tts_text", "voice", "voice_2", "error")
    for image, video, audio, audio_2, text, voice, voice_2, error in rows.columns(*columns):
        if error:
            yield ()
            continue
        picture = f"image:{image}" if image else f"video:{video}"
        if text:
            yield (picture, *map(_speech_name, _spoken(text, (voice, voice_2))))
        else:
            yield (picture, *(f"audio:{uri}" for uri in (audio, audio_2) if uri))


def speeches_of(rows: TableRows) -> dict[str, Speech]:
    """All that is to be said, by name."""
    found: dict[str, Speech] = {}
    for text, voice, voice_2, error in rows.columns("tts_text", "voice", "voice_2", "error"):
        if text and not error:
            found |= {_speech_name(speech): speech for speech in _spoken(text, (voice, voice_2))}
    return found


def _spoken(text: str, voices: Iterable[str | None]) -> list[Speech]:
    named = tuple(voice for voice in voices if voice)
    return [(text, named, speaker) for speaker in range(len(named))]


def _speech_name(speech: Speech) -> str:
    text, voices, speaker = speech
    return f"speech:{speaker}:{','.join(voices)}:{text}"
