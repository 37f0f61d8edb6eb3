"""What a backend offers to the stages. A backend is a folder that knows no other backend."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from avatar_core.config import nearest, parse
from avatar_core.errors import ConfigError
from avatar_core.media.face import Face
from avatar_core.media.footage import Footage

Picture = NDArray[np.uint8]
"""RGB, shape (height, width, 3)."""
Tensors = Mapping[str, NDArray[Any]]

BACKENDS = {
    "preview": "avatar_core.backends.preview.backend:PreviewBackend",
    "hunyuan": "avatar_core.backends.hunyuan.backend:HunyuanBackend",
    "multitalk": "avatar_core.backends.multitalk.backend:MultiTalkBackend",
    "ditto": "avatar_core.backends.ditto.backend:DittoBackend",
}


ReportStep = Callable[[int, int], None]
"""`report(done, total)`: steps of one clip; raises `Cancelled` once the user stopped."""


class Backend(Protocol):
    """One renderer. `config` has one dataclass per stage (`config.audio`, `config.denoise`, ...); a field
    with `metadata={"row": True}` may be set by a row's `params`.

    `versions` names the stages that the backend takes part in, each with the integer that is raised
    whenever its output changes for the same input.

    `guessed_seconds` are those that a stage takes per item, or per second of video where it makes clips,
    for as long as a store has not measured them; one of them decides how many items a shard holds.

    A backend that must know where in the picture a speaker is, and not just the face, has `encode_scene(
    models, picture, faces, boxes, speakers, config)` in place of `encode_picture`: `picture` as it was given,
    upright; `boxes` of the row in its pixels, which alone decide where there are any; else the speakers'
    `faces`.

    A backend that renders from footage too has `takes_video = True` and `encode_video`; for others a row with
    a video is an error. It gets footage at the clip's rate, or with `frames_in_turn = True` frame by frame as
    it was filmed, whatever its rate.

    A backend whose stages can do with less memory has `memory_levels(stage, device)` too: names of levels,
    most memory first, beginning with the first that fits the device. Levels never change a result.

    A backend that renders long clips window by window is a `WindowedBackend`.
    """

    name: str
    label: str
    config: Any
    config_type: type
    versions: Mapping[str, int]
    queues: Mapping[str, str]
    guessed_seconds: Mapping[str, float]
    max_speakers: int
    text_sees_picture: bool

    def resolve(self) -> "Backend":
        """The same backend with every `auto` that changes numbers settled for this machine."""
        ...

    def weights(self, stage: str, config: Any) -> tuple[str, ...]:
        """Registry names of the weights that a stage loads."""
        ...

    def fit_picture(
        self, picture: Picture, max_side: int, config: Any
    ) -> tuple[Picture, tuple[float, float]]:
        """The picture at the size of the video, and its scale across and down; `config` is a stage's."""
        ...

    def num_frames(self, duration_s: float, fps: float) -> int: ...

    def load(self, stage: str, config: Any, device: str, memory: str | None) -> Any:
        """Models of a stage, handed to the methods below; `memory` is one of the stage's levels, if any."""
        ...

    def encode_audio(
        self,
        models: Any,
        tracks: Sequence[NDArray[np.float32]],
        sample_rate: int,
        fps: float,
        num_frames: int,
    ) -> Tensors:
        """Features of one clip's speech; `tracks` holds one mono recording per speaker, equally long."""
        ...

    def encode_text(
        self, models: Any, prompt: str, negative_prompt: str | None, picture: Picture | None, config: Any
    ) -> Tensors:
        """Both prompts; a backend without a `text` stage has no such method. `picture` is there if
        `text_sees_picture`."""
        ...

    def encode_picture(self, models: Any, picture: Picture, faces: Sequence[Face], config: Any) -> Tensors:
        """What denoise and decode need of the picture; `faces` are the speakers, in order."""
        ...

    def encode_video(self, models: Any, frames: Footage, faces: Sequence[Face], config: Any) -> Tensors:
        """The same from footage; a backend without `takes_video` has no such method. `frames` are pictures of
        equal size, each after `fit_picture`, to be read in order or by index; `faces` are those of the
        first."""
        ...

    def denoise(
        self,
        models: Any,
        conditions: Mapping[str, Tensors],
        fps: float,
        seed: int,
        config: Any,
        report: ReportStep,
        unfinished: Path | None,
    ) -> Tensors:
        """Latents of a clip (`preview`: motion) from the tensors of the stages it consumes, by stage.
        `unfinished` is a file for a state from which a killed clip goes on with the same result."""
        ...

    def decode(
        self, models: Any, picture: Any, conditions: Mapping[str, Tensors], config: Any
    ) -> Iterator[Picture]:
        """Frames of the clip, one by one, so that memory does not grow with its length; those beyond the
        length of the speech are not asked for. `picture` is a `Footage` where the row has a video."""
        ...


@runtime_checkable
class WindowedBackend(Protocol):
    """What a backend has instead of `denoise` and `decode` if each window of a clip continues the one before:
    every window is then an item of its own, and a clip goes on from the last one that was finished."""

    def num_windows(self, duration_s: float, fps: float) -> int:
        """At least 1. A window must not depend on how many follow it."""
        ...

    def denoise_window(
        self,
        models: Any,
        conditions: Mapping[str, Tensors],
        fps: float,
        seed: int,
        config: Any,
        report: ReportStep,
        window: int,
        previous: Tensors | None,
    ) -> Tensors:
        """Latents of a window, and whatever the next one needs to go on. `seed` is the clip's; `previous` is
        what this gave for `window` - 1, None for the first."""
        ...

    def decode_windows(
        self,
        models: Any,
        picture: Picture,
        conditions: Mapping[str, Tensors],
        windows: Sequence[Tensors],
        config: Any,
    ) -> Iterator[Picture]:
        """As `decode`, from all windows of the clip; each tensor is read anew when it is asked for."""
        ...


def create_backend(values: Mapping[str, Any]) -> Backend:
    """The backend named by `values["name"]` with its options. Raises `ConfigError`."""
    options = dict(values)
    name = str(options.pop("name", ""))
    backend_type = find_backend(name)
    try:
        config = parse(backend_type.config_type, options, where="backend")
    except ConfigError as error:
        raise ConfigError(f"backend {name}: {error}", error.problems) from None
    backend: Backend = backend_type(config)
    return backend


def find_backend(name: str) -> Any:
    """The class of the backend `name`. Raises `ConfigError`."""
    if name not in BACKENDS:
        known = f"choose one of: {', '.join(BACKENDS)}{nearest(name, list(BACKENDS))}"
        problem = f"unknown backend `{name}`; {known}"
        raise ConfigError(problem, {"backend.name": problem})
    module, _, attribute = BACKENDS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
