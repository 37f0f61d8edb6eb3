import logging
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avatar_core.errors import StoreError
from avatar_core.store.attempts import catalog_folder, compact, read_attempts
from avatar_core.store.catalog import CHAIN_SCHEMA, drop, hide, load_catalog
from avatar_core.store.manifest import manifest_folder, read_parquet, write_data, write_manifest
from avatar_core.store.storage import Storage

COLUMNS = pa.schema([("faces", pa.int64())])


def attempt(storage, columns=COLUMNS, **statuses):
    rows = [{"key": key, "status": status} for key, status in statuses.items()]
    return write_manifest(storage, "face", rows, columns)


def catalog_files(storage):
    return list(storage.list(catalog_folder("face")))


def test_rows_come_back_with_their_attempt(storage):
    path, sha256 = write_data(storage, "face", b"tensors", ".safetensors")
    row = {"key": "a", "status": "ok", "seconds": 1.5, "data": path, "sha256": sha256, "faces": 2}
    name = write_manifest(storage, "face", [row], COLUMNS)
    catalog = load_catalog(storage, "face")
    found = catalog.get("a")
    assert {**found, **row} == found
    assert found["attempt"] == name
    assert found["error"] is None
    assert storage.local_path(found["data"], found["sha256"]).read_bytes() == b"tensors"
    assert len(load_catalog(storage, "audio")) == 0


def test_the_earliest_ok_wins_and_only_then_a_failure_shows(storage):
    first = attempt(storage, a="failed", b="ok", c="failed")
    second = attempt(storage, a="ok", b="failed", c="failed")
    third = attempt(storage, a="ok", b="ok")
    catalog = load_catalog(storage, "face")
    assert set(catalog.ok_keys()) == {"a", "b"}
    assert catalog.get("a")["attempt"] == second
    assert catalog.get("b")["attempt"] == first
    assert catalog.get("c") is None
    assert catalog.failure("c")["attempt"] == second
    assert catalog.failure("a") is None
    assert set(catalog.failed_keys()) == {"c"}
    assert "a" in catalog
    assert "c" not in catalog
    assert [row["attempt"] for row in catalog.attempts("a")] == [first, second, third]


def test_select_keeps_the_order_and_names_what_is_missing(storage):
    attempt(storage, a="ok", b="ok", c="failed")
    catalog = load_catalog(storage, "face")
    assert catalog.select(["b", "a", "b"])["key"].to_pylist() == ["b", "a", "b"]
    assert catalog.select([]).num_rows == 0
    assert catalog.failures(["c"])["status"].to_pylist() == ["failed"]
    with pytest.raises(StoreError, match=r"2 of 3 face results") as caught:
        catalog.select(["a", "c", "d"])
    assert caught.value.keys == ("c", "d")


def test_a_dropped_key_is_as_if_never_made(storage):
    attempt(storage, a="failed", b="ok")
    attempt(storage, a="ok")
    seen = load_catalog(storage, "face")
    repaired = attempt(storage, a="ok")
    drop(storage, "face", ["a", "unknown"], seen)
    catalog = load_catalog(storage, "face")
    assert catalog.get("a")["attempt"] == repaired
    drop(storage, "face", ["a", "b"], catalog)
    catalog = load_catalog(storage, "face")
    assert len(catalog) == 0
    assert catalog.failure("a") is None
    assert drop(storage, "face", ["a"], catalog) is None


def window(storage, number, sha256, previous_sha256=None, chain="w", status="ok"):
    """One attempt at a window; its key is the chain's name and its number."""
    row = {"key": f"{chain}{number}", "status": status, "sha256": sha256, "window": number}
    if number:
        row |= {"previous_key": f"{chain}{number - 1}", "previous_sha256": previous_sha256}
    return write_manifest(storage, "denoise", [row], CHAIN_SCHEMA)


def kept(storage):
    """What counts for each key, the same from single manifests and from a catalog file."""
    found = {}
    for _ in range(2):
        catalog = load_catalog(storage, "denoise")
        before, found = found, {key: catalog.get(key)["sha256"] for key in sorted(catalog.ok_keys())}
        assert before in ({}, found)
        compact(storage, "denoise", 1)
    return found


