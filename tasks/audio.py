"""Audio: the recordings of a clip become the features that its backend wants."""

from typing import Any

from prefect import task
from prefect.client.schemas.objects import State

from tasks.shard import OF_STAGE, Shard


@task(name="audio", **OF_STAGE)
def audio(shard: Shard) -> State[Any]:
    """Features of speech are computed, on a CPU or on the queue of a GPU."""
    return shard.run()
