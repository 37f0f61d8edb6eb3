"""Where `avatar render -o` copies the videos: what may be there is looked at before any work."""

import io
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from avatar_core.config import Config
from avatar_core.errors import AvatarError, ConfigError
from avatar_core.media.source import local_path, scheme_of
from avatar_core.media.table import PATHS
from avatar_core.planning.batch import Batch, open_storage
from avatar_core.result import Result
from avatar_core.store.disk import clone_or_copy, publishing
from flows.streams import EXIT_READER_LEFT, output_for_bytes, output_is_closed

SUFFIX = ".mp4"

_STORE_FOLDERS = ("assets", "catalog", "datasets", "runs", "stages")
_BLOCK_BYTES = 1 << 20


@contextmanager
def opened_destination(given: str | None, config: Config) -> Iterator["Destination | None"]:
    """What `-o` names, if it was given; while that is standard output, text goes to standard error.

    Raises `ConfigError` where nothing can be written.
    """
    if given is None:
        yield None
    elif _is_standard_output(given):
        if given == "-" and output_is_closed():
            raise ConfigError("-o -: standard output is closed; give a file or a folder")
        if os.isatty(1):
            raise ConfigError(
                f"-o {given}: standard output is a terminal; send it elsewhere (`| ffplay -`), or give a "
                "file or a folder"
            )
        with output_for_bytes() as stream:
            yield Destination(given, config, stream)
    else:
        yield Destination(given, config)


class Destination:
    """A file, a folder, a pipe or device, or `stream`. Paths are shown as the user gave them."""

    def __init__(self, given: str, config: Config, stream: io.FileIO | None = None) -> None:
        """Raises `ConfigError` where nothing can be written."""
        self._storage = open_storage(config)
        self._inputs = list(_local_inputs(config))
        self._stream = stream
        self._path = _expanded(given)
        self._is_folder = given.endswith("/") or _is_folder(self._path)
        self._paths: dict[str, Path] = {}
        if self._is_folder:
            _check(self._path, _folder_problem(self._path))
        elif not stream:
            _check(self._path, self._file_problem(self._path))

    def place(self, batch: Batch) -> None:
        """Gives each clip its path, before any work. Raises `ConfigError`, also where several would have to
        go into one pipe, device or stream."""
        clips = batch.clips
        if len(clips) > 1 and (self._stream or _is_device(self._path)):
            raise ConfigError(
                f"-o {self._path}: only one video goes there, and this render makes {len(clips)} (takes, or "
                "parts of a long recording); give a file or a folder"
            )
        for index in range(len(clips)):
            name = clips.name(index)
            number = name.removeprefix(str(clips.names[clips.position[index]]))
            self._paths[name] = (
                self._path / f"{name}{SUFFIX}"
                if self._is_folder
                else self._path.with_stem(self._path.stem + number)
            )
        for path in self._paths.values() if not self._stream else ():
            _check(path, self._file_problem(path))

    def copy_videos(self, result: Result) -> Iterator[str]:
        """Of the clips that are finished; gives where each of them was written."""
        folder = result.dataset.removeprefix(f"{self._storage.uri}/")
        for clip in result.clips.select(["name", "status", "file_name", "sha256"]).to_pylist():
            if clip["status"] == "ok":
                video = self._storage.local_path(f"{folder}/{clip['file_name']}", clip["sha256"])
                yield self._copy(video, self._paths[clip["name"]])

    def _copy(self, video: Path, path: Path) -> str:
        place = "standard output" if self._stream else str(path)
        try:
            if self._stream:
                _pour(video, self._stream)
            elif _is_device(path):
                with path.open("wb", buffering=0) as device:
                    _pour(video, device)
            else:
                _replace(video, path.resolve())
        except OSError as error:
            if self._stream and isinstance(error, BrokenPipeError):
                raise SystemExit(EXIT_READER_LEFT) from None
            raise AvatarError(
                f"the video cannot be written to {place}: {error.strerror}; it is rendered, and the same "
                "command with another -o only copies it"
            ) from error
        return place

    def _file_problem(self, path: Path) -> str | None:
        try:
            status = path.stat()
        except FileNotFoundError:
            return self._name_problem(path) or _folder_problem(path.resolve().parent)
        except OSError as error:
            return f"{error.strerror}; give another path"
        for name, known in self._inputs:
            if os.path.samestat(status, known):
                return f"is the input {name}, which would be lost; give another path"
        if stat.S_ISREG(status.st_mode):
            problem = self._name_problem(path) or _folder_problem(path.resolve().parent)
        else:
            problem = _device_problem(path, status.st_mode)
        # For root the system would not look at the bits, which were taken away for a reason.
        if not problem and not (status.st_mode & 0o222 and os.access(path, os.W_OK)):
            return "is not to be written, by its permissions; change them or give another path"
        return problem

    def _name_problem(self, path: Path) -> str | None:
        if path.suffix.lower() not in ("", SUFFIX):
            return f"the video is an MP4; give a name that ends in {SUFFIX}"
        root = Path(self._storage.uri) if self._storage.is_local else None
        if root and any(path.resolve().is_relative_to(root / folder) for folder in _STORE_FOLDERS):
            return f"lies in the store, {root}, whose files are not to be changed; give another path"
        return None


