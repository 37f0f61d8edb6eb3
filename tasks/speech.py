"""Speech: the texts of rows without a recording are said."""

from typing import Any

from prefect import task
from prefect.client.schemas.objects import State

from tasks.shard import OF_STAGE, Shard


@task(name="speech", **OF_STAGE)
def speech(shard: Shard) -> State[Any]:
    """Texts become recordings, on the CPUs of the dispatching machine."""
    return shard.run()
