"""A Prefect server of the user's own: started in the background, found again, stopped.

Nothing here imports Prefect, so that asking for the server costs a few milliseconds. What runs is kept as
`server.json` in the state folder, beside the server's log and its database (see `database.py`).
"""

import dataclasses
import errno
import fcntl
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from platformdirs import user_state_path

from avatar_core.errors import AvatarError, ConfigError
from flows.database import (
    KEEP_DAYS,
    DatabaseOptions,
    Kind,
    check_same_database,
    prepare_database,
    restore_database,
)
from flows.postgres import running_postgres, stop_postgres

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 4200

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0
_ANSWER_TIMEOUT_S = 10.0
"""A server that is busy is not away."""
_PROBE_TIMEOUT_S = 2.0
_LOG_LINES_SHOWN = 15

_SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # One by one, as is the default, states are stored several times slower than a busy run makes them.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
}
"""What a variable of the user's own may change."""

_CLIENT_SETTINGS = ("PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_PROFILE")


@dataclass(frozen=True)
class Server:
    """`started` tells its process from any other that has or will have the number `pid`. It listens on
    `host`, this machine reaches it at `address`; `keep_days` is None where Prefect's settings say how long
    runs are kept."""

    pid: int
    started: str
    address: str
    host: str = DEFAULT_HOST
    database: Kind = "sqlite"
    keep_days: int | None = KEEP_DAYS

    @property
    def api_url(self) -> str:
        return f"{self.address}/api"

    @property
    def alive(self) -> bool:
        return process_start(self.pid) == self.started


def state_folder() -> Path:
    folder = os.environ.get("AVATAR_STATE_DIR")
    return Path(folder).expanduser().resolve() if folder else user_state_path("avatar-dataset")


def log_path() -> Path:
    return state_folder() / "server.log"


def former_log_path() -> Path:
    """Of the server before this one, which may have died of what it says there."""
    return state_folder() / "server.log.1"


def running_server() -> Server | None:
    """The server that `start_server` left running, whether or not it answers yet."""
    server = _recorded()
    return server if server and server.alive else None


