"""What a backend offers. A backend is a folder that knows no other backend."""

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from avatar_core.config import nearest, parse
from avatar_core.errors import ConfigError
from avatar_core.optional_packages import hide_broken_packages
from avatar_core.stages.base import Picture
from avatar_core.stages.clip_stage import BackendStage, ClipStage, Scale
from avatar_core.stages.face import FaceStage
from avatar_core.weights.ensure import ensure

BACKENDS = {
    "preview": "avatar_core.backends.preview.backend:PreviewBackend",
    "hunyuan": "avatar_core.backends.hunyuan.backend:HunyuanBackend",
    "multitalk": "avatar_core.backends.multitalk.backend:MultiTalkBackend",
    "ditto": "avatar_core.backends.ditto.backend:DittoBackend",
}


class Backend(ABC):
    """One renderer: what its clips may look like, and the stages that make them.

    `config` has one dataclass per stage with options (`config.audio`, `config.denoise`, ...); a field with
    `metadata={"row": True}` may be set by a row's `params`.

    With `takes_video` it renders from footage too; for others a row with a video is an error. It gets footage
    at the clip's rate, or with `frames_in_turn` frame by frame as it was filmed, whatever its rate. With
    `renders_on_cpu` a machine without a GPU does for all its stages.
    """

    name: str
    label: str
    config: Any
    config_type: type
    max_speakers: int = 1
    takes_video: bool = False
    frames_in_turn: bool = False
    renders_on_cpu: bool = False

    def __init__(self, config: Any) -> None:
        self.config = config

    def resolve(self) -> Self:
        """The same backend with every `auto` that changes numbers settled for this machine. Raises
        `WeightsError` where it lacks weights."""
        return self

    def num_frames(self, duration_s: float, fps: float) -> int:
        """Of a clip. Raises `InputError` for a rate or length that it cannot render."""
        return covering_frames(duration_s, fps)

    @abstractmethod
    def fit_picture(self, picture: Picture, max_side: int) -> tuple[Picture, Scale]:
        """The picture at the size of the video, and its scale."""
        ...

    @abstractmethod
    def own_stages(self) -> Sequence[BackendStage[Any, Any, Any]]:
        """In running order."""
        ...

    def stages(self) -> dict[str, ClipStage[Any, Any]]:
        """All that a clip goes through after ingest, by name, in running order."""
        own = self.own_stages()
        face = [FaceStage()] if any(FaceStage.name in stage.inputs for stage in own) else []
        return {stage.name: stage for stage in (*face, *own)}

    def options(self) -> dict[str, Any]:
        """The options of each stage that has any."""
        return {stage: options for stage, options in vars(self.config).items() if is_dataclass(options)}


class CheckpointBackend(Backend):
    """A backend whose weights are parts of one checkpoint, which its configuration names. `<name>-tiny` is a
    random one in the official layout, which proves the chain on any machine and is written when it is first
    used."""

    @property
    def tiny_checkpoint(self) -> str:
        return f"{self.name}-tiny"

    @property
    def renders_on_cpu(self) -> bool:  # type: ignore[override]
        return bool(self.config.checkpoint == self.tiny_checkpoint)

    @abstractmethod
    def write_tiny_checkpoint(self, folder: Path) -> None: ...

    def resolve(self) -> Self:
        options = self.options()
        used = [name for stage in self.own_stages() for name in stage.weight_names(options[stage.name])]
        ensure(
            self.config.checkpoint,
            list(dict.fromkeys(used)),
            self._write_tiny if self.renders_on_cpu else None,
        )
        return self

    def _write_tiny(self, folder: Path) -> None:
        hide_broken_packages()
        self.write_tiny_checkpoint(folder)


def covering_frames(duration_s: float, fps: float) -> int:
    """So many that the speech ends within the last. A hair more than a whole frame is rounding of the sample
    count, not a frame."""
    return max(1, int(np.ceil(duration_s * fps - 1e-3)))


def with_scale(fitted: Picture, picture: Picture) -> tuple[Picture, Scale]:
    """What became of a `picture` by resizing alone, and its scale across and down."""
    return fitted, (fitted.shape[1] / picture.shape[1], fitted.shape[0] / picture.shape[0])


def create_backend(values: Mapping[str, Any]) -> Backend:
    """The backend named by `values["name"]` with its options. Raises `ConfigError`."""
    options = dict(values)
    name = str(options.pop("name", ""))
    backend_type = find_backend(name)
    try:
        config: Any = parse(backend_type.config_type, options, where="backend")
    except ConfigError as error:
        raise ConfigError(f"backend {name}: {error}", error.problems) from None
    return backend_type(config)


def find_backend(name: str) -> type[Backend]:
    """The class of the backend `name`. Raises `ConfigError`."""
    if name not in BACKENDS:
        known = f"choose one of: {', '.join(BACKENDS)}{nearest(name, list(BACKENDS))}"
        problem = f"unknown backend `{name}`; {known}"
        raise ConfigError(problem, {"backend.name": problem})
    found: type[Backend] = pkgutil.resolve_name(BACKENDS[name])
    return found
