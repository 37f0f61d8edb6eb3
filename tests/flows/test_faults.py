"""Kills, full disks, damaged records and a second run: real processes, counted by a log outside the store."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from avatar_core.maintenance import verify_run
from avatar_core.store.attempts import compact
from avatar_core.store.catalog import load_catalog
from avatar_core.store.manifest import manifest_folder
from avatar_core.store.storage import Storage
from tests.flows.conftest import PrefectServer
from tests.flows.counted_backend import CALL_LOG, ITEM_S, read_calls
from tests.sample_rows import videos, write_recording, write_table

pytestmark = [pytest.mark.xdist_group("prefect"), pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
AVATAR = [sys.executable, "-c", "import tests.flows.counted_backend; from flows.cli import main; main()"]
SOURCES, CLIPS = 6, 14
"""Pictures, and recordings; clips of a picture and a recording each."""
ITEMS = {"ingest": 2 * SOURCES, "face": SOURCES, "audio": SOURCES, "reference": SOURCES} | {
    "denoise": CLIPS,
    "decode": CLIPS,
}
PATIENCE_S = 120.0

Call = tuple[str, str]
"""Stage and key."""


@dataclass(frozen=True)
class Runs:
    """`avatar render` of one table with one store; `log` gets a line for each item that is begun."""

    folder: Path
    table: Path
    environment: dict[str, str] = field(repr=False)
    options: tuple[str, ...] = ("runtime.cpus=2", "runtime.shard_seconds=0.03")

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def log(self) -> Path:
        return self.folder / "calls.log"

    @property
    def videos(self) -> dict[str, bytes]:
        return videos(self.store / "datasets/batch")

    def start(self, output: int = subprocess.PIPE) -> "subprocess.Popen[str]":
        words = ["render", str(self.table), "--config-dir", str(self.table.parent / "conf"), "backend=counted"]
        words += ["face.required=false", "runtime.gpus=[]", f"storage.root={self.store}", *self.options]
        return subprocess.Popen(
            [*AVATAR, *words],
            env={**self.environment, CALL_LOG: str(self.log)},
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT if output == subprocess.PIPE else output,
            text=True,
        )

    def finish(self) -> tuple[int, str]:
        """Exit code and output of a run that is left alone."""
        process = self.start()
        output, _ = process.communicate(timeout=PATIENCE_S)
        return process.returncode, output

    def calls(self) -> list[Call]:
        return read_calls(self.log)

    def committed(self) -> set[Call]:
        storage = Storage(str(self.store))
        return {(stage, key) for stage in ITEMS for key in load_catalog(storage, stage).ok_keys()}

    def kill_when(self, is_moment: Callable[[list[Call]], bool]) -> str:
        """Kills the run and all that it started once its calls so far are right; gives the last call's stage."""
        before = len(self.calls())
        process = self.start(subprocess.DEVNULL)
        while not is_moment(calls := self.calls()[before:]):
            assert process.poll() is None, f"ended with {process.returncode} before the moment"
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)  # it must not start another process meanwhile
        tree = [process.pid, *descendants(process.pid)]
        for pid in tree:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        deadline_s = time.monotonic() + PATIENCE_S
        while any(map(lives, tree)) and time.monotonic() < deadline_s:
            time.sleep(0.001)
        return calls[-1][0]


