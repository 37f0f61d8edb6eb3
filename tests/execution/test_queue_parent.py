"""However the process that has the queues ends, their children end with it."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.processes import PATIENCE_S, exists, until

pytestmark = pytest.mark.timeout(120)

PARENT = """
import sys, threading, time
from pathlib import Path
from avatar_core.execution.worker import Job, StoreAddress
from avatar_core.execution.worker_process import WorkerProcesses
from tests.execution import toy_backend as toy
from tests.execution.jobs import run_job

job = Job(StoreAddress(sys.argv[1], {}, None, 2**20), {"name": "toy"}, "denoise",
          (toy.toy_item("a", toy.nothing), toy.toy_item("b", getattr(toy, sys.argv[2]))), {})
with WorkerProcesses(cpus=2) as queues:
    told = lambda row: print(*(queue.pid for queue in queues.values()), flush=True)
    if sys.argv[3] == "main":
        run_job(queues["cpu-0"], job, on_row=told)
    else:
        threading.Thread(target=run_job, args=[queues["cpu-0"], job], kwargs={"on_row": told}).start()
        time.sleep(100)
"""


def start_parent(root: Path, act: str, thread: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A process amid a shard, and its children, of which the second is idle."""
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), str(root), act, thread],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert parent.stdout is not None
    return parent, [int(pid) for pid in parent.stdout.readline().split()]


@pytest.mark.parametrize("act", ["sleep_for_ever", "compute_for_ever"])
def test_children_end_with_a_killed_parent(tmp_path: Path, act: str) -> None:
    parent, children = start_parent(tmp_path, act, "other")
    assert all(map(exists, children))
    parent.kill()
    parent.communicate(timeout=PATIENCE_S)
    until(lambda: not any(map(exists, children)))


@pytest.mark.drill
@pytest.mark.parametrize("thread", ["main", "other"])
def test_an_interrupted_parent_ends_its_children(tmp_path: Path, thread: str) -> None:
    parent, children = start_parent(tmp_path, "sleep_for_ever", thread)
    parent.send_signal(signal.SIGINT)
    parent.communicate(timeout=PATIENCE_S)
    assert not any(map(exists, children))
