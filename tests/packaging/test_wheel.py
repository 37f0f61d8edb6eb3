"""The wheel holds what it needs and nothing else, and runs away from the checkout."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # hatchling is in the dev extra, so that building needs no network.
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel alone; its dependencies are those of the running environment."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # A plain path line: `.pth` files found there, among them the checkout's own, are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install"]
    offline = ["--no-deps", "--no-index", "--ignore-installed", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *offline, str(wheel)], capture_output=True, check=True)
    return environment


@pytest.fixture
def hostile_folder(tmp_path: Path) -> Path:
    """A user's folder whose own packages have our names."""
    for package in ("flows", "tasks", "avatar_core", "conf"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"raise RuntimeError('the wrong {package}')\n")
    return tmp_path


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_wheel_holds_only_the_packages(names: list[str]) -> None:
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"flows", "tasks", "avatar_core"}
    assert not [name for name in names if "__pycache__" in name or name.endswith((".flac", ".wav", ".jpg"))]


def test_wheel_holds_the_data(names: list[str]) -> None:
    wanted = {"avatar_core/_data/weights/registry.yaml", "avatar_core/backends/preview/template.json"}
    assert wanted <= set(names)
    configurations = {f"avatar_core/_data/{path.relative_to(ROOT)}" for path in ROOT.glob("conf/**/*.yaml")}
    assert configurations
    assert configurations <= set(names)
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_every_module_of_the_checkout_is_in_the_wheel(names: list[str]) -> None:
    modules = {
        str(path.relative_to(ROOT))
        for top in ("flows", "tasks", "avatar_core")
        for path in ROOT.glob(f"{top}/**/*.py")
    }
    assert modules == {name for name in names if name.endswith(".py")}


def test_resources_come_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "from avatar_core.resources import checkout, resource; from avatar_core import weights;"
        "print(checkout(), resource('weights/registry.yaml').is_file(), 'mtcnn' in weights.load_registry())"
    )
    result = run([str(installed / "bin" / "python"), "-c", code], tmp_path)
    assert (result.stdout, result.stderr) == ("None True True\n", "")


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--version", f"avatar-dataset {version('avatar-dataset')}"),
        ("--help", "A table of pictures and recordings becomes a dataset of talking-avatar videos."),
    ],
)
def test_command_runs_beside_packages_of_the_same_name(
    installed: Path, hostile_folder: Path, option: str, line: str
) -> None:
    result = run([str(installed / "bin" / "avatar"), option], hostile_folder)
    assert result.returncode == 0, result.stderr
    assert line in [shown.strip() for shown in result.stdout.splitlines()]
