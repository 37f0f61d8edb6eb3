import errno
import hashlib
import multiprocessing
import os
import stat
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fsspec.registry import _registry as known_filesystems

from avatar_core.errors import ConfigError, StoreError
from avatar_core.store.manifest import write_data
from avatar_core.store.storage import Storage

DAY_S = 86400.0


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix == ".partial"]


def test_what_was_written_is_there(storage, tmp_path):
    storage.write_bytes("a/one.bin", b"first")
    storage.write_bytes("a/one.bin", b"second!")
    (tmp_path / "two").write_bytes(b"from a file")
    storage.put_file("a/b/two.bin", tmp_path / "two")

    assert storage.read_bytes("a/one.bin") == b"second!"
    assert storage.read_bytes("a/b/two.bin") == b"from a file"
    assert storage.exists("a/one.bin")
    assert not storage.exists("a/three.bin")
    assert not storage.exists("a")
    assert storage.size("a/one.bin") == 7
    (tmp_path / "two").write_bytes(b"edited")
    assert storage.read_bytes("a/b/two.bin") == b"from a file"


def test_list_is_recursive_and_fresh(storage, make_storage):
    assert storage.list() == {}
    assert storage.list("a") == {}
    other = make_storage()
    for path in ("a/x", "a/b/y", "ab/z"):
        other.write_bytes(path, b"12345")
        assert path in storage.list()
    assert set(storage.list("a")) == {"a/x", "a/b/y"}
    info = storage.list("a")["a/x"]
    assert info.size == 5
    assert abs(info.mtime - time.time()) < 60
    other.delete(["a/x", "ab/z"])
    assert set(storage.list()) == {"a/b/y"}


def test_deleting_what_is_gone_is_fine(storage):
    storage.write_bytes("a", b"1")
    storage.delete(["a", "b"])
    storage.delete([])
    assert not storage.exists("a")


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "a\\b", "a//b", "./a", "a/", "a\0"])
def test_paths_stay_inside_the_root(storage, path):
    for call in (
        storage.read_bytes,
        storage.exists,
        storage.local_path,
        lambda p: storage.write_bytes(p, b""),
    ):
        with pytest.raises(StoreError, match="not a path inside the store"):
            call(path)
    with pytest.raises(StoreError, match="not a path inside"):
        storage.delete([path])
    with pytest.raises(StoreError, match="not a path inside"):
        storage.copy_out("a", path)


def test_absence_names_the_path(storage, tmp_path):
    for call in (storage.read_bytes, storage.size, storage.local_path):
        with pytest.raises(StoreError, match=r"a/b\.bin is not in .*store|a/b\.bin is not in s3://"):
            call("a/b.bin")
    with pytest.raises(StoreError, match=r"a/b\.bin is not in"):
        storage.local_path("a/b.bin", sha256(b""))
    with pytest.raises(StoreError, match=r"a/b\.bin is not in"):
        storage.copy_out("a/b.bin", tmp_path / "out")
    with pytest.raises(StoreError, match=r"a/b\.bin is not in"):
        storage.copy_out("a/b.bin", "copy.bin", sha256(b""))
    assert not (tmp_path / "out").exists()
    assert not storage.exists("copy.bin")
    assert leftovers(tmp_path) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(storage, tmp_path):
    storage.write_bytes("a", b"old")
    for source in (tmp_path / "absent", tmp_path):
        with pytest.raises(StoreError, match="is not a file"):
            storage.put_file("a", source)
    assert storage.read_bytes("a") == b"old"
    assert set(storage.list(partial=True)) == {"a"}


def test_a_full_disk_is_explained(tmp_path, monkeypatch):
    storage = Storage(str(tmp_path / "store"))

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    storage.write_bytes("a/b", b"old")
    (tmp_path / "new").write_bytes(b"new")
    monkeypatch.setattr(os, "fsync", full)
    for write in (
        lambda: storage.write_bytes("a/b", b"new"),
        lambda: storage.put_file("a/b", tmp_path / "new"),
        lambda: storage.copy_out("a/b", tmp_path / "out"),
    ):
        with pytest.raises(StoreError, match=r"a/b in .*no space is left .*`avatar gc`"):
            write()
    assert set(storage.list(partial=True)) == {"a/b"}
    assert storage.read_bytes("a/b") == b"old"
    assert not (tmp_path / "out").exists()


def test_a_root_that_is_a_file_is_explained(tmp_path):
    (tmp_path / "store").write_text("not a folder")
    storage = Storage(str(tmp_path / "store"))
    with pytest.raises(StoreError, match=r"is a file, not a folder .*choose another storage root"):
        storage.write_bytes("a/b", b"data")
    assert not storage.exists("a/b")


