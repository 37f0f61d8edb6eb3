"""The only place that knows Hydra: files of options, groups and overrides become a `Config`."""

import os
import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Sweep
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from avatar_core.backends.base import create_backend
from avatar_core.config import Config, nearest, option_names, parse
from avatar_core.errors import ConfigError
from avatar_core.resources import resource
from flows.config_files import CONFIG_DIR, GROUPS, PRIMARY, OptionFiles
from flows.option_errors import backend_options, explained, origin, type_of
from flows.overrides import (
    Override,
    Several,
    escaped,
    is_override,
    quoted,
    read_choice,
    read_override,
    read_value,
)

__all__ = ["compose_config", "is_override", "quoted"]

_in_use: ContextVar[OptionFiles | None] = ContextVar("in_use", default=None)


def compose_config(
    overrides: Sequence[str], config_dir: Path | None = None, given: Mapping[str, Any] | None = None
) -> Config:
    """The configuration of a run: `given` options (by dotted name, as they are) before overrides, batch file,
    preset, storage and backend, and our defaults.

    `config_dir`, else what `AVATAR_CONFIG_DIR` names, is searched for files before ours. Raises `ConfigError`
    that names the override or file, with the nearest name for a misspelt one.
    """
    files = OptionFiles(_own_folder(config_dir))
    words = [read_override(word) for word in overrides]
    values = apply_overrides(_composed(files, words), words, given or {}, files)
    try:
        also = [*backend_options(values.get("backend", {}).get("name")), *GROUPS]
        config = parse(Config, values, also=also)
        create_backend(config.backend)
    except ConfigError as error:
        raise ConfigError(explained(error, values, words, files)) from None
    return config


# --- Hydra


class _Source(ConfigSource):
    """Hydra reads files by way of `OptionFiles`; it copies sources, so they are not kept here."""

    @property
    def _files(self) -> OptionFiles:
        files = _in_use.get()
        assert files is not None
        return files

    @staticmethod
    def scheme() -> str:
        return "avatar"

    def load_config(self, config_path: str) -> ConfigResult:
        values = self._files.read(config_path)
        try:
            config = OmegaConf.create(values)
        except OmegaConfBaseException as error:
            raise ConfigError(
                f"{self._files.find(config_path)}: option `{error.full_key}` holds `${{`, but no reference "
                "such as ${video.fps}; write \\${ for the text"
            ) from None
        return ConfigResult(self.provider, self.full_path(), config, header={"package": "_global_"})

    def is_config(self, config_path: str) -> bool:
        return self._files.find(config_path) is not None

    def is_group(self, config_path: str) -> bool:
        return config_path in GROUPS

    def available(self) -> bool:
        return True

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return self._files.names(config_path) if self.is_group(config_path) else []


