"""Broken optional packages beside the model libraries."""

import importlib
import importlib.util
import logging
import sys
from functools import cache

log = logging.getLogger(__name__)

PROBED = ("torchvision", "torchaudio", "torchao", "xformers", "bitsandbytes", "peft", "flash_attn")
"""None of them is needed. transformers and diffusers import whichever is installed, and one that is installed
but cannot be imported (a build for another torch, say) takes nearly all of their classes with it."""


@cache
def hide_broken_packages() -> tuple[str, ...]:
    """Names of the optional packages that do not import, now invisible to the model libraries.

    Call before the first import of transformers or diffusers: both look for a package by `find_spec`, which
    answers "absent" for a module that is None in `sys.modules`.
    """
    broken = [name for name in PROBED if importlib.util.find_spec(name) and not _imports(name)]
    for name in broken:
        for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[module]
        sys.modules[name] = None  # type: ignore[assignment]
    return tuple(broken)


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception as error:
        log.warning("%s is installed but broken, and left out: %s", name, " ".join(str(error).split()))
        return False
    return True