def _recorded() -> Server | None:
    """Also one that has died; one that was stopped is not recorded any more."""
    try:
        return Server(**json.loads(_record_path().read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def server_environment() -> dict[str, str]:
    """Prefect's settings for our server if it answers and the user named no other. Set them before Prefect is
    imported."""
    server, chosen = running_server(), os.environ.get("PREFECT_API_URL")
    if not server or chosen not in (None, "", server.api_url) or not answers(server.api_url):
        return {}
    # Prefect's links would lead to its older pages, the address alone leads to the newer ones.
    pages = os.environ.get("PREFECT_UI_URL") or f"{server.address}/v2"
    return {"PREFECT_API_URL": server.api_url, "PREFECT_UI_URL": pages}


def names_server() -> bool:
    """Whether there is a Prefect server: that of PREFECT_API_URL, of `avatar up`, or of the user's profile,
    which is read without importing Prefect. True also where that cannot be read: Prefect will say why."""
    return bool(os.environ.get("PREFECT_API_URL") or server_environment() or _profile_names_server())


def _profile_names_server() -> bool:
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    path = Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml").expanduser()
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        profile = values["profiles"].get(os.environ.get("PREFECT_PROFILE") or values.get("active"), {})
        return bool(profile.get("PREFECT_API_URL"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return True


def answers(api_url: str, timeout_s: float = _ANSWER_TIMEOUT_S) -> bool:
    """Whether a Prefect server is there. A proxy in the environment is not asked."""
    try:
        url = urlsplit(api_url)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(url.hostname or "", url.port, timeout=timeout_s)
        connection.request("GET", f"{url.path.rstrip('/')}/health")
        response = connection.getresponse()
        return response.status == 200 and response.read(16).strip() == b"true"
    except (OSError, ValueError, http.client.HTTPException):  # ValueError: that is no URL
        return False


def start_server(
    host: str | None = None,
    port: int | None = None,
    options: DatabaseOptions | None = None,
    *,
    timeout_s: float = START_TIMEOUT_S,
) -> tuple[Server, bool]:
    """The server, and whether it was started just now; it answers on return and outlives this process.

    Raises `ConfigError` where the address or the database cannot be had, `AvatarError` with the end of its
    log where the server does not come up.
    """
    options = options or DatabaseOptions()
    with _changing():
        server = running_server()
        if server:
            _check_same_place(server, host, port)
            check_same_database(options, server.database, server.keep_days, server.pid)
            restore_database(server.database, state_folder())
            _wait_until_it_answers(server, timeout_s)
            return server, False
        try:
            server = _launch(host or DEFAULT_HOST, port or DEFAULT_PORT, options)
            _wait_until_it_answers(server, timeout_s)
        except BaseException:
            _stop(server, STOP_TIMEOUT_S)
            raise
        return server, True


def revive_server() -> str | None:
    """Starts again what has died of the server that is recorded, and nobody stopped: says what that was, None
    where all is well or somebody is at it. It may not answer yet. Raises `AvatarError` where it cannot."""
    try:
        with _changing(wait=False):
            server = _recorded()
            if server is None:
                return None
            if server.alive:
                if server.database != "postgres" or running_postgres(state_folder()):
                    return None
                restore_database(server.database, state_folder())
                return "PostgreSQL"
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(server.pid, signal.SIGKILL)  # what is left of it has the port
            options = DatabaseOptions(postgres=server.database == "postgres", keep_days=server.keep_days)
            _launch(server.host, urlsplit(server.address).port or DEFAULT_PORT, options)
            return "the Prefect server"
    except BlockingIOError:
        return None


def stop_server(*, timeout_s: float = STOP_TIMEOUT_S) -> Server | None:
    """The server that was stopped, None where none ran."""
    with _changing():
        server = running_server()
        _stop(server, timeout_s)
        return server


def _stop(server: Server | None, timeout_s: float) -> None:
    """Its database too, also where only that was left."""
    if server:
        _end(server, timeout_s)
    stop_postgres(state_folder())
    _record_path().unlink(missing_ok=True)


def _launch(host: str, port: int, options: DatabaseOptions) -> Server:
    address = _free_address(host, port)
    program = [sys.executable, "-P", "-m", "flows.prefect_server"]
    command = [*program, "server", "start", "--host", host, "--port", str(port)]
    folder = state_folder()
    database = prepare_database(options, folder, os.environ)
    with suppress(FileNotFoundError):
        log_path().replace(former_log_path())
    with log_path().open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,  # away from settings files and packages in the user's folder
            env=_server_settings(folder, database.environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    started = process_start(process.pid) or ""
    server = Server(process.pid, started, address, host, database.kind, database.keep_days)
    try:
        fresh = folder / "server.json.new"
        fresh.write_text(json.dumps(dataclasses.asdict(server)), encoding="utf-8")
        fresh.replace(_record_path())
    except OSError:
        _end(server, STOP_TIMEOUT_S)  # nobody would find it again
        raise
    return server


def _server_settings(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in environment.items() if name not in _CLIENT_SETTINGS}
    # A relative address holds for every host name, port and tunnel under which a browser comes.
    ours = {"PREFECT_HOME": str(folder / "prefect"), "PREFECT_SERVER_UI_API_URL": "/api"}
    return {**_SETTINGS, **kept, **ours}


def _wait_until_it_answers(server: Server, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not answers(server.api_url, _PROBE_TIMEOUT_S):
        if not server.alive:
            raise AvatarError(f"the Prefect server ended before it answered; {_end_of_log()}")
        if time.monotonic() > deadline:
            raise AvatarError(
                f"the Prefect server at {server.address} did not answer for {timeout_s:g} s; stop it with "
                f"`avatar down`; {_end_of_log()}"
            )
        time.sleep(0.1)


def _end_of_log() -> str:
    text = log_path().read_text(encoding="utf-8", errors="replace")
    return "\n".join([f"the end of {log_path()}:", *messages(text)[-_LOG_LINES_SHOWN:]])


def messages(log: str) -> list[str]:
    """Its lines without the places in the code that a traceback lists."""
    lines = [line for line in log.splitlines() if line.strip()]
    return [
        line for line in lines if not line.startswith((" ", "Traceback (most recent", "During handling of"))
    ]


def _end(server: Server, timeout_s: float) -> None:
    """Ends the whole process group, which has the number of the server as long as that lives."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not server.alive:
            return
        with suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        deadline = time.monotonic() + timeout_s
        while server.alive and time.monotonic() < deadline:
            time.sleep(0.05)
    if server.alive:
        raise AvatarError(f"the Prefect server, process {server.pid}, was killed and does not end")


def _free_address(host: str, port: int) -> str:
    """The address by which this machine reaches a server on `host` and `port`."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except (OSError, OverflowError) as error:
        raise ConfigError(_why_not(host, port, error)) from None
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _why_not(host: str, port: int, error: Exception) -> str:
    if not isinstance(error, OSError) or error.errno != errno.EADDRINUSE:
        return (
            f"no server can listen on host {host}, port {port}: {error}; choose others with --host and --port"
        )
    url = f"http://{host}:{port}/api"
    if answers(url):
        return (
            f"port {port} on {host} has a Prefect server that `avatar up` did not start; set "
            f"PREFECT_API_URL={url} to use it, or choose another port with --port"
        )
    return f"port {port} on {host} is taken by another program; choose another port with --port"


def _check_same_place(server: Server, host: str | None, port: int | None) -> None:
    url = urlsplit(server.address)
    other_host = host not in (None, url.hostname, "0.0.0.0", "::")
    if other_host or port not in (None, url.port):
        raise ConfigError(f"a server runs already, at {server.address}; stop it first with `avatar down`")


def _record_path() -> Path:
    return state_folder() / "server.json"


@contextmanager
def _changing(*, wait: bool = True) -> Iterator[None]:
    """One process at a time starts or stops the server. Raises `BlockingIOError` where another does, unless
    that is to be waited for."""
    try:
        state_folder().mkdir(parents=True, exist_ok=True)
        lock = (state_folder() / "lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"the server's folder {state_folder()} cannot be written ({error}); "
            "choose one with AVATAR_STATE_DIR"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def process_start(pid: int) -> str | None:
    """Boot and clock tick at which a process started; None if it has ended."""
    try:
        # The name in brackets may hold spaces; state and start time are fields 3 and 22.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, start = fields.split()[0], fields.split()[19]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return None if state in "ZX" else f"{boot} {start}"
