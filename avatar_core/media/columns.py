"""The names of a table's columns."""

from collections import Counter
from collections.abc import Collection
from functools import lru_cache
from itertools import chain, count

from avatar_core.errors import InputError
from avatar_core.media.cells import as_text, plain

_BLANKS = " \t\r\n\v\f\xa0\u200b\ufeff"
"""Also those that do not show, such as a second byte order mark."""


@lru_cache(256)
def column_names(given: tuple[str, ...], known: frozenset[str]) -> tuple[str, ...]:
    """The columns without blanks around them, each of another name. Of those that mean something (`known`,
    which count without case) there must be one; raises `InputError`."""
    names = [as_text(plain(name)).strip(_BLANKS) for name in given]
    doubled = [name for name, count in Counter(map(str.lower, names)).items() if count > 1 and name in known]
    if doubled:
        raise InputError(
            f"has the column {', '.join(map(repr, doubled))} more than once; rename or remove one"
        )
    taken = {*names}
    unique: list[str] = []
    for position, name in enumerate(names, start=1):
        if not name or name in unique:
            name = _free(name or f"column_{position}", taken)
            taken.add(name)
        unique.append(name)
    return tuple(unique)


def _free(name: str, taken: Collection[str]) -> str:
    """The name, or the first that is free of those with a number behind it."""
    names = chain([name], (f"{name}_{number}" for number in count(2)))
    return next(each for each in names if each not in taken)
