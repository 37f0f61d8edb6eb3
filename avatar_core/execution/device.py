"""The device that a worker computes on, and the lock of a GPU: two renders never load their models onto one.

The lock is held from before the first model is loaded until all are let go, and the system takes it from a
process that ends, however it ends. Renders in containers that share no `/tmp` do not see each other.
"""

import fcntl
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from avatar_core.execution.shard import drop_models
from avatar_core.stages.base import ItemSpec, Stage

FOLDER = "AVATAR_LOCK_DIR"
"""Environment variable: where the locks are, in place of /tmp/avatar-devices. All who share a GPU need the
same."""


class Device:
    """Stages that want a GPU get it where there is one, or it is `pretended`, named by that; all others the
    CPU."""

    def __init__(self, *, gpu: bool, pretended: str | None = None) -> None:
        self._gpu, self._pretended = gpu, pretended
        self._lock: DeviceLock | None = None

    def of(self, stage: Stage) -> str:
        """As torch calls it."""
        return "cuda" if self._gpu and stage.device_kind == "gpu" else "cpu"

    def take_for(self, stage: Stage, items: Sequence[ItemSpec]) -> str | None:
        """Who else holds the GPU that these items need, None if nobody does."""
        on_gpu = (self._gpu or self._pretended is not None) and stage.device_kind == "gpu"
        if not on_gpu or not any(stage.weights(item.config) for item in items):
            return None
        if self._lock is None:
            self._lock = DeviceLock(_device_name(self._pretended))
        return self._lock.take()

    def let_go(self) -> None:
        """Of the models that are loaded, if they are on a GPU, and of the GPU."""
        if self._lock:
            drop_models()
            self._lock.release()


class DeviceLock:
    def __init__(self, device: str) -> None:
        """`device` is the name of a GPU that all processes know it by, such as its UUID."""
        self._path = _folder() / device.replace("/", "_")
        self._file: IO[str] | None = None

    def take(self) -> str | None:
        """Who holds it, None if it is ours now. Does not wait."""
        if self._file:
            return None
        file = self._open()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                return file.read() or "another process"
        file.truncate(0)
        file.write(f"another render (process {os.getpid()})")
        file.flush()
        self._file = file
        return None

    def _open(self) -> IO[str]:
        # Linux may forbid O_CREAT for a file of another user in a folder for all, though it is there.
        with suppress(FileNotFoundError):
            return self._path.open("r+")
        file = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT), "r+")
        with suppress(OSError):
            self._path.chmod(0o666)
        return file

    def release(self) -> None:
        if self._file:
            self._file.close()
            self._file = None


def _device_name(pretended: str | None) -> str:
    """Of the first GPU that this process sees, or one that is only `pretended`."""
    if pretended is not None:
        return f"pretended-{pretended}"
    import torch

    return str(torch.cuda.get_device_properties(0).uuid)


def _folder() -> Path:
    default = Path("/tmp") if os.access("/tmp", os.W_OK) else Path(tempfile.gettempdir())
    folder = Path(os.environ.get(FOLDER) or default / "avatar-devices")
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        folder.chmod(0o1777)  # for all users of the machine
    return folder
