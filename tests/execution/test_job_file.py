"""Jobs and results on their way through a store."""

import dataclasses
from dataclasses import asdict
from typing import Any

import pytest

from avatar_core.backends.base import create_backend
from avatar_core.errors import StoreError
from avatar_core.execution.job_file import JobFile
from avatar_core.execution.worker import Job, JobResult, StoreAddress
from avatar_core.stages.base import ItemSpec
from avatar_core.stages.subject import Segment
from avatar_core.store.storage import Storage
from tests.planning.test_item_builder import NAMES, items
from tests.subjects import subject

HERE = StoreAddress("root", {"secret": "hunter2"}, None, 1)
ROW = {"key": "a", "status": "ok", "seconds": 0.25, "boxes": [[1.0, 2.5]], "error": None, "name": "Zoë"}


def job_of(backend: dict[str, Any], stage: str, specs: tuple[ItemSpec, ...]) -> Job:
    return Job(HERE, backend, stage, specs, {"audio": {"a": ROW}}, memory="low")


def values(spec: ItemSpec) -> dict[str, Any]:
    """All of them: seed and window count for nothing where configurations are compared."""
    return {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)} | {"config": asdict(spec.config)}


@pytest.mark.parametrize("name", NAMES)
def test_a_job_comes_back_as_it_was(storage: Storage, name: str) -> None:
    backend = create_backend({"name": name})
    given = {"name": name, **asdict(backend.config)}
    facts = subject(backend, seed=2**63 + 5, segment=Segment(0.1 + 0.2, 1 / 3), boxes=((0.1, 0.0, 9.5, 9.0),))
    for stage, specs in items(backend, facts).items():
        job = job_of(given, stage, specs)
        file = JobFile(storage, "run", job.id)
        file.write(job, {"a": "Zoë"})
        read, labels = file.read(HERE)
        assert labels == {"a": "Zoë"}
        assert [*map(values, read.items)] == [*map(values, specs)]
        assert [type(spec.config) for spec in read.items] == [type(spec.config) for spec in specs]
        assert [type(getattr(spec.config, "backend", None)) for spec in read.items] == [
            type(getattr(spec.config, "backend", None)) for spec in specs
        ]
        assert (read.id, read.stage, read.memory, read.version) == (job.id, stage, "low", job.version)
        assert read.inputs == job.inputs
        assert create_backend(read.backend).config == backend.config


def test_credentials_stay_here(storage: Storage) -> None:
    job = job_of({"name": "preview"}, "audio", ())
    file = JobFile(storage, "run", job.id)
    file.write(job)
    assert b"hunter2" not in storage.read_bytes(file.path)
    assert b"root" not in storage.read_bytes(file.path)


@pytest.mark.parametrize(
    "result",
    [
        JobResult(),
        JobResult((ROW, ROW), ("one", "two"), unfinished=("b",)),
        JobResult(error="no", error_type="StoreError", keys=("audio:a",), died=True, last_item="b"),
        JobResult(busy="another render"),
        JobResult(refused="it has another version"),
        JobResult(cancelled=True, hung=True),
    ],
)
def test_a_result_comes_back_as_it_was(storage: Storage, result: JobResult) -> None:
    file = JobFile(storage, "run", "job")
    assert file.read_result() is None
    file.write_result(result)
    assert file.read_result() == result
    file.delete()
    assert file.read_result() is None


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"stage": "audio"}', b"\xff"])
def test_a_damaged_job_is_an_error_of_the_store(storage: Storage, content: bytes) -> None:
    file = JobFile(storage, "run", "job")
    storage.write_bytes(file.path, content)
    with pytest.raises(StoreError, match=r"runs/run/jobs/job\.json in .* is no job of this version"):
        file.read(HERE)


def test_a_job_that_is_gone_is_an_error_of_the_store(storage: Storage) -> None:
    with pytest.raises(StoreError):
        JobFile(storage, "run", "job").read(HERE)
