import time

import pyarrow as pa
import pytest

from avatar_core.store.attempts import compact, read_attempts
from avatar_core.store.catalog import load_catalog
from avatar_core.store.claims import claim_folder
from avatar_core.store.gc import MIN_AGE_S, gc
from avatar_core.store.manifest import write_data, write_manifest
from avatar_core.store.storage import Storage

NO_COLUMNS = pa.schema([])


@pytest.fixture
def later() -> float:
    return time.time() + MIN_AGE_S + 60


def made(storage, stage, key, data):
    path, sha256 = write_data(storage, stage, data, ".bin")
    write_manifest(storage, stage, [{"key": key, "status": "ok", "data": path, "sha256": sha256}], NO_COLUMNS)
    return path


def accepted(storage, key, data):
    path, sha256 = write_data(storage, "ingest", data, ".png", folder="assets")
    write_manifest(
        storage, "ingest", [{"key": key, "status": "ok", "data": path, "sha256": sha256}], NO_COLUMNS
    )
    return path, sha256


def test_only_what_nothing_refers_to_goes(storage, later):
    kept, lost = made(storage, "face", "kept", b"kept"), made(storage, "face", "lost", b"lost")
    shared = made(storage, "audio", "wanted", b"shared")
    made(storage, "audio", "unwanted", b"shared")
    (asset, sha256), (old_asset, _) = accepted(storage, "p", b"picture"), accepted(storage, "q", b"other")
    storage.write_bytes("runs/x/config.yaml", b"{}")
    storage.write_bytes("datasets/x/metadata.parquet", b"")
    storage.write_bytes("stages/face/data/.0123.partial", b"half")
    roots = {"face": {"kept", "not made yet"}, "audio": {"wanted"}}
    before = set(storage.list(partial=True))

    report = gc(storage, roots, {sha256}, now=later)
    assert report.dry_run
    assert set(report.paths) == {lost, old_asset, "stages/face/data/.0123.partial"}
    assert dict(report.files) == {"data": 1, "assets": 1, "partial": 1}
    assert dict(report.bytes) == {"data": 4, "assets": 5, "partial": 4}
    assert set(storage.list(partial=True)) == before

    assert gc(storage, roots, {sha256}, now=later, dry_run=False).paths == report.paths
    assert before - set(storage.list(partial=True)) == set(report.paths)
    assert {kept, shared, asset} < set(storage.list())


def test_results_that_lost_their_file_count_as_absent(storage, later):
    made(storage, "face", "kept", b"kept")
    made(storage, "face", "lost", b"lost")
    accepted(storage, "p", b"picture")
    gc(storage, {"face": {"kept"}}, set(), now=later, dry_run=False)
    assert set(load_catalog(storage, "face").ok_keys()) == {"kept"}
    assert len(load_catalog(storage, "ingest")) == 0


def test_the_data_of_a_losing_attempt_goes(storage, later):
    winner, loser = made(storage, "face", "k", b"winner"), made(storage, "face", "k", b"loser")
    gc(storage, {"face": {"k"}}, set(), now=later, dry_run=False)
    assert storage.exists(winner)
    assert not storage.exists(loser)
    assert load_catalog(storage, "face").get("k")["data"] == winner


def test_young_files_stay(storage):
    made(storage, "face", "k", b"new")
    compact(storage, "face", 1)
    assert gc(storage, {}, set(), dry_run=False).paths == []
    assert gc(storage, {}, set(), now=time.time() + MIN_AGE_S - 60, dry_run=False).paths == []


def test_covered_manifests_and_superseded_catalog_files_go(storage, later):
    for number in range(3):
        made(storage, "face", f"k{number}", b"%d" % number)
        compact(storage, "face", 1)
    made(storage, "face", "k3", b"3")
    roots = {"face": {"k0", "k1", "k2", "k3"}}
    report = gc(storage, roots, set(), now=later, dry_run=False)
    assert dict(report.files) == {"manifests": 3, "catalog": 2}
    found = read_attempts(storage, "face")
    assert (len(found.catalogs), len(found.manifests), len(found.superseded)) == (1, 1, 0)
    assert set(load_catalog(storage, "face").ok_keys()) == roots["face"]


def test_a_damaged_catalog_file_covers_nothing(storage, later):
    made(storage, "face", "k", b"data")
    (name,) = compact(storage, "face", 1)
    storage.write_bytes(f"catalog/face/{name}.parquet", b"garbage")
    assert gc(storage, {"face": {"k"}}, set(), now=later, dry_run=False).paths == []
    assert "k" in load_catalog(storage, "face")


def test_an_empty_store_has_nothing_to_delete(tmp_path):
    assert gc(Storage(str(tmp_path / "store")), {}, set(), dry_run=False).paths == []
    assert not (tmp_path / "store").exists()


def test_what_dead_runs_claimed_goes(storage, later):
    claim = f"{claim_folder('face')}/00000000-0000-7000-8000-000000000000.json"
    storage.write_bytes(claim, b"{}")
    assert gc(storage, {}, set()).paths == []
    assert gc(storage, {}, set(), dry_run=False, now=later).files == {"claims": 1}
    assert not storage.exists(claim)
