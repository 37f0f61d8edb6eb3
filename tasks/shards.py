"""A task run per shard, and one for what a stage reuses. They show what goes on without them."""

from collections.abc import Callable
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed


@task(name="shard", task_run_name="{label}", cache_policy=NO_CACHE, persist_result=False)
def show_shard(label: str, until_it_ends: Callable[[], State[Any]]) -> State[Any]:
    return until_it_ends()


@task(name="reused", task_run_name="{label}", cache_policy=NO_CACHE, persist_result=False)
def reuse(label: str, message: str) -> State[Any]:
    return Completed(name="Cached", message=message)
