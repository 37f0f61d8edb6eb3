"""The work of a run without anybody who shows it."""

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from flows.execution import Execution, Line, ShardRun

from avatar_core.config import Config, parse
from avatar_core.errors import Cancelled
from avatar_core.execution.worker import JobResult
from avatar_core.pipeline import begin_run
from avatar_core.planning.batch import Batch
from avatar_core.progress import Silent
from tests.sample_rows import Rendered, data_files, open_known, videos, write_picture, write_table

pytestmark = pytest.mark.timeout(120)


def opened(table: Path, root: Path, **options: object) -> Batch:
    values = {"table": str(table), "storage": {"root": str(root)}, "runtime": {"cpus": 1}, **options}
    return open_known(parse(Config, values))


def execution(batch: Batch, cancelled: Callable[[], bool] = lambda: False) -> Execution:
    return Execution(batch, begin_run(batch), Silent(), cancelled)


def test_the_work_needs_nobody_who_looks_on(rendered: Rendered, tmp_path: Path) -> None:
    with execution(opened(rendered.table, tmp_path)) as work:
        result = work.result()
    assert work.ended
    assert videos(Path(result.dataset)) == videos(rendered.result.dataset)


def test_every_shard_is_told(rendered: Rendered, store: Path, tmp_path: Path) -> None:
    with execution(opened(rendered.table, store, video={"crf": 30})) as work:
        shards = [news for news in work.news() if isinstance(news, ShardRun)]
    assert work.reused == {"ingest": 4, "face": 2, "audio": 2, "reference": 2, "denoise": 4, "decode": 0}
    assert {(shard.stage, shard.worker) for shard in shards} == {("decode", "cpu-0")}
    assert sum(len(shard.result().rows) for shard in shards) == 4


def test_random_weights_are_computed_where_the_real_ones_would_be(
    rendered: Rendered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AVATAR_WEIGHTS", str(tmp_path / "weights"))
    backend = {"name": "ditto", "checkpoint": "ditto-tiny", "denoise": {"num_inference_steps": 1}}
    runtime = {"cpus": 1, "gpus": [0, 1], "pretend": True}
    batch = opened(rendered.table, tmp_path / "store", backend=backend, runtime=runtime, limit=2)
    with execution(batch) as work:
        shards = [news for news in work.news() if isinstance(news, ShardRun)]
    assert work.result().ok
    assert {(shard.stage, shard.worker.partition("-")[0]) for shard in shards} == {
        ("face", "cpu"),
        ("audio", "cpu"),
        ("reference", "gpu"),
        ("denoise", "gpu"),
        ("decode", "gpu"),
    }


def test_what_is_logged_is_with_its_shard_or_with_the_run(inputs: Path, tmp_path: Path) -> None:
    picture = write_picture(tmp_path / "bad.jpg", "closeup")
    picture.write_bytes((inputs / "landscape.png").read_bytes())
    rows = [{"name": "bad", "image": str(picture), "audio": str(inputs / "hello.wav")}]
    with execution(opened(write_table(tmp_path / "table.csv", rows), tmp_path / "store")) as work:
        news = list(work.news())
    beside = [line.text for line in news if isinstance(line, Line)]
    assert any("bad: reference failed: no face found" in text for text in beside)


def test_lines_are_read_once_and_end_with_the_shard() -> None:
    told = threading.Event()
    begun: list[ShardRun] = []

    def call(on_start: Callable[[], None]) -> JobResult:
        on_start()
        on_start()
        return JobResult()

    shard = ShardRun("decode", "cpu-0", "decode 0001", call, begun.append, told.set)
    shard.tell(Line(20, "begins"))
    shard.start()
    assert told.wait(60)
    assert [line.text for line in shard.lines()] == ["begins"]
    assert list(shard.lines()) == []
    assert shard.result() == JobResult()
    assert begun == [shard]


def test_an_error_of_whoever_shows_it_stops_the_work(rendered: Rendered, tmp_path: Path) -> None:
    work = execution(opened(rendered.table, tmp_path, takes=200))
    with suppress(OSError), work:
        next(work.news())
        raise OSError("no server")
    with pytest.raises(Cancelled):
        work.result()
    assert not (tmp_path / "datasets").exists()
    assert len(data_files(tmp_path, "decode")) < 800


def test_a_reason_to_stop_may_be_added_later(rendered: Rendered, tmp_path: Path) -> None:
    stop = threading.Event()
    with execution(opened(rendered.table, tmp_path, takes=200)) as work:
        work.stop_when(stop.is_set)
        stop.set()
        with pytest.raises(Cancelled):
            work.result()
