import json
from pathlib import Path

import pytest

from avatar_core.execution.worker import Job, StoreAddress
from avatar_core.execution.worker_process import WorkerProcess
from avatar_core.store.storage import Storage
from avatar_core.store.tensors import open_item
from tests.execution import toy_backend as toy
from tests.execution.jobs import run_job


@pytest.mark.parametrize(("memory", "levels"), [("auto", ["high", "low"]), ("low", ["low"])])
def test_a_queue_goes_down_the_levels_of_its_backend(tmp_path: Path, memory: str, levels: list[str]) -> None:
    queue = WorkerProcess("cpu-0")
    backend = {"name": "toy", "memory_levels": ["high", "low"]}
    items = (toy.toy_item("a", toy.need_less_memory), toy.toy_item("b", toy.nothing))
    job = Job(StoreAddress(str(tmp_path), {}, None, 2**20), backend, "denoise", items, {}, memory=memory)
    try:
        result = run_job(queue, job, item_timeout_s=60.0)
    finally:
        queue.stop()
    assert [(row["status"], row["memory"]) for row in result.rows] == [("ok", "low")] * 2
    file = Storage(str(tmp_path)).local_path(result.rows[0]["data"])
    assert json.loads(open_item(file, "a")["answer"].tobytes()) == levels
