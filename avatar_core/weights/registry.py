"""The list of model files that the project can use: `weights/registry.yaml`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import PurePosixPath
from typing import Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from avatar_core.errors import WeightsError
from avatar_core.resources import resource


@dataclass(frozen=True)
class File:
    """`member` is the file's path inside the distribution that carries it."""

    member: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """Files of one model: patterns in `folder` (`.`: the repository itself), each of which must match unless
    it is `optional`. A part `on_request` does not belong to the whole: it comes by its own name only."""

    folder: str
    files: tuple[str, ...]
    optional: tuple[str, ...] = ()
    on_request: bool = False

    @property
    def required(self) -> tuple[str, ...]:
        """Patterns with the folder."""
        return tuple(self._inside(pattern) for pattern in self.files)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The required ones and the optional ones."""
        return tuple(self._inside(pattern) for pattern in self.files + self.optional)

    def _inside(self, pattern: str) -> str:
        return (PurePosixPath(self.folder) / pattern).as_posix()


@dataclass(frozen=True)
class Repository:
    """A model repository at a revision."""

    project: str
    version: str


@dataclass(frozen=True)
class Entry:
    """`kind` says where the files come from: `package` = an installed dependency of ours, used in place;
    `wheel` = single members of a wheel that is never installed; `huggingface` = a model repository, `version`
    its revision, or several `repositories` by the folder that each one's files lie in; `random` = made by
    `avatar weights tiny`, in the layout of `project`. The first two have `files` with known hashes, the
    others `parts`."""

    title: str
    kind: Literal["package", "wheel", "huggingface", "random"]
    project: str
    version: str
    licence: str
    files: Mapping[str, File] = field(default_factory=dict)
    parts: Mapping[str, Part] = field(default_factory=dict)
    repositories: Mapping[str, Repository] = field(default_factory=dict)

    @property
    def sources(self) -> Mapping[str, Repository]:
        """Repositories by folder, which is empty for the only one."""
        return self.repositories or {"": Repository(self.project, self.version)}


@cache
def load_registry() -> Mapping[str, Entry]:
    path = resource("weights/registry.yaml")
    try:
        return TypeAdapter(dict[str, Entry]).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise WeightsError(f"the weights registry {path} cannot be read: {error}") from error
