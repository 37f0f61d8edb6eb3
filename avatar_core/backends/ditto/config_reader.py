"""The published configuration as `avatar weights convert ditto` writes it: settings, and arrays beside."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from avatar_core import weights
from avatar_core.backends.ditto.registration import SOURCE_KEYS, Character
from avatar_core.errors import WeightsError

SETTINGS, ARRAYS = "ditto.yaml", "ditto_cfg.safetensors"
DEFAULT, CHARACTER = "default.", "ch_info."
"""Prefixes of the arrays' names."""


@dataclass(frozen=True)
class OfficialConfig:
    """`defaults` and `arrays` (`emo` [m, 8], `delta_eye_arr` [n, 63], `v_min_max_for_clip` [k, 265]: those
    that there are) under their published names; `condition` says what motion is conditioned on (`use_emo`,
    ...)."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    character: Character | None = None
    condition: Mapping[str, bool] = field(default_factory=dict)


def read_official_config(checkpoint: str) -> OfficialConfig:
    """Of the weights `ditto` or of another checkpoint. Raises `WeightsError`."""
    copy = weights.converted(f"{checkpoint}/config")
    if copy is None:
        weights.locate(f"{checkpoint}/config")
        raise WeightsError(
            f"the configuration of {checkpoint!r} is not converted yet, or has changed since; "
            f"run: avatar weights convert {checkpoint}"
        )
    return read_config(copy)


def read_config(folder: Path) -> OfficialConfig:
    try:
        settings = yaml.safe_load((folder / SETTINGS).read_text(encoding="utf-8"))
        tensors = load_file(folder / ARRAYS)
        return OfficialConfig(
            defaults=dict(settings["defaults"]),
            arrays=_below(DEFAULT, tensors),
            character=_character(_below(CHARACTER, tensors)),
            condition=dict(settings["condition"]),
        )
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise WeightsError(
            f"{folder} holds no converted configuration ({reason}); run: avatar weights convert ditto"
        ) from error


def _below(prefix: str, tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


def _character(tensors: Mapping[str, NDArray[Any]]) -> Character | None:
    if not tensors:
        return None
    return Character(
        motion={key: _frames(tensors, "x_s_info.{}." + key) for key in SOURCE_KEYS},
        eye_open=_frames(tensors, "eye_open.{}"),
        eye_ball=_frames(tensors, "eye_ball.{}"),
        sc=tensors["sc"],
    )


def _frames(tensors: Mapping[str, NDArray[Any]], pattern: str) -> NDArray[Any]:
    """[n, width] from one array for each frame."""
    names = [pattern.format(i) for i in range(len(tensors))]
    return np.stack([tensors[name] for name in names if name in tensors])
