"""What a stage is: a named, versioned, pure function on one item.

Reading inputs, writing results, keys, resuming, counting and item errors are done once, by
`avatar_core.execution.shard.run_shard`; a stage sees local files and plain values only.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
"""RGB, shape (height, width, 3)."""
Tensors = Mapping[str, NDArray[Any]]

DeviceKind = Literal["cpu", "gpu"]

Report = Callable[[int, int], None]
"""`report(done, total)` within one item: shows progress, raises `Cancelled` once the user stopped."""


@dataclass(frozen=True)
class Output:
    """Result of one item. `tensors` share a safetensors file with their shard; `file` stands alone."""

    columns: Mapping[str, Any] = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)
    file: Path | None = None


@dataclass(frozen=True, slots=True)
class Asset:
    """An accepted input in the store; `key` is the item of `stage` that brought it there."""

    key: str
    sha256: str
    path: str
    stage: str = "ingest"

    @property
    def owner(self) -> str:
        return f"{self.stage}:{self.key}"


@dataclass(frozen=True, slots=True)
class ItemSpec:
    """An item before its inputs are resolved: all that identifies it, as plain values.

    `config` is the stage's configuration after row overrides; `work` is its size for forecasts, in seconds
    of video or 1. Ingest items name the outside world in `source`; no other stage does.
    """

    key: str
    config: Any
    inputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    assets: Mapping[str, tuple[Asset, ...]] = field(default_factory=dict)
    work: float = 1.0
    source: str | None = None


@dataclass(frozen=True)
class Item:
    """One unit of a stage's work, with everything it consumes resolved to this machine."""

    key: str
    inputs: Mapping[str, Sequence[Output]]
    assets: Mapping[str, Sequence[Path]]
    source: str | None = None
    unfinished: Path | None = None
    """A file that outlives a killed process, where a long item may keep how far it is; it may not exist."""


class Stage(ABC):
    """`version` is raised whenever the output changes for the same input; `noun` is what one item is called.

    `device_kind` says on whose workers its shards wait. `columns` are the stage's own manifest columns;
    `folder` is where result files go, `stages/<name>/data` if None. A shard holds no more than `max_items`,
    of which `concurrency` are worked on at once, in threads, where the store or their source is remote: they
    should wait for it rather than compute. `guessed_seconds` per unit of work hold until a store has measured
    them: they size shards.
    """

    name: str
    noun: str = "item"
    version: int
    device_kind: DeviceKind = "cpu"
    columns: pa.Schema
    folder: str | None = None
    max_items: int = 256
    concurrency: int = 1
    guessed_seconds: float = 1.0

    def weights(self, config: Any) -> tuple[str, ...]:
        """Registry names of the weights that `load` reads; they are part of the item's key."""
        return ()

    def model_options(self, config: Any) -> Hashable:
        """What `load` depends on beside the weights and their level."""
        return None

    def memory_levels(self, device: str) -> tuple[str, ...]:
        """Ways to load and run, most memory first, beginning with what fits; they give equal results."""
        return ()

    def load(self, config: Any, device: str, memory: str | None) -> Any:
        """Models shared by all items whose configuration names the same weights; `memory` is their level."""
        return None

    @abstractmethod
    def process(self, item: Item, config: Any, models: Any, scratch: Path, report: Report) -> Output: ...