def test_only_what_continues_the_chosen_window_counts(storage):
    first = window(storage, 0, "a0")
    window(storage, 0, "b0")
    window(storage, 1, "b1", "b0")
    window(storage, 2, "b2", "b1")
    window(storage, 0, "x", chain="other")
    assert kept(storage) == {"w0": "a0", "other0": "x"}
    window(storage, 1, "a1", "a0")
    assert kept(storage) == {"w0": "a0", "w1": "a1", "other0": "x"}
    window(storage, 2, "a2", "a1")
    window(storage, 2, "c2", "a1")
    assert kept(storage) == {"w0": "a0", "w1": "a1", "w2": "a2", "other0": "x"}
    hide(storage, "denoise", [("w0", first)])
    assert kept(storage) == {"w0": "b0", "w1": "b1", "w2": "b2", "other0": "x"}


def test_equal_data_of_another_attempt_may_be_continued(storage):
    first = window(storage, 0, "a0")
    window(storage, 0, "a0")
    window(storage, 1, "a1", "a0")
    hide(storage, "denoise", [("w0", first)])
    assert kept(storage) == {"w0": "a0", "w1": "a1"}


def test_windows_behind_a_gap_do_not_count(storage):
    window(storage, 0, "a0")
    second = window(storage, 1, "a1", "a0")
    window(storage, 2, "a2", "a1")
    hide(storage, "denoise", [("w1", second)])
    window(storage, 1, None, "a0", status="failed")
    assert kept(storage) == {"w0": "a0"}
    catalog = load_catalog(storage, "denoise")
    assert catalog.failed_keys() == {"w1"}
    assert catalog.live_attempts(["w2"]) != []
    window(storage, 1, "a1", "a0")
    assert kept(storage) == {"w0": "a0", "w1": "a1", "w2": "a2"}


def test_windows_stand_beside_results_that_have_none(storage):
    window(storage, 0, "a0")
    window(storage, 1, "b1", "b0")
    write_manifest(storage, "denoise", [{"key": "whole", "status": "ok", "sha256": "y"}], pa.schema([]))
    assert kept(storage) == {"w0": "a0", "whole": "y"}


def test_columns_of_several_versions_are_united(storage, caplog):
    attempt(storage, a="ok")
    rows = [{"key": "b", "status": "ok", "faces": "two", "blur": 0.5}]
    write_manifest(storage, "face", rows, pa.schema([("faces", pa.string()), ("blur", pa.float64())]))
    attempt(storage, pa.schema([("blur", pa.int32())]), c="ok")
    for _ in range(2):
        catalog = load_catalog(storage, "face")
        assert catalog.get("a")["faces"] is None
        assert catalog.get("b")["faces"] == "two"
        assert catalog.get("b")["blur"] == 0.5
        assert catalog.get("c")["blur"] is None
        compact(storage, "face", 1)
    assert "faces" in caplog.text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one row"),
        ([{"key": "a", "status": "fine"}], "status 'fine'"),
        ([{"status": "ok"}], "key None"),
        ([{"key": "a", "status": "ok", "nose": 1}], "nose"),
        ([{"key": "a", "status": "ok", "faces": "two"}], "does not fit"),
    ],
)
def test_rows_that_do_not_fit_are_refused(storage, rows, message):
    with pytest.raises(StoreError, match=message):
        write_manifest(storage, "face", rows, COLUMNS)
    assert storage.list(partial=True) == {}


def test_a_stage_cannot_redefine_a_column_of_every_manifest(storage):
    for name in ("status", "attempt"):
        with pytest.raises(StoreError, match=name):
            attempt(storage, pa.schema([(name, pa.int64())]), a="ok")


def test_data_is_stored_once_and_repaired(storage, tmp_path):
    (tmp_path / "picture.png").write_bytes(b"pixels")
    path, sha256 = write_data(storage, "ingest", tmp_path / "picture.png", ".png", folder="assets")
    assert path == f"assets/{sha256[:2]}/{sha256}.png"
    assert write_data(storage, "ingest", b"pixels", ".png", folder="assets") == (path, sha256)
    storage.write_bytes(path, b"pixelz")
    write_data(storage, "ingest", b"pixels", ".png", folder="assets")
    assert storage.read_bytes(path) == b"pixels"
    assert list(storage.list()) == [path]


def test_writers_of_the_same_content_do_no_harm(storage):
    with ThreadPoolExecutor(8) as pool:
        written = set(pool.map(lambda _: write_data(storage, "face", b"x" * 100_000, ".bin"), range(16)))
    assert len(written) == 1
    assert list(storage.list(partial=True)) == [next(iter(written))[0]]


