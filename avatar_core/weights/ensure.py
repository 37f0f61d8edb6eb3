"""All that a backend needs of a checkpoint: present, written if it is a random one, or named as absent."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from avatar_core import weights
from avatar_core.errors import WeightsError

WriteRandom = Callable[[Path], None]
"""Fills a folder with random weights in the official layout, or adds what is missing there."""


def ensure(checkpoint: str, names: Sequence[str], write_random: WriteRandom | None) -> None:
    """`names` of weights, most of them parts of `checkpoint`. Raises `WeightsError`, for several absent parts
    of it one error that names all."""
    if write_random and not all(map(weights.present, names)):
        write_once(weights.folder() / checkpoint, write_random)
    absent = [name for name in names if name.startswith(f"{checkpoint}/") and not weights.present(name)]
    if len(absent) > 1:
        parts = ", ".join(name.partition("/")[2] for name in absent)
        raise WeightsError(
            f"weights {checkpoint!r}: {parts} not found in {weights.folder() / checkpoint}; "
            f"run: {weights.remedy(checkpoint)}"
        )
    for name in names:
        weights.locate(name)


def write_once(folder: Path, write_random: WriteRandom) -> None:
    """Where there is none yet, whole or not at all: a run may be killed, or another be at the same."""
    if folder.exists():
        write_random(folder)
        return
    with suppress(OSError):  # if it is then absent, its finder says so
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=".tiny-") as scratch:
            write_random(Path(scratch) / folder.name)
            (Path(scratch) / folder.name).rename(folder)
