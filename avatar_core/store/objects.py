"""Files of an object store (S3 and its kin) or in memory, through fsspec.

Every write is one request, because leaving an open s3fs file by an exception publishes what was
written so far.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import fsspec

from avatar_core.errors import ConfigError
from avatar_core.store.disk import FileInfo

_DELETE_BATCH = 1000  # S3 takes no more keys in one request
_CONNECTIONS = 64  # as many requests at once; botocore's own limit is 10


def object_options(protocol: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What fsspec is given besides: with equal options all threads of a process share one client."""
    if protocol != "s3":
        return {**options, "use_listings_cache": False}
    config = {"max_pool_connections": _CONNECTIONS, **(options.get("config_kwargs") or {})}
    return {**options, "use_listings_cache": False, "config_kwargs": config}


class ObjectFiles:
    def __init__(self, protocol: str, root: str, options: Mapping[str, Any]) -> None:
        try:
            self._fs = fsspec.filesystem(protocol, **object_options(protocol, options))
        except ImportError as error:
            raise ConfigError(
                f"storage root {protocol}://{root} needs a package that is not installed: "
                "pip install 'avatar-dataset[s3]'"
            ) from error
        self._is_s3 = protocol == "s3"
        self._root = root
        self.uri = f"{protocol}://{root}"

    def read(self, path: str) -> bytes:
        # By default s3fs asks for the size first, to read large objects in parts.
        return bytes(self._fs.cat_file(self._full(path), max_concurrency=1))

    def write(self, path: str, data: bytes) -> None:
        self._fs.pipe_file(self._full(path), data)

    def put(self, path: str, local: Path) -> None:
        self._fs.put_file(str(local), self._full(path))

    def fetch(self, path: str, target: Path) -> None:
        self._fs.get_file(self._full(path), str(target))

    def copy(self, path: str, target: str) -> None:
        self._fs.cp_file(self._full(path), self._full(target))

    def info(self, path: str) -> FileInfo | None:
        try:
            entry = self._fs.info(self._full(path))
        except FileNotFoundError:
            return None
        return _file_info(entry) if entry["type"] == "file" else None

    def list(self, prefix: str) -> dict[str, FileInfo]:
        folder, inside = self._full(prefix), {}
        if self._is_s3 and "/" in folder:
            # Asked for a folder that is empty, s3fs sends two more requests; not so for a part of its parent.
            folder, _, name = folder.rpartition("/")
            inside = {"prefix": f"{name}/"}
        found = self._fs.find(folder, detail=True, **inside)
        start = len(self._root) + 1 if self._root else 0
        return {name.lstrip("/")[start:]: _file_info(entry) for name, entry in found.items()}

    def delete(self, paths: Iterable[str]) -> None:
        full = [self._full(path) for path in paths]
        for start in range(0, len(full), _DELETE_BATCH):
            batch = full[start : start + _DELETE_BATCH]
            if len(batch) == 1:
                self._fs.rm_file(batch[0])
                continue
            self._fs.rm(batch)
            if self._fs.exists(batch[0]):  # s3fs passes over refused deletions of many
                raise PermissionError("the store refused to delete")

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root


def _file_info(entry: Mapping[str, Any]) -> FileInfo:
    changed = entry.get("LastModified", entry.get("created"))  # S3, memory
    changed_s = changed if isinstance(changed, float) else changed.timestamp()
    return FileInfo(entry["size"], changed_s, entry.get("ETag", "").strip('"') or None)
