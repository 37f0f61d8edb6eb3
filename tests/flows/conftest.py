"""A Prefect server that lives as long as the tests that share it."""

import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.server import start_server, stop_server
from flows.supervisor import stop_supervisor


@dataclass(frozen=True)
class PrefectServer:
    """`environment` is what a process needs to use it; `folder` holds its state and log."""

    address: str
    folder: Path
    environment: dict[str, str] = field(repr=False)

    def get(self, path: str) -> Any:
        return self._answer(httpx.get(f"{self.address}/api/{path}", timeout=90))

    def post(self, path: str, body: Any) -> Any:
        """A busy database answers 503, at which Prefect's own client tries again too."""
        for _ in range(20):
            response = httpx.post(f"{self.address}/api/{path}", json=body, timeout=90)
            if response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(0.5)
        return self._answer(response)

    def _answer(self, response: httpx.Response) -> Any:
        response.raise_for_status()
        return response.json() if response.content else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serverless(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Where no Prefect server is known; `folder` has the state."""
    rest = {name: value for name, value in environment.items() if name != "PREFECT_API_URL"}
    return rest | {"AVATAR_STATE_DIR": str(folder / "state"), "PREFECT_HOME": str(folder / "prefect")}


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """One per test process."""
    folder = tmp_path_factory.mktemp("prefect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AVATAR_STATE_DIR", str(folder / "state"))
        patch.setenv("PREFECT_HOME", str(folder / "home"))
        server, _ = start_server(port=free_port())
        try:
            clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
            ours = {"PREFECT_HOME": str(folder / "home"), "PREFECT_API_URL": server.api_url}
            yield PrefectServer(server.address, folder / "state", {**clean, **ours})
        finally:
            patch.setenv("AVATAR_STATE_DIR", str(folder / "state"))
            stop_supervisor(print, at_once=True)
            stop_server()
