"""What this project's things are called on a Prefect server."""

import os
import re
import socket

from avatar_core.errors import ConfigError

POOL = "avatar"
"""The work pool that all queues belong to."""
HOST = "AVATAR_HOST"
"""Environment variable: what this machine is called on the server, in place of its host name."""

_HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_GPU_QUEUE = re.compile(r"(?P<host>.+)-gpu-(?P<number>\d+)")
_RENDER_QUEUE = re.compile(r"(?P<host>.+)-render")
_OF_SHARD = " · "


def host_name() -> str:
    """Raises `ConfigError`."""
    name = os.environ.get(HOST) or socket.gethostname()
    if not _HOST_NAME.fullmatch(name):
        raise ConfigError(
            f"a machine cannot be called `{name}` on the server: give up to 63 letters, digits, dots, dashes "
            f"and underscores with --name or {HOST}"
        )
    return name


def render_queue(host: str) -> str:
    """Where renders wait that run on this machine."""
    return f"{host}-render"


def gpu_queue(host: str, number: int) -> str:
    """Where shards wait for one GPU of this machine."""
    return f"{host}-gpu-{number}"


def host_of(queue: str) -> str | None:
    """The machine of a GPU's queue, None for any other queue."""
    match = _GPU_QUEUE.fullmatch(queue)
    return match["host"] if match else None


def machine_of(queue: str) -> str | None:
    """The machine of a GPU's queue or of a queue of renders, None for any other queue."""
    match = _GPU_QUEUE.fullmatch(queue) or _RENDER_QUEUE.fullmatch(queue)
    return match["host"] if match else None


def shard_name(stage: str, items: int, first: str) -> str:
    """What a shard is called on the queue of a GPU; `first` is what its first item belongs to."""
    return _OF_SHARD.join([stage, str(items), first if items == 1 else f"{first}, ..."])


def items_in(shard: str) -> int:
    """How many items a shard of this name has."""
    _, number, *_ = [*shard.split(_OF_SHARD), "", ""]
    return int(number) if number.isdecimal() else 0
