"""A command that a test watches: which items it has begun, and how to hold it at one of them.

A test that ends a command "amid the second clip" must not race against it: the command and all its
processes stop at that moment by themselves (`tests/watched/sitecustomize.py`) and wait for the test.
"""

import os
import secrets
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.processes import until

PROGRAM = Path(__file__).with_name("watched")

Call = tuple[str, str]
"""Stage and key."""


@dataclass(frozen=True)
class Watch:
    """Files in `folder`; the watched command needs `environment`."""

    folder: Path

    def environment(self, base: Mapping[str, str] = os.environ) -> dict[str, str]:
        self.folder.mkdir(exist_ok=True)
        path = os.pathsep.join(filter(None, [str(PROGRAM), base.get("PYTHONPATH")]))
        return {**base, "PYTHONPATH": path, "AVATAR_WATCH": str(self.folder)}

    def calls(self) -> list[Call]:
        """Every item so far, in the order in which they were begun; a line that is being written is none."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [(line.split()[0], line.split()[1]) for line in lines if line.endswith("\n")]

    def hold_at(self, stage: str, item: int = 1, step: int = 0) -> None:
        """At the beginning of the stage's item of this number, counted from 1 over all commands that were
        watched; or later in it, when it reports `step`."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / "wanted").write_text(f"{stage} {item} {step} {secrets.token_hex(4)}")
        (self.folder / "wanted").rename(self.folder / "hold")  # whoever reads it reads all of it

    def until_held(self, *processes: "subprocess.Popen[Any]") -> None:
        hold_id = (self.folder / "hold").read_text().split()[-1]
        until((self.folder / f"held-{hold_id}").exists, processes)

    def release(self) -> None:
        """Those that wait go on, and so does one that is just about to wait."""
        (self.folder / "hold").unlink(missing_ok=True)
