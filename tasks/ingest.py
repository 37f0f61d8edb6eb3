"""Ingest: pictures, videos and recordings that the rows name come into the store, hashed and probed."""

from typing import Any

from prefect import task
from prefect.client.schemas.objects import State

from tasks.shard import OF_STAGE, Shard


@task(name="ingest", **OF_STAGE)
def ingest(shard: Shard) -> State[Any]:
    """Files are read, checked and copied, on the CPUs of the dispatching machine."""
    return shard.run()
