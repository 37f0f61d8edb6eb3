"""Tells a test which items a command works on, and holds all its processes at an exact moment of that work.

Python imports this by itself when it starts with this folder on its path: so in the command and in every
process that it starts, whatever backend they use. `tests/watch.py` is the test's side.
"""

import os
import sys
import time
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path

FOLDER = Path(os.environ["AVATAR_WATCH"])
CALLS, HOLD = FOLDER / "calls", FOLDER / "hold"


def begin(stage, key):
    with CALLS.open("a") as calls:
        calls.write(f"{stage} {key}\n")
    hold(stage, 0)


def hold(stage, step):
    """Waits while the work is held, which it is from the first moment that is the wanted one or later."""
    try:
        wanted_stage, item, wanted_step, hold_id = HOLD.read_text().split()
    except FileNotFoundError:
        return
    held = FOLDER / f"held-{hold_id}"
    if stage == wanted_stage and step >= int(wanted_step):
        keys = {line.split()[1] for line in CALLS.read_text().splitlines() if line.startswith(f"{stage} ")}
        if len(keys) >= int(item):
            held.touch()
    while held.exists() and HOLD.exists():  # it may be released before we say that we are held
        time.sleep(0.005)


def watched(attempt):
    def call(stage, spec, item, ladder, scratch, report):
        def reported(done, total):
            hold(stage.name, done)
            report(done, total)

        begin(stage.name, spec.key)
        return attempt(stage, spec, item, ladder, scratch, reported)

    return call


class Watching(MetaPathFinder):
    """Wraps what `run_shard` calls for each item, as soon as it is imported."""

    def find_spec(self, name, path, target=None):
        if name != "avatar_core.execution.shard":
            return None
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module._attempt = watched(module._attempt)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Watching())
