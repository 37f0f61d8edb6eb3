"""`avatar weights`, as a user types it."""

import re
from pathlib import Path

import pytest

from tests.sample_rows import RunAvatar


def test_weights_are_listed_and_verified(avatar: RunAvatar) -> None:
    code, output = avatar("weights", "list")
    assert code == 0
    assert re.search(r"^mtcnn +yes", output, re.MULTILINE)
    code, output = avatar("weights", "verify", "mtcnn")
    assert (code, output) == (0, "mtcnn: ok\n")
    code, output = avatar("weights", "verify", "mtcn")
    assert code == 2
    assert "mtcnn" in output


def test_random_weights_are_written_and_converted(
    avatar: RunAvatar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AVATAR_WEIGHTS", str(tmp_path))
    assert avatar("weights", "tiny", "hunyuan")[0] == 0
    assert avatar("weights", "verify", "hunyuan-tiny") == (0, "hunyuan-tiny: ok\n")
    code, output = avatar("weights", "convert", "hunyuan-tiny/transformer")
    assert code == 0
    assert str(tmp_path / "hunyuan-tiny/converted/transformer") in output
    code, output = avatar("weights", "tiny", "preview")
    assert code == 2
    assert "backends with such weights: hunyuan" in output


def test_random_weights_want_a_folder(avatar: RunAvatar, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for backend in ("hunyuan", "ditto", "kokoro"):
        code, output = avatar("weights", "tiny", backend, file)
        assert (code, output) == (2, f"error: {file} is a file; give an empty or absent folder\n")
    assert file.read_text() == "kept"
