"""The only place that knows Hydra: groups in `conf/` and overrides become a `Config`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def compose_config(overrides: Sequence[str], config_dir: Path | None = None) -> Config:
    """The configuration of a run. `config_dir` is searched for batch files and groups as well as ours.

    Raises `ConfigError`, with the nearest name for a misspelt one.
    """
    folder = resource("conf")
    path = [f"hydra.searchpath=[{config_dir.resolve().as_uri()}]"] if config_dir else []
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            values = OmegaConf.to_container(compose("config", [*path, *overrides]), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explained(error, folder)) from None
    assert isinstance(values, dict)
    # Present because the group was named, absent from a run's own options.
    known = {key: value for key, value in values.items() if key not in ("hydra", "preset", "batch")}
    config = parse(Config, known)
    create_backend(config.backend)
    return config


def _explained(error: Exception, folder: Path) -> str:
    text = " ".join(str(error).split())
    if key := _MISSING_KEY.search(text):
        name = key[1] or key[2]
        return f"unknown option `{name}`{nearest(name, [*option_names(Config), *_groups(folder)])}"
    if group := _MISSING_GROUP.search(text):
        choices = sorted(path.stem for path in (folder / group[1]).glob("*.yaml"))
        hint = nearest(group[2], choices)
        return f"unknown {group[1]} `{group[2]}`; choose one of: {', '.join(choices)}{hint}"
    return f"cannot read the configuration: {text}"


def _groups(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_dir()]


def is_override(argument: str) -> bool:
    """Whether a command-line word is a Hydra override and not a file."""
    return re.match(r"[~+]{0,2}[A-Za-z_][\w.@/-]*=", argument) is not None and not Path(argument).exists()


def quoted(value: Any) -> str:
    """A value as Hydra's override grammar takes it literally."""
    return "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"
