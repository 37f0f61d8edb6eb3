"""What the tests themselves stand on."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import exists, kill_tree, until
from tests.watch import Watch

ROOT = Path(__file__).parents[1]
IGNORING = "import signal, sys; signal.signal(2, signal.SIG_IGN); import subprocess; "
WAITING = [sys.executable, "-c", "import time; time.sleep(100)"]


def test_a_pure_test_imports_neither_the_command_line_nor_an_s3_server() -> None:
    heavy = {"boto3", "moto", "flows.cli", "prefect", "avatar_core.pipeline", "pandas", "av", "torch"}
    code = f"import sys, tests.conftest; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.drill
def test_signals_arrive_where_the_tests_are_started_beside_a_script() -> None:
    """There SIGINT is ignored, and so it would be in all that the tests start."""
    tests = ["-m", "pytest", "-n", "0", "-q", "tests/test_watching.py", "-k", "interrupted"]
    run = f"sys.exit(subprocess.call([sys.executable, *{tests}]))"
    done = subprocess.run([sys.executable, "-c", IGNORING + run], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_a_process_can_be_interrupted() -> None:
    with subprocess.Popen(WAITING, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == -signal.SIGINT


def test_waiting_has_an_end() -> None:
    with pytest.raises(AssertionError, match=r"waited 0\.05 s in vain"):
        until(lambda: False, patience_s=0.05)


def test_waiting_ends_with_the_process() -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(AssertionError, match="ended with 3 before"):
        until(lambda: False, [process])


def test_a_killed_process_takes_along_what_it_started() -> None:
    code = f"import subprocess; subprocess.Popen({WAITING}); print(flush=True); subprocess.call({WAITING})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        kill_tree(process)
    assert not exists(process.pid)


def test_a_command_is_held_at_a_step_of_an_item_and_goes_on_when_released(tmp_path: Path) -> None:
    """The items of other stages, and those before, are not held."""
    watch = Watch(tmp_path)
    watch.hold_at("denoise", 2, step=3)
    code = (
        "from types import SimpleNamespace as N; import avatar_core.execution.shard as run\n"
        "def process(item, config, models, scratch, report):\n"
        "    [report(step, 4) for step in range(5)]\n"
        "for stage, key in (('face', 'a'), ('denoise', 'b'), ('denoise', 'c'), ('decode', 'd')):\n"
        "    stage = N(name=stage, process=process)\n"
        "    run._attempt(stage, N(key=key, config=None), None, N(models=lambda config: None), None, print)\n"
        "    print(key, flush=True)\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, env=watch.environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        watch.until_held(process)
        assert watch.calls() == [("face", "a"), ("denoise", "b"), ("denoise", "c")]
        watch.release()
        output, _ = process.communicate(timeout=60)
    assert [line for line in output.splitlines() if line in "abcd"] == ["a", "b", "c", "d"]
    assert watch.calls()[-1] == ("decode", "d")
