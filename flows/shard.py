"""The flow that runs one shard on the queue of a GPU. It is run by the lane of that queue, which has the
models loaded, and by nobody else."""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Failed

FLOW = "shard"
ENTRYPOINT = "flows.shard.shard"
PROGRESS = "avatar.shard.progress"
"""Name of the events that tell how far an item is."""

Serve = Callable[..., State[Any]]

serving: ContextVar[Serve] = ContextVar("serving")
"""What the lane of this process does with a shard."""


@flow(name=FLOW, persist_result=False, validate_parameters=False)
def shard(
    store: str, run: str, job: str, item_timeout_s: float, options: Mapping[str, Any] | None = None
) -> State[Any]:
    """Compute the items of a job file: `job` of the `run` in the `store`. `options` are those with which the
    store is opened, but for credentials, which the machine of the lane has itself."""
    serve = serving.get(None)
    if serve is None:
        return Failed(message="shards are run by the lane of a queue: start one with `avatar worker`")
    return serve(store, run, job, item_timeout_s, options or {})
