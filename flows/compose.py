"""The only place that knows Hydra: groups in `conf/` and overrides become a `Config`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from avatar_core.backends.base import create_backend
from avatar_core.config import Config, nearest, option_names, parse
from avatar_core.errors import ConfigError
from avatar_core.resources import resource

_MISSING_KEY = re.compile(r"Could not override '([^']+)'|Key '([^']+)' is not in struct")
_MISSING_GROUP = re.compile(r"Could not find '([^'/]+)/([^']+)'")
_SECRETS = "storage."


def compose_config(overrides: Sequence[str], config_dir: Path | None = None) -> Config:
    """The configuration of a run. `config_dir` is searched for batch files and groups as well as ours.

    Raises `ConfigError`, with the nearest name for a misspelt one.
    """
    folders = [resource("conf")]
    words = list(overrides)
    if config_dir is not None:
        if not config_dir.is_dir():
            raise ConfigError(f"--config-dir {config_dir}: no such folder")
        folders.append(config_dir.resolve())
        words.insert(0, f"hydra.searchpath=[{quoted(f'file://{folders[1]}')}]")
    try:
        with initialize_config_dir(str(folders[0]), version_base="1.3"):
            values = OmegaConf.to_container(compose("config", words), resolve=True)
    except yaml.YAMLError as error:
        raise ConfigError(f"a configuration file is no YAML: {_one_line(error)}") from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_explained(error, folders, overrides)) from None
    assert isinstance(values, dict)
    # `hydra` and the names of chosen groups are no options of a run.
    config = parse(Config, {k: v for k, v in values.items() if k not in ("hydra", "preset", "batch")})
    create_backend(config.backend)
    return config


def is_override(argument: str) -> bool:
    """Whether a command-line word is a Hydra override and not a file."""
    return re.match(r"[~+]{0,2}[A-Za-z_][\w.@/-]*=", argument) is not None and not Path(argument).exists()


def quoted(value: Any) -> str:
    """A value as Hydra's override grammar takes it literally: backslashes count only before a quote."""
    text = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), str(value))
    return "'" + text.replace("${", "\\${") + "'"


def _explained(error: Exception, folders: Sequence[Path], overrides: Sequence[str]) -> str:
    text = _one_line(error)
    if key := _MISSING_KEY.search(text):
        name = key[1] or key[2]
        return f"unknown option `{name}`{nearest(name, _known_names(folders[0]))}"
    if group := _MISSING_GROUP.search(text):
        choices = sorted({path.stem for folder in folders for path in (folder / group[1]).glob("*.yaml")})
        hint = nearest(group[2], choices)
        return f"unknown {group[1]} `{group[2]}`; choose one of: {', '.join(choices)}{hint}"
    if any(_SECRETS in word.partition("=")[0] for word in overrides):
        return (
            f"cannot read the configuration: check how the `{_SECRETS}...` overrides are written and quoted"
        )
    return f"cannot read the configuration of {' '.join(overrides) or 'conf/config.yaml'}: {text}"


def _known_names(folder: Path) -> list[str]:
    """Options, those of the default backend too, and groups."""
    with initialize_config_dir(str(folder), version_base="1.3"):
        backend = create_backend(OmegaConf.to_container(compose("config").backend))  # type: ignore[arg-type]
    groups = [path.name for path in folder.iterdir() if path.is_dir()]
    return [*option_names(Config), *option_names(backend.config_type, "backend."), *groups]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
