"""A Prefect API for the length of one run, where the user has none.

Prefect would start one itself, but in the terminal's process group: Ctrl-C would end it before the run that
reports to it. It would also stay behind where its run is killed.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from typing import IO

from avatar_core.errors import AvatarError
from flows.server import answers, messages

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0
_ATTEMPTS = 3  # another program may take the port meanwhile

# On Linux the kernel ends it with its parent.
_BOOT = """
import ctypes, runpy, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
runpy.run_module("uvicorn", run_name="__main__")
"""
_ARGUMENTS = "--factory prefect.server.api.server:create_app --host 127.0.0.1 --log-level error --lifespan on"
_ENVIRONMENT = {
    "PREFECT_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
}


class TemporaryServer:
    """Starts on entering, in the background; `wait` gives its address. Ends on leaving."""

    def __init__(self) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process: subprocess.Popen[bytes]
        self._url = ""

    def __enter__(self) -> "TemporaryServer":
        self._launch()
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def wait(self) -> str:
        """The API's URL, once it answers. Raises `AvatarError`."""
        deadline, attempts = time.monotonic() + START_TIMEOUT_S, 1
        while not answers(self._url):
            if self._process.poll() is not None and attempts < _ATTEMPTS:
                attempts += 1
                self._launch()
            elif self._process.poll() is not None or time.monotonic() > deadline:
                raise AvatarError(f"Prefect's temporary server did not start: {self._end_of_log()}")
            time.sleep(0.1)
        return self._url

    def _launch(self) -> None:
        port = _free_port()
        self._url = f"http://127.0.0.1:{port}/api"
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, *_ARGUMENTS.split(), "--port", str(port)],
            env={**os.environ, **_ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            process_group=0,
        )

    def _end_of_log(self) -> str:
        self._log.seek(0)
        lines = messages(self._log.read().decode(errors="replace"))
        return lines[-1] if lines else "no reason given"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
