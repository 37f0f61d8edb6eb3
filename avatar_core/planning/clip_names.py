"""File names of clips: safe, unique, and telling."""

import re
from collections import Counter

from slugify import slugify

from avatar_core.media.table import TableRows

MAX_NAME_BYTES = 120
TEXT_CHARS = 40  # of a text to be said, in the name of its clip

_NUMBER = re.compile(r"(-take\d+)?(-part\d+)?$")


def clip_names(rows: TableRows, *, numbered: bool = False) -> tuple[list[str], list[str]]:
    """A file name for each row, unique whatever the case of its letters, and warnings about doubled ones.

    `numbered`: rows may have several takes or parts, whose names must be free too.
    """
    names: list[str] = []
    warnings: list[str] = []
    taken: set[str] = set()
    used: Counter[str] = Counter()  # numbers given to a name so far
    columns = ("index", "name", "image", "video", "audio", "tts_text")
    for index, given, image, video, audio, text in rows.columns(*columns):
        wanted = slug(given or f"{_stem(image or video or '')}-{text[:TEXT_CHARS] if text else _stem(audio)}")
        name = wanted
        while not taken.isdisjoint(_claimed(name, numbered)):
            used[wanted.casefold()] += 1
            name = f"{_shortened(wanted, 8)}-{used[wanted.casefold()] + 1}"
        if name != wanted and given:
            warnings.append(f"row {index + 1}: name `{wanted}` is already used; this clip is called `{name}`")
        taken |= _claimed(name, numbered)
        names.append(name)
    return names, warnings


def _claimed(name: str, numbered: bool) -> set[str]:
    """`a-take2` may also be the second take of `a`, so it claims that name as well."""
    name = name.casefold()
    return {name, _NUMBER.sub("", name)} if numbered else {name}


def slug(text: str) -> str:
    """A safe file name: no separators, no leading dots, at most `MAX_NAME_BYTES` minus room for numbers."""
    name = slugify(text, lowercase=False, allow_unicode=True, regex_pattern=r"[^\w.-]+").strip(".-")
    while ".." in name:
        name = name.replace("..", ".")
    return _shortened(name, 24) or "clip"


def _shortened(name: str, reserve: int) -> str:
    return name.encode()[: MAX_NAME_BYTES - reserve].decode(errors="ignore").rstrip(".-")


def numbered_name(name: str, take: int, part: int | None) -> str:
    take_suffix = f"-take{take + 1}" if take else ""
    return name + take_suffix + (f"-part{part + 1}" if part is not None else "")


def _stem(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2].rpartition(".")[0] or uri.rpartition("/")[2]
