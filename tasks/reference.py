"""Reference: pictures are fitted to the video and encoded, with the faces of those who speak."""

from typing import Any

from prefect import task
from prefect.client.schemas.objects import State

from tasks.shard import OF_STAGE, Shard


@task(name="reference", **OF_STAGE)
def reference(shard: Shard) -> State[Any]:
    """Pictures are encoded, on the queue of a GPU."""
    return shard.run()