@pytest.fixture
def closed_folder(tmp_path) -> Iterator[Path]:
    """Root may write everywhere, so where the tests run as root, they step down for a while."""
    folder, user = tmp_path / "closed", os.geteuid()
    folder.mkdir()
    folder.chmod(0)
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.chmod(stat.S_IRWXU)


def test_missing_permissions_are_explained(closed_folder):
    storage = Storage(str(closed_folder / "store"))
    for call in (
        storage.read_bytes,
        storage.exists,
        storage.list,
        lambda path: storage.write_bytes(path, b""),
    ):
        with pytest.raises(StoreError, match=r"permission denied .*check the owner"):
            call("a")


def test_new_files_have_the_usual_permissions(tmp_path):
    storage = Storage(str(tmp_path / "store"))
    (tmp_path / "plain").write_bytes(b"x")
    storage.write_bytes("a", b"x")
    assert (tmp_path / "store/a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_local_path_verifies(storage, make_storage):
    data = b"the picture"
    storage.write_bytes("a/p.png", data)
    path = storage.local_path("a/p.png", sha256(data))
    assert path.read_bytes() == data
    assert path.suffix == ".png"
    assert storage.local_path("a/p.png").read_bytes() == data
    for opened in (storage, make_storage()):
        with pytest.raises(StoreError, match=f"a/p.png.*{sha256(data)}, expected {sha256(b'other')}"):
            opened.local_path("a/p.png", sha256(b"other"))


def test_an_altered_file_is_noticed_and_not_kept(storage, make_storage, tmp_path):
    data = b"the right content"
    storage.write_bytes("a", b"the wrong content")
    for _ in range(2):
        with pytest.raises(StoreError, match=r"a in .* was altered"):
            storage.local_path("a", sha256(data))
    assert leftovers(tmp_path) == []
    make_storage().write_bytes("a", data)
    assert storage.local_path("a", sha256(data)).read_bytes() == data


def test_a_file_altered_after_it_was_verified_is_noticed_on_disk(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write_bytes("a", b"right")
    path = storage.local_path("a", sha256(b"right"))
    path.write_bytes(b"wrong")
    os.utime(path, (1, 1))
    with pytest.raises(StoreError, match="was altered"):
        storage.local_path("a", sha256(b"right"))


def test_a_verified_file_is_hashed_once(storage, monkeypatch):
    storage.write_bytes("a", b"data")
    storage.local_path("a", sha256(b"data"))
    storage.local_path("a", sha256(b"data"))

    def never(*arguments):
        raise AssertionError("hashed again")

    monkeypatch.setattr(hashlib, "file_digest", never)
    storage.local_path("a", sha256(b"data"))


def test_copy_out_is_an_independent_verified_copy(storage, tmp_path):
    data = b"a video" * 1000
    storage.write_bytes("a.mp4", data)
    target = tmp_path / "out" / "clip.mp4"
    storage.copy_out("a.mp4", target, sha256(data))
    target.write_bytes(b"edited by the user")
    assert storage.read_bytes("a.mp4") == data

    storage.copy_out("a.mp4", "datasets/clip.mp4", sha256(data))
    storage.write_bytes("datasets/clip.mp4", b"edited")
    assert storage.read_bytes("a.mp4") == data

    for destination in (target, "datasets/clip.mp4"):
        with pytest.raises(StoreError, match="was altered"):
            storage.copy_out("a.mp4", destination, sha256(b"other"))
    assert target.read_bytes() == b"edited by the user"
    assert storage.read_bytes("datasets/clip.mp4") == b"edited"
    assert leftovers(tmp_path) == []


def test_holds_compares_content(storage, tmp_path):
    (tmp_path / "same").write_bytes(b"data")
    storage.write_bytes("a", b"data")
    assert storage.holds("a", b"data", DAY_S)
    assert storage.holds("a", tmp_path / "same", DAY_S)
    assert not storage.holds("a", b"datA", DAY_S)
    assert not storage.holds("a", b"longer data", DAY_S)
    assert not storage.holds("b", b"data", DAY_S)
    assert not storage.holds("a", b"data", -1.0)


def test_small_files_cost_one_request_each(s3_root, s3_options, s3_requests, tmp_path):
    storage = Storage(s3_root, s3_options, cache_dir=tmp_path)
    assert storage.list("a") == {}
    assert s3_requests == ["list_objects_v2"]
    s3_requests.clear()
    path, digest = write_data(storage, "ingest", b"data", ".wav", folder="assets")
    (tmp_path / "file").write_bytes(b"data")
    assert write_data(storage, "ingest", tmp_path / "file", ".wav", folder="assets") == (path, digest)
    assert storage.read_bytes(path) == b"data"
    assert storage.local_path(path, digest).read_bytes() == b"data"
    storage.delete([path])
    assert s3_requests == ["put_object", "put_object", "get_object", "get_object", "delete_object"]


def test_a_large_file_is_not_sent_again(s3_root, s3_options, s3_requests, tmp_path):
    storage = Storage(s3_root, s3_options, cache_dir=tmp_path)
    data = bytes(9 << 20)
    written = write_data(storage, "decode", data, ".mp4")
    s3_requests.clear()
    assert write_data(storage, "decode", data, ".mp4") == written
    assert s3_requests == ["head_object"]


def test_many_writers_of_one_file(storage):
    payload = [bytes([number]) * 200_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        writes = [pool.submit(storage.write_bytes, "same", data) for data in payload]
        seen = [storage.read_bytes("same") for _ in range(5) if storage.exists("same")]
        for write in writes:
            write.result()
    assert all(data in payload for data in [*seen, storage.read_bytes("same")])
    assert set(storage.list(partial=True)) == {"same"}


def write_forever(root: str) -> None:
    storage = Storage(root)
    while True:
        storage.write_bytes("same", bytes([time.time_ns() % 256]) * 3_000_000)


def test_killed_writers_never_show_half_a_file(tmp_path):
    storage = Storage(str(tmp_path / "store"))
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=write_forever, args=(storage.uri,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    while not storage.exists("same"):
        time.sleep(0.01)
    seen = [storage.read_bytes("same") for _ in range(20)]
    for writer in writers:
        writer.kill()
        writer.join()
    assert {(len(data), len(set(data))) for data in [*seen, storage.read_bytes("same")]} == {(3_000_000, 1)}
    assert set(storage.list()) == {"same"}


@pytest.mark.parametrize("root", ["memory://", "memory://test/storage/"])
def test_memory_root(root, tmp_path):
    storage = Storage(root, cache_dir=tmp_path)
    storage.delete(storage.list())
    storage.write_bytes("a/b", b"data")
    assert set(storage.list()) == {"a/b"}
    assert set(storage.list("a")) == {"a/b"}
    assert storage.local_path("a/b", sha256(b"data")).read_bytes() == b"data"
    storage.copy_out("a/b", "c", sha256(b"data"))
    storage.delete(["a/b"])
    assert set(storage.list()) == {"c"}


@pytest.mark.parametrize("root", ["", "  ", "ftp://host/x", "s3://", "s3:///x"])
def test_unusable_roots_are_refused(root):
    with pytest.raises(ConfigError, match="storage root"):
        Storage(root)


def test_roots_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Storage("store").uri == Storage("~/store").uri == Storage(f"file://{tmp_path}/store").uri
    assert Storage("store").uri == (tmp_path / "store").as_posix()
    assert not (tmp_path / "store").exists()


def test_credentials_in_the_root_are_refused_without_repeating_them():
    with pytest.raises(ConfigError) as caught:
        Storage("s3://user:hidden@bucket/x")
    assert "hidden" not in str(caught.value)


def test_no_secret_is_ever_shown(tmp_path):
    options = {
        "key": "access-id",
        "secret": "very-secret",
        "endpoint_url": "http://127.0.0.1:1/very-secret",
        "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 1},
    }
    storage = Storage("s3://bucket/x", options, cache_dir=tmp_path)
    with pytest.raises(StoreError, match=r"cannot read a in s3://bucket/x.*127\.0\.0\.1") as caught:
        storage.read_bytes("a")
    shown = f"{caught.value} {caught.value.__cause__} {storage!r}"
    assert "very-secret" not in shown
    assert "access-id" not in shown


def test_a_bucket_that_does_not_exist_is_an_error(s3_options, tmp_path):
    storage = Storage("s3://no-such-bucket/x", s3_options, cache_dir=tmp_path)
    for call in (storage.list, lambda: storage.write_bytes("a", b"1")):
        with pytest.raises(StoreError, match=r"in s3://no-such-bucket/x: there is no such bucket; create it"):
            call()


def test_missing_s3fs_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(known_filesystems, "s3", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'avatar-dataset\[s3\]'"):
        Storage("s3://bucket/never-opened-before", {"endpoint_url": "http://127.0.0.1:9"})
