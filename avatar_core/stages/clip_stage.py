"""What the stages of a clip share: they say which facts of it they read, and what of that they make."""

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

from avatar_core.optional_packages import hide_broken_packages
from avatar_core.stages.base import Item, Output, Picture, Report, Stage, Tensors
from avatar_core.stages.subject import Subject

Scale = tuple[float, float]
"""Across and down."""


class BackendConfig(Protocol):
    """The configuration of a backend's stage: `backend` are the backend's own options for it."""

    @property
    def backend(self) -> Any: ...


ConfigT = TypeVar("ConfigT")
OwnConfigT = TypeVar("OwnConfigT", bound=BackendConfig)
OptionsT = TypeVar("OptionsT")
ModelsT = TypeVar("ModelsT")


class ClipStage(Stage, Generic[ConfigT, ModelsT]):
    """A stage after ingest. `config_type` is the dataclass that `configure` gives. `inputs` names the stages
    whose results it consumes; of a chained one it gets all windows, in order.

    `facts` names what `configure` and `work` read of a `Subject`, `reads` the assets that an item gets: clips
    that are equal in those and in what they consume share an item, and no other fact can be read. The seed
    and the window, where they are among them, stand in the key by themselves, since they differ in every
    item: in the configuration they are marked as execution-only and left out of comparisons.

    A `chained` stage works in windows, each of which continues the one before, and consumes its own result.
    """

    config_type: ClassVar[type]
    inputs: tuple[str, ...] = ()
    facts: tuple[str, ...]
    reads: tuple[Literal["picture", "recordings"], ...] = ()
    chained: ClassVar[bool] = False

    @property
    def owner(self) -> str:
        """Whose results these are, as their keys say."""
        return self.name

    @abstractmethod
    def configure(self, subject: Subject) -> ConfigT:
        """Raises `InputError` where the stage cannot do that."""
        ...

    def work(self, subject: Subject) -> float:
        """The size of a clip's item, or of all its windows: in seconds of video or 1."""
        return 1.0

    def num_windows(self, subject: Subject) -> int:
        """At least 1. A window must not depend on how many follow it."""
        return 1

    def weights(self, config: ConfigT) -> tuple[str, ...]:
        return ()

    @abstractmethod
    def load(self, config: ConfigT, device: str, memory: str | None) -> ModelsT: ...

    @abstractmethod
    def process(
        self, item: Item, config: ConfigT, models: ModelsT, scratch: Path, report: Report
    ) -> Output: ...


class ClipRules(Protocol):
    """What the stages of a backend ask it: its name, and what its clips look like."""

    @property
    def name(self) -> str: ...

    @property
    def label(self) -> str: ...

    @property
    def frames_in_turn(self) -> bool: ...

    def fit_picture(self, picture: Picture, max_side: int) -> tuple[Picture, Scale]: ...

    def num_frames(self, duration_s: float, fps: float) -> int: ...


class BackendStage(ClipStage[OwnConfigT, ModelsT], Generic[OwnConfigT, OptionsT, ModelsT]):
    """A stage of one backend, with options and models of its own (None where it has none).

    `checkpoint` names the weights that its `parts` belong to. With `has_memory_levels` its models are loaded
    by a level of `avatar_core.memory`.
    """

    has_memory_levels: ClassVar[bool] = False

    def __init__(self, backend: ClipRules, checkpoint: str = "") -> None:
        self.backend = backend
        self.checkpoint = checkpoint

    @property
    def owner(self) -> str:
        return f"{self.name}/{self.backend.name}"

    def parts(self, options: OptionsT) -> tuple[str, ...]:
        """What it loads of the checkpoint."""
        return ()

    def weight_names(self, options: OptionsT) -> tuple[str, ...]:
        """Registry names of all that it loads."""
        return tuple(f"{self.checkpoint}/{part}" for part in self.parts(options))

    def weights(self, config: OwnConfigT) -> tuple[str, ...]:
        return self.weight_names(config.backend)

    def model_options(self, config: OwnConfigT) -> Hashable:
        """Its options but for those that a row may set."""
        options = config.backend
        if not is_dataclass(options):
            return None
        return tuple((f.name, repr(vars(options)[f.name])) for f in fields(options) if not f.metadata)

    def memory_levels(self, device: str) -> tuple[str, ...]:
        if not self.has_memory_levels:
            return ()
        from avatar_core.memory import fitting_level_names

        return fitting_level_names(device)

    def load(self, config: OwnConfigT, device: str, memory: str | None) -> ModelsT:
        if self.parts(config.backend):
            hide_broken_packages()
        return self.load_models(config.backend, device, memory)

    @abstractmethod
    def load_models(self, options: OptionsT, device: str, memory: str | None) -> ModelsT:
        """What it computes with; `memory` is one of its levels, if it has any."""
        ...


def tensors_of(item: Item, stages: Sequence[str]) -> dict[str, Tensors]:
    """What an item consumes of stages that are not chained, by stage."""
    return {stage: item.inputs[stage][0].tensors for stage in stages}
