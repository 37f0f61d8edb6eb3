"""Jobs and their results as files of the store: how a worker of another process or machine gets them.

They are JSON, and hold no credentials: whoever reads one opens the store with its own.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any

from avatar_core.backends.base import create_backend
from avatar_core.config import parse
from avatar_core.errors import StoreError
from avatar_core.execution.worker import Job, JobResult, StoreAddress
from avatar_core.stages.base import Asset, ItemSpec
from avatar_core.stages.clip_stage import ClipStage
from avatar_core.store.storage import Storage

_LEFT_OUT = ("store",)
"""Of a job: where its store is, and how it is opened, is known to who reads it."""


@dataclass(frozen=True)
class JobFile:
    """Of one attempt at a shard of a run."""

    storage: Storage
    run_id: str
    job_id: str

    @property
    def path(self) -> str:
        return f"runs/{self.run_id}/jobs/{self.job_id}.json"

    @property
    def _result_path(self) -> str:
        return f"runs/{self.run_id}/jobs/{self.job_id}.result.json"

    def write(self, job: Job, labels: Mapping[str, str] | None = None) -> None:
        """`labels` are for people: what items belong to, by key."""
        values: dict[str, Any] = {
            field.name: getattr(job, field.name) for field in fields(job) if field.name not in _LEFT_OUT
        }
        values |= {"items": [asdict(item) for item in job.items], "labels": labels or {}}
        self.storage.write_bytes(self.path, _encoded(values))

    def read(self, store: StoreAddress) -> tuple[Job, dict[str, str]]:
        """With its labels. Raises `StoreError` where it is gone or damaged."""
        values = self._decoded(self.path)
        try:
            labels = values.pop("labels")
            items = _read_items(values["backend"], values["stage"], values["items"])
            return Job(**{**values, "items": items, "store": store}), labels
        except (KeyError, TypeError) as error:
            raise self._damaged(self.path, error) from None

    def write_result(self, result: JobResult) -> None:
        self.storage.write_bytes(self._result_path, _encoded(asdict(result)))

    def read_result(self) -> JobResult | None:
        """None where there is none."""
        if not self.storage.exists(self._result_path):
            return None
        values = self._decoded(self._result_path)
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        try:
            return JobResult(**{**values, **lists})
        except TypeError as error:
            raise self._damaged(self._result_path, error) from None

    def delete(self) -> None:
        self.storage.delete([self.path, self._result_path])

    def _decoded(self, path: str) -> dict[str, Any]:
        data = self.storage.read_bytes(path)
        try:
            values = json.loads(data)
        except ValueError as error:
            raise self._damaged(path, error) from None
        if not isinstance(values, dict):
            raise self._damaged(path, f"it holds a {type(values).__name__}")
        return values

    def _damaged(self, path: str, reason: object) -> StoreError:
        return StoreError(
            f"{path} in {self.storage.uri} is no job of this version of avatar-dataset: {reason}"
        )


def _read_items(backend: Mapping[str, Any], stage_name: str, values: list[Any]) -> tuple[ItemSpec, ...]:
    created = create_backend(backend)
    stage = created.stages()[stage_name]
    options = created.options().get(stage_name)
    return tuple(_read_item(stage, options, each) for each in values)


def _read_item(stage: ClipStage[Any, Any], options: Any, values: dict[str, Any]) -> ItemSpec:
    config: Any = parse(stage.config_type, values["config"])
    if options is not None and getattr(config, "backend", None) is not None:
        config = replace(config, backend=parse(type(options), config.backend))
    inputs = {name: tuple(keys) for name, keys in values["inputs"].items()}
    assets = {column: tuple(Asset(**asset) for asset in found) for column, found in values["assets"].items()}
    return ItemSpec(**{**values, "config": config, "inputs": inputs, "assets": assets})


def _encoded(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, default=_plain).encode()


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no place in a job")
