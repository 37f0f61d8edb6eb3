"""YAML as it was written, and what is wrong with it, by line."""

import re
from pathlib import Path
from typing import Any

import yaml

from avatar_core.errors import ConfigError

_INT = re.compile(r"-?(?:0|[1-9][0-9]*)$")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$")
TWICE = "`{}` is there twice; write it once"


class _Loader(yaml.SafeLoader):
    """YAML without its surprises: 12:30, 007, 1_000 and 2024-05-01 stay what was written, 1e3 is a number,
    keys are text, and one that is there twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=TWICE.format(key.value), problem_mark=key.start_mark)
            seen.add(key.value)
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def read_yaml(text: str) -> Any:
    """Raises `yaml.YAMLError`."""
    return yaml.load(text, _Loader)


def parse_options(text: str, path: Path) -> dict[str, Any]:
    """Options by name. Raises `ConfigError` with the line of what is wrong."""
    try:
        values = read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_explained(error)}") from None
    if values is None:
        raise ConfigError(f"{path}: is empty; write options, such as `table: batch.csv`, or {{}} for none")
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else "one text"
        raise ConfigError(f"{path}: is {kind}; write options by name, such as `table: batch.csv`")
    return values


def _explained(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    line = f", line {mark.line + 1}" if mark else ""
    if "'\\t'" in str(problem):
        return f"{line}: holds a tab; indent with spaces"
    if problem and problem.startswith("`"):
        return f"{line}: {problem}"
    if not problem:
        return f"{line}: is no YAML ({' '.join(str(error).split())})"
    return f"{line}: is no YAML ({problem}); a text with special characters goes in quotes"
