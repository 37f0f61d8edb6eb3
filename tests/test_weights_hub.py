"""Fetching from a model hub: the real client against a small server that speaks what it needs of the API."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from avatar_core import weights
from avatar_core.errors import WeightsError
from avatar_core.weights import Entry, Part
from avatar_core.weights.registry import Repository

REPOSITORY, OTHER = "someone/toy", "other/words"
REVISION = "0123456789abcdef0123456789abcdef01234567"
LARGE = bytes(range(256)) * 4000


@dataclass
class Hub:
    """What the server has and what it was asked for. So many of its next answers with a large file break off,
    and with `lie` it promises other hashes."""

    files: dict[str, bytes]
    port: int = 0
    breaks: int = 0
    break_after: int = 300_000
    lie: bool = False
    requests: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)

    @property
    def downloads(self) -> list[str]:
        return [
            path.rpartition(REVISION + "/")[2]
            for method, path, _, _ in self.requests
            if method == "GET" and "/resolve/" in path
        ]

    def ranges(self, name: str) -> list[str | None]:
        return [asked for method, path, asked, _ in self.requests if method == "GET" and path.endswith(name)]


def is_large(name: str) -> bool:
    return name.endswith((".pt", ".safetensors"))


def describe(hub: Hub, name: str) -> dict[str, object]:
    content = hub.files[name]
    sha256 = hashlib.sha256(content + (b"!" if hub.lie else b"")).hexdigest()
    large = {"lfs": {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": 100}}
    oid = hashlib.sha1(content).hexdigest()
    return {"size": len(content), "oid": oid, "blobId": oid} | (large if is_large(name) else {})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer(head=True)

    def do_GET(self) -> None:
        self.answer(head=False)

    def answer(self, *, head: bool) -> None:
        path = unquote(urlparse(self.path).path)
        asked = self.headers.get("Range")
        self.hub.requests.append((self.command, path, asked, self.headers.get("Authorization")))
        repository = OTHER if OTHER in path else REPOSITORY  # both have the same files
        prefix = f"/{repository}/resolve/{REVISION}/"
        if path in (
            f"/api/models/{repository}/revision/main",
            f"/api/models/{repository}/revision/{REVISION}",
        ):
            siblings = [{"rfilename": name, **describe(self.hub, name)} for name in self.hub.files]
            self.send_json({"id": repository, "sha": REVISION, "siblings": siblings})
        elif path == f"/api/models/{repository}/tree/{REVISION}":
            entries = [{"type": "file", "path": name, **describe(self.hub, name)} for name in self.hub.files]
            self.send_json(entries)
        elif path.startswith(prefix) and path.removeprefix(prefix) in self.hub.files:
            self.send_file(path.removeprefix(prefix), asked, head)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def send_json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, name: str, asked: str | None, head: bool) -> None:
        content = self.hub.files[name]
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        tag = hashlib.sha256(content).hexdigest() if is_large(name) else hashlib.sha1(content).hexdigest()
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{tag}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if head:
            return
        if self.hub.breaks and len(content) > self.hub.break_after:
            self.hub.breaks -= 1
            self.wfile.write(content[start : self.hub.break_after])
            self.wfile.flush()
            self.close_connection = True
        else:
            self.wfile.write(content[start:])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(
        {
            "README.md": b"about",
            "ckpts/net/model.pt": LARGE,
            "ckpts/net/training.log": b"lines",
            "ckpts/words/config.json": b"{}",
            "ckpts/words/model.safetensors": LARGE[:5000],
            "ckpts/half/model.pt": LARGE[:3000],
        }
    )
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.port = server.server_address[1]
    entry = Entry(
        "A toy",
        "huggingface",
        REPOSITORY,
        "main",
        "MIT",
        parts={
            "net": Part("ckpts/net", ("*.pt",)),
            "words": Part("ckpts/words", ("*.json", "*.safetensors"), optional=("*.txt",)),
            "half": Part("ckpts/half", ("model.pt",), on_request=True),
        },
    )
    monkeypatch.setattr(weights, "load_registry", lambda: {"toy": entry})
    monkeypatch.setenv("AVATAR_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.port}")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def home(hub: Hub, tmp_path: Path) -> Path:
    return tmp_path / "weights" / "toy"


def silent(message: str) -> None:
    pass


def place_by_hand(home: Path, hub: Hub) -> None:
    for name, content in hub.files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(content)


def alter(path: Path) -> None:
    """Another content of the same size, as a person would write it: with a new time."""
    status = path.stat()
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def test_fetch_brings_the_wanted_files_and_notes_revision_and_hashes(hub: Hub, home: Path) -> None:
    said: list[str] = []
    assert weights.fetch("toy", said.append) == home
    assert "downloading 3 files" in said[0]
    assert REVISION[:12] in said[0]
    files = {path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()}
    assert files == {
        "origin.json",
        "sha256.json",
        "ckpts/net/model.pt",
        "ckpts/words/config.json",
        "ckpts/words/model.safetensors",
    }
    origin = json.loads((home / "origin.json").read_text())
    assert (origin["repository"], origin["revision"]) == (REPOSITORY, REVISION)
    assert origin["files"]["ckpts/net/model.pt"] == hashlib.sha256(LARGE).hexdigest()
    assert weights.verify("toy") == []
    assert REVISION in weights.provenance("toy")
    assert weights.locate("toy/words") == home / "ckpts/words"


def test_an_entry_may_come_from_several_repositories(
    hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Entry(
        "A toy",
        "huggingface",
        REPOSITORY,
        "main",
        "MIT",
        parts={
            "net": Part("", ("toy/ckpts/net/*.pt", "words/ckpts/words/model.safetensors")),
            "words": Part("words/ckpts/words", ("*.json",)),
            "half": Part("toy/ckpts/half", ("model.pt",), on_request=True),
        },
        repositories={"toy": Repository(REPOSITORY, "main"), "words": Repository(OTHER, "main")},
    )
    monkeypatch.setattr(weights, "load_registry", lambda: {"toy": entry})
    assert weights.fetch("toy/net", silent) == home
    assert sorted(hub.downloads) == ["ckpts/net/model.pt", "ckpts/words/model.safetensors"]
    assert not weights.present("toy")
    hub.requests.clear()
    weights.fetch("toy", silent)
    assert hub.downloads == ["ckpts/words/config.json"] * len(hub.downloads)
    assert (home / "toy/ckpts/net/model.pt").read_bytes() == LARGE
    assert weights.locate("toy/words") == home / "words/ckpts/words"
    assert weights.verify("toy") == []
    assert f"{REPOSITORY}, revision {REVISION}; {OTHER}, revision {REVISION}" in weights.provenance("toy")
    alter(home / "words/ckpts/words/model.safetensors")
    with pytest.raises(WeightsError, match="is not the registered file"):
        weights.fingerprint("toy/net")
    weights.fetch("toy", silent)
    assert weights.verify("toy") == []


def test_second_fetch_asks_nobody(hub: Hub, home: Path) -> None:
    weights.fetch("toy", silent)
    hub.requests.clear()
    said: list[str] = []
    weights.fetch("toy", said.append)
    assert said == ["toy: already there"]
    assert hub.requests == []


def test_parts_are_fetched_one_by_one(hub: Hub, home: Path) -> None:
    weights.fetch("toy/words", silent)
    assert weights.present("toy/words")
    assert not weights.present("toy/net")
    assert not weights.present("toy")
    weights.fetch("toy", silent)
    assert sorted(hub.downloads) == sorted(
        [
            "ckpts/words/config.json",
            "ckpts/words/config.json",
            "ckpts/words/model.safetensors",
            "ckpts/net/model.pt",
        ]
    )
    assert weights.verify("toy") == []
    assert not weights.present("toy/half")
    weights.fetch("toy/half", silent)
    assert weights.verify("toy/half") == []


def test_a_part_may_lie_in_the_repository_itself(
    hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"notes": Part(".", ("README.md", "LICENCE"))}
    entry = Entry("A toy", "huggingface", REPOSITORY, "main", "MIT", parts=parts)
    monkeypatch.setattr(weights, "load_registry", lambda: {"toy": entry})
    with pytest.raises(WeightsError, match=r"'toy/notes': README\.md, LICENCE not found in"):
        weights.locate("toy/notes")
    hub.files["LICENCE"] = b"MIT"
    weights.fetch("toy", silent)
    assert weights.locate("toy/notes") == home
    assert sorted(hub.downloads) == ["LICENCE", "README.md"]


def test_broken_connection_goes_on_where_it_broke(hub: Hub, home: Path) -> None:
    content = LARGE * 13  # the client keeps whole pieces of 10 MB
    hub.files["ckpts/net/model.pt"], hub.breaks, hub.break_after = content, 1, 11 << 20
    weights.fetch("toy/net", silent)
    first, second = hub.ranges("model.pt")
    assert first is None
    assert second is not None
    assert 0 < int(second.strip("bytes=-")) <= 11 << 20
    assert (home / "ckpts/net/model.pt").read_bytes() == content
    assert weights.verify("toy/net") == []


def test_fetch_after_a_failed_one_asks_for_the_rest(hub: Hub, home: Path) -> None:
    hub.breaks = 100
    with pytest.raises(WeightsError, match=f"{REPOSITORY} could not be fetched from http://127"):
        weights.fetch("toy", silent)
    assert not weights.present("toy/net")
    assert not weights.present("toy/words")
    hub.breaks = 0
    hub.requests.clear()
    weights.fetch("toy", silent)
    assert hub.downloads == ["ckpts/net/model.pt"]
    assert weights.verify("toy") == []


def test_altered_file_is_refused_and_fetched_again(hub: Hub, home: Path) -> None:
    weights.fetch("toy", silent)
    clean = weights.fingerprint("toy/net")
    alter(home / "ckpts/net/model.pt")
    with pytest.raises(
        WeightsError, match=r"model\.pt is not the registered file.*run: avatar weights fetch"
    ):
        weights.fingerprint("toy/net")
    assert "is not the registered file" in weights.verify("toy")[0]
    hub.requests.clear()
    weights.fetch("toy", silent)
    assert "ckpts/words/model.safetensors" not in hub.downloads
    assert weights.fingerprint("toy/net") == clean


def test_content_that_is_not_what_the_hub_promised_is_not_kept(hub: Hub, home: Path) -> None:
    hub.lie = True
    with pytest.raises(WeightsError, match=r"model\.pt of someone/toy arrived with SHA-256"):
        weights.fetch("toy/net", silent)
    assert not weights.present("toy/net")
    assert not (home / "origin.json").exists()


def test_files_placed_by_hand_are_taken_when_they_are_the_hubs(hub: Hub, home: Path) -> None:
    (home / "ckpts/net").mkdir(parents=True)
    (home / "ckpts/net/model.pt").write_bytes(LARGE)
    weights.fetch("toy", silent)
    assert "ckpts/net/model.pt" not in hub.downloads
    assert REVISION in weights.provenance("toy")
    assert weights.verify("toy") == []


def test_token_comes_from_the_environment_alone(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights.fetch("toy/words", silent)
    assert {token for _, _, _, token in hub.requests} == {None}
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.requests.clear()
    weights.fetch("toy/net", silent)
    assert {token for _, _, _, token in hub.requests} == {"Bearer hf_secret"}
    assert not any(b"hf_secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "nobody"])
def test_unreachable_hub_names_the_other_ways(
    hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(
        WeightsError, match=r"could not be fetched from .*HF_ENDPOINT .* or place the files by hand"
    ):
        weights.fetch("toy", silent)


def test_unknown_repository_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry("A toy", "huggingface", "someone/else", "main", "MIT", parts={"net": Part("a", ("b",))})
    monkeypatch.setattr(weights, "load_registry", lambda: {"toy": entry})
    with pytest.raises(WeightsError, match=r"someone/else could not be fetched from .*404"):
        weights.fetch("toy", silent)


def test_full_disk_is_told_before_the_download(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "avatar_core.weights.download.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})()
    )
    with pytest.raises(WeightsError, match=r"GB free, the files need .* make room"):
        weights.fetch("toy", silent)
    assert hub.downloads == []


def test_files_placed_by_hand_are_recorded(hub: Hub, home: Path) -> None:
    place_by_hand(home, hub)
    assert weights.present("toy")
    assert weights.verify("toy") == []
    recorded = json.loads((home / "sha256.json").read_text())
    assert recorded["ckpts/net/model.pt"]["sha256"] == hashlib.sha256(LARGE).hexdigest()
    assert "ckpts/net/training.log" not in recorded
    assert "placed by hand" in weights.provenance("toy")
    assert hub.requests == []


def test_replaced_file_of_ones_own_is_another_model(hub: Hub, home: Path) -> None:
    place_by_hand(home, hub)
    first, other = weights.fingerprint("toy/net"), weights.fingerprint("toy/words")
    alter(home / "ckpts/net/model.pt")
    assert weights.fingerprint("toy/net") != first
    assert weights.fingerprint("toy/words") == other
    assert weights.verify("toy") == []


def test_damage_is_found_though_size_and_time_are_the_same(hub: Hub, home: Path) -> None:
    place_by_hand(home, hub)
    assert weights.verify("toy") == []
    path = home / "ckpts/net/model.pt"
    status = path.stat()
    alter(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights.verify("toy", trust_record=True) == []
    assert "is not the registered file" in weights.verify("toy")[0]


def test_half_copied_shards_count_as_absent(hub: Hub, home: Path) -> None:
    place_by_hand(home, hub)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (home / "ckpts/words/model.safetensors.index.json").write_text(json.dumps(index))
    assert not weights.present("toy/words")
    with pytest.raises(WeightsError, match=r"ckpts/words/model-2\.safetensors not found"):
        weights.locate("toy/words")
    (home / "ckpts/words/model-2.safetensors").write_bytes(b"rest")
    assert weights.present("toy/words")


def test_unknown_part_lists_the_known_ones(hub: Hub) -> None:
    with pytest.raises(WeightsError, match="'toy' have no part 'nett'; there are: net, words, half"):
        weights.locate("toy/nett")


def test_parts_of_an_entry_are_named(hub: Hub) -> None:
    assert weights.part_names("toy") == ["toy/net", "toy/words", "toy/half"]
    assert weights.part_names("toy/net") == ["toy/net"]
