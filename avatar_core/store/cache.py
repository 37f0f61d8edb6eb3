"""A machine's copies of remote files, named by content and shared by its processes."""

import fcntl
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from avatar_core.store.disk import PARTIAL_SUFFIX, publishing
from avatar_core.store.keys import file_sha256

_ABANDONED_S = 86400.0
_UNFINISHED_S = 7 * 86400.0
_RESCAN_SHARE = 0.02  # of the size limit: what this process may add before it looks at the folder again


class HashMemo:
    """SHA-256 of local files, each read once for as long as its size and time of change stay."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[int, int, str]] = {}

    def sha256(self, path: Path) -> str:
        status = path.stat()
        known = self._known.get(path)
        if known and known[:2] == (status.st_size, status.st_mtime_ns):
            return known[2]
        found = file_sha256(path)
        self._known[path] = (status.st_size, status.st_mtime_ns, found)
        return found

    def remember(self, path: Path, sha256: str) -> None:
        status = path.stat()
        self._known[path] = (status.st_size, status.st_mtime_ns, sha256)


class FileCache:
    """Keeps at most `limit_bytes`, beyond that only what some living process has been handed."""

    def __init__(self, folder: Path, limit_bytes: int, hashes: HashMemo) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._hashes = hashes
        self._unscanned_bytes: float = float("inf")

    def get(self, sha256: str, suffix: str, fetch: Callable[[Path], object]) -> Path:
        """`fetch` makes a file at the path it is given and raises unless its content has this SHA-256."""
        path = self.folder / sha256[:2] / f"{sha256}{suffix}"
        _lease(self.folder).add(path.name)
        if not (path.exists() and self._hashes.sha256(path) == sha256):
            with publishing(path) as partial:
                fetch(partial)
            self._hashes.remember(path, sha256)
            self._unscanned_bytes += path.stat().st_size
        # access times are set by hand: many machines mount without them
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        if self._unscanned_bytes > self.limit_bytes * _RESCAN_SHARE:
            self._make_room()
        return path

    def add(self, suffix: str, fetch: Callable[[Path], object]) -> Path:
        """For content that has no known SHA-256 before it is here."""
        download = self.folder / "00" / f".{uuid.uuid4().hex}{PARTIAL_SUFFIX}"
        download.parent.mkdir(parents=True, exist_ok=True)
        try:
            fetch(download)
            return self.get(file_sha256(download), suffix, download.replace)
        finally:
            download.unlink(missing_ok=True)

    def unfinished_file(self, key: str) -> Path:
        return self.folder / "unfinished" / key

    def release(self) -> None:
        """Everything handed out by this process may be evicted from now on."""
        _lease(self.folder).clear()

    def _make_room(self) -> None:
        with _locked(self.folder):
            in_use = _names_in_use(self.folder)
            files = sorted(self._files(), key=lambda file: file[1].st_atime_ns)
            excess = sum(status.st_size for _, status in files) - self.limit_bytes
            self._drop_abandoned()
            for path, status in files:
                if excess <= 0:
                    break
                if path.name not in in_use:
                    path.unlink(missing_ok=True)
                    excess -= status.st_size
        self._unscanned_bytes = 0

    def _drop_abandoned(self) -> None:
        for path in self.folder.glob("unfinished/*"):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - _UNFINISHED_S:
                    path.unlink()

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            with suppress(FileNotFoundError):
                status = path.stat()
                if path.suffix != PARTIAL_SUFFIX:
                    yield path, status
                elif status.st_mtime < time.time() - _ABANDONED_S:
                    path.unlink()


class _Lease:
    """The names that this process was handed, in a file that stays locked for as long as it lives."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: set[str] = set()
        (folder / "in-use").mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            self._file = (folder / "in-use" / uuid.uuid4().hex).open("w")
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def add(self, name: str) -> None:
        if name in self._names:
            return
        with _locked(self._folder):
            self._file.write(f"{name}\n")
            self._file.flush()
            self._names.add(name)

    def clear(self) -> None:
        with _locked(self._folder):
            self._file.seek(0)
            self._file.truncate()
            self._names.clear()


_leases: dict[Path, _Lease] = {}
_leases_lock = threading.Lock()


def _lease(folder: Path) -> _Lease:
    with _leases_lock:
        if folder not in _leases:
            _leases[folder] = _Lease(folder)
        return _leases[folder]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _names_in_use(folder: Path) -> set[str]:
    names: set[str] = set()
    for lease in (folder / "in-use").iterdir():
        with lease.open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                names.update(file.read().split())
            else:
                lease.unlink()  # its process has ended
    return names
