"""Files on a local disk that appear whole or not at all."""

import fcntl
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PARTIAL_SUFFIX = ".partial"
_FICLONE = 0x40049409  # linux/fs.h: share the blocks of another file (Btrfs, XFS)


@dataclass(frozen=True, slots=True)
class FileInfo:
    """Size in bytes, time of the last change in seconds since the epoch; `etag` of an object store: the MD5
    of an object that was put in one unencrypted request, something else otherwise."""

    size: int
    mtime: float
    etag: str | None = None


@contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """A new path beside `path`: the file made there replaces `path` at the end, or an error removes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def clone_or_copy(source: Path, target: Path) -> None:
    """Never a hard link, so that an edit of one leaves the other alone."""
    with source.open("rb") as reader, target.open("wb") as writer:
        try:
            fcntl.ioctl(writer, _FICLONE, reader.fileno())
        except OSError:
            shutil.copyfileobj(reader, writer, 1 << 20)


class DiskFiles:
    """The local form of `ObjectFiles`; errors are those of the operating system."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = root.as_posix()

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def write(self, path: str, data: bytes) -> None:
        with publishing(self.root / path) as partial:
            partial.write_bytes(data)

    def put(self, path: str, local: Path) -> None:
        with publishing(self.root / path) as partial:
            clone_or_copy(local, partial)

    def fetch(self, path: str, target: Path) -> None:
        clone_or_copy(self.root / path, target)

    def copy(self, path: str, target: str) -> None:
        self.put(target, self.root / path)

    def info(self, path: str) -> FileInfo | None:
        try:
            status = (self.root / path).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return FileInfo(status.st_size, status.st_mtime) if stat.S_ISREG(status.st_mode) else None

    def list(self, prefix: str) -> dict[str, FileInfo]:
        found: dict[str, FileInfo] = {}
        folders = [prefix]
        while folders:
            folder = folders.pop()
            # What was listed may vanish before it is looked at.
            with suppress(FileNotFoundError), os.scandir(self.root / folder) as entries:
                for entry in entries:
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(path)
                        continue
                    with suppress(FileNotFoundError):
                        status = entry.stat()
                        if stat.S_ISREG(status.st_mode):
                            found[path] = FileInfo(status.st_size, status.st_mtime)
        return found

    def delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            (self.root / path).unlink(missing_ok=True)
