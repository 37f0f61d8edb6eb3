"""Words of the command line such as `video.fps=30`: told from files, and read by the option's type."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from avatar_core.errors import ConfigError
from avatar_core.option_types import is_text, list_items, needs_brackets, takes_only_lists
from flows.config_files import GROUPS
from flows.plain_yaml import read_yaml

_OVERRIDE = re.compile(r"(?P<sign>\+{0,2})(?P<option>[A-Za-z_][\w.-]*)=(?P<value>.*)", re.DOTALL)
_REMOVAL = re.compile(r"~(?P<option>[A-Za-z_][\w.-]*)")
_ITEM = re.compile(r"""\s*('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\s*(?:,|$)|([^,]*)(?:,|$)""", re.DOTALL)

Grammar = Callable[[str], Any]
"""Reads a value as Hydra does, several separated by commas as `Several`. Raises `ValueError`."""


class Several(list[Any]):
    """Values separated by commas, without the brackets of a list."""


@dataclass(frozen=True)
class Override:
    """`value` is None where the option is to be left at its default (`~option`)."""

    word: str
    option: str
    value: str | None

    @property
    def shown(self) -> str:
        """As typed, but for what may be a credential."""
        secret = self.option.partition(".")[0] == "storage" and self.option != "storage.root"
        return f"`{self.option}=...`" if secret and not self.is_choice else f"`{self.word}`"

    @property
    def is_choice(self) -> bool:
        """Whether it names a file of a group, or a backend; `storage={root: a}` sets options."""
        named = self.option in GROUPS or self.option == "backend.name"
        return named and not (self.value or "").lstrip().startswith("{")


def is_override(word: str) -> bool:
    """Whether a command-line word sets an option and is not a file."""
    return bool(_OVERRIDE.match(word) or _REMOVAL.fullmatch(word)) and not os.path.exists(word)  # noqa: PTH110


def read_override(word: str) -> Override:
    """Raises `ConfigError` for what sets no option."""
    if found := _OVERRIDE.fullmatch(word):
        return Override(word, found["option"], found["value"])
    if found := _REMOVAL.fullmatch(word):
        return Override(word, found["option"], None)
    raise ConfigError(f"`{word}` sets no option; write it as NAME=VALUE, such as video.fps=30")


def read_value(override: Override, annotation: Any, grammar: Grammar) -> Any:
    """The value as the option's type reads it: text as it stands, unless it is `null` or in quotes; lists
    with or without brackets; the rest as Hydra reads it. Text comes escaped for OmegaConf."""
    text = (override.value or "").strip()
    if override.value is None or (text == "null" and annotation is not None):
        return None
    if annotation is None or is_text(annotation):
        return _unquoted(override.value, grammar)
    items = list_items(annotation)
    bracketed = text.startswith("[") and text.endswith("]")
    if items is not None and is_text(items) and takes_only_lists(annotation) and text:
        return [_unquoted(item, grammar) for item in _split(text[1:-1] if bracketed else text)]
    value = _structure(override.value, grammar)
    if isinstance(value, Several) and annotation is Any:
        return escaped(override.value)
    if isinstance(value, Several) and items is None:
        raise ConfigError(
            f"{override.shown}: `{override.option}` takes one value, got {len(value)}; start a run for each"
        )
    if isinstance(value, Several) or (items is not None and needs_brackets(annotation, value)):
        return list(value) if isinstance(value, Several) else [value]
    return value


def read_choice(override: Override) -> str | list[str] | None:
    """The name of a group's file, or several in brackets; None for none."""
    text = (override.value or "").strip()
    if override.value is None or text == "null":
        return None
    if text.startswith("[") and text.endswith("]"):
        return [_bare(name) for name in _split(text[1:-1])]
    return _bare(text)


def escaped(value: Any) -> Any:
    """The value with every text as OmegaConf takes it literally: backslashes count only before `${`."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    return [escaped(item) for item in value] if isinstance(value, list | tuple) else value


def quoted(value: Any) -> str:
    """A value as an override holds it literally, whatever is in it: backslashes count only before a quote."""
    text = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), escaped(str(value)))
    return f"'{text}'"


def _bare(name: str) -> str:
    return name[1:-1] if len(name) > 1 and name[0] == name[-1] and name[0] in "'\"" else name


def _unquoted(text: str, grammar: Grammar) -> str:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        try:
            value = grammar(text)
        except ValueError:
            value = None
        if isinstance(value, str):
            return value
    escape: str = escaped(text)
    return escape


def _split(text: str) -> Sequence[str]:
    return [(found[1] or found[2]).strip() for found in _ITEM.finditer(text) if found[0]]


def _structure(text: str, grammar: Grammar) -> Any:
    try:
        value = grammar(text)
    except ValueError:
        value = text
    if not isinstance(value, str):
        return value
    if text.lstrip().startswith(("[", "{")):
        try:
            return escaped(read_yaml(text))
        except yaml.YAMLError:
            pass
    return _unquoted(text, grammar)
