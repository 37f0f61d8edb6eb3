"""What a render gives."""

from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from avatar_core.publish import to_frame


@dataclass(frozen=True)
class Result:
    """`dataset` is the folder or URI; `clips` its rows of this run."""

    dataset: str
    clips: pa.Table
    run_id: str
    max_failed_fraction: float

    @cached_property
    def metadata(self) -> pd.DataFrame:
        """A row per clip."""
        return to_frame(self.clips)

    @cached_property
    def failures(self) -> pd.DataFrame:
        """The rows that have no video for a reason; those that a stopped run left are `to do`."""
        return to_frame(self.clips.filter(pc.equal(self.clips["status"], "failed")))

    @property
    def failed_fraction(self) -> float:
        return len(self.failures) / max(1, len(self.clips))

    @property
    def ok(self) -> bool:
        """Whether no more clips failed than the batch allows."""
        return self.failed_fraction <= self.max_failed_fraction
