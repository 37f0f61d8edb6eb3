"""Files of options: found by name or path, read, and made what Hydra composes.

A batch or preset file is written as anybody would write it: options in full (`video: {fps: 30}`), groups by
name (`preset: draft`). Hydra's own ways, a `# @package` line and a `defaults` list, work too.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from avatar_core.config import nearest
from avatar_core.errors import ConfigError
from avatar_core.resources import resource
from flows.plain_yaml import TWICE, parse_options

GROUPS = ("batch", "preset", "storage", "backend")
"""What is chosen by name; what comes first wins."""

CONFIG_DIR = "AVATAR_CONFIG_DIR"
"""Environment variable with the folder of one's own files, where no other is named."""

PRIMARY = "config"

OF_A_SECTION = ("storage", "backend")
"""Groups whose files hold the options of the section of that name, not those of a whole run."""

SUFFIXES = (".yaml", ".yml")

_HEADER = re.compile(r"^#\s*@package\s+(\S+)", re.MULTILINE)


class OptionFiles:
    """The files that may be chosen: in the user's own folder, if there is one, then in ours."""

    def __init__(self, own: Path | None = None) -> None:
        self._ours = resource("conf")
        self._folders = [*([own] if own else []), self._ours]
        self.read_so_far: dict[str, dict[str, Any]] = {}
        """Options by the label of their file; Hydra reads those first that win."""

    def choice(self, group: str, value: Any, where: str) -> Any:
        """What Hydra is to call the chosen file: a name, several, or None. Raises `ConfigError`."""
        if isinstance(value, list):
            return [self.choice(group, item, where) for item in value]
        if value is None and group not in OF_A_SECTION:
            return None
        name = "null" if value is None else str(value)
        if name.endswith(SUFFIXES):
            path = Path(name).expanduser()
            if path.is_file():
                return quote(str(path.resolve()), safe="")
            if not self._find(group, path.stem):
                raise ConfigError(f"{where}: no such file: {path.absolute()}")
            name = path.stem
        elif not self._find(group, name):
            names = self.names(group)
            hint = nearest(name, names) or (
                f"; one of your own is found by its path, {group}=./NAME.yaml, or as {group}/NAME.yaml in "
                "the folder named by --config-dir"
            )
            raise ConfigError(
                f"{where}: unknown {group} `{name}`; choose one of: {', '.join(names) or 'none yet'}{hint}"
            )
        return quote(name, safe="")

    def names(self, group: str) -> list[str]:
        return sorted({path.stem for folder in self._folders for path in _yaml_files(folder / group)})

    def find(self, config_path: str) -> Path | None:
        """The file that Hydra calls `config_path`: a group, and what `choice` gave."""
        if config_path == PRIMARY:
            return self._ours / f"{PRIMARY}.yaml"
        group, _, name = config_path.partition("/")
        if group not in GROUPS or not name:
            return None
        name = unquote(name)
        return Path(name) if name.startswith("/") else self._find(group, name)

    def read(self, config_path: str) -> dict[str, Any]:
        """Options from the root on, with a `defaults` list for Hydra. Raises `ConfigError`."""
        path = self.find(config_path)
        assert path is not None
        text = _text(path)
        values = parse_options(text, path)
        group = config_path.partition("/")[0]
        if config_path == PRIMARY:
            return values
        where = self._label(path, group)
        defaults = values.pop("defaults", None) or []
        if not isinstance(defaults, list):
            raise ConfigError(
                f"{where}: `defaults` is a list of files, such as [preset: draft]; got {defaults!r}"
            )
        values = _from_the_root(where, values, _HEADER.search(text), group)
        chosen, built_on = self._choices(where, group, defaults, values)
        if group == "backend" and "name" not in values.get(group, {}) and built_on == ["_self_"]:
            raise ConfigError(f"{where}: has no `name`; write which backend it is for, such as name: preview")
        self.read_so_far[where] = values
        return {**values, "defaults": [*built_on, *({f"override /{g}": name} for g, name in chosen.items())]}

    def _find(self, group: str, name: str) -> Path | None:
        for folder in self._folders:
            found = [folder / group / f"{name}{suffix}" for suffix in SUFFIXES]
            found = [path for path in found if path.is_file()]
            if len(found) > 1:
                raise ConfigError(f"there are both {found[0]} and {found[1]}; remove one of them")
            if found:
                return found[0]
        return None

    def _label(self, path: Path, group: str) -> str:
        return f"`{group}={path.stem}`" if path.is_relative_to(self._ours) else str(path)

    def _choices(
        self, where: str, group: str, defaults: list[Any], values: dict[str, Any]
    ) -> tuple[dict[str, Any], list[Any]]:
        """The groups that a file chooses, taken out of its `values`, and what it builds on, itself last."""
        chosen: dict[str, Any] = {}
        built_on: list[Any] = []
        for entry in defaults:
            name, value = _group_of(entry, group)
            if name in GROUPS and name != group:
                chosen[name] = self.choice(name, value, where)
            elif name == group:
                built_on.append(self.choice(group, value, where))
            else:
                built_on.append(entry)
        for name, value in _named_groups(values) if group not in OF_A_SECTION else ():
            if name != group:
                chosen[name] = self.choice(name, value, where)
            elif value is not None:
                built_on.insert(0, self.choice(group, value, where))
        return chosen, built_on if "_self_" in built_on else [*built_on, "_self_"]


def _yaml_files(folder: Path) -> Iterator[Path]:
    return (path for suffix in SUFFIXES for path in folder.glob(f"*{suffix}") if path.is_file())


def _group_of(entry: Any, group: str) -> tuple[str, Any]:
    """`{override /preset: draft}` is the group preset and its file draft; a bare name is of `group`."""
    if isinstance(entry, dict) and len(entry) == 1:
        key, value = next(iter(entry.items()))
        return str(key).removeprefix("override ").strip().removeprefix("/"), value
    plain = isinstance(entry, str) and entry != "_self_" and not re.search("[/@$]", entry)
    return (group, entry) if plain else ("", entry)


def _named_groups(values: dict[str, Any]) -> list[tuple[str, Any]]:
    """Groups that a file chooses as `preset: draft` or `backend: {name: ditto}`; they leave `values`."""
    named = []
    for group in GROUPS:
        section = values.get(group)
        if group == "backend" and isinstance(section, dict):
            if "name" in section:
                named.append((group, section.pop("name")))
        elif group in values and not (isinstance(section, dict) and group in OF_A_SECTION):
            named.append((group, values.pop(group)))
    return named


def _from_the_root(
    where: str, values: dict[str, Any], header: re.Match[str] | None, group: str
) -> dict[str, Any]:
    """Options with their sections, whatever package a file is written for."""
    package = header[1] if header else "_group_"
    if group in OF_A_SECTION and set(values) == {group} and isinstance(values[group], dict):
        package = "_global_"  # written with its section, as in a batch file
    elif package in ("_group_", group):
        package = group if group in OF_A_SECTION else "_global_"
    for part in reversed(package.split(".") if package != "_global_" else []):
        values = {part: values}
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = str(key).split(".")  # `video.fps: 30`, as on the command line
        place: Any = nested
        for section in sections:
            place = place.setdefault(section, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict) or name in place:
            raise ConfigError(f"{where}: {TWICE.format(key)}")
        place[name] = value
    if "hydra" in nested:
        raise ConfigError(f"{where}: unknown option `hydra`; a file holds options of a run only")
    return nested


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}, line {line}: is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
