import json
import os
import subprocess
import sys
import threading
import time

import pyarrow as pa
import pytest

from avatar_core.store import claims as claims_module
from avatar_core.store import sharing as sharing_module
from avatar_core.store.arrivals import Arrivals
from avatar_core.store.catalog import drop, load_catalog
from avatar_core.store.claims import LEASE_S, Claims, claim_folder, claimed
from avatar_core.store.manifest import write_manifest
from avatar_core.store.sharing import Sharing
from avatar_core.store.storage import Storage
from tests.processes import until

NO_COLUMNS = pa.schema([])
ELSEWHERE = "another machine"


@pytest.fixture
def store(tmp_path):
    """For what is done to files, or by another process."""
    return Storage(str(tmp_path / "store"))


def commit(storage, *keys, status="ok", **columns):
    rows = [{"key": key, "status": status, **columns} for key in keys]
    return write_manifest(storage, "face", rows, NO_COLUMNS)


def claim_files(storage):
    return sorted(storage.list(claim_folder("face")))


# --- claims


def test_a_claim_holds_until_it_is_released(storage):
    ours, theirs = Claims(storage), Claims(storage, ELSEWHERE)
    claim = theirs.claim("face", ["a", "b"])
    assert ours.held("face") == {"a", "b"}
    assert theirs.held("face") == set()
    assert ours.held("audio") == set()
    theirs.reduce(claim, {"b"})
    assert ours.held("face") == {"b"}
    theirs.release(claim)
    assert ours.held("face") == set()
    assert claim_files(storage) == []


