"""What one shard leaves behind, whatever happens in it. The stage here is real but does next to nothing."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest

from avatar_core.errors import Cancelled, ConfigError, InputError, StoreError, WeightsError
from avatar_core.execution.shard import run_shard
from avatar_core.stages.base import Asset, Item, ItemSpec, Output, Report, Stage
from avatar_core.store.catalog import load_catalog
from avatar_core.store.manifest import write_data
from avatar_core.store.storage import Storage
from tests.sample_rows import flip_byte


class DoublingStage(Stage):
    """Doubles the number in an item's configuration; a string there says how to fail."""

    name = "doubling"
    version = 1
    columns = pa.schema({"double": pa.int64()})

    def __init__(self) -> None:
        self.scratch: list[Path] = []
        self.found: list[Path] = []  # in the scratch folder, before an item used it
        self.loaded: list[Any] = []
        self.threads: list[int] = []

    def weights(self, config: Any) -> tuple[str, ...]:
        return ("mtcnn",) if config == 100 else ()

    def load(self, config: Any, device: str, memory: str | None) -> Any:
        self.loaded.append(config)
        return 2

    def process(self, item: Item, config: Any, models: Any, scratch: Path, report: Report) -> Output:
        self.scratch.append(scratch)
        self.found += scratch.iterdir()
        self.threads.append(cv2.getNumThreads())
        report(1, 2)
        if isinstance(config, Exception):
            raise config
        (scratch / "left behind").touch()
        (scratch / "folder").mkdir()
        value = np.array([models * config])
        if config < 0:
            path = scratch / "result.txt"
            path.write_text(str(value))
            return Output({"double": int(value[0])}, file=path)
        return Output({"double": int(value[0])}, {"double": value})


class SummingStage(DoublingStage):
    """Adds up what it consumes."""

    name = "summing"

    def process(self, item: Item, config: Any, models: Any, scratch: Path, report: Report) -> Output:
        values = [int(output.tensors["double"][0]) for output in item.inputs["doubling"]]
        sizes = [len(path.read_bytes()) for path in item.assets.get("text", ())]
        return Output({"double": sum(values) + sum(sizes)})


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "store"))


def specs(*configs: Any) -> list[ItemSpec]:
    return [ItemSpec(f"key{number}", config, work=2.0) for number, config in enumerate(configs)]


def test_results_are_committed_in_one_manifest(store: Storage) -> None:
    seen: list[dict[str, Any]] = []
    rows = run_shard(store, DoublingStage(), specs(1, 2, -3), {}, on_row=seen.append)
    assert seen == rows
    assert [row["double"] for row in rows] == [2, 4, -6]
    assert len(store.list("stages/doubling/manifests")) == 1
    catalog = load_catalog(store, "doubling")
    for row in rows:
        found = catalog.get(row["key"])
        assert found is not None
        assert {name: found[name] for name in ("double", "data", "sha256", "work")} == {
            name: row[name] for name in ("double", "data", "sha256", "work")
        }
    assert rows[0]["data"] == rows[1]["data"]  # tensors share a file
    assert rows[2]["data"].endswith(".txt")
    assert store.read_bytes(rows[2]["data"]) == b"[-6]"


def test_inputs_and_assets_are_resolved(store: Storage) -> None:
    rows = {row["key"]: row for row in run_shard(store, DoublingStage(), specs(1, 2), {})}
    path, sha256 = write_data(store, "ingest", b"four", ".txt", folder="assets")
    spec = ItemSpec("sum", 0, {"doubling": ("key0", "key1")}, {"text": (Asset("asset", sha256, path),)})
    (summed,) = run_shard(store, SummingStage(), [spec], {"doubling": rows})
    assert summed["double"] == 2 + 4 + 4


