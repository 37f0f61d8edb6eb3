"""Text: prompts are encoded."""

from typing import Any

from prefect import task
from prefect.client.schemas.objects import State

from tasks.shard import OF_STAGE, Shard


@task(name="text", **OF_STAGE)
def text(shard: Shard) -> State[Any]:
    """Prompt embeddings are computed, on the queue of a GPU."""
    return shard.run()
