"""Numbers of a run, by stage, and how they are said."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Tally:
    """What a stage has and what this run did; `cached` was there at its start or came from another run.
    `to_do` counts what is done by now too."""

    items: int = 0
    cached: int = 0
    to_do: int = 0
    done: int = 0
    failed: int = 0
    seconds: float = 0.0

    def plan(self, items: int, cached: int, left: int) -> None:
        """Of all that is known by now the store holds `cached`, and `left` is to do."""
        self.items, self.cached = items, max(0, cached - self.done)
        self.to_do = self.done + self.failed + left

    def count(self, row: Mapping[str, Any]) -> None:
        self.done += row["status"] == "ok"
        self.failed += row["status"] == "failed"
        self.seconds += row.get("seconds") or 0.0

    def count_other(self, row: Mapping[str, Any]) -> None:
        """Of another run."""
        self.to_do -= 1
        self.cached += row["status"] == "ok"
        self.failed += row["status"] == "failed"


def counted(noun: str, count: int) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
