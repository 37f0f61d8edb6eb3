"""What the surroundings of a process may hold that nobody could use: widths, folders, encodings.

Called before anything else, so that no library takes them over.
"""

import os
import sys
from pathlib import Path

from rich.console import Console

from flows.proxies import LOOPBACK, reach_directly

COLUMNS = range(40, 1000)
"""Widths of a terminal in which a table can be read."""


def create_console(*, stderr: bool = False) -> Console:
    """As wide as COLUMNS says, if that is a width in which anything can be shown."""
    _leave_out_odd_width()  # Rich would show nothing in a width of 0
    return Console(stderr=stderr)


def settle_environment() -> None:
    """Leaves out of this process's environment, and its children's, what counts for nothing."""
    _use_utf8()
    _leave_out_odd_width()
    _leave_out_relative_folders()
    reach_directly(*LOOPBACK)


def working_directory_is_gone() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def _use_utf8() -> None:
    """Starts anew where file names can be ASCII only: Python takes its encoding from the locale just once."""
    if sys.getfilesystemencoding() == "ascii" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _leave_out_odd_width() -> None:
    try:
        usable = int(os.environ.get("COLUMNS", "80")) in COLUMNS
    except ValueError:
        usable = False
    if not usable:
        del os.environ["COLUMNS"]


def _leave_out_relative_folders() -> None:
    """The XDG specification has them ignored: each working directory would have a cache of its own."""
    for name in list(os.environ):
        is_folder = name == "HOME" or (name.startswith("XDG_") and name.endswith("_HOME"))
        if is_folder and not Path(os.environ[name]).is_absolute():
            del os.environ[name]
    try:
        Path.home()
    except RuntimeError:  # a user that the system does not know, in a container: `~` would become a folder
        os.environ["HOME"] = "/"
