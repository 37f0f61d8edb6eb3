"""Face: the faces of each picture are found and aligned."""

from typing import Any

from prefect import task
from prefect.client.schemas.objects import State

from tasks.shard import OF_STAGE, Shard


@task(name="face", **OF_STAGE)
def face(shard: Shard) -> State[Any]:
    """Faces are detected, on the CPUs of the dispatching machine."""
    return shard.run()
