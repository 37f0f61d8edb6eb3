"""How a run tells what it is doing; the terminal view and the log are observers."""

import time
from typing import Any, Protocol


class Observer(Protocol):
    """Called from the process that coordinates a run; implementations must not raise."""

    def stage_started(self, stage: str, *, items: int, cached: int, to_do: int) -> None:
        """All items of a stage are known; `to_do` counts what this run has done of them by now too. Said
        again where damaged results are computed once more."""
        ...

    def stage_grew(self, stage: str, *, items: int, cached: int, to_do: int) -> None:
        """So many items of a stage are known by now, and more will be."""
        ...

    def item_progress(self, stage: str, key: str, done: int, total: int) -> None: ...

    def item_ended(self, stage: str, row: dict[str, Any]) -> None:
        """`row` is the item's manifest row."""
        ...

    def clip_published(self, name: str, path: str) -> None: ...

    def warning(self, message: str) -> None: ...


class StepClock:
    """Tells how far items are that take many steps, and how long they still need."""

    def __init__(self) -> None:
        self._begun: dict[str, tuple[float, int]] = {}

    def text(self, key: str, done: int, total: int) -> str:
        """For example `step 12 of 50, 9.8 s each, 6:12 left`; empty where an item has no steps."""
        now_s = time.monotonic()
        begun_s, begun = self._begun.setdefault(key, (now_s, done))
        if total <= 1:
            return ""
        if done == begun:
            return f"step {done} of {total}"
        each_s = (now_s - begun_s) / (done - begun)
        minutes, seconds = divmod(round(each_s * (total - done)), 60)
        return f"step {done} of {total}, {each_s:.1f} s each, {minutes}:{seconds:02d} left"

    def end(self, key: str) -> None:
        self._begun.pop(key, None)


class Silent:
    """Observes nothing."""

    def stage_started(self, stage: str, *, items: int, cached: int, to_do: int) -> None:
        pass

    def stage_grew(self, stage: str, *, items: int, cached: int, to_do: int) -> None:
        pass

    def item_progress(self, stage: str, key: str, done: int, total: int) -> None:
        pass

    def item_ended(self, stage: str, row: dict[str, Any]) -> None:
        pass

    def clip_published(self, name: str, path: str) -> None:
        pass

    def warning(self, message: str) -> None:
        pass
