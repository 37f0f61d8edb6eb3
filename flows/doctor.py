"""What `avatar doctor` reports: why a machine cannot render. No model library is imported by this process."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from avatar_core import weights

CORE = (
    *("av", "hydra-core", "numpy", "opencv-python-headless", "pandas", "pillow", "pyarrow", "pydantic"),
    *("safetensors", "typer"),
)
OPTIONAL = (
    *("torch", "diffusers", "transformers", "accelerate", "librosa", "numba", "mtcnn", "onnxruntime"),
    *("prefect", "fastapi", "gradio", "s3fs", "kokoro", "misaki", "en_core_web_sm"),
)

# Packages that model libraries import when they find them: one that is installed but cannot be imported
# breaks libraries that work without it.
FRAGILE = ("torchvision", "flash_attn", "torchaudio", "xformers", "bitsandbytes", "torchao", "peft")
IMPORTED = (*FRAGILE, "librosa", "numba")

# Each of them installs the same `cv2` folder.
OTHER_OPENCV = ("opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless")

ENCODERS = ("libx264", "aac")
DECODERS = ("mp3", "aac", "flac", "vorbis", "opus", "pcm_s16le")
FREE_GB = 5.0


class Check(NamedTuple):
    section: str
    item: str
    value: str
    ok: bool


def report(store: str = "avatar-store", cache: Path | None = None) -> list[Check]:
    """`store` may be a URL; only the space of local folders is measured."""
    cache = cache or weights.folder()
    return [
        *_versions(),
        *_gpus(),
        *_codecs(),
        *_disk(store, cache),
        *_weights(),
        *_imports(),
        *_opencv(),
    ]


def _versions() -> Iterator[Check]:
    yield Check("versions", "python", platform.python_version(), sys.version_info >= (3, 11))
    yield Check("versions", "avatar-dataset", _version("avatar-dataset") or "not installed", True)
    for name in CORE:
        version = _version(name)
        yield Check("versions", name, version or "not installed", version is not None)
    for name in OPTIONAL:
        if version := _version(name):
            yield Check("versions", name, version, True)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> Iterator[Check]:
    """By the driver's own program: importing torch would take seconds and may fail itself."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        yield Check("gpu", "nvidia", "none found (no nvidia-smi)", True)
        return
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Check("gpu", "nvidia", f"nvidia-smi does not answer: {error}", False)
        return
    if result.returncode:
        reason = (result.stderr or result.stdout).strip()
        yield Check("gpu", "nvidia", f"nvidia-smi fails: {reason}", False)
        return
    for index, line in enumerate(result.stdout.splitlines()):
        name, memory, driver = (part.strip() for part in line.split(","))
        yield Check("gpu", f"cuda:{index}", f"{name}, {memory}, driver {driver}", True)


def _codecs() -> Iterator[Check]:
    try:
        from av.codec.codec import Codec, UnknownCodecError
    except ImportError as error:
        yield Check("codecs", "av", f"cannot be imported: {error}", False)
        return
    wanted: list[tuple[str, Literal["r", "w"]]] = [(name, "w") for name in ENCODERS]
    wanted += [(name, "r") for name in DECODERS]
    for name, mode in wanted:
        item = f"{name} {'encoder' if mode == 'w' else 'decoder'}"
        try:
            Codec(name, mode)
        except UnknownCodecError:
            yield Check("codecs", item, "absent from this build of PyAV", False)
        else:
            yield Check("codecs", item, "there", True)


def _disk(store: str, cache: Path) -> Iterator[Check]:
    if "://" in store:
        yield Check("disk", "store", f"{store} (space not measured)", True)
    else:
        yield _space("store", Path(store).expanduser())
    yield _space("weights and cache", cache)


def _space(item: str, path: Path) -> Check:
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    free_gb = shutil.disk_usage(existing).free / 1e9
    writable = os.access(existing, os.W_OK)
    value = f"{path}: {free_gb:.1f} GB free" + ("" if writable else ", not writable")
    return Check("disk", item, value, writable and free_gb >= FREE_GB)


def _weights() -> Iterator[Check]:
    for name, entry in weights.load_registry().items():
        if not weights.present(name):
            # Files that are fetched serve options, which say so themselves when they are used.
            yield Check("weights", name, f"absent; run: {weights.remedy(name)}", entry.kind != "package")
        elif problems := weights.verify(name, trust_record=entry.kind == "huggingface"):
            yield Check("weights", name, f"altered: {'; '.join(problems)}", False)
        else:
            yield Check("weights", name, "present", True)


def _imports() -> Iterator[Check]:
    installed = [name for name in IMPORTED if importlib.util.find_spec(name)]
    errors = _try_imports(installed)
    for name in IMPORTED:
        if name not in installed:
            yield Check("optional packages", name, "not installed", True)
        elif errors[name]:
            yield Check("optional packages", name, f"installed but broken: {errors[name]}", False)
        else:
            yield Check("optional packages", name, "can be imported", True)


_TRY_IMPORTS = """
import contextlib, importlib, io, json, sys
for name in sys.argv[1:]:
    error = ""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(name)
    except BaseException as problem:
        error = f"{type(problem).__name__}: {problem}"
    print(json.dumps([name, error]), flush=True)
"""


def _try_imports(names: Sequence[str]) -> dict[str, str]:
    """Name -> error, empty where the import worked. A package that kills the process costs only itself."""
    errors: dict[str, str] = {}
    while left := [name for name in names if name not in errors]:
        errors |= _try_imports_once(left)
        if culprit := next((name for name in left if name not in errors), None):
            errors[culprit] = "importing it ended the process or took too long"
    return errors


def _try_imports_once(names: Sequence[str], timeout_s: float = 90) -> dict[str, str]:
    with tempfile.TemporaryFile("w+") as output:
        with contextlib.suppress(subprocess.TimeoutExpired):
            command = [sys.executable, "-c", _TRY_IMPORTS, *names]
            subprocess.run(command, stdout=output, stderr=subprocess.DEVNULL, timeout=timeout_s, check=False)
        output.seek(0)
        return dict(json.loads(line) for line in output if line.startswith('["'))


def _opencv() -> Iterator[Check]:
    others = [f"{name} {version}" for name in OTHER_OPENCV if (version := _version(name))]
    if others:
        value = f"{', '.join(others)} overwrites opencv-python-headless; uninstall both, install the headless"
        yield Check("conflicts", "opencv", value, False)
    else:
        yield Check("conflicts", "opencv", "only the headless package", True)
