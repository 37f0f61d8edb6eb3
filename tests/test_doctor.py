import stat
import subprocess
import sys
from pathlib import Path

import pytest

from avatar_core import weights
from flows import doctor
from flows.doctor import Check


def find(checks: list[Check], section: str, item: str) -> Check:
    return next(check for check in checks if (check.section, check.item) == (section, item))


def break_package(folder: Path, name: str, code: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)


def put_driver(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Stands in for the driver's program, which needs a GPU."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_this_environment_is_healthy(tmp_path: Path) -> None:
    checks = doctor.report(str(tmp_path / "store"), tmp_path / "cache")
    assert [check for check in checks if not check.ok and check.section not in {"disk", "gpu"}] == []
    assert find(checks, "codecs", "libx264 encoder").value == "there"
    assert find(checks, "weights", "mtcnn").value == "present"
    assert "GB free" in find(checks, "disk", "store").value


def test_report_imports_no_model_library() -> None:
    code = (
        "import sys; from flows.doctor import report; report();"
        "print(sorted({'torch', 'librosa', 'numba', 'mtcnn', 'pandas'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_store_on_an_object_store_is_not_measured() -> None:
    checks = doctor.report("s3://bucket/store")
    assert find(checks, "disk", "store") == Check(
        "disk", "store", "s3://bucket/store (space not measured)", True
    )


def test_altered_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVATAR_WEIGHTS", str(tmp_path))
    assert find(list(doctor._weights()), "weights", "face-mesh").value.startswith("absent")
    (tmp_path / "face-mesh").mkdir()
    file = weights.load_registry()["face-mesh"].files["face_landmark.tflite"]
    (tmp_path / "face-mesh" / "face_landmark.tflite").write_bytes(bytes(file.size))
    check = find(list(doctor._weights()), "weights", "face-mesh")
    assert not check.ok
    assert check.value.startswith("altered")


def test_broken_packages_are_found_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_package(tmp_path, "flash_attn", "raise ImportError('undefined symbol')")
    break_package(tmp_path, "torchaudio", "import os; os._exit(3)")
    break_package(tmp_path, "xformers", "print('hello')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    checks = list(doctor._imports())
    section = "optional packages"
    assert find(checks, section, "flash_attn").value == "installed but broken: ImportError: undefined symbol"
    assert "ended the process" in find(checks, section, "torchaudio").value
    assert find(checks, section, "xformers") == Check(section, "xformers", "can be imported", True)
    assert find(checks, section, "librosa").ok


def test_each_gpu_has_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_driver(
        tmp_path, monkeypatch, "echo 'NVIDIA H200, 143771 MiB, 570.1'; echo 'NVIDIA L4, 23034 MiB, 570.1'"
    )
    assert list(doctor._gpus()) == [
        Check("gpu", "cuda:0", "NVIDIA H200, 143771 MiB, driver 570.1", True),
        Check("gpu", "cuda:1", "NVIDIA L4, 23034 MiB, driver 570.1", True),
    ]


def test_failing_driver_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_driver(tmp_path, monkeypatch, "echo 'Driver/library version mismatch'; exit 18")
    (check,) = doctor._gpus()
    assert check == Check("gpu", "nvidia", "nvidia-smi fails: Driver/library version mismatch", False)


def test_second_opencv_is_a_conflict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [check.ok for check in doctor._opencv()] == [True]
    metadata = tmp_path / "opencv_python-4.12.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: opencv-python\nVersion: 4.12.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    (check,) = doctor._opencv()
    assert not check.ok
    assert check.value.startswith("opencv-python 4.12.0 overwrites")
