from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from avatar_core.execution.worker_process import WorkerProcesses
from tests.execution.runs import Run


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


@pytest.fixture(scope="module")
def queues() -> Iterator[WorkerProcesses]:
    with WorkerProcesses(cpus=2) as local:
        yield local


@pytest.fixture
def run(threads: ThreadPoolExecutor, queues: WorkerProcesses) -> Run:
    return Run(threads, queues)
