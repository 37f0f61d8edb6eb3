"""What is remembered beside model files: hashes taken earlier, and where the files come from."""

import contextlib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from avatar_core.errors import WeightsError

RECORD = "sha256.json"
ORIGIN = "origin.json"

Hashes = Mapping[str, str]
"""SHA-256 by a file's path inside its folder."""


@dataclass(frozen=True)
class Origin:
    """Where the files of a folder come from, with the hashes that they had then: a revision of a repository,
    or a conversion of the files `source` to `dtype` (empty: as they were)."""

    files: Hashes
    repository: str = ""
    revision: str = ""
    source: Hashes = field(default_factory=dict)
    dtype: str = ""


@dataclass(frozen=True)
class _Recorded:
    """A hash, true while the file keeps this size and time."""

    size: int
    mtime_ns: int
    sha256: str


_RECORDS = TypeAdapter(dict[str, _Recorded])
_ORIGINS = TypeAdapter(Origin)


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_record(home: Path) -> dict[str, str]:
    """Hashes of the files that have not changed since they were taken."""
    try:
        record = _RECORDS.validate_json((home / RECORD).read_bytes())
    except (OSError, ValidationError):
        return {}
    return {name: known.sha256 for name, known in record.items() if _unchanged(home / name, known)}


def write_record(home: Path, hashes: Hashes) -> None:
    """Added to what is known of other files. A folder that cannot be written to only costs hashing again."""
    record = {}
    for name, sha256 in {**read_record(home), **hashes}.items():
        status = (home / name).stat()
        record[name] = _Recorded(status.st_size, status.st_mtime_ns, sha256)
    with contextlib.suppress(OSError):
        _replace(home / RECORD, _RECORDS, record)


def read_origin(home: Path) -> Origin | None:
    """None where nobody noted it: the files were placed by hand."""
    try:
        return _ORIGINS.validate_json((home / ORIGIN).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        reason = str(error).partition("\n")[0]
        raise WeightsError(f"{home / ORIGIN} cannot be read ({reason}); fetch or convert again") from error


def write_origin(home: Path, origin: Origin) -> None:
    _replace(home / ORIGIN, _ORIGINS, origin)


def _unchanged(path: Path, known: _Recorded) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return (known.size, known.mtime_ns) == (status.st_size, status.st_mtime_ns)


def _replace(path: Path, adapter: TypeAdapter[Any], value: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(adapter.dump_json(value, indent=1))
    temporary.replace(path)
