"""Every hash of the project: what a result is called follows from here alone."""

import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from avatar_core.errors import ConfigError

_encoder = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def canonical_json(value: Any) -> str:
    """ASCII, sorted, without spaces. 1 and 1.0 stay apart: parse numbers to the field's type first."""
    _check_plain(value, "value")
    return _encoder.encode(value)


def digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def config_values(config: Any) -> dict[str, Any]:
    """What a configuration dataclass says beyond its declared defaults, execution-only fields left out.

    Classes are not named: two that may stand in one field need a field that tells them apart.
    """
    return {
        field.name: _plain(getattr(config, field.name))
        for field in _hashed_fields(config)
        if not _is_default(field, getattr(config, field.name))
    }


def item_key(stage: str, version: int, config: Any, weights: str, inputs: Mapping[str, Sequence[str]]) -> str:
    """`config` is a dataclass, or the `digest` of its `config_values` where many items share it."""
    if not isinstance(config, str):
        config = digest(config_values(config))
    consumed = {name: _key_list(name, keys) for name, keys in inputs.items()}
    return hashlib.sha256(_encoder.encode([stage, version, config, weights, consumed]).encode()).hexdigest()


def row_content(
    *,
    pictures: Sequence[str],
    recordings: Sequence[str],
    prompt: str = "",
    negative_prompt: str = "",
    fps: float | None = None,
    audio_type: str | None = None,
    bbox: Any = None,
    params: Mapping[str, Any] | None = None,
) -> str:
    """Equal rows share one clip; `pictures` and `recordings` are SHA-256s, in order."""
    # Rows are many and their values checked when they were parsed: no need to look at each again.
    content = _encoder.encode(
        {
            "pictures": pictures,
            "recordings": recordings,
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "fps": None if fps is None else float(fps),
            "audio_type": audio_type,
            "bbox": bbox,
            "params": params or {},
        }
    )
    return hashlib.sha256(content.encode()).hexdigest()


def derive_seed(*parts: Any) -> int:
    """A seed in 0..2**63-1, as torch and numpy both take it."""
    return int.from_bytes(hashlib.sha256(canonical_json(parts).encode()).digest()[:8], "big") >> 1


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_id_lock = threading.Lock()
_last_id_time = 0


def new_id() -> str:
    """A UUIDv7 (RFC 9562), each later in sort order than the one before it in this process."""
    global _last_id_time
    with _id_lock:
        # 48 bits of milliseconds and 12 of their fraction, which also count ids of one instant
        _last_id_time = max((time.time_ns() << 12) // 1_000_000, _last_id_time + 1)
        ticks = _last_id_time
    random = int.from_bytes(os.urandom(8), "big") & ((1 << 62) - 1)
    high = (ticks >> 12) << 16 | 0x7000 | ticks & 0xFFF
    return str(uuid.UUID(int=high << 64 | 0b10 << 62 | random))


def _check_plain(value: Any, where: str) -> None:
    if value is None or isinstance(value, bool | int | str):
        return
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise ConfigError(f"{where} is {value}: only finite numbers can be part of a key")
    elif isinstance(value, Mapping):
        for name, part in value.items():
            if not isinstance(name, str):
                raise ConfigError(f"{where} has the name {name!r}: names in a key must be text")
            _check_plain(part, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            _check_plain(part, f"{where}[{index}]")
    else:
        raise ConfigError(
            f"{where} is a {type(value).__name__}: a key is made of text, numbers, booleans, null, "
            "lists and mappings; convert it first"
        )


def _key_list(name: str, keys: Sequence[str]) -> list[str]:
    if isinstance(keys, str):
        raise TypeError(f"inputs[{name!r}] must be a sequence of keys, not one key")
    return list(keys)


def _hashed_fields(config: Any) -> list[Field[Any]]:
    if not is_dataclass(config) or isinstance(config, type):
        raise ConfigError(f"a {type(config).__name__} is not a configuration dataclass")
    return [field for field in fields(config) if not field.metadata.get("execution")]


def _is_default(field: Field[Any], value: Any) -> bool:
    if field.default is not MISSING:
        default = field.default
    elif field.default_factory is not MISSING:
        default = field.default_factory()
    else:
        return False
    return _same(value, default)


def _same(value: Any, default: Any) -> bool:
    """Equality that ignores execution-only fields and keeps true apart from 1."""
    if is_dataclass(value):
        return type(value) is type(default) and all(
            _same(getattr(value, field.name), getattr(default, field.name)) for field in _hashed_fields(value)
        )
    if isinstance(value, Mapping) and isinstance(default, Mapping):
        return value.keys() == default.keys() and all(_same(value[name], default[name]) for name in value)
    if isinstance(value, list | tuple) and isinstance(default, list | tuple):
        return len(value) == len(default) and all(map(_same, value, default))
    return bool(value == default) and isinstance(value, bool) == isinstance(default, bool)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return config_values(value)
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
