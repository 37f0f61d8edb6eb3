"""The GPUs of this machine, found without loading a library for them."""

import os
from collections.abc import Sequence
from pathlib import Path

from avatar_core.config import RuntimeConfig


def usable_gpus(runtime: RuntimeConfig) -> tuple[int, ...]:
    """Those that the configuration names, or all that are visible."""
    return tuple(visible_gpus()) if runtime.gpus == "auto" else runtime.gpus


def visible_gpus() -> Sequence[int]:
    """Positions of the GPUs that this process may use."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return range(len([name for name in allowed.split(",") if name.strip() not in ("", "-1")]))
    return range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))
