"""The one place that reads what a table's row points to."""

import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

import fsspec

from avatar_core.config import check_place
from avatar_core.errors import AvatarError, InputError
from avatar_core.media.files import open_regular
from avatar_core.store.objects import object_options

STORES = ("s3", "memory")
NETWORK = ("http", "https", "ftp", "sftp", "gs", "gcs", "abfs", "az", "hf")
BLOCK_BYTES = 1 << 20
MAX_NAME_CHARS = 4096
STATS_AT_ONCE = 32

_WORTH_A_PAGE = 50
"""A page of a listing tells of 1000 objects: it costs about as much as looking up so many."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)(?:,[^:/]*)?:")


@dataclass(frozen=True)
class SourcePolicy:
    """What a row may point to. `allowed_roots` (folders, or URIs such as s3://bucket/inputs) empty = any."""

    allow_network: bool = False
    allowed_roots: Sequence[str] = ()
    max_bytes: int = 2 << 30
    storage_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceStat:
    """`version` changes when the content may have: modification time in ns, or the store's etag; empty
    where a server tells neither, so that equality proves nothing."""

    uri: str
    size: int
    version: str


def scheme_of(uri: str) -> str | None:
    """'s3' of s3://..., 'concat' of concat:a|b, 'subfile' of subfile,,start,0,:x; None for a plain path."""
    found = _SCHEME.match(uri)
    return found[1].lower() if found else None


def stat_source(uri: str, policy: SourcePolicy) -> SourceStat:
    if _is_remote(uri, policy):
        return _find_remote(uri, policy)[2]
    with _open_local(uri, policy) as file:
        return _local_stat(uri, file, policy)


def stat_sources(uris: Iterable[str], policy: SourcePolicy) -> dict[str, SourceStat | InputError]:
    """What `stat_source` returns or raises for each. Remote ones are looked up many at once, or by listing
    their folder where that takes fewer requests."""
    wanted = list(dict.fromkeys(uris))
    remote = [uri for uri in wanted if not is_local(uri)]
    found = _list_sources(remote, policy)
    single = [uri for uri in remote if uri not in found]
    with ThreadPoolExecutor(STATS_AT_ONCE) as pool:
        found.update(zip(single, pool.map(lambda uri: _stat_or_error(uri, policy), single), strict=True))
    return {uri: found[uri] if uri in found else _stat_or_error(uri, policy) for uri in wanted}


def copy_source(
    uri: str, policy: SourcePolicy, destination: Path, on_block: Callable[[], None] = lambda: None
) -> None:
    """Nothing is left at `destination` on an error. `on_block` is called between the blocks of a file that
    has several, and may raise."""
    try:
        if _is_remote(uri, policy) and scheme_of(uri) == "s3":
            _download(uri, policy, destination, on_block)
            return
        read = _read_remote if _is_remote(uri, policy) else _read_local
        with destination.open("wb") as target:
            for block in read(uri, policy):
                if target.tell():
                    on_block()
                target.write(block)
    except BaseException:
        destination.unlink(missing_ok=True)
        raise


def _stat_or_error(uri: str, policy: SourcePolicy) -> SourceStat | InputError:
    try:
        return stat_source(uri, policy)
    except InputError as error:
        return error


def _is_remote(uri: str, policy: SourcePolicy) -> bool:
    _check_name(uri)
    if is_local(uri):
        return False
    scheme = scheme_of(uri)
    if scheme in NETWORK and not policy.allow_network:
        raise InputError(f"{uri}: network sources are off ({scheme}); set input.allow_network=true")
    if scheme not in STORES + NETWORK:
        raise InputError(f"{uri}: the scheme '{scheme}:' is not allowed; allowed: paths, file://, s3://")
    return True


def _check_name(uri: str) -> None:
    if not uri.strip():
        raise InputError("the path is empty; give a path or an s3:// URI")
    if len(uri) > MAX_NAME_CHARS:
        raise InputError(f"{uri[:60]}...: the path has {len(uri)} characters, allowed are {MAX_NAME_CHARS}")
    if "\0" in uri or uri.encode(errors="replace") != uri.encode(errors="surrogatepass"):
        raise InputError(f"{uri!r}: the path holds a character that no file name can have")
    try:
        check_place(uri)
    except ValueError as error:
        raise InputError(str(error)) from None
    if "::" in uri:
        raise InputError(f"{uri}: chained URIs ('::') are not allowed; give one path or one s3:// URI")


def _read_blocks(uri: str, file: BinaryIO, stat: SourceStat) -> Iterator[bytes]:
    size = 0
    while block := file.read(BLOCK_BYTES):
        size += len(block)
        if size > stat.size:
            break
        yield block
    if size != stat.size:
        raise InputError(f"{uri}: changed while it was read ({stat.size} bytes at first); try again")


def _check_size(uri: str, size: int | None, policy: SourcePolicy) -> None:
    if size is None:
        raise InputError(f"{uri}: the server does not tell its size; copy the file to a folder or s3://")
    if size == 0:
        raise InputError(f"{uri}: is empty (0 bytes)")
    if size > policy.max_bytes:
        raise InputError(f"{uri}: has {size} bytes, allowed are {policy.max_bytes}; raise input.max_bytes")


def _check_inside(uri: str, place: str, roots: Sequence[str], policy: SourcePolicy) -> None:
    if policy.allowed_roots and not any(is_inside(place, root) for root in roots):
        raise InputError(f"{uri}: lies outside the allowed folders ({', '.join(policy.allowed_roots)})")


def is_inside(place: str, root: str) -> bool:
    """By whole path segments: /data2 is not inside /data. Both must be normal already."""
    return place == root or place.startswith(root.rstrip("/") + "/")


# --- local files


def _open_local(uri: str, policy: SourcePolicy) -> BinaryIO:
    resolved = os.path.realpath(local_path(uri))
    roots = [os.path.realpath(local_path(root)) for root in policy.allowed_roots if is_local(root)]
    _check_inside(uri, resolved, roots, policy)
    if not os.path.lexists(resolved):
        raise InputError(f"{uri}: no such file (relative paths are relative to the table)")
    try:
        return open_regular(resolved, follow_links=False)
    except InputError as error:
        raise InputError(f"{uri}: {error}") from error


def _local_stat(uri: str, file: BinaryIO, policy: SourcePolicy) -> SourceStat:
    status = os.fstat(file.fileno())
    _check_size(uri, status.st_size, policy)
    return SourceStat(uri, status.st_size, str(status.st_mtime_ns))


def _read_local(uri: str, policy: SourcePolicy) -> Iterator[bytes]:
    with _open_local(uri, policy) as file, _reading(uri):
        yield from _read_blocks(uri, file, _local_stat(uri, file, policy))


def is_local(uri: str) -> bool:
    return scheme_of(uri) in (None, "file")


def local_path(uri: str) -> str:
    """Without file:// (no percent decoding, as fsspec does)."""
    return re.sub(r"^file:(//(localhost(?=/))?)?", "", uri, flags=re.IGNORECASE)


# --- stores and servers


def _locate(uri: str, policy: SourcePolicy) -> tuple[fsspec.AbstractFileSystem, str]:
    place = normalise_uri(uri)
    meant = normalise_uri(unquote(uri)) if scheme_of(uri) in NETWORK else place  # servers read %2e%2e as ..
    roots = [normalise_uri(root) for root in policy.allowed_roots if not is_local(root)]
    _check_inside(uri, meant, roots, policy)
    with _reading(uri):
        scheme = place.partition(":")[0]
        options = object_options(scheme, policy.storage_options) if scheme in STORES else {}
        storage, path = fsspec.core.url_to_fs(place, **options)
    return storage, path


def _find_remote(uri: str, policy: SourcePolicy) -> tuple[fsspec.AbstractFileSystem, str, SourceStat]:
    storage, path = _locate(uri, policy)
    with _reading(uri):
        info = storage.info(path)
    return storage, path, _remote_stat(uri, info, policy)


def _remote_stat(uri: str, info: Mapping[str, Any], policy: SourcePolicy) -> SourceStat:
    if info.get("type") == "directory":
        raise InputError(f"{uri}: is a folder; give a file")
    _check_size(uri, info.get("size"), policy)
    version = next((info[key] for key in ("ETag", "mtime", "LastModified", "created") if key in info), "")
    return SourceStat(uri, info["size"], str(version))


def _list_sources(uris: Sequence[str], policy: SourcePolicy) -> dict[str, SourceStat | InputError]:
    """Of the objects on S3 those that lie near each other; whatever a listing cannot tell is left out."""
    places: dict[str, str] = {}
    folders: defaultdict[tuple[fsspec.AbstractFileSystem, str], set[str]] = defaultdict(set)
    for uri in uris:
        if scheme_of(uri) == "s3":
            with suppress(InputError):
                storage, place = _locate(uri, policy)
                places[uri] = place
                folders[storage, posixpath.dirname(place)].add(place)
    infos: dict[str, Mapping[str, Any]] = {}
    with ThreadPoolExecutor(STATS_AT_ONCE) as pool:
        for found in pool.map(lambda item: _list_folder(item[0][0], sorted(item[1])), folders.items()):
            infos.update(found)
    stats: dict[str, SourceStat | InputError] = {}
    for uri, place in places.items():
        if place in infos:
            try:
                stats[uri] = _remote_stat(uri, infos[place], policy)
            except InputError as error:
                stats[uri] = error
    return stats


def _list_folder(storage: fsspec.AbstractFileSystem, paths: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Those of `paths`, all of one folder and sorted, that are found page by page; each page begins at the
    next of them, and the first that holds few of them is the last."""
    found: dict[str, Mapping[str, Any]] = {}
    left = list(paths)
    with suppress(Exception):  # listing may be forbidden where reading is not
        while len(left) >= _WORTH_A_PAGE and not storage.version_aware:
            bucket, first, _ = storage.split_path(left[0])
            prefix = first[: first.rfind("/") + 1]
            page = storage.call_s3(
                "list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter="/", StartAfter=first[:-1]
            )
            listed = {f"{bucket}/{entry['Key']}": entry for entry in page.get("Contents", ())}
            hits = [path for path in left if path in listed]
            found |= {path: {"ETag": listed[path]["ETag"], "size": listed[path]["Size"]} for path in hits}
            if len(hits) < _WORTH_A_PAGE or not page.get("IsTruncated"):
                break
            left = left[left.index(hits[-1]) + 1 :]
    return found


class _Watched(fsspec.callbacks.Callback):  # type: ignore[misc]
    """Looks at a download as it comes: here, within what s3fs guards, an error closes the connection."""

    def __init__(self, uri: str, policy: SourcePolicy, on_block: Callable[[], None]) -> None:
        super().__init__()
        self._uri, self._policy, self._on_block = uri, policy, on_block

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        _check_size(self._uri, self.size, self._policy)
        if self.value < self.size:
            self._on_block()


def _download(uri: str, policy: SourcePolicy, destination: Path, on_block: Callable[[], None]) -> None:
    """In one request, so that all of it is of one version, unless the connection broke."""
    storage, path = _locate(uri, policy)
    watched = _Watched(uri, policy, on_block)
    with _reading(uri):
        storage.get_file(path, str(destination), callback=watched, max_concurrency=1)
    _check_size(uri, watched.size, policy)
    if watched.value != watched.size:
        raise InputError(f"{uri}: changed while it was read ({watched.size} bytes at first); try again")


def _read_remote(uri: str, policy: SourcePolicy) -> Iterator[bytes]:
    storage, path, stat = _find_remote(uri, policy)
    with _reading(uri), storage.open(path, "rb") as file:
        yield from _read_blocks(uri, file, stat)


@contextmanager
def _reading(uri: str) -> Iterator[None]:
    try:
        yield
    except (AvatarError, GeneratorExit):
        raise
    except FileNotFoundError as error:
        raise InputError(f"{uri}: no such file (relative paths are relative to the table)") from error
    except ImportError as error:
        raise InputError(f"{uri}: needs a package that is not installed ({error})") from error
    except Exception as error:  # every fsspec file system has its own exception types
        reason = " ".join(str(error).split())
        raise InputError(f"{uri}: cannot be read ({type(error).__name__}: {reason})") from error


def normalise_uri(uri: str) -> str:
    """scheme://bucket/path with '.', '..' and '//' resolved; '..' cannot leave the bucket."""
    scheme, _, rest = uri.partition("://")
    if not rest:
        raise InputError(f"{uri}: not a URI; write {scheme_of(uri)}://bucket/path")
    bucket, _, path = rest.partition("/")
    return f"{scheme.lower()}://{bucket}{posixpath.normpath('/' + path)}".rstrip("/")