def descendants(pid: int) -> list[int]:
    children: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            children += map(int, path.read_text().split())
    return [*children, *(further for child in children for further in descendants(child))]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    for number in range(SOURCES):
        Image.new("RGB", (64, 64), (40 * number, 128, 60)).save(folder / f"{number}.png")
        write_recording(folder / f"{number}.wav", start_s=0.5 + 0.1 * number, duration_s=0.24)
    pairs = [(number % SOURCES, (number + number // SOURCES) % SOURCES) for number in range(CLIPS)]
    (folder / "conf/backend").mkdir(parents=True)
    (folder / "conf/backend/counted.yaml").write_text("name: counted\n")
    return write_table(folder / "batch.csv", [{"image": f"{p}.png", "audio": f"{a}.wav"} for p, a in pairs])


@pytest.fixture(scope="module")
def environment(prefect_server: PrefectServer, table: Path) -> dict[str, str]:
    """With bytecode, whose absence would make every start compile all anew."""
    values = {name: value for name, value in prefect_server.environment.items()}
    values.pop("PYTHONDONTWRITEBYTECODE", None)
    return values | {"PYTHONPYCACHEPREFIX": str(table.parent / "bytecode"), ITEM_S: "0.005"}


@pytest.fixture
def runs(tmp_path: Path, table: Path, environment: dict[str, str]) -> Runs:
    return Runs(tmp_path, table, environment)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, table: Path, environment: dict[str, str]) -> Runs:
    """A finished run, not to be changed."""
    runs = Runs(tmp_path_factory.mktemp("unbroken"), table, environment)
    code, output = runs.finish()
    assert code == 0, output
    assert Counter(stage for stage, _ in runs.calls()) == ITEMS
    assert len(runs.videos) == CLIPS
    return runs


# --- kill -9


def kill_and_go_on(runs: Runs, moments: int, at_least: int) -> Counter[str]:
    """Kills the same command at moments spread evenly over its items; gives how many fell into each stage."""
    killed: Counter[str] = Counter()
    for moment in range(moments):
        begun_before, committed = runs.calls(), runs.committed()
        wanted = 1 + round(moment * (sum(ITEMS.values()) - 2) / max(1, moments - 1))
        if moments == 2:
            wanted = round((moment + 1) * sum(ITEMS.values()) / 3)

        def is_moment(calls: list[Call]) -> bool:
            begun = len({*begun_before, *calls})  # noqa: B023
            if not calls or begun < wanted:  # noqa: B023
                return False
            return killed[calls[-1][0]] < at_least or begun > wanted + 3 # noqa: B023

        killed[runs.kill_when(is_moment)] += 1
        assert not committed.intersection(runs.calls()[len(begun_before) :])
    return killed


def expect_completed(runs: Runs, unbroken: Runs) -> None:
    begun_before, committed = len(runs.calls()), runs.committed()
    code, output = runs.finish()
    assert code == 0, output
    assert not committed.intersection(runs.calls()[begun_before:])
    assert set(runs.calls()) == set(unbroken.calls())
    assert runs.videos == unbroken.videos
    assert verify_run(Storage(str(runs.store)), "batch").problems == ()


def test_a_run_killed_at_any_moment_goes_on_where_it_was(runs: Runs, unbroken: Runs) -> None:
    killed = kill_and_go_on(runs, 20, at_least=3)
    print(killed, len(runs.calls()))
    assert killed.total() == 20
    assert min(killed[stage] for stage in ITEMS) >= 3, killed
    expect_completed(runs, unbroken)


def test_a_run_killed_with_its_temporary_server_goes_on_where_it_was(runs: Runs, unbroken: Runs) -> None:
    environment = runs.environment | {"AVATAR_STATE_DIR": str(runs.folder / "state")}
    del environment["PREFECT_API_URL"]
    runs = replace(runs, environment=environment)
    kill_and_go_on(runs, 2, at_least=0)
    expect_completed(runs, unbroken)


# --- two runs at once


def test_two_runs_at_once_both_complete(runs: Runs, unbroken: Runs) -> None:
    runs = replace(runs, environment=runs.environment | {ITEM_S: "0.05"})
    both = [runs.start(), runs.start()]
    ended = [(process.communicate(timeout=PATIENCE_S)[0], process.returncode) for process in both]
    assert [code for _, code in ended] == [0, 0], ended
    assert runs.videos == unbroken.videos
    calls = Counter(stage for stage, _ in runs.calls())
    print(calls, ITEMS)
    print({s: sorted(pq.read_metadata(p).num_rows for p in runs.store.glob(f"stages/{s}/manifests/*")) for s in ITEMS})
    assert verify_run(Storage(str(runs.store)), "batch").problems == ()


# --- a full disk


@pytest.fixture
def small_disk(runs: Runs) -> Iterator[Path]:
    runs.store.mkdir()
    mount = shutil.which("mount")
    command = [mount or "false", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(runs.store)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield runs.store
    subprocess.run(["umount", str(runs.store)], check=True)


@pytest.mark.parametrize("part", [0.1, 0.4, 0.7, 0.95])
def test_a_full_disk_ends_the_run_and_the_same_command_goes_on(
    runs: Runs, unbroken: Runs, small_disk: Path, part: float
) -> None:
    """`part` of the space that the batch needs is free."""
    runs = replace(runs, options=(*runs.options, "runtime.retries=0"))
    needed = sum(-(-path.stat().st_size // 4096) * 4096 for path in unbroken.store.rglob("*") if path.is_file())
    ballast, disk = small_disk / "ballast", os.statvfs(small_disk)
    ballast.write_bytes(bytes(disk.f_bavail * disk.f_frsize - round(part * needed)))
    code, output = runs.finish()
    print(code, output)
    assert code in (1, 2), output
    assert "Traceback" not in output
    assert "no space is left" in output or "No space left" in output
    assert output.splitlines()[-1].startswith("error: "), output
    ballast.unlink()
    expect_completed(replace(runs, options=(*runs.options, "retry_failed=true")) if False else runs, unbroken)


# --- damaged records


def test_damaged_manifests_and_catalog_files_are_not_served(runs: Runs, unbroken: Runs) -> None:
    shutil.copytree(unbroken.store, runs.store)
    storage = Storage(str(runs.store))
    assert compact(storage, "decode", min_manifests=1)
    shutil.rmtree(runs.store / manifest_folder("decode"))
    damaged = [*runs.store.glob("catalog/decode/*"), *(runs.store / manifest_folder("denoise")).iterdir()]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-20])
    for path in (runs.store / manifest_folder("audio")).iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    code, output = runs.finish()
    print(code, output)
    assert code == 0, output
    assert Counter(stage for stage, _ in runs.calls()) == {s: ITEMS[s] for s in ("audio", "denoise", "decode")}
    assert runs.videos == unbroken.videos
    assert "warning" in output.lower()