@pytest.mark.parametrize(
    ("error", "kind", "message", "retryable"),
    [
        (InputError("picture: is\nbad"), "InputError", "picture: is bad", False),
        (ValueError("oops"), "ValueError", "unexpected ValueError: oops", False),
        (OSError("bad picture"), "OSError", "unexpected OSError: bad picture", False),
        (MemoryError(), "MemoryError", "unexpected MemoryError: no message", True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_an_error_of_an_item_is_its_row(
    store: Storage, error: Exception, kind: str, message: str, retryable: bool
) -> None:
    rows = run_shard(store, DoublingStage(), specs(1, error, 3), {})
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    failure = load_catalog(store, "doubling").failure("key1")
    assert failure is not None
    assert (failure["error_type"], failure["error"], failure["retryable"]) == (kind, message, retryable)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (StoreError("gone"), StoreError),
        (WeightsError("altered"), WeightsError),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), StoreError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["store", "weights", "disk full", "interrupt"],
)
def test_an_error_of_the_machine_ends_the_shard_but_keeps_what_is_done(
    store: Storage, error: Any, raised: type[BaseException]
) -> None:
    stage = DoublingStage()
    stage.process = interrupting(stage, error)  # type: ignore[method-assign]
    with pytest.raises(raised):
        run_shard(store, stage, specs(1, 2, 3), {})
    catalog = load_catalog(store, "doubling")
    assert set(catalog.ok_keys()) == {"key0"}
    assert not catalog.failed_keys()


def interrupting(stage: DoublingStage, error: BaseException, at: str = "key1") -> Callable[..., Output]:
    process = stage.process

    def process_or_raise(item: Item, *rest: Any) -> Output:
        if item.key == at:
            raise error
        return process(item, *rest)

    return process_or_raise


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 5])
def test_cancelling_keeps_what_is_done(store: Storage, calls: int) -> None:
    """Each item asks twice whether it is cancelled: before it starts and within."""
    asked = iter(range(100))
    with pytest.raises(Cancelled):
        run_shard(store, DoublingStage(), specs(1, 2, 3), {}, cancelled=lambda: next(asked) >= calls)
    assert set(load_catalog(store, "doubling").ok_keys()) == {f"key{n}" for n in range(calls // 2)}


def test_progress_is_reported_by_key(store: Storage) -> None:
    told: list[tuple[str, int, int]] = []
    run_shard(store, DoublingStage(), specs(1), {}, on_progress=lambda *event: told.append(event))
    assert told == [("key0", 0, 1), ("key0", 1, 2)]


def test_a_damaged_input_is_named_by_its_owner(store: Storage, tmp_path: Path) -> None:
    rows = {row["key"]: row for row in run_shard(store, DoublingStage(), specs(1), {})}
    flip_byte(tmp_path / "store" / rows["key0"]["data"])
    with pytest.raises(StoreError) as caught:
        run_shard(store, SummingStage(), [ItemSpec("sum", 0, {"doubling": ("key0",)})], {"doubling": rows})
    assert caught.value.keys == ("doubling:key0",)
    (tmp_path / "store" / rows["key0"]["data"]).unlink()
    with pytest.raises(StoreError) as caught:
        run_shard(store, SummingStage(), [ItemSpec("sum", 0, {"doubling": ("key0",)})], {"doubling": rows})
    assert caught.value.keys == ("doubling:key0",)


def test_a_lost_asset_is_named_by_its_ingest_item(store: Storage) -> None:
    asset = Asset("asset", "0" * 64, "assets/00/absent.png")
    with pytest.raises(StoreError) as caught:
        run_shard(store, SummingStage(), [ItemSpec("sum", 0, {}, {"text": (asset,)})], {})
    assert caught.value.keys == ("ingest:asset",)


def test_scratch_is_private_and_does_not_stay(store: Storage) -> None:
    stage = DoublingStage()
    run_shard(store, stage, specs(1, 2, ValueError("oops"), 3), {})
    assert stage.found == []
    assert not any(path.exists() for path in stage.scratch)


def test_models_are_loaded_once_for_the_same_weights(store: Storage) -> None:
    stage = DoublingStage()
    stage.name = f"doubling_{os.urandom(4).hex()}"  # models of earlier tests stay loaded
    run_shard(store, stage, specs(1, 2, 100, 3), {})
    run_shard(store, stage, specs(4), {})
    assert stage.loaded == [1, 100]


class OutOfMemoryError(RuntimeError):
    """As torch names its own."""


class LadderStage(DoublingStage):
    """Knows the levels 3, 2 and 1; an item needs one at most as high as its configuration."""

    def __init__(self, error: type[Exception] = MemoryError) -> None:
        super().__init__()
        self.name = f"ladder_{os.urandom(4).hex()}"  # models of earlier tests stay loaded
        self.error = error

    def memory_levels(self, device: str) -> tuple[str, ...]:
        return ("3", "2", "1")

    def load(self, config: Any, device: str, memory: str | None) -> Any:
        self.loaded.append(memory)
        return memory

    def process(self, item: Item, config: Any, models: Any, scratch: Path, report: Report) -> Output:
        self.found += scratch.iterdir()
        (scratch / "begun").touch()
        if int(models) > config:
            raise self.error("too little memory")
        return Output({"double": 0})


@pytest.mark.parametrize("error", [MemoryError, OutOfMemoryError])
def test_out_of_memory_an_item_is_done_at_the_next_lower_level(
    store: Storage, error: type[Exception]
) -> None:
    stage = LadderStage(error)
    rows = run_shard(store, stage, specs(3, 2, 3, 1), {})
    assert [(row["status"], row["memory"]) for row in rows] == [
        ("ok", "3"),
        ("ok", "2"),
        ("ok", "2"),
        ("ok", "1"),
    ]
    assert stage.loaded == ["3", "2", "1"]
    assert stage.found == []
    assert load_catalog(store, stage.name).table["memory"].to_pylist() == ["3", "2", "2", "1"]


def test_an_item_is_tried_twice_and_then_may_pass_another_time(store: Storage) -> None:
    stage = LadderStage()
    rows = run_shard(store, stage, specs(1, 0, 1), {})
    assert [(row["status"], row.get("retryable"), row["memory"]) for row in rows] == [
        ("failed", True, "2"),
        ("failed", True, "1"),
        ("ok", None, "1"),
    ]
    assert stage.loaded == ["3", "2", "1"]


def test_a_shard_starts_at_the_level_that_was_asked_for(store: Storage) -> None:
    stage = LadderStage()
    assert [row["memory"] for row in run_shard(store, stage, specs(3, 1), {}, memory="2")] == ["2", "1"]
    with pytest.raises(ConfigError, match=r"no memory level `9` on cpu; choose auto or one of: 3, 2, 1"):
        run_shard(store, stage, specs(3), {}, memory="9")
    assert run_shard(store, DoublingStage(), specs(3), {}, memory="9")[0]["memory"] is None


def test_a_model_that_does_not_fit_is_loaded_at_the_next_lower_level(store: Storage) -> None:
    class LargeStage(LadderStage):
        def load(self, config: Any, device: str, memory: str | None) -> Any:
            if memory == "3":
                raise MemoryError
            return super().load(config, device, memory)

    assert [row["memory"] for row in run_shard(store, LargeStage(), specs(3, 3), {})] == ["2", "2"]


def test_without_levels_an_item_is_tried_twice_too(store: Storage) -> None:
    stage = DoublingStage()
    rows = run_shard(store, stage, specs(MemoryError()), {})
    assert (rows[0]["status"], rows[0]["memory"]) == ("failed", None)
    assert len(stage.scratch) == 2


def test_libraries_work_on_one_thread_meanwhile(store: Storage) -> None:
    stage, before = DoublingStage(), cv2.getNumThreads()
    run_shard(store, stage, specs(1), {})
    assert stage.threads == [1]
    assert cv2.getNumThreads() == before


def test_an_empty_shard_writes_nothing(store: Storage) -> None:
    assert run_shard(store, DoublingStage(), [], {}) == []
    assert store.list() == {}


# --- items worked on at once


class WaitingStage(DoublingStage):
    """Works on four items at once. One that is in `waits_for` first waits for its event, or to be stopped."""

    concurrency = 4

    def __init__(self, waits_for: dict[str, threading.Event] | None = None) -> None:
        super().__init__()
        self.waits_for = waits_for or {}
        self.ended: dict[str, threading.Event] = {f"key{number}": threading.Event() for number in range(99)}

    def process(self, item: Item, config: Any, models: Any, scratch: Path, report: Report) -> Output:
        try:
            if event := self.waits_for.get(item.key):
                while not event.wait(0.005):
                    report(0, 1)
            return super().process(item, config, models, scratch, report)
        finally:
            self.ended[item.key].set()


@pytest.fixture
def remote(tmp_path: Path) -> Storage:
    """In memory, where items wait no longer than on a disk but count as if they did."""
    return Storage(f"memory://shard-{os.urandom(4).hex()}", cache_dir=tmp_path / "cache")


def forever(*keys: str) -> dict[str, threading.Event]:
    """What these items wait for until they are stopped."""
    return dict.fromkeys(keys, threading.Event())


def test_rows_come_in_the_order_of_the_items_however_many_are_worked_on_at_once(remote: Storage) -> None:
    stage = WaitingStage()
    stage.waits_for = {"key0": stage.ended["key3"], "key2": stage.ended["key9"]}
    seen: list[dict[str, Any]] = []
    numbers = [1, -2, ValueError("oops"), *range(4, 41)]
    rows = run_shard(remote, stage, specs(*numbers), {}, on_row=seen.append)
    assert seen == rows
    assert [row["key"] for row in rows] == [f"key{place}" for place in range(40)]
    assert [row.get("double") for row in rows] == [
        None if isinstance(number, ValueError) else 2 * number for number in numbers
    ]
    assert rows[2]["error"] == "unexpected ValueError: oops"
    assert len(remote.list("stages/doubling/manifests")) == 1
    assert set(stage.threads) == {1}
    assert stage.found == []
    assert 1 < len(set(stage.scratch)) <= 4
    assert not any(path.exists() for path in stage.scratch)


def test_on_a_disk_items_are_worked_on_in_turn(store: Storage) -> None:
    stage = WaitingStage()
    run_shard(store, stage, specs(*range(1, 9)), {})
    assert len(set(stage.scratch)) == 1


def test_cancelling_keeps_what_was_finished_meanwhile(remote: Storage) -> None:
    finishing = {"key0", *(f"key{number}" for number in range(2, 9))}
    stage = WaitingStage(forever("key1", *(f"key{number}" for number in range(9, 99))))

    def cancelled() -> bool:
        return all(stage.ended[key].is_set() for key in finishing)

    with pytest.raises(Cancelled):
        run_shard(remote, stage, specs(*range(1, 99)), {}, cancelled=cancelled)
    assert set(load_catalog(remote, "doubling").ok_keys()) == finishing


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (StoreError("gone", keys=["face:1"]), StoreError),
        (WeightsError("altered"), WeightsError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["store", "weights", "interrupt"],
)
def test_an_error_of_the_machine_stops_the_items_at_work_and_keeps_the_finished(
    remote: Storage, error: Any, raised: type[BaseException]
) -> None:
    stage = WaitingStage(forever("key0", *(f"key{number}" for number in range(9, 99))))
    stage.process = interrupting(stage, error, "key5")  # type: ignore[method-assign]
    rows: list[dict[str, Any]] = []
    with pytest.raises(raised) as caught:
        run_shard(remote, stage, specs(*range(1, 99)), {}, on_row=rows.append)
    assert caught.value is error
    finished = load_catalog(remote, "doubling").ok_keys()
    assert {row["key"] for row in rows} == set(finished)
    assert set(finished) <= {f"key{number}" for number in (1, 2, 3, 4, 6, 7, 8)}
    assert len(finished) >= 2  # without which no place was free for key5


def test_only_the_first_item_at_work_is_told_of(remote: Storage) -> None:
    """Whoever hears nothing for long blames the item last told of."""
    stage = WaitingStage()
    stage.waits_for = {"key2": stage.ended["key9"]}
    told: list[tuple[str, int, int]] = []
    run_shard(remote, stage, specs(*range(1, 13)), {}, on_progress=lambda *event: told.append(event))
    keys = [key for key, _, _ in told]
    assert list(dict.fromkeys(keys)) == [f"key{place}" for place in range(12)]
    assert keys == sorted(keys, key=lambda key: int(key[3:]))


def test_out_of_memory_an_item_is_tried_twice_among_others(remote: Storage) -> None:
    stage = WaitingStage()
    rows = run_shard(remote, stage, specs(1, MemoryError(), 3), {})
    assert [(row["status"], row.get("retryable")) for row in rows] == [
        ("ok", None),
        ("failed", True),
        ("ok", None),
    ]
    assert len(stage.scratch) == 4
