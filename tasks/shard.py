"""What the tasks of all stages share: how a shard is run, what it ends as, and where its result is kept."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from prefect.cache_policies import CacheKeyFnPolicy
from prefect.client.schemas.objects import State, StateType
from prefect.context import FlowRunContext, TaskRunContext
from prefect.filesystems import WritableFileSystem
from prefect.serializers import JSONSerializer
from prefect.states import Cancelled, Completed, Crashed, Failed
from pydantic import Field

from avatar_core.errors import StoreError
from avatar_core.execution.shard_call import ShardCall
from avatar_core.execution.tally import counted
from avatar_core.execution.worker import JobResult
from avatar_core.store.gc import TASKS
from avatar_core.store.manifest import manifest_folder

log = logging.getLogger(__name__)

ROWS_FAILED, GAVE_BACK = "RowsFailed", "GaveBack"
_ERRORS_SHOWN = 5


class Shard:
    """Items of one stage, to be computed by whoever they were given to. Prefect looks for futures in the
    values of dataclasses and lists: this is neither."""

    def __init__(self, call: ShardCall, uri: str, label_of: Callable[[str, str], str]) -> None:
        self.call, self.stage = call, call.stage
        self._uri, self._label_of = uri, label_of

    def __str__(self) -> str:
        return self.call.label

    @property
    def key(self) -> str:
        return cache_key(self.stage, [item.key for job in self.call.jobs for item in job.items])

    def run(self) -> State[Any]:
        result = self.call()
        return state_of(result, partial(self._label_of, self.stage), self._manifests(result))

    def _manifests(self, result: JobResult) -> dict[str, Any]:
        folder = f"{self._uri}/{manifest_folder(self.stage)}"
        return {"manifests": [f"{folder}/{attempt}.parquet" for attempt in result.attempts]}


@dataclass(frozen=True)
class Reused:
    """What was there before: `count` items of a stage, whose result Prefect finds under `key`."""

    stage: str
    key: str
    label: str

    def __str__(self) -> str:
        return self.label

    def run(self) -> State[Any]:
        return Completed(name="Cached", message=self.label)


def cache_key(stage: str, keys: list[str]) -> str:
    """Of a task with items of these keys."""
    return f"{stage}-{hashlib.sha256(json.dumps(sorted(keys)).encode()).hexdigest()}"


def keep_result(key: str, value: dict[str, Any]) -> None:
    """What a task would have given, for Prefect to find; within a flow."""
    context = FlowRunContext.get()
    assert context is not None
    store = context.result_store.model_copy(update={"serializer": JSONSerializer(), "metadata_storage": None})
    store.write(value, key=key)


def state_of(
    result: JobResult, label_of: Callable[[str], str] = str, data: dict[str, Any] | None = None
) -> State[Any]:
    """How a shard has ended, as Prefect shows it; `label_of` names what an item belongs to."""
    failed = [row for row in result.rows if row["status"] == "failed"]
    if result.cancelled:
        return Cancelled(message=f"{counted('item', len(result.rows))} kept")
    if result.died or result.hung:
        return Crashed(message=result.error)
    if result.busy or result.refused:
        return Failed(name=GAVE_BACK, message=result.refused or f"the GPU is held by {result.busy}")
    if result.error:
        return Failed(message=result.error)
    if failed:
        reasons = [f"{label_of(row['key'])}: {row['error']}" for row in failed[:_ERRORS_SHOWN]]
        more = f" (and {len(failed) - _ERRORS_SHOWN} more)" if len(failed) > _ERRORS_SHOWN else ""
        message = f"{len(failed)} of {len(result.rows)} failed: {'; '.join(reasons)}{more}"
        return State(type=StateType.FAILED, name=ROWS_FAILED, message=message, data=data)
    return Completed(message=counted("item", len(result.rows)), data=data)


def _key_of(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    return str(parameters["shard"].key)


BY_CONTENT = CacheKeyFnPolicy(cache_key_fn=_key_of)


OF_STAGE: dict[str, Any] = {
    "task_run_name": "{shard}",
    "cache_policy": BY_CONTENT,
    "persist_result": True,
    "cache_result_in_memory": False,  # nobody asks for the result of a task that has just ended
    "result_serializer": "json",
}
"""Options of every stage's task: cached by the content keys of its items."""


class StoreFiles(WritableFileSystem):
    """Results of tasks as small files of the store. One that names manifests which are gone counts as
    absent, so that it is made again; so does all that is not ours."""

    _block_type_slug = "avatar-store-files"
    storage: Any = Field(exclude=True)
    """The `Storage`."""

    def _resolve_path(self, path: str) -> None:
        """Paths are keys, relative to the store."""

    def read_path(self, path: str, _sync: bool = True) -> bytes:  # type: ignore[override]
        content: bytes = self.storage.read_bytes(f"{TASKS}/{path}.json")
        record = json.loads(content)
        if record["metadata"]["serializer"]["type"] != "json":
            # Anybody who can write to the store may have put it there.
            raise ValueError(f"{path} is not JSON")
        for uri in json.loads(record["result"]).get("manifests", ()):
            if not self.storage.exists(uri.removeprefix(f"{self.storage.uri}/")):
                raise ValueError(f"{path} names {uri}, which is gone")
        return content

    def write_path(self, path: str, content: bytes, _sync: bool = True) -> None:  # type: ignore[override]
        try:
            self.storage.write_bytes(f"{TASKS}/{path}.json", content)
        except StoreError as error:  # the work is done: Prefect would call it undone
            log.warning("the result of a task is not kept: %s", error)