def test_damaged_manifests_are_reported_and_ignored(storage, caplog):
    good = attempt(storage, a="ok")
    whole = storage.read_bytes(f"{manifest_folder('face')}/{good}.parquet")
    other = pa.table({"key": ["b"], "status": [1]})
    pq.write_table(other, sink := pa.BufferOutputStream())
    altered = whole.replace(b"\x01\x00\x00\x00a", b"\x01\x00\x00\x00b")  # the key, as Parquet stores it
    assert altered != whole
    for data in (whole[:-20], b"", b"garbage", sink.getvalue().to_pybytes(), altered):
        storage.write_bytes(f"{manifest_folder('face')}/{uuid.uuid4()}.parquet", data)
        storage.write_bytes(f"{catalog_folder('face')}/{uuid.uuid4()}.parquet", data)
    storage.write_bytes(f"{manifest_folder('face')}/notes.txt", b"not ours")
    with caplog.at_level(logging.WARNING):
        catalog = load_catalog(storage, "face")
    assert list(catalog.ok_keys()) == ["a"]
    assert len(catalog.attempts("a")) == 1
    assert caplog.text.count("is ignored") == 10


def test_compaction_waits_for_enough_manifests_and_deletes_nothing(storage):
    for _ in range(3):
        attempt(storage, a="ok")
    before = set(storage.list())
    assert compact(storage, "face", 4) == []
    assert compact(storage, "face", 3)
    assert compact(storage, "face", 1) == []
    assert before < set(storage.list())
    found = read_attempts(storage, "face")
    assert not found.manifests
    assert len(found.covered) == 3


def test_few_catalog_files_stay_to_be_read(storage):
    for number in range(20):
        attempt(storage, **{f"k{number}": "ok"})
        compact(storage, "face", 1)
    found = read_attempts(storage, "face")
    assert len(found.catalogs) <= 3
    assert len(found.catalogs) + len(found.superseded) == 20
    assert len(load_catalog(storage, "face")) == 20


def test_many_manifests_go_into_several_catalog_files(storage, monkeypatch):
    monkeypatch.setattr("avatar_core.store.attempts._COMPACTED", 3)
    names = [attempt(storage, a="ok", **{f"k{number}": "ok"}) for number in range(8)]
    assert len(compact(storage, "face", 1)) == 3
    found = read_attempts(storage, "face")
    assert (len(found.catalogs), len(found.manifests), len(found.covered)) == (3, 0, 8)
    assert [row["attempt"] for row in load_catalog(storage, "face").attempts("a")] == names
    attempt(storage, b="ok")
    compact(storage, "face", 1)
    assert len(load_catalog(storage, "face")) == 10


def test_two_compactions_at_once_are_harmless(storage):
    names = [attempt(storage, a="ok", b="failed") for _ in range(4)]
    with ThreadPoolExecutor(2) as pool:
        written = list(pool.map(lambda _: compact(storage, "face", 1), range(2)))
    assert any(written)
    catalog = load_catalog(storage, "face")
    assert [row["attempt"] for row in catalog.attempts("a")] == names
    attempt(storage, c="ok")
    compact(storage, "face", 1)
    assert len(load_catalog(storage, "face").attempts("b")) == 4


def test_a_catalog_file_of_a_slow_clock_still_supersedes(storage, monkeypatch):
    first = attempt(storage, a="ok")
    compact(storage, "face", 1)
    second = attempt(storage, a="ok")
    early = "00000000-0000-7000-8000-000000000000"
    monkeypatch.setattr("avatar_core.store.attempts.new_id", lambda: early)
    assert compact(storage, "face", 1) == [early]
    monkeypatch.undo()
    assert list(read_attempts(storage, "face").catalogs) == [early]
    attempt(storage, b="ok")
    compact(storage, "face", 1)
    assert [row["attempt"] for row in load_catalog(storage, "face").attempts("a")] == [first, second]


def racing(storage: Storage, method: str, action) -> Storage:
    """The same store, on which `action` happens right before the first call of `method`."""

    class Racing(type(storage)):
        pass

    def call(self, *arguments):
        with lock:
            if actions:
                actions.pop()()
        return original(self, *arguments)

    lock, actions, original = threading.Lock(), [action], getattr(type(storage), method)
    setattr(Racing, method, call)
    storage.__class__ = Racing
    return storage


def test_files_that_vanish_while_reading_are_looked_up_again(make_storage):
    plain = make_storage()
    for key in "abc":
        attempt(plain, **{key: "ok"})

    def compact_and_delete():
        compact(plain, "face", 1)
        found = read_attempts(plain, "face")
        plain.delete([f"{manifest_folder('face')}/{name}.parquet" for name in found.covered])
        plain.delete([f"{catalog_folder('face')}/{name}.parquet" for name in found.superseded])

    assert set(
        load_catalog(racing(make_storage(), "read_bytes", compact_and_delete), "face").ok_keys()
    ) == set("abc")
    attempt(plain, d="ok")
    assert set(
        load_catalog(racing(make_storage(), "read_bytes", compact_and_delete), "face").ok_keys()
    ) == set("abcd")
    assert len(catalog_files(plain)) == 1


