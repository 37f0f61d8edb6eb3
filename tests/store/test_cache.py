import hashlib
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from avatar_core.errors import StoreError
from avatar_core.store.cache import FileCache, HashMemo
from avatar_core.store.storage import Storage

SIZE = 1000


def content(number: int) -> bytes:
    return number.to_bytes(4, "big") * (SIZE // 4)


def sha256(number: int) -> str:
    return hashlib.sha256(content(number)).hexdigest()


@pytest.fixture
def remote(s3_root, s3_options, tmp_path):
    storage = Storage(s3_root, s3_options, tmp_path / "cache", cache_bytes=3 * SIZE)
    for number in range(6):
        storage.write_bytes(f"{number}.bin", content(number))
    return storage


def fetch(storage: Storage, number: int) -> Path:
    return storage.local_path(f"{number}.bin", sha256(number))


def cached(tmp_path: Path) -> set[str]:
    return {path.stem for path in (tmp_path / "cache").glob("??/*")}


def test_what_was_handed_out_stays_beyond_the_limit(remote, tmp_path):
    paths = [fetch(remote, number) for number in range(6)]
    assert [path.read_bytes() for path in paths] == [content(number) for number in range(6)]


def test_the_least_recently_used_go_first(remote, tmp_path):
    for number in (0, 1, 2):
        fetch(remote, number)
    fetch(remote, 0)
    remote.release()
    fetch(remote, 3)
    assert cached(tmp_path) == {sha256(number) for number in (0, 2, 3)}
    assert fetch(remote, 1).read_bytes() == content(1)


def test_one_copy_serves_all_paths_of_a_content(remote, tmp_path):
    remote.write_bytes("again.bin", content(0))
    assert remote.local_path("again.bin", sha256(0)) == fetch(remote, 0) == remote.local_path("0.bin")
    assert cached(tmp_path) == {sha256(0)}


def test_a_damaged_copy_is_fetched_again(remote, tmp_path):
    path = fetch(remote, 0)
    path.write_bytes(b"damaged")
    assert fetch(remote, 0).read_bytes() == content(0)


def test_a_copy_serves_after_the_store_lost_the_file(remote):
    fetch(remote, 0)
    remote.delete(["0.bin"])
    assert fetch(remote, 0).read_bytes() == content(0)
    remote.delete(["1.bin"])
    with pytest.raises(StoreError, match=r"1\.bin is not in"):
        fetch(remote, 1)


def test_abandoned_downloads_are_swept(remote, tmp_path):
    old, new = tmp_path / "cache/00/.old.partial", tmp_path / "cache/00/.new.partial"
    old.parent.mkdir(parents=True)
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    fetch(remote, 0)
    assert not old.exists()
    assert new.exists()


def test_many_threads_want_one_file(remote):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda number: fetch(remote, number), [0, 1] * 8))
    assert len(set(paths)) == 2
    assert [path.read_bytes() for path in paths[:2]] == [content(0), content(1)]


def hold(folder: Path, number: int, ready, done) -> None:
    cache = FileCache(folder, SIZE, HashMemo())
    path = cache.get(sha256(number), ".bin", lambda target: target.write_bytes(content(number)))
    ready.set()
    done.wait(60)
    assert path.read_bytes() == content(number)


def test_what_another_process_uses_is_not_evicted(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    ready, done = spawn.Event(), spawn.Event()
    child = spawn.Process(target=hold, args=(tmp_path, 0, ready, done))
    child.start()
    assert ready.wait(60)
    cache = FileCache(tmp_path, SIZE, HashMemo())
    for number in (1, 2):
        cache.get(sha256(number), ".bin", lambda target, number=number: target.write_bytes(content(number)))
        cache.release()
    held = tmp_path / sha256(0)[:2] / f"{sha256(0)}.bin"
    assert held.exists()
    done.set()
    child.join(60)
    assert child.exitcode == 0
    for number in (3, 4):
        cache.get(sha256(number), ".bin", lambda target, number=number: target.write_bytes(content(number)))
        cache.release()
    assert not held.exists()
