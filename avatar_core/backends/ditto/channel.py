"""A queue between two threads that knows an end and can be broken off."""

from collections import deque
from collections.abc import Iterator
from threading import Condition
from typing import Generic, TypeVar

from avatar_core.errors import Cancelled

Item = TypeVar("Item")


class Channel(Generic[Item]):
    """At most `size` items wait in it. Both ends raise `Cancelled` once it is broken off."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[Item] = deque()
        self._ended = self._cancelled = False
        self._changed = Condition()

    def put(self, item: Item) -> None:
        """Waits for room."""
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or len(self._items) < self._size)
            if self._cancelled:
                raise Cancelled("the stream was ended")
            self._items.append(item)
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Item]:
        """Items as they come, until `end`."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._cancelled or self._items or self._ended)
                if self._cancelled:
                    raise Cancelled("the stream was ended")
                if not self._items:
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item

    def end(self) -> None:
        """No more items will come; those in it can still be had."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def cancel(self) -> None:
        """Whoever waits at either end stops waiting; what was in it is gone."""
        with self._changed:
            self._cancelled = True
            self._items.clear()
            self._changed.notify_all()
