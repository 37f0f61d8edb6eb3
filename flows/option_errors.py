"""What is wrong with an option, after the override or the file that it comes from."""

from collections.abc import Mapping, Sequence
from typing import Any

from avatar_core.backends.base import BACKENDS, find_backend
from avatar_core.config import Config, option_names
from avatar_core.errors import ConfigError
from avatar_core.option_types import option_type
from flows.config_files import OptionFiles
from flows.overrides import Override


def type_of(option: str, backend: str | None) -> Any:
    """The option's annotation with that backend; None where there is no such option."""
    if option.startswith("backend.") and backend in BACKENDS:
        return option_type(find_backend(backend).config_type, option.removeprefix("backend."))
    return option_type(Config, option)


def backend_options(backend: str | None) -> list[str]:
    return option_names(find_backend(backend).config_type, "backend.") if backend in BACKENDS else []


def origin(option: str, words: Sequence[Override], files: OptionFiles) -> str | None:
    """The override, else the file, that set an option or a part of it."""
    for word in reversed(words):
        if not word.is_choice and _overlap(word.option, option):
            return word.shown
    return next((label for label, values in files.read_so_far.items() if _holds(values, option)), None)


def explained(
    error: ConfigError, values: Mapping[str, Any], words: Sequence[Override], files: OptionFiles
) -> str:
    """One sentence for each override or file that is wrong."""
    backend = values.get("backend", {}).get("name")
    sentences: list[str] = []
    of_others: dict[str, list[str]] = {}
    for option, problem in error.problems.items():
        where = origin(option, words, files)
        if where is None:
            sentences.append(problem)
        elif (
            option.startswith("backend.")
            and backend in BACKENDS
            and _unknown(option, backend)
            and _with(option)
        ):
            of_others.setdefault(where, []).append(option)
        elif where.startswith("`"):
            no_file = f"; nor is there a file {where}" if problem == f"unknown option `{option}`" else ""
            sentences.append(f"{where}: {problem.removeprefix(f'option `{option}`: ')}{no_file}")
        else:
            sentences.append(f"{where}: {problem}")
    sentences += [_of_others(where, options, backend) for where, options in of_others.items()]
    return "; ".join(sentences) or str(error)


def _of_others(where: str, options: Sequence[str], backend: str) -> str:
    """A preset of another backend, for example."""
    others = [name for name in BACKENDS if not any(_unknown(option, name) for option in options)]
    with_it = f" {where.strip('`')}" if where.startswith("`") else ""
    advice = (
        f"; choose a backend that does: {', '.join(others)}, such as `backend={others[0]}{with_it}`"
        if others
        else ""
    )
    return f"{where} sets {', '.join(options)}, which the backend {backend} does not have{advice}"


def _with(option: str) -> list[str]:
    return [name for name in BACKENDS if not _unknown(option, name)]


def _unknown(option: str, backend: str) -> bool:
    return type_of(option, backend) is None


def _overlap(option: str, other: str) -> bool:
    return f"{option}.".startswith(f"{other}.") or f"{other}.".startswith(f"{option}.")


def _holds(values: Any, option: str) -> bool:
    for part in option.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True
