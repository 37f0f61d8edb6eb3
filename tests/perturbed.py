"""The same work in fresh processes that differ in what lies in memory nobody has written yet."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILLS = (0, 1, 85, 170, 255)
"""0 leaves memory as it comes; glibc fills it with each of the others. Elsewhere they mean nothing."""


def in_fresh_processes(module: str, *arguments: object, fills: Sequence[int] = FILLS) -> list[Any]:
    """What `python -m module` prints as JSON with each fill.

    Large blocks come from the heap too: those that the kernel maps are zeros, whatever the fill.
    """
    found = []
    for fill in fills:
        surroundings = {"MALLOC_PERTURB_": str(fill), "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)],
            env=os.environ | surroundings,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found