class _SourceFirst(SearchPathPlugin):
    """Before Hydra's own reading of `conf/`; other users of Hydra in this process are left alone."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if _in_use.get():
            search_path.prepend("avatar", "avatar://conf", anchor="main")


Plugins.instance().register(_Source)
Plugins.instance().register(_SourceFirst)


def _composed(files: OptionFiles, words: Sequence[Override]) -> DictConfig:
    """All files that the words and one another choose, not yet resolved."""
    chosen: dict[str, Any] = {}
    for word in words:
        if word.is_choice:
            group = word.option.removesuffix(".name")
            chosen[group] = files.choice(group, read_choice(word), word.shown)
        elif word.option == "backend" and "name" in (section := _section(word)):
            chosen["backend"] = files.choice("backend", section["name"], word.shown)
    hydra_words = [
        f"~{group}" if name is None else f"{group}={_hydra(name)}" for group, name in chosen.items()
    ]
    reading = _in_use.set(files)
    try:
        with initialize_config_dir(str(resource("conf")), version_base="1.3"):
            config = compose(PRIMARY, hydra_words)
    except RecursionError:
        read = ", ".join(files.read_so_far)
        raise ConfigError(
            f"files are built on one another in a circle: {read}; name no file in itself"
        ) from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        read = ", ".join(files.read_so_far) or "the configuration"
        raise ConfigError(f"{read}: cannot be put together ({_first_line(error)})") from None
    finally:
        _in_use.reset(reading)
    OmegaConf.set_struct(config, False)
    return config


def _section(word: Override) -> dict[str, Any]:
    value = read_value(word, dict, _grammar)
    return value if isinstance(value, dict) else {}


def _hydra(name: Any) -> str:
    return f"[{','.join(map(_hydra, name))}]" if isinstance(name, list) else quoted(name)


def _grammar(text: str) -> Any:
    """A value as Hydra reads it on its own command line. Raises `ValueError`."""
    parser = OverridesParser.create()
    try:
        value: Any = parser.parse_override(f"option={text}").value()
        if isinstance(value, ChoiceSweep) and value.simple_form:
            value = parser.parse_override(f"option=[{text}]").value()
            return Several(value)
    except HydraException as error:
        raise ValueError(text) from error
    if isinstance(value, Sweep):
        raise ValueError(text)
    return value


# --- overrides


def apply_overrides(
    config: DictConfig, words: Sequence[Override], given: Mapping[str, Any], files: OptionFiles
) -> dict[str, Any]:
    """Plain values, after what the words and `given` set; a table given takes the place of a file's rows."""
    backend = OmegaConf.select(config, "backend.name")
    for word in words:
        if word.is_choice:
            continue
        annotation = type_of(word.option, backend)
        try:
            if word.value is None:
                _remove(config, word, annotation, backend)
            else:
                value = read_value(word, annotation, _grammar)
                if word.option == "backend" and isinstance(value, dict):
                    value.pop("name", None)  # chosen already
                OmegaConf.update(config, word.option, value, merge=True, force_add=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{word.shown}: cannot be set ({_first_line(error)})") from None
    for option, value in given.items():
        OmegaConf.update(config, option, escaped(value), merge=False, force_add=True)
    new = {*given, *(word.option for word in words)}
    if "table" in new and "rows" not in new and OmegaConf.select(config, "table") is not None:
        config.rows = []
    elif "rows" in new and "table" not in new:
        config.table = None
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        where = origin(str(error.full_key), words, files)
        reason = re.sub("^KeyError raised while resolving interpolation: ", "", _first_line(error)).strip('"')
        option = f"option `{error.full_key}`: {reason}; set it, or write the value itself"
        raise ConfigError(f"{where}: {option}" if where else option) from None
    return cast("dict[str, Any]", values)


def _remove(config: DictConfig, word: Override, annotation: Any, backend: str | None) -> None:
    section, _, name = word.option.rpartition(".")
    place = OmegaConf.select(config, section) if section else config
    if isinstance(place, DictConfig) and name in place:
        place.pop(name)
    elif annotation is None:
        names = [*option_names(Config), *backend_options(backend), *GROUPS]
        raise ConfigError(f"{word.shown}: unknown option `{word.option}`{nearest(word.option, names)}")


def _own_folder(named: Path | None) -> Path | None:
    from_environment = os.environ.get(CONFIG_DIR)
    if named is None and not from_environment:
        return None
    shown = f"--config-dir {named}" if named is not None else f"{CONFIG_DIR}={from_environment}"
    folder = Path(named if named is not None else from_environment or "").expanduser().resolve()
    if not folder.is_dir():
        found = "is no folder; one file is chosen by batch=PATH" if folder.exists() else "no such folder"
        raise ConfigError(f"{shown}: {found}")
    unread, ours = folder / "config.yaml", resource("conf/config.yaml")
    if unread.is_file() and unread.read_bytes() != ours.read_bytes():
        raise ConfigError(
            f"{shown}: its config.yaml is not read; move it to {folder / 'preset'} under a name of its own, "
            "and choose it by preset=NAME"
        )
    return folder


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
