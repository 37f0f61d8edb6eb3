"""Every error this project raises on purpose.

    AvatarError
    ├── ConfigError    an option, override or batch file is wrong
    ├── InputError     a table, picture or recording is wrong (becomes the row's failure)
    ├── WeightsError   model files are absent, altered or do not fit
    ├── StoreError     a stored result is missing, altered or unreachable
    ├── BackendError   a backend cannot do what was asked
    └── Cancelled      the user stopped the run

A message says what was got, what is allowed and what to do.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager


class AvatarError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(AvatarError):
    """`problems` says what is wrong by option, dotted, where that is what is wrong."""

    def __init__(self, message: str, problems: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.problems = dict(problems or {})


class InputError(AvatarError):
    pass


class WeightsError(AvatarError):
    pass


class StoreError(AvatarError):
    """`keys` names the results that must be computed again, where that would help."""

    def __init__(self, message: str, keys: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.keys = tuple(keys)


class BackendError(AvatarError):
    pass


class Cancelled(AvatarError):  # noqa: N818 - an ending, not a fault
    pass


@contextmanager
def about(subject: str) -> Iterator[None]:
    """Input errors from within begin with what they are about: "picture a.png: is truncated"."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{subject}: {error}") from error


def shown(value: object) -> str:
    """A value as a message quotes it: its `repr`, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