def _is_standard_output(given: str) -> bool:
    """`-`, or what it is sent to: /dev/stdout, or the file after `>`."""
    if given == "-":
        return True
    try:
        return not output_is_closed() and os.path.samestat(Path(given).stat(), os.fstat(1))
    except (OSError, ValueError):
        return False


def _expanded(given: str) -> Path:
    if not given or "\0" in given:
        raise ConfigError(f"-o {given!r}: is no path; give a file or a folder")
    if "://" in given and scheme_of(given) != "file":
        raise ConfigError(
            f"-o {given}: a copy goes to this machine only; give a path, or have the dataset itself "
            "elsewhere by storage.root"
        )
    try:
        return Path(local_path(given)).expanduser()
    except RuntimeError:
        raise ConfigError(f"-o {given}: there is no such user; give another path") from None


def _is_folder(path: Path) -> bool:
    with suppress(OSError):  # said by what follows
        return path.is_dir()
    return False


def _local_inputs(config: Config) -> Iterator[tuple[str, os.stat_result]]:
    for place in (config.table, *(row.get(name) for row in config.rows for name in PATHS)):
        if isinstance(place, str) and scheme_of(place) in (None, "file"):
            with suppress(OSError, ValueError):  # the render says what is wrong with it
                yield place, Path(local_path(place)).stat()


def _check(path: Path, problem: str | None) -> None:
    if problem:
        raise ConfigError(f"-o {path}: {problem}")


def _folder_problem(folder: Path) -> str | None:
    """Those that are not there will be made."""
    try:
        existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        if not existing.is_dir():
            return f"{existing} is no folder; give another path"
        with tempfile.TemporaryFile(dir=existing):  # permissions alone tell too little, to root above all
            return None
    except OSError as error:
        return f"no file can be made there ({error.strerror}); give another path"


def _device_problem(path: Path, mode: int) -> str | None:
    """Pipes and devices that take bytes in order are fine."""
    if stat.S_ISDIR(mode):
        return "is a folder; give another path"
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        return f"is a {'disk' if stat.S_ISBLK(mode) else 'socket'}; give a file or a folder"
    if stat.S_ISCHR(mode) and _is_terminal(path):
        return "is a terminal; give a file or a folder"
    return None


def _is_terminal(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return False  # its permissions, or writing to it, will tell
    try:
        return os.isatty(descriptor)
    finally:
        os.close(descriptor)


def _is_device(path: Path) -> bool:
    return path.exists() and not path.is_file()


def _pour(video: Path, target: io.FileIO) -> None:
    with video.open("rb") as source:
        while block := source.read(_BLOCK_BYTES):
            left = memoryview(block)
            while left:
                left = left[target.write(left) :]


def _replace(video: Path, path: Path) -> None:
    """Whole or not at all. The permissions and the owner of what was there stay."""
    before = path.stat() if path.exists() else None
    with publishing(path) as partial:
        clone_or_copy(video, partial)
        if before:
            with suppress(OSError):
                os.chown(partial, before.st_uid, before.st_gid)
            partial.chmod(stat.S_IMODE(before.st_mode))
