"""Kills, full disks, damaged records and a second run: real processes, watched item by item."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
from PIL import Image

from avatar_core.maintenance import verify_run
from avatar_core.pipeline import render
from avatar_core.store.attempts import compact
from avatar_core.store.catalog import load_catalog
from avatar_core.store.manifest import manifest_folder
from avatar_core.store.storage import Storage
from flows.server import Server, start_server, stop_server
from tests.execution.windowed_backend import WindowedBackend
from tests.flows.conftest import PrefectServer, free_port, serverless
from tests.processes import kill_tree, until
from tests.sample_rows import flip_byte, videos, write_recording, write_table
from tests.watch import Call, Watch

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
AVATAR = [sys.executable, "-c", "import tests.execution.windowed_backend; from flows.cli import main; main()"]
SOURCES, CLIPS = 8, 14
"""Pictures, and recordings; clips of a picture and a recording each."""
ITEMS = {"ingest": 2 * SOURCES, "face": SOURCES, "audio": SOURCES, "reference": SOURCES} | {
    "denoise": CLIPS,
    "decode": CLIPS,
}
RECORD_BYTES = 65536
"""More than the record of a run takes."""
PATIENCE_S = 120.0
END_S = 20.0
"""From the finished dataset to the end of the command, where nobody hears of it any more: ten seconds are
allowed, and the interpreter needs a moment too."""


def by_stage(calls: Sequence[Call]) -> Counter[str]:
    return Counter(stage for stage, _ in calls)


@dataclass(frozen=True)
class Runs:
    """`avatar render` of one table with one store, watched."""

    folder: Path
    table: Path
    base: dict[str, str] = field(repr=False)
    options: tuple[str, ...] = ("runtime.cpus=2", "runtime.shard_seconds=0.03")
    backend: str = "counted"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def watch(self) -> Watch:
        return Watch(self.folder / "watch")

    @property
    def videos(self) -> dict[str, bytes]:
        return videos(self.store / "datasets/batch")

    def start(self, command: str = "render", output: int = subprocess.PIPE) -> "subprocess.Popen[str]":
        words = [str(self.table), "--config-dir", str(self.table.parent / "conf"), f"backend={self.backend}"]
        words += ["face.required=false", "runtime.gpus=[]", f"storage.root={self.store}", *self.options]
        return subprocess.Popen(
            [*AVATAR, command, *words],
            env=self.watch.environment(self.base),
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT if output == subprocess.PIPE else output,
            text=True,
        )

    def finish(self, command: str = "render") -> tuple[int, str]:
        """Exit code and output of a run that is left alone."""
        process = self.start(command)
        output, _ = process.communicate(timeout=PATIENCE_S)
        return process.returncode, output

    def calls(self) -> list[Call]:
        return self.watch.calls()

    def committed(self) -> set[Call]:
        storage = Storage(str(self.store))
        return {(stage, key) for stage in ITEMS for key in load_catalog(storage, stage).ok_keys()}

    def kill_at(self, stage: str, item: int, committed: int = 0) -> None:
        """Kills a run, and all that it started, when it begins this item (see `Watch.hold_at`) and so many
        items of the stage are committed."""
        self.watch.hold_at(stage, item)
        process = self.start(output=subprocess.DEVNULL)
        self.watch.until_held(process)
        until(lambda: len(load_catalog(Storage(str(self.store)), stage).ok_keys()) >= committed, [process])
        kill_tree(process)
        self.watch.release()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    for number in range(SOURCES):
        Image.new("RGB", (64, 64), (40 * number, 128, 60)).save(folder / f"{number}.png")
        write_recording(folder / f"{number}.wav", start_s=0.5 + 0.1 * number, duration_s=0.24)
    pairs = [(number % SOURCES, (number + number // SOURCES) % SOURCES) for number in range(CLIPS)]
    (folder / "conf/backend").mkdir(parents=True)
    for backend in ("counted", "windowed"):
        (folder / "conf/backend" / f"{backend}.yaml").write_text(f"name: {backend}\n")
    return write_table(folder / "batch.csv", [{"image": f"{p}.png", "audio": f"{a}.wav"} for p, a in pairs])


@pytest.fixture(scope="module")
def environment(prefect_server: PrefectServer, table: Path) -> dict[str, str]:
    """With bytecode, whose absence would make every start compile all anew."""
    values = dict(prefect_server.environment)
    values.pop("PYTHONDONTWRITEBYTECODE", None)
    return values | {"PYTHONPYCACHEPREFIX": str(table.parent / "bytecode")}


@pytest.fixture
def runs(tmp_path: Path, table: Path, environment: dict[str, str]) -> Runs:
    return Runs(tmp_path, table, environment)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, table: Path, environment: dict[str, str]) -> Runs:
    """A finished run, not to be changed."""
    runs = Runs(tmp_path_factory.mktemp("unbroken"), table, environment)
    code, output = runs.finish()
    assert code == 0, output
    assert by_stage(runs.calls()) == ITEMS
    assert len(runs.videos) == CLIPS
    return runs


# --- kill -9


def kill_and_go_on(runs: Runs, moments: Sequence[tuple[str, int]]) -> None:
    """Kills the same command again and again, each time at an item further on."""
    for stage, item in moments:
        begun_before, committed = len(runs.calls()), runs.committed()
        runs.kill_at(stage, item)
        begun = runs.calls()
        assert len({key for name, key in begun if name == stage}) in (item, item + 1)  # two processes
        assert not committed.intersection(begun[begun_before:])


def expect_completed(runs: Runs, unbroken: Runs) -> None:
    begun_before, committed = len(runs.calls()), runs.committed()
    code, output = runs.finish()
    assert code == 0, output
    assert not committed.intersection(runs.calls()[begun_before:])
    assert {*committed, *runs.calls()} == set(unbroken.calls())
    assert runs.videos == unbroken.videos
    assert verify_run(Storage(str(runs.store)), "batch").problems == ()


@pytest.mark.drill
@pytest.mark.parametrize("stage", ITEMS)
def test_a_run_killed_at_any_item_goes_on_where_it_was(runs: Runs, unbroken: Runs, stage: str) -> None:
    items = ITEMS[stage]
    kill_and_go_on(runs, [(stage, item) for item in (1, items // 2, items)])
    expect_completed(runs, unbroken)


@pytest.mark.drill
def test_a_run_without_a_server_that_is_killed_goes_on_where_it_was(runs: Runs, unbroken: Runs) -> None:
    runs = replace(runs, base=serverless(runs.base, runs.folder))
    kill_and_go_on(runs, [("denoise", 3), ("decode", 7)])
    expect_completed(runs, unbroken)


@pytest.fixture
def own_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """One that may be killed."""
    monkeypatch.setenv("AVATAR_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    server, _ = start_server(port=free_port())
    yield server
    stop_server()


@pytest.fixture
def orphaned(runs: Runs, table: Path, own_server: Server) -> tuple[Runs, "subprocess.Popen[str]"]:
    """A run with a row that fails, whose server was killed while it denoised. Prefect's own settings let it
    try for minutes to tell a dead server of each task run."""
    (table.parent / "none.wav").write_text("no recording")
    more = table.with_name("with-a-bad-row.csv")
    more.write_text(f"{table.read_text()}0.png,none.wav\n")
    base = runs.base | {"PREFECT_API_URL": own_server.api_url}
    runs = replace(runs, table=more, base=base, options=(*runs.options, "name=batch"))
    runs.watch.hold_at("denoise")
    process = runs.start()
    runs.watch.until_held(process)
    until(lambda: has_flow_run(own_server), [process], PATIENCE_S)
    os.killpg(own_server.pid, signal.SIGKILL)
    runs.watch.release()
    return runs, process


AWAY = "warning: the Prefect server does not answer; its pages miss the end of this run"


@pytest.mark.drill
def test_a_run_does_not_wait_for_its_killed_server(
    orphaned: tuple[Runs, "subprocess.Popen[str]"], unbroken: Runs
) -> None:
    runs, process = orphaned
    until((runs.store / "datasets/batch/metadata.parquet").exists, [process])
    output, _ = process.communicate(timeout=END_S)
    assert process.returncode == 1, output
    assert runs.videos == unbroken.videos
    lines = output.splitlines()
    assert lines.count(AWAY) == 1
    result = lines.index(f"{CLIPS} of {CLIPS + 1} clips in {runs.store}/datasets/batch")
    assert result < lines.index(AWAY)  # it is shown when it is there
    assert "Traceback" not in output


@pytest.mark.drill
def test_ctrl_c_ends_the_waiting_for_a_killed_server(orphaned: tuple[Runs, "subprocess.Popen[str]"]) -> None:
    runs, process = orphaned
    assert process.stdout
    while "clips in" not in (line := process.stdout.readline()):
        assert line, "it ended without its result"
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=8)  # a dead server would be given ten
    assert process.returncode == 1
    assert len(runs.videos) == CLIPS
    assert "Traceback" not in output


def has_flow_run(server: Server) -> bool:
    response = httpx.post(f"{server.api_url}/flow_runs/filter", json={}, timeout=PATIENCE_S)
    return bool(response.raise_for_status().json())


@pytest.mark.drill
def test_a_clip_killed_in_its_second_window_goes_on_there(
    tmp_path: Path, table: Path, environment: dict[str, str]
) -> None:
    recording = write_recording(tmp_path / "long.wav", duration_s=0.6)
    long_table = write_table(tmp_path / "batch.csv", [{"image": table.parent / "0.png", "audio": recording}])
    shutil.copytree(table.parent / "conf", tmp_path / "conf")
    runs = Runs(tmp_path, long_table, environment, backend=WindowedBackend.name)
    runs.kill_at("denoise", 2, committed=1)
    code, output = runs.finish()
    assert code == 0, output
    first, killed, second, third = [key for stage, key in runs.calls() if stage == "denoise"]
    assert killed == second
    assert len({first, second, third}) == 3
    options = {
        "face": {"required": False},
        "runtime": {"gpus": []},
        "storage": {"root": str(tmp_path / "un")},
    }
    unbroken = render({"table": str(long_table), "backend": {"name": WindowedBackend.name}, **options})
    assert runs.videos == videos(unbroken.dataset)
    assert len(runs.videos) == 1


# --- two runs at once


@pytest.mark.drill
def test_two_runs_at_once_both_complete_and_share_the_work(runs: Runs, unbroken: Runs) -> None:
    runs.watch.hold_at("ingest")
    both = [runs.start(), runs.start()]
    until(lambda: len(runs.calls()) == 2, both)  # each has begun an item
    runs.watch.release()
    outputs = [process.communicate(timeout=PATIENCE_S)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert by_stage(runs.calls()) == ITEMS
    assert runs.videos == unbroken.videos
    assert pq.read_metadata(runs.store / "datasets/batch/metadata.parquet").num_rows == CLIPS
    assert verify_run(Storage(str(runs.store)), "batch").problems == ()


@pytest.mark.drill
@pytest.mark.parametrize(("stage", "item"), [("ingest", 5), ("denoise", 3)])
def test_a_run_goes_on_when_another_is_killed(runs: Runs, unbroken: Runs, stage: str, item: int) -> None:
    runs.watch.hold_at(stage, item)
    killed, other = runs.start(output=subprocess.DEVNULL), runs.start()
    runs.watch.until_held(killed, other)
    kill_tree(killed)
    committed, begun_before = runs.committed(), len(runs.calls())
    runs.watch.release()
    output, _ = other.communicate(timeout=PATIENCE_S)
    assert other.returncode == 0, output
    assert not committed.intersection(runs.calls()[begun_before:])
    assert set(runs.calls()) == set(unbroken.calls())
    assert runs.videos == unbroken.videos


# --- a full disk


@pytest.fixture
def small_disk(runs: Runs) -> Iterator[Path]:
    """The store on a disk of 8 MB."""
    runs.store.mkdir()
    command = [shutil.which("mount") or "false", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(runs.store)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield runs.store
    subprocess.run(["umount", str(runs.store)], check=True)


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))


def fill(disk: Path, free_bytes: int) -> Path:
    """A file that leaves so much."""
    status = os.statvfs(disk)
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(status.f_bavail * status.f_frsize - free_bytes))
    return ballast


def expect_no_space(runs: Runs) -> str:
    code, output = runs.finish()
    assert code == 2, output
    assert re.fullmatch("error: cannot .*: no space is left .*; free some.*", output.splitlines()[-1]), output
    assert "Traceback" not in output
    assert not list(runs.store.rglob("*.partial"))
    return output


@pytest.mark.drill
@pytest.mark.parametrize("part", [0.1, 0.5])
def test_a_full_disk_ends_the_run_and_the_same_command_goes_on(
    runs: Runs, unbroken: Runs, small_disk: Path, part: float
) -> None:
    """Where `part` of what the batch needs is free: in ingest, and amid the flow."""
    runs = replace(runs, options=(*runs.options, "runtime.retries=0"))
    ballast = fill(small_disk, int(part * disk_bytes(unbroken.store)))
    expect_no_space(runs)
    begun = set(by_stage(runs.calls()))
    assert ("denoise" in begun) == (part > 0.2)
    ballast.unlink()
    expect_completed(runs, unbroken)


@pytest.mark.drill
def test_a_disk_that_is_full_when_the_dataset_is_published_costs_no_video(
    runs: Runs, unbroken: Runs, small_disk: Path
) -> None:
    shutil.copytree(unbroken.store, small_disk, dirs_exist_ok=True)
    published = small_disk / "datasets/batch/videos"
    room = disk_bytes(published)
    shutil.rmtree(published)
    ballast = fill(small_disk, room // 2 + RECORD_BYTES)
    output = expect_no_space(runs)
    ballast.unlink()
    expect_completed(runs, unbroken)
    assert "computing it again" not in output
    assert not runs.calls()


# --- damaged records


@pytest.fixture
def damaged(runs: Runs, unbroken: Runs) -> Runs:
    """Truncated: the one catalog file of decode, the manifests of denoise. Altered: those of audio."""
    shutil.copytree(unbroken.store, runs.store)
    assert compact(Storage(str(runs.store)), "decode", min_manifests=1)
    shutil.rmtree(runs.store / manifest_folder("decode"))
    (catalog_file,) = runs.store.glob("catalog/decode/*")
    for path in (catalog_file, *(runs.store / manifest_folder("denoise")).iterdir()):
        path.write_bytes(path.read_bytes()[:-20])
    for path in (runs.store / manifest_folder("audio")).iterdir():
        flip_byte(path)
    return runs


@pytest.mark.drill
def test_damaged_manifests_and_catalog_files_are_not_served(damaged: Runs, unbroken: Runs) -> None:
    expect_completed(damaged, unbroken)
    assert by_stage(damaged.calls()) == {stage: ITEMS[stage] for stage in ("audio", "denoise", "decode")}


def test_the_command_warns_of_damaged_manifests_and_catalog_files(damaged: Runs) -> None:
    code, output = damaged.finish("plan")
    assert code == 0, output
    assert re.search("warning.*catalog/decode/", output, re.IGNORECASE), output
    assert re.search("warning.*stages/denoise/manifests/", output, re.IGNORECASE), output
