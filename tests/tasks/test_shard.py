"""What tasks end as, and where Prefect finds their results again."""

import json
from typing import Any

import pytest
from prefect.results import ResultStore
from prefect.serializers import JSONSerializer, PickleSerializer

from avatar_core.execution.worker import JobResult
from avatar_core.store.storage import Storage
from tasks.by_stage import task_of
from tasks.shard import GAVE_BACK, ROWS_FAILED, StoreFiles, cache_key, state_of

OK = {"key": "a", "status": "ok"}


def bad(number: int) -> dict[str, Any]:
    return {"key": f"k{number}", "status": "failed", "error": f"no face in {number}"}


@pytest.mark.parametrize(
    ("result", "kind", "name", "message"),
    [
        (JobResult((OK, OK)), "COMPLETED", "Completed", "2 items"),
        (JobResult((OK, bad(1))), "FAILED", ROWS_FAILED, "1 of 2 failed: clip of k1: no face in 1"),
        (JobResult(error="disk full"), "FAILED", "Failed", "disk full"),
        (JobResult(error="signal 9", died=True), "CRASHED", "Crashed", "signal 9"),
        (JobResult(error="silent", hung=True), "CRASHED", "Crashed", "silent"),
        (JobResult((OK,), cancelled=True), "CANCELLED", "Cancelled", "1 item kept"),
        (JobResult(refused="another version"), "FAILED", GAVE_BACK, "another version"),
        (JobResult(busy="another render"), "FAILED", GAVE_BACK, "the GPU is held by another render"),
    ],
)
def test_how_a_shard_has_ended(result: JobResult, kind: str, name: str, message: str) -> None:
    state = state_of(result, "clip of {}".format)
    assert (state.type.value, state.name, state.message) == (kind, name, message)


def test_of_many_failures_the_first_are_told() -> None:
    message = state_of(JobResult(tuple(map(bad, range(9))))).message
    assert message
    assert message.startswith("9 of 9 failed: k0: no face in 0; k1: ")
    assert message.endswith("k4: no face in 4 (and 4 more)")


def test_stages_have_tasks_of_their_own_names() -> None:
    for stage in ("ingest", "speech", "face", "audio", "text", "reference", "denoise", "decode", "mine"):
        assert task_of(stage).name == stage
    assert cache_key("face", ["a", "b"]) == cache_key("face", ["b", "a"]) != cache_key("audio", ["a", "b"])


@pytest.fixture
def results(storage: Storage) -> ResultStore:
    return ResultStore(result_storage=StoreFiles(storage=storage), serializer=JSONSerializer())


def test_results_are_found_while_their_manifests_are_there(storage: Storage, results: ResultStore) -> None:
    manifest = "stages/face/manifests/1.parquet"
    storage.write_bytes(manifest, b"rows")
    results.write({"manifests": [f"{storage.uri}/{manifest}"]}, key="face-1")
    assert results.exists("face-1")
    assert results.read("face-1").result == {"manifests": [f"{storage.uri}/{manifest}"]}
    storage.delete([manifest])
    assert not results.exists("face-1")
    assert not results.exists("face-2")


def test_what_somebody_put_there_is_not_unpickled(storage: Storage, results: ResultStore) -> None:
    theirs = ResultStore(result_storage=StoreFiles(storage=storage), serializer=PickleSerializer())
    theirs.write({"items": 1}, key="face-1")
    assert storage.exists("tasks/face-1.json")
    assert not results.exists("face-1")
    with pytest.raises(Exception, match="is not JSON"):
        results.read("face-1")
    storage.write_bytes("tasks/face-1.json", json.dumps({"metadata": {}}).encode())
    assert not results.exists("face-1")
