"""One place for every file of a store: a folder, an S3 prefix or, within one process, memory."""

import errno
import hashlib
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import platformdirs

from avatar_core.errors import AvatarError, ConfigError, StoreError
from avatar_core.store.cache import FileCache, HashMemo
from avatar_core.store.disk import PARTIAL_SUFFIX, DiskFiles, FileInfo, publishing
from avatar_core.store.keys import file_sha256
from avatar_core.store.objects import ObjectFiles

DEFAULT_CACHE_BYTES = 50 * 2**30
_SECRET_NAME = re.compile("key|secret|token|password", re.IGNORECASE)


class Storage:
    """Paths are relative to `root`, with forward slashes. Whatever goes wrong is a `StoreError`.

    `options` go to fsspec (credentials, `endpoint_url`, ...) and never into a message.
    `cache_dir` keeps this machine's copies of remote files, up to about `cache_bytes`.
    """

    def __init__(
        self,
        root: str,
        options: Mapping[str, Any] | None = None,
        cache_dir: Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self._secrets = sorted(_secret_texts(options or {}), key=len, reverse=True)
        self._files = _open_root(root, options or {})
        self._hashes = HashMemo()
        self._cache = FileCache(
            cache_dir or platformdirs.user_cache_path("avatar-dataset") / "files", cache_bytes, self._hashes
        )

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    @property
    def uri(self) -> str:
        return self._files.uri

    @property
    def is_local(self) -> bool:
        return isinstance(self._files, DiskFiles)

    def read_bytes(self, path: str) -> bytes:
        with self._explained("read", path):
            return self._files.read(_checked(path))

    def write_bytes(self, path: str, data: bytes) -> None:
        with self._explained("write", path):
            self._files.write(_checked(path), data)

    def put_file(self, path: str, local: Path) -> None:
        if not local.is_file():
            raise StoreError(f"{local} is not a file, so it cannot become {path} in {self.uri}")
        with self._explained("write", path):
            self._files.put(_checked(path), local)

    def exists(self, path: str) -> bool:
        return self._info(path) is not None

    def size(self, path: str) -> int:
        info = self._info(path)
        if info is None:
            raise self._absent(path)
        return info.size

    def list(self, prefix: str = "", *, partial: bool = False) -> dict[str, FileInfo]:
        """Every file below the folder `prefix`; with `partial` also what killed writers left behind."""
        with self._explained("list", prefix or "files"):
            found = self._files.list(_checked(prefix) if prefix else "")
        return {path: info for path, info in found.items() if partial or not path.endswith(PARTIAL_SUFFIX)}

    def delete(self, paths: Iterable[str]) -> None:
        checked = [_checked(path) for path in paths]
        with self._explained("delete", f"{len(checked)} files"):
            self._files.delete(checked)

    def local_path(self, path: str, sha256: str | None = None) -> Path:
        """A verified file on this machine, not to be changed, which stays at least until `release`."""
        with self._explained("read", path):
            if not isinstance(self._files, DiskFiles):
                return self._cached(_checked(path), sha256)
            local = self._files.root / _checked(path)
            if sha256:
                self._require(path, sha256, self._hashes.sha256(local))
            elif not local.is_file():
                raise self._absent(path)
            return local

    def unfinished_file(self, key: str) -> Path:
        """Where this machine may keep how far an item is until it is committed; it may not exist."""
        return self._cache.unfinished_file(key)

    def release(self) -> None:
        """Ends this process's claim on the cached files that `local_path` gave it."""
        if not self.is_local:
            self._cache.release()

    def copy_out(self, path: str, destination: Path | str, sha256: str | None = None) -> None:
        """Copies to a local file, or to another path of this storage given as text, verifying on the way."""
        with self._explained("copy", path):
            if isinstance(destination, Path):
                with publishing(destination) as partial:
                    self._fetch(_checked(path), partial, sha256)
            elif isinstance(self._files, DiskFiles):
                with publishing(self._files.root / _checked(destination)) as partial:
                    self._fetch(_checked(path), partial, sha256)
            else:
                if sha256:
                    self._require(path, sha256, hashlib.sha256(self._files.read(_checked(path))).hexdigest())
                self._files.copy(_checked(path), _checked(destination))

    def holds(self, path: str, data: bytes | Path, max_age_s: float) -> bool:
        """Whether exactly this content was put there not longer ago, if that shows without a download."""
        info = self._info(path)
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        if info is None or info.size != size or time.time() - info.mtime > max_age_s:
            return False
        if not isinstance(self._files, DiskFiles):
            return info.etag == _digest(data, "md5")
        with self._explained("read", path):
            return file_sha256(self._files.root / path) == _digest(data, "sha256")

    def _info(self, path: str) -> FileInfo | None:
        with self._explained("look up", path):
            return self._files.info(_checked(path))

    def _cached(self, path: str, sha256: str | None) -> Path:
        suffix = PurePosixPath(path).suffix
        if sha256:
            return self._cache.get(sha256, suffix, lambda target: self._fetch(path, target, sha256))
        return self._cache.add(suffix, lambda target: self._files.fetch(path, target))

    def _fetch(self, path: str, target: Path, sha256: str | None) -> None:
        self._files.fetch(path, target)
        if sha256:
            self._require(path, sha256, file_sha256(target))

    def _require(self, path: str, sha256: str, found: str) -> None:
        if sha256 != found:
            raise StoreError(
                f"{path} in {self.uri} was altered: its SHA-256 is {found}, expected {sha256}; "
                "it has to be made again"
            )

    def _absent(self, path: str) -> StoreError:
        return StoreError(f"{path} is not in {self.uri}; if it was deleted, it has to be made again")

    @contextmanager
    def _explained(self, action: str, path: str) -> Iterator[None]:
        try:
            yield
        except AvatarError:
            raise
        except FileNotFoundError as error:
            if action in ("write", "list"):
                raise StoreError(
                    f"cannot {action} {path} in {self.uri}: there is no such bucket; create it"
                ) from error
            raise self._absent(path) from error
        except Exception as error:
            if self.is_local and not isinstance(error, OSError):
                raise
            text = self._without_secrets(str(error))
            message = f"cannot {action} {path} in {self.uri}: {_reason(error, text)}"
            raise StoreError(message) from (error if text == str(error) else None)

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return re.sub(r"://[^/@\s]*@", "://***@", text)


def _open_root(root: str, options: Mapping[str, Any]) -> DiskFiles | ObjectFiles:
    protocol, separator, rest = root.partition("://")
    if not root.strip():
        raise ConfigError("the storage root is empty; give a folder or s3://bucket/prefix")
    if not separator or protocol == "file":
        return DiskFiles(Path(rest if separator else root).expanduser().resolve())
    if "@" in rest.split("/")[0]:
        raise ConfigError("the storage root holds credentials; put them into the storage options instead")
    if protocol not in ("s3", "memory") or (protocol == "s3" and not rest.partition("/")[0]):
        raise ConfigError(f"storage root {root!r} is neither a folder nor of the form s3://bucket/prefix")
    return ObjectFiles(protocol, rest.strip("/"), options)


def _checked(path: str) -> str:
    parts = path.split("/")
    if "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise StoreError(
            f"{path!r} is not a path inside the store: "
            "it must be relative, with forward slashes and without . or .."
        )
    return path


def _reason(error: Exception, text: str) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space is left ({text}); free some, for example by `avatar gc`, or choose another root"
    if isinstance(error, PermissionError):
        return f"permission denied ({text}); check the owner of the folder or the storage credentials"
    if isinstance(error, NotADirectoryError | FileExistsError):
        return f"a part of this path is a file, not a folder ({text}); choose another storage root"
    return f"{type(error).__name__}: {text}"


def _digest(data: bytes | Path, algorithm: str) -> str:
    if isinstance(data, bytes):
        return hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()
    with data.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def names_secret(option: str) -> bool:
    """Whether the value of an option of this name must not be shown."""
    return bool(_SECRET_NAME.search(option))


def _secret_texts(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _secret_texts(value)
        elif isinstance(value, str) and len(value) >= 4 and names_secret(name):
            yield value
