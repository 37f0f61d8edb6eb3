"""Texts to be spoken: of one speaker, or of two in turns marked as `(s1) Hello. (s2) Hi there. (s1) Bye.`"""

import re
from dataclasses import dataclass

from avatar_core.errors import InputError, shown

_TAG = re.compile(r"\(s(\d+)\)")
# The first letter is the language. Japanese and Mandarin need packages that the extra `tts` does not bring.
_VOICE = re.compile(r"(?:.*/)?([abefhip][fm]_[a-z0-9_]+)(?:\.pt)?")


@dataclass(frozen=True)
class Turn:
    """`speaker` counts from 0."""

    speaker: int
    text: str


def voice_name(value: str) -> str:
    """`af_heart` of itself or of its file's name, `weights/Kokoro-82M/voices/af_heart.pt`."""
    found = _VOICE.fullmatch(value.strip())
    if not found:
        raise InputError(
            f"{shown(value)} is not the name of a Kokoro voice; give one such as af_heart or am_adam, of a "
            "language whose letter is a (American), b (British), e, f, h, i or p"
        )
    return found[1]


def split_turns(text: str, speakers: int) -> list[Turn]:
    """What follows a tag up to the next one is a turn. Raises `InputError` for all that would go unsaid."""
    before, *rest = _TAG.split(text)
    if speakers == 1:
        if rest:
            raise InputError(
                f"the tag (s{rest[0]}) marks turns of two speakers; name `voice_2` too, or take the tags out"
            )
        return [Turn(0, text.strip())]
    if not rest:
        raise InputError("has no turns for two speakers; write (s1) ... (s2) ..., or leave `voice_2` empty")
    if before.strip():
        raise InputError(f"nobody says {shown(before.strip())} before the first tag; put (s1) or (s2) there")
    turns = []
    for number, said in zip(rest[::2], rest[1::2], strict=True):
        if number not in ("1", "2"):
            raise InputError(f"the tag (s{number}) names no speaker; allowed: (s1), (s2)")
        if not said.strip():
            raise InputError(f"a turn of (s{number}) is empty; write what is said after its tag")
        turns.append(Turn(int(number) - 1, said.strip()))
    return turns
