"""Denoise: latents of a clip, or of a window of it, from all its conditions."""

from typing import Any

from prefect import task
from prefect.client.schemas.objects import State

from tasks.shard import OF_STAGE, Shard


@task(name="denoise", **OF_STAGE)
def denoise(shard: Shard) -> State[Any]:
    """Diffusion, on the queue of a GPU."""
    return shard.run()
