import functools
import os
import socket
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from avatar_core.errors import Cancelled, InputError
from avatar_core.media.source import SourcePolicy, SourceStat, copy_source, stat_source, stat_sources

CONTENT = bytes(range(256)) * 5000


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    path = folder / "a b%20.png"
    path.write_bytes(CONTENT)
    return path


def refusal(uri: str | Path, policy: SourcePolicy | None = None) -> str:
    with pytest.raises(InputError) as caught:
        stat_source(str(uri), policy or SourcePolicy())
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_local_file(picture: Path, tmp_path: Path) -> None:
    for uri in (str(picture), f"file://{picture}", f"file://localhost{picture}", f"FILE:{picture}"):
        stat = stat_source(uri, SourcePolicy())
        assert (stat.size, stat.version) == (len(CONTENT), str(picture.stat().st_mtime_ns))
        copy_source(uri, SourcePolicy(), tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == CONTENT


def test_memory_store(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/bucket/in/a.png", CONTENT)
    stat = stat_source("memory://bucket/in/a.png", SourcePolicy())
    assert (stat.size, stat.version != "") == (len(CONTENT), True)
    copy_source("memory://bucket/in/../in/a.png", SourcePolicy(), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://127.0.0.1:9/a.png", "network sources are off (http); set input.allow_network=true"),
        ("HTTPS://example.org/a.png", "network sources are off (https)"),
        ("ftp://example.org/a.png", "network sources are off (ftp)"),
        ("gs://bucket/a.png", "network sources are off (gs)"),
        (
            "concat:/etc/hosts|/etc/passwd",
            "the scheme 'concat:' is not allowed; allowed: paths, file://, s3://",
        ),
        ("subfile,,start,0,end,9,,:/etc/passwd", "the scheme 'subfile:' is not allowed"),
        ("data:image/png;base64,AAAA", "the scheme 'data:'"),
        ("pipe:0", "the scheme 'pipe:'"),
        ("fd:0", "the scheme 'fd:'"),
        ("cache:/etc/hosts", "the scheme 'cache:'"),
        ("crypto:/etc/hosts", "the scheme 'crypto:'"),
        ("local:///etc/hosts", "the scheme 'local:'"),
        ("C:\\a.png", "C:\\a.png is a Windows path; give a POSIX path, in WSL /mnt/c/a.png"),
        ("d:/a b.png", "d:/a b.png is a Windows path; give a POSIX path, in WSL /mnt/d/a b.png"),
        ("simplecache::s3://bucket/a.png", "chained URIs ('::')"),
        ("zip://a.png::/x.zip", "chained URIs ('::')"),
        ("/absent/a.png", "/absent/a.png: no such file (relative paths are relative to the table)"),
        ("memory://bucket/absent.png", "no such file"),
        ("s3:bucket/a.png", "not a URI; write s3://bucket/path"),
        ("a\0b.png", "a character that no file name can have"),
        ("a\ud800b.png", "a character that no file name can have"),
        ("/x/" + "y" * 300, "no such file"),
        ("z" * 5000, "has 5000 characters, allowed are 4096"),
        ("", "the path is empty"),
        ("/dev/zero", "/dev/zero: is a device; give a regular file"),
        ("/dev/null", "is a device"),
        ("/proc/self/environ", "is empty (0 bytes)"),
        ("/etc", "is a folder; give a regular file"),
        ("/etc/hosts/a.png", "no such file"),
    ],
)
def test_refused(uri: str, message: str) -> None:
    assert message in refusal(uri)


def test_special_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert "is a pipe" in refusal(tmp_path / "pipe.png")
    (tmp_path / "empty.png").touch()
    assert "is empty (0 bytes)" in refusal(tmp_path / "empty.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert "loop.png: " in refusal(tmp_path / "loop.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.png"))
        assert "cannot be opened" in refusal(tmp_path / "s.png")


def test_size_limit(picture: Path, tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/bucket/big.png", CONTENT)
    for uri in (str(picture), "memory://bucket/big.png"):
        assert "allowed are 100; raise input.max_bytes" in refusal(uri, SourcePolicy(max_bytes=100))
        with pytest.raises(InputError, match="allowed are 100"):
            copy_source(uri, SourcePolicy(max_bytes=100), tmp_path / "copy")
        assert not (tmp_path / "copy").exists()


def test_allowed_roots(picture: Path, tmp_path: Path) -> None:
    inside = SourcePolicy(allowed_roots=[str(tmp_path / "in")])
    assert stat_source(str(picture), inside).size == len(CONTENT)
    assert stat_source(f"{tmp_path}/in/../in/{picture.name}", inside).size == len(CONTENT)

    outside = tmp_path / "in2"
    outside.mkdir()
    (outside / "b.png").write_bytes(CONTENT)
    (tmp_path / "in" / "link.png").symlink_to(outside / "b.png")
    (tmp_path / "in" / "folder").symlink_to(outside)
    for uri in (
        outside / "b.png",
        f"{tmp_path}/in/../in2/b.png",
        f"file://{tmp_path}/in/../in2/b.png",
        tmp_path / "in" / "link.png",
        tmp_path / "in" / "folder" / "b.png",
        "/etc/absent-and-not-told",
        "memory://bucket/a.png",
    ):
        assert "lies outside the allowed folders" in refusal(uri, inside)


def test_a_link_inside_the_roots_is_followed(picture: Path, tmp_path: Path) -> None:
    link = picture.with_name("link.png")
    link.symlink_to(picture)
    assert stat_source(str(link), SourcePolicy(allowed_roots=[str(tmp_path)])).size == len(CONTENT)


def test_allowed_roots_of_a_store() -> None:
    files = fsspec.filesystem("memory")
    for name in ("/bucket/in/a.png", "/bucket/in2/a.png", "/bucket/secret.png"):
        files.pipe(name, CONTENT)
    policy = SourcePolicy(allowed_roots=["memory://bucket/in/"])
    assert stat_source("memory://bucket/in/a.png", policy).size == len(CONTENT)
    for uri in (
        "memory://bucket/in2/a.png",
        "memory://bucket/in/../secret.png",
        "memory://bucket/secret.png",
        "/etc/hosts",
    ):
        assert "lies outside the allowed folders" in refusal(uri, policy)


def test_folder_in_a_store() -> None:
    fsspec.filesystem("memory").pipe("/bucket/folder/a.png", CONTENT)
    assert "is a folder; give a file" in refusal("memory://bucket/folder")


def test_s3(tmp_path: Path, s3_root: str, s3_options: dict[str, Any]) -> None:
    files = fsspec.filesystem("s3", **s3_options)
    files.pipe(f"{s3_root}/in/a.png", CONTENT)
    policy = SourcePolicy(allowed_roots=[f"{s3_root}/in"], storage_options=s3_options)
    first = stat_source(f"{s3_root}/in/a.png", policy)
    copy_source(first.uri, policy, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT
    assert stat_source(first.uri, policy) == first
    files.pipe(f"{s3_root}/in/a.png", CONTENT[::-1])
    assert stat_source(first.uri, policy).version != first.version
    assert "no such file" in refusal(f"{s3_root}/in/absent.png", policy)
    assert "lies outside" in refusal(f"{s3_root}/in/../a.png", policy)
    assert "s3://absent-bucket/a.png: " in refusal(
        "s3://absent-bucket/a.png", SourcePolicy(storage_options=s3_options)
    )


def one_by_one(uris: list[str], policy: SourcePolicy) -> list[SourceStat | str]:
    def stat(uri: str) -> SourceStat | str:
        try:
            return stat_source(uri, policy)
        except InputError as error:
            return str(error)

    return [stat(uri) for uri in uris]


def all_at_once(uris: list[str], policy: SourcePolicy) -> list[SourceStat | str]:
    found = stat_sources(uris, policy)
    assert list(found) == list(dict.fromkeys(uris))
    return [str(stat) if isinstance(stat, InputError) else stat for stat in map(found.get, uris) if stat]


def test_many_local_sources(picture: Path, tmp_path: Path) -> None:
    uris = [
        str(picture),
        f"file://{picture}",
        str(picture),
        "/absent/a.png",
        "gs://b/a.png",
        "a\0b",
        "",
        "/etc",
    ]
    assert all_at_once(uris, SourcePolicy()) == one_by_one(uris, SourcePolicy())
    assert stat_sources([], SourcePolicy()) == {}


def test_many_sources_on_s3(s3_root: str, s3_options: dict[str, Any], s3_requests: list[str]) -> None:
    """One listing tells of those that lie together, and the same as a look at each."""
    files = fsspec.filesystem("s3", **s3_options)
    names = [f"{number:03d} b%20é.wav" for number in range(120)]
    for name in names:
        files.pipe(f"{s3_root}/in/{name}", name.encode())
    files.pipe({f"{s3_root}/in/empty.wav": b"", f"{s3_root}/in/folder/a.wav": b"a", f"{s3_root}/b.wav": b"b"})
    files.pipe(f"{s3_root}/in/large.wav", CONTENT)
    policy = SourcePolicy(
        allowed_roots=[f"{s3_root}/in"], storage_options=s3_options, max_bytes=len(CONTENT) - 1
    )
    uris = [f"{s3_root}/in/{name}" for name in [*names, "empty.wav", "large.wav"]]
    uris += [f"{s3_root}/in/../in/{names[0]}", f"{s3_root}/in/absent.wav", f"{s3_root}/in/folder"]
    uris += [f"{s3_root}/in/folder/a.wav", f"{s3_root}/b.wav", "s3:bucket/a.png", "/absent/a.png"]
    expected = one_by_one(uris, policy)
    s3_requests.clear()
    assert all_at_once(uris, policy) == expected
    absent = ["head_object", "list_objects_v2"]
    assert sorted(s3_requests) == sorted(["list_objects_v2", *absent, *absent, "head_object"])


def test_sources_far_apart_are_not_listed(
    s3_root: str, s3_options: dict[str, Any], s3_requests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that tells of few of them is the last."""
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "100")  # on a page
    files = fsspec.filesystem("s3", **s3_options)
    files.pipe({f"{s3_root}/{number:03d}": b"a" for number in range(180)})
    uris = [f"{s3_root}/{number:03d}" for number in range(0, 180, 3)]
    policy = SourcePolicy(storage_options=s3_options)
    s3_requests.clear()
    assert all_at_once(uris, policy) == one_by_one(uris, policy)
    assert s3_requests.count("list_objects_v2") == 1
    s3_requests.clear()
    stat_sources([f"{s3_root}/{number:03d}" for number in range(180)], policy)
    assert s3_requests == ["list_objects_v2"] * 2


def test_an_object_is_read_in_one_request(
    tmp_path: Path, s3_root: str, s3_options: dict[str, Any], s3_requests: list[str]
) -> None:
    fsspec.filesystem("s3", **s3_options).pipe(f"{s3_root}/a.png", CONTENT)
    policy = SourcePolicy(storage_options=s3_options)
    s3_requests.clear()
    copy_source(f"{s3_root}/a.png", policy, tmp_path / "copy")
    assert s3_requests == ["get_object"]
    assert (tmp_path / "copy").read_bytes() == CONTENT
    (tmp_path / "copy").unlink()
    with pytest.raises(InputError, match=r"allowed are 100; raise input\.max_bytes"):
        copy_source(
            f"{s3_root}/a.png", SourcePolicy(storage_options=s3_options, max_bytes=100), tmp_path / "copy"
        )
    with pytest.raises(InputError, match="no such file"):
        copy_source(f"{s3_root}/absent.png", policy, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_copying_can_be_stopped(
    picture: Path, tmp_path: Path, s3_root: str, s3_options: dict[str, Any]
) -> None:
    fsspec.filesystem("s3", **s3_options).pipe(f"{s3_root}/a.png", CONTENT)

    def stop() -> None:
        raise Cancelled("stopped")

    for uri in (str(picture), f"{s3_root}/a.png"):
        with pytest.raises(Cancelled):
            copy_source(uri, SourcePolicy(storage_options=s3_options), tmp_path / "copy", stop)
        assert not (tmp_path / "copy").exists()


@pytest.fixture
def website(picture: Path) -> Iterator[str]:
    handler = functools.partial(SimpleHTTPRequestHandler, directory=picture.parent.parent)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_network_when_allowed(website: str, picture: Path, tmp_path: Path) -> None:
    picture.rename(picture.with_name("a.png"))
    policy = SourcePolicy(allow_network=True, allowed_roots=[f"{website}/in"])
    assert stat_source(f"{website}/in/a.png", policy).size == len(CONTENT)
    copy_source(f"{website}/in/a.png", policy, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT
    assert "no such file" in refusal(f"{website}/in/absent.png", policy)
    for path in ("copy", "in/../copy", "in/%2e%2e/copy"):
        assert "lies outside the allowed folders" in refusal(f"{website}/{path}", policy)
    assert "network sources are off" in refusal(f"{website}/in/a.png", SourcePolicy())
