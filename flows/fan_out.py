"""Shards as Prefect tasks: each waits for those whose manifests it reads, so that the graph of a run shows
how its videos came about."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from prefect import allow_failure
from prefect.client.schemas.objects import State, StateDetails
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture, wait
from prefect.states import Completed

from avatar_core.errors import AvatarError
from avatar_core.execution.shard_call import ShardCall
from avatar_core.execution.tally import counted
from avatar_core.planning.batch import Batch
from tasks.by_stage import task_of
from tasks.shard import Reused, Shard, StoreFiles, cache_key, keep_result

SETTLE_S = 15.0
"""Without a word from the last tasks."""


class _Submitted:
    """A task to wait for: its future, and after its end just its id, since a large batch has many of them."""

    __slots__ = ("_future", "_id")

    def __init__(self, future: PrefectFuture[Any]) -> None:
        self._future: PrefectFuture[Any] | None = future
        self._id = future.task_run_id
        future.add_done_callback(self._let_go)

    def _let_go(self, future: PrefectFuture[Any]) -> None:
        self._future = None

    def awaited(self) -> PrefectFuture[Any] | State[Any]:
        """What `wait_for` takes; an end of which no more is known than whose it is makes an edge as well."""
        return self._future or Completed(data=True, state_details=StateDetails(task_run_id=self._id))


class _Unrelated(dict[Any, Any]):
    """Remembers nothing. What a task reads is said with `wait_for`: Prefect need not keep the state of every
    task of the run, to recognise what it gave by its address, which may be another's by then."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Keep nothing."""


class FanOut:
    """To be made within the flow, in the thread that submits."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._open: set[PrefectFuture[Any]] = set()
        self._made_by: dict[tuple[str, str], _Submitted] = {}  # stage and key
        self._reused: dict[str, _Submitted] = {}

    def reuse(self, found: Mapping[str, int]) -> None:
        """So many items of each stage are in the store already: one task that Prefect finds cached."""
        for stage, count in found.items():
            if count and stage not in self._reused:
                label = f"{stage} reused · {counted(self._batch.stages[stage].noun, count)}"
                key = cache_key(stage, [self._batch.storage.uri, str(count)])
                keep_result(key, {"items": count})
                self._reused[stage] = self._submitted(stage, Reused(stage, key, label), [])

    def submit(self, call: ShardCall) -> None:
        upstream: dict[_Submitted, None] = {}
        for stage, key in _consumed(call):
            maker = self._made_by.get((stage, key)) or self._reused.get(stage)
            if maker is not None:
                upstream[maker] = None
        shard = Shard(call, self._batch.storage.uri, self._batch.clip_of)
        task = self._submitted(call.stage, shard, list(upstream))
        for job in call.jobs:
            for item in job.items:
                self._made_by[call.stage, item.key] = task

    def settle(self) -> None:
        """What is still on its way to the server when the flow returns would be cancelled."""
        before = 0
        while self._open and len(self._open) != before:
            before = len(self._open)
            wait(list(self._open), timeout=SETTLE_S)

    def _submitted(self, stage: str, shard: Shard | Reused, upstream: Sequence[_Submitted]) -> _Submitted:
        # What the store has was planned away: a shard is always to do, also where a manifest was dropped.
        task = task_of(stage).with_options(refresh_cache=isinstance(shard, Shard))
        # Rows that failed above are no reason not to do the others.
        future = task.submit(shard, wait_for=[allow_failure(each.awaited()) for each in upstream])
        self._open.add(future)
        future.add_done_callback(self._open.discard)
        if isinstance(shard, Shard):
            future.add_done_callback(partial(_check_was_run, shard.call))
        return _Submitted(future)


def _check_was_run(call: ShardCall, future: PrefectFuture[Any]) -> None:
    # What state it is in may have to be asked of the server, which may be away.
    call.abandon(AvatarError(f"Prefect did not run the task `{call.label}`, and its log says why; try again"))


def _consumed(call: ShardCall) -> Iterator[tuple[str, str]]:
    for job in call.jobs:
        for stage, rows in job.inputs.items():
            for key in rows:
                yield stage, key
        for item in job.items:
            for assets in item.assets.values():
                for asset in assets:
                    yield asset.stage, asset.key


@contextmanager
def results_in(files: StoreFiles) -> Iterator[None]:
    """Tasks of the flow that runs here keep their results in these, and nothing in memory."""
    context = FlowRunContext.get()
    assert context is not None
    store = context.result_store.model_copy(update={"result_storage": files})
    forgetful = {"run_results": _Unrelated(), "task_run_assets": _Unrelated()}
    with context.model_copy(update={"result_store": store, **forgetful}):
        yield