def test_a_claim_of_a_dead_process_holds_nothing(store):
    code = (
        "import sys, time; from avatar_core.store.claims import Claims; "
        "from avatar_core.store.storage import Storage; "
        "Claims(Storage(sys.argv[1])).claim('face', ['a']); print('claimed', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, store.uri], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "claimed\n"
        ours = Claims(store)
        assert ours.held("face") == {"a"}
        other.kill()
    assert ours.held("face") == set()
    assert claim_files(store) == []


def far_claim(storage, *keys):
    """As another machine would write it."""
    text = json.dumps({"owner": ELSEWHERE, "keys": keys})
    storage.write_bytes(f"{claim_folder('face')}/far.json", text.encode())


def test_a_claim_that_is_not_renewed_is_void(store, tmp_path, monkeypatch):
    ours = Claims(store)
    far_claim(store, "a")
    assert ours.held("face") == {"a"}
    with monkeypatch.context() as patch:
        patch.setattr(claims_module, "LEASE_S", 0.0)
        assert ours.held("face") == set()
    long_ago = time.time() - 2 * LEASE_S
    os.utime(tmp_path / "store" / claim_folder("face") / "far.json", (long_ago, long_ago))
    ours = Claims(store)
    assert ours.held("face") == set()
    far_claim(store, "a")
    assert ours.held("face") == {"a"}


def test_a_process_does_not_wait_for_itself(storage):
    Claims(storage).claim("face", ["a"])
    assert Claims(storage).held("face") == set()
    assert Claims(storage, ELSEWHERE).held("face") == {"a"}


def test_what_is_done_for_a_process_holds_when_that_is_gone(storage, monkeypatch):
    monkeypatch.setattr(claims_module, "RENEW_S", 0.01)
    asker = Claims(storage, "it asked")
    with claimed(storage, "face", ["a"], "it asked"):
        until(lambda: Claims(storage, ELSEWHERE).held("face") == {"a"})
        assert asker.held("face") == set()
    assert Claims(storage, ELSEWHERE).held("face") == set()
    assert claim_files(storage) == []


def test_claims_are_renewed(store, tmp_path, monkeypatch):
    monkeypatch.setattr(claims_module, "RENEW_S", 0.0)
    claims = Claims(store)
    claim = claims.claim("face", ["a"])
    os.utime(tmp_path / "store" / claim.path, (0, 0))
    claims.renew()
    assert time.time() - store.list(claim.path.rpartition("/")[0])[claim.path].mtime < LEASE_S
    claims.release(claim)
    claims.renew()
    assert claim_files(store) == []


@pytest.mark.parametrize("text", [b"", b"[]", b'{"owner": "x"}', b'{"owner": "x 1 1", "keys": 3}'])
def test_what_is_no_claim_holds_nothing(storage, text):
    storage.write_bytes(f"{claim_folder('face')}/odd.json", text)
    assert Claims(storage).held("face") == set()


# --- arrivals


def test_only_what_came_later_arrives_and_once(storage):
    commit(storage, "before")
    arrivals = Arrivals(storage, load_catalog(storage, "face"))
    commit(storage, "a", seconds=2.0)
    commit(storage, "a", seconds=3.0)
    commit(storage, "b", "c")
    assert arrivals.take(["before", "a", "x"])["a"]["seconds"] == 2.0
    assert arrivals.take(["before", "a", "x"]) == {}
    assert set(arrivals.take(["b", "c"])) == {"b", "c"}


def test_failures_arrive_unless_they_may_pass(storage):
    arrivals = Arrivals(storage, load_catalog(storage, "face"))
    commit(storage, "a", status="failed", error="bad picture")
    commit(storage, "b", status="failed", error="no memory", retryable=True)
    assert {key: row["error"] for key, row in arrivals.take(["a", "b"]).items()} == {"a": "bad picture"}


def test_what_was_dropped_does_not_arrive(storage):
    arrivals = Arrivals(storage, load_catalog(storage, "face"))
    commit(storage, "a", "b")
    arrivals.take([])
    drop(storage, "face", ["a"], load_catalog(storage, "face"))
    assert set(arrivals.take(["a", "b"])) == {"b"}


def test_own_results_do_not_arrive(storage):
    arrivals = Arrivals(storage, load_catalog(storage, "face"))
    commit(storage, "read")
    arrivals.take([])
    arrivals.leave_out(["read", "unread"])
    commit(storage, "unread")
    assert arrivals.take(["read", "unread"]) == {}
    commit(storage, "unread")
    assert set(arrivals.take(["unread"])) == {"unread"}


# --- both together


class Settled:
    """What `on_settled` was told; `wait` for it."""

    def __init__(self):
        self.told, self.event = None, threading.Event()

    def __call__(self, stage, rows, free):
        self.told = (stage, set(rows), set(free))
        self.event.set()

    def wait(self):
        assert self.event.wait(30)
        self.event.clear()
        return self.told


def test_a_run_gives_way_and_hears_how_it_ends(storage, monkeypatch):
    monkeypatch.setattr(sharing_module, "REMOTE_WATCH_S", 0.5)
    settled = Settled()
    theirs = Claims(storage, ELSEWHERE)
    with Sharing(storage, {"face": load_catalog(storage, "face")}, settled) as ours:
        commit(storage, "done")
        first = theirs.claim("face", ["a", "b"])
        taken = ours.take("face", ["done", "a", "b", "c"])
        assert (set(taken.found), taken.elsewhere) == ({"done"}, {"a", "b"})
        assert theirs.held("face") == {"c"}
        assert ours.take("face", ["a"]).claim is None
        ours.watch("face", taken.elsewhere)
        commit(storage, "a")
        assert settled.wait() == ("face", {"a"}, set())
        theirs.release(first)
        assert settled.wait() == ("face", set(), {"b"})
    assert claim_files(storage) == []


def test_what_a_lost_worker_had_committed_is_found(storage):
    sharing = Sharing(storage, {"face": load_catalog(storage, "face")}, lambda *settled: None)
    taken = sharing.take("face", ["a"])
    commit(storage, "a")
    sharing.release(taken)
    sharing.look_closely()
    assert sharing.take("face", ["a"]).found.keys() == {"a"}


def test_a_store_that_cannot_be_written_claims_nothing_and_stops_nobody(store, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store/stages").write_text("in the way")
    catalogs = {"face": load_catalog(Storage("memory://empty"), "face")}
    with Sharing(store, catalogs, pytest.fail) as ours:
        taken = ours.take("face", ["a"])
        assert (taken.found, taken.elsewhere, taken.claim) == ({}, set(), None)
        ours.release(taken)
