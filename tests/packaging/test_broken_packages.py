"""Optional packages that are installed but broken cost nothing that does not need them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
BROKEN = (
    *("torchvision", "flash_attn", "torchaudio", "xformers", "bitsandbytes", "torchao", "peft"),
    "tensorflow",
)
HEAVY = ("torch", "diffusers", "transformers", "prefect", "gradio", "hydra", "pandas", "librosa")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    stubs = tmp_path / "stubs"
    for name in BROKEN:
        (stubs / name).mkdir(parents=True)
        (stubs / name / "__init__.py").write_text(
            f"raise RuntimeError('operator {name}::nms does not exist')\n"
        )
    return {**os.environ, "PYTHONPATH": str(stubs), "AVATAR_WEIGHTS": str(tmp_path / "weights")}


@pytest.mark.drill
@pytest.mark.parametrize("choice", [[], ["backend=hunyuan", "preset=tiny"]], ids=["preview", "hunyuan"])
def test_clip_is_rendered_beside_broken_packages(
    tmp_path: Path, environment: dict[str, str], choice: list[str]
) -> None:
    command = [sys.executable, "-m", "flows.cli", "render", *choice]
    command += [str(SAMPLES / "portrait.jpg"), str(SAMPLES / "hello.wav"), "-o", "out.mp4"]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "out.mp4").stat().st_size > 10_000


def test_help_imports_nothing_heavy(tmp_path: Path, environment: dict[str, str]) -> None:
    code = (
        "import contextlib, sys; from flows.cli import main; sys.argv = ['avatar', '--help']\n"
        "with contextlib.suppress(SystemExit): main()\n"
        f"sys.exit('heavy: ' + ' '.join(sorted(set({HEAVY + BROKEN!r}) & set(sys.modules))))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert "render" in result.stdout
    assert result.stderr == "heavy: \n"
