"""Hearing of what happens on the server, at once rather than at the next look."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

import httpx
from prefect.events import Event
from prefect.events.clients import get_events_subscriber
from prefect.events.filters import EventFilter, EventNameFilter
from prefect.exceptions import PrefectException

AWAY = (httpx.HTTPError, PrefectException, OSError)
"""What Prefect's client raises where the server does not answer, or not as it should."""
AGAIN_S = 2.0
"""After which the server is tried again."""


def listen(prefixes: Sequence[str], tell: Callable[[Event], None], name: str) -> Callable[[], None]:
    """Tells of events whose names begin so, from a thread of its own, until the function that this gives is
    called. Some may be missed: whoever listens looks for himself now and then."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(_hear(prefixes, tell))

    def run() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.close()

    threading.Thread(target=run, name=name, daemon=True).start()

    def stop() -> None:
        loop.call_soon_threadsafe(task.cancel)

    return stop


async def _hear(prefixes: Sequence[str], tell: Callable[[Event], None]) -> None:
    wanted = EventFilter(event=EventNameFilter(prefix=list(prefixes)))
    while True:
        try:
            async with get_events_subscriber(filter=wanted) as events:
                async for event in events:
                    tell(event)
        except Exception:  # of websockets, of the network, of Prefect: the server is away
            pass
        await asyncio.sleep(AGAIN_S)