def test_an_endless_race_ends(make_storage):
    plain = make_storage()

    class Vanishing(Storage):
        def list(self, prefix="", *, partial=False):
            return {f"{prefix}/{uuid.uuid4()}.parquet": None}

    plain.__class__ = Vanishing
    with pytest.raises(StoreError, match="deleted while they are read"):
        load_catalog(plain, "face")


def test_an_unreachable_store_is_an_error_not_an_empty_catalog(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store/stages").write_text("a file in the way")
    with pytest.raises(StoreError, match="is a file, not a folder"):
        load_catalog(Storage(str(tmp_path / "store")), "face")


statuses = st.dictionaries(st.sampled_from("abcd"), st.sampled_from(["ok", "failed"]), min_size=1)
simple_steps = st.one_of(
    st.tuples(st.just("attempt"), statuses),
    st.tuples(st.just("hide"), st.integers(0, 100)),
    st.tuples(st.just("drop"), st.sets(st.sampled_from("abcd"))),
    st.tuples(st.just("compact"), st.just([])),
    st.tuples(st.just("clean"), st.none()),
)
# a compaction between whose reading and writing other things happen, other such compactions too
steps = st.recursive(
    simple_steps, lambda inner: st.tuples(st.just("compact"), st.lists(inner, max_size=5)), max_leaves=6
)


class Model:
    """The rules of the catalog in their plainest form: rows in order of time."""

    def __init__(self):
        self.rows = []
        self.hidden = set()

    def live(self, key):
        return [row for row in self.rows if row[1] == key and row[:2] not in self.hidden]

    def answer(self, key):
        ok = [name for name, _, status in self.live(key) if status == "ok"]
        failed = [name for name, _, status in self.live(key) if status == "failed"]
        return (ok[0] if ok else None, failed[-1] if failed and not ok else None)


def play(root: str, model: Model, action: str, argument) -> None:
    storage = Storage(root)
    if action == "attempt":
        name = attempt(storage, **argument)
        model.rows += [(name, key, status) for key, status in argument.items()]
    elif action == "hide" and model.rows:
        name, key, _ = model.rows[argument % len(model.rows)]
        hide(storage, "face", [(key, name)])
        model.hidden.add((name, key))
    elif action == "drop":
        drop(storage, "face", argument, load_catalog(storage, "face"))
        model.hidden |= {row[:2] for key in argument for row in model.live(key)}
    elif action == "compact":
        meanwhile = partial(play_all, root, model, argument)
        compact(racing(storage, "write_bytes", meanwhile), "face", 1)
    elif action == "clean":
        found = read_attempts(storage, "face")
        storage.delete([f"{manifest_folder('face')}/{name}.parquet" for name in found.covered])
        storage.delete([f"{catalog_folder('face')}/{name}.parquet" for name in found.superseded])


def play_all(root: str, model: Model, history) -> None:
    for action, argument in history:
        play(root, model, action, argument)
        catalog = load_catalog(Storage(root), "face")
        for key in "abcd":
            rows = (catalog.get(key), catalog.failure(key))
            assert tuple(row and row["attempt"] for row in rows) == model.answer(key)


@given(st.lists(steps, max_size=12))
def test_any_history_resolves_as_the_rules_say(history):
    play_all(f"memory://{uuid.uuid4()}", Model(), history)


def attempts_in(storage: Storage, name: str) -> set[str]:
    data = storage.read_bytes(f"{catalog_folder('face')}/{name}.parquet")
    return set(read_parquet(data)["attempt"].to_pylist())


def test_a_catalog_file_holds_all_that_it_supersedes(make_storage):
    """Else two compactions, each relying on a file that the other supersedes, would lose rows."""
    plain = make_storage()
    for number in range(8):
        attempt(plain, **{f"k{number}": "ok"})
    compact(racing(make_storage(), "write_bytes", lambda: compact(plain, "face", 1)), "face", 1)
    assert len(read_attempts(plain, "face").catalogs) == 2
    for number in range(8, 12):
        attempt(plain, **{f"k{number}": "ok"})
        compact(plain, "face", 1)
        for name, file in read_attempts(plain, "face").catalogs.items():
            for old in file.supersedes:
                assert attempts_in(plain, old) <= attempts_in(plain, name)
