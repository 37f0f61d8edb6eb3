"""How a run tells what it is doing; the terminal view and the log are observers."""

from typing import Any, Protocol


class Observer(Protocol):
    """Called from the process that coordinates a run; implementations must not raise."""

    def stage_started(self, stage: str, *, items: int, cached: int, to_do: int) -> None: ...

    def item_progress(self, stage: str, key: str, done: int, total: int) -> None: ...

    def item_ended(self, stage: str, row: dict[str, Any]) -> None:
        """`row` is the item's manifest row."""
        ...

    def clip_published(self, name: str, path: str) -> None: ...

    def warning(self, message: str) -> None: ...


class Silent:
    """Observes nothing."""

    def stage_started(self, stage: str, *, items: int, cached: int, to_do: int) -> None:
        pass

    def item_progress(self, stage: str, key: str, done: int, total: int) -> None:
        pass

    def item_ended(self, stage: str, row: dict[str, Any]) -> None:
        pass

    def clip_published(self, name: str, path: str) -> None:
        pass

    def warning(self, message: str) -> None:
        pass
