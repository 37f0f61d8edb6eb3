"""A clip: one video to be, with its items."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from avatar_core.media.table import TableRow
from avatar_core.stages.base import Asset, ItemSpec


@dataclass(frozen=True, slots=True)
class Source:
    """A picture, video or recording after ingest: an asset with its header's figures, or why it is none."""

    asset: Asset | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Clip:
    """One video to be. `items` are by stage, in running order, and empty for a rejected row, whose reason is
    in `error`. Of a chained stage `windows` has all of the clip, and `items` the last of them."""

    row: TableRow
    name: str
    take: int = 0
    part: int = 0
    seed: int | None = None
    items: Mapping[str, ItemSpec] = field(default_factory=dict)
    error: str | None = None
    windows: Mapping[str, tuple[ItemSpec, ...]] = field(default_factory=dict)

    def of_stage(self, stage: str) -> tuple[ItemSpec, ...]:
        """Its items of a stage, in order."""
        return self.windows.get(stage) or (self.items[stage],)
