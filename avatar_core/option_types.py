"""What the type of an option allows: whether it is text, a list, a section, and how a message says so."""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "multiple_of": "a multiple of"}
_PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_MAPPING = "a mapping such as {name: value}"


def option_type(kind: Any, name: str) -> Any:
    """The annotation of the option `name`, dotted, of the dataclass `kind`: `Any` for what lies below an open
    mapping, None where there is no such option."""
    for part in name.split("."):
        if not dataclasses.is_dataclass(kind):
            return Any if kind is Any or any(_is_mapping(branch) for branch in branches(kind)) else None
        kind = get_type_hints(kind, include_extras=True).get(part)
    return kind


def branches(annotation: Any) -> list[Any]:
    """The alternatives of a union, bounds left off."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return branches(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [branch for part in get_args(annotation) for branch in branches(part)]
    return [annotation]


def is_text(annotation: Any) -> bool:
    """Whether the option takes text and nothing else, but for None."""
    return all(
        branch in (str, type(None)) or (get_origin(branch) is Literal and _all_text(branch))
        for branch in branches(annotation)
    )


def list_items(annotation: Any) -> Any:
    """The annotation of the items where the option takes a list, else None."""
    lists = [branch for branch in branches(annotation) if get_origin(branch) in (tuple, list, Sequence)]
    return get_args(lists[0])[0] if lists else None


def takes_only_lists(annotation: Any) -> bool:
    """Whether a list, or None, is all that the option takes."""
    return all(branch is type(None) or list_items(branch) is not None for branch in branches(annotation))


def needs_brackets(annotation: Any, value: Any) -> bool:
    """Whether a single value can only be meant as a list of one."""
    kinds = [branch for branch in branches(annotation) if list_items(branch) is None]
    if isinstance(value, str):
        return not (str in kinds or choices(annotation))
    return isinstance(value, int | float) and not {int, float, bool, Any}.intersection(kinds)


def choices(annotation: Any) -> list[str]:
    """The words of which the option takes one."""
    literals = [branch for branch in branches(annotation) if get_origin(branch) is Literal]
    return [word for branch in literals for word in get_args(branch) if isinstance(word, str)]


def described(annotation: Any) -> str:
    """What the option takes, such as "a number from 1 to 120, or null"."""
    origin = get_origin(annotation)
    if origin is Annotated:
        kind, *notes = get_args(annotation)
        return described(kind) + _bounds(notes)
    if origin in (Union, types.UnionType):
        return ", or ".join(described(part) for part in get_args(annotation))
    if origin is Literal:
        return " or ".join(filter(None, (", ".join(map(repr, words)) for words in _last_apart(annotation))))
    if annotation is type(None):
        return "null"
    if origin in (tuple, list, Sequence):
        parts = get_args(annotation)
        items = parts[0] if parts[-1] is ... or len(parts) == 1 else None
        return f"a list, each {described(items)}" if items else f"a list of {len(parts)}"
    if dataclasses.is_dataclass(annotation):
        names = ", ".join(field.name for field in dataclasses.fields(annotation))
        return f"the options in it by name ({names})"
    return _MAPPING if _is_mapping(annotation) else _PLAIN.get(annotation, "a value")


def _bounds(notes: Sequence[Any]) -> str:
    constraints = [c for note in notes for c in (note.metadata if isinstance(note, FieldInfo) else [note])]
    limits = {name: getattr(c, name) for name in _BOUNDS for c in constraints if hasattr(c, name)}
    words = []
    if "ge" in limits and "le" in limits:
        words.append(f"from {limits.pop('ge')} to {limits.pop('le')}")
    words += [f"{_BOUNDS[name]} {limit}" for name, limit in limits.items()]
    words += ["that is not empty" for c in constraints if getattr(c, "min_length", 0)]
    return f" {' and '.join(words)}" if words else ""


def _last_apart(annotation: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    words = get_args(annotation)
    return words[:-1], words[-1:]


def _all_text(annotation: Any) -> bool:
    return all(isinstance(word, str) for word in get_args(annotation))


def _is_mapping(annotation: Any) -> bool:
    return get_origin(annotation) in (dict, Mapping) or annotation in (dict, Mapping)
