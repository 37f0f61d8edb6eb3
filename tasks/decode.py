"""Decode: latents become frames, and with the speech a video."""

from typing import Any

from prefect import task
from prefect.client.schemas.objects import State

from tasks.shard import OF_STAGE, Shard


@task(name="decode", **OF_STAGE)
def decode(shard: Shard) -> State[Any]:
    """Frames are decoded and encoded with the sound, on the queue of a GPU."""
    return shard.run()
