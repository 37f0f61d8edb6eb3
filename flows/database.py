"""Which database a Prefect server of `avatar up` stands on, and how long it keeps finished runs.

A database's address may hold a password. It goes into the environment of the server and nowhere else: not
into files, messages or a command line.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from avatar_core.errors import ConfigError
from flows.postgres import data_folder, running_postgres, start_postgres, stop_postgres

Kind = Literal["sqlite", "postgres", "own"]

KEEP_DAYS = 30

_ADDRESS = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
_OWN_DATABASE = (
    _ADDRESS,
    "PREFECT_API_DATABASE_CONNECTION_URL",
    "PREFECT_SERVER_DATABASE_DRIVER",
    "PREFECT_API_DATABASE_DRIVER",
)
_VACUUM = "PREFECT_SERVER_SERVICES_DB_VACUUM"
_OWN_RETENTION = (f"{_VACUUM}_ENABLED", f"{_VACUUM}_RETENTION_PERIOD")
_EVENT_RETENTION = ("PREFECT_SERVER_EVENTS_RETENTION_PERIOD", "PREFECT_EVENTS_RETENTION_PERIOD")

_DRIVERS = {
    "postgresql+asyncpg": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "postgres": "postgresql+asyncpg",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
    "sqlite": "sqlite+aiosqlite",
}
"""The driver that Prefect has, by what an address may begin with."""


@dataclass(frozen=True)
class DatabaseOptions:
    """What `avatar up` was asked for; raises `ConfigError` where that is contradictory or no address."""

    postgres: bool = False
    url: str | None = field(default=None, repr=False)
    keep_days: int | None = None

    def __post_init__(self) -> None:
        if self.postgres and self.url is not None:
            raise ConfigError(
                "--postgres starts a database, --database names one of your own; give one of them"
            )
        if self.url is not None:
            object.__setattr__(self, "url", _with_driver(self.url))

    @property
    def environment(self) -> dict[str, str]:
        """By which another process of ours starts a server on the same database."""
        return {_ADDRESS: self.url} if self.url else {}


@dataclass(frozen=True)
class Database:
    """`environment` is that of the server; `keep_days` is None where Prefect's settings say how long finished
    runs are kept."""

    kind: Kind
    keep_days: int | None
    environment: dict[str, str] = field(repr=False)


def prepare_database(options: DatabaseOptions, folder: Path, environment: Mapping[str, str]) -> Database:
    """What the server in `folder` is to stand on; a PostgreSQL of ours runs on return if that is it, and only
    then."""
    kind = _kind(options, environment)
    keep_days = _days_kept(options, kind, environment)
    settings = {**_retention_settings(keep_days, environment), **environment}
    if kind == "postgres":
        # PGPORT and its like are meant for another PostgreSQL, and would be taken for ours.
        settings = {name: value for name, value in settings.items() if not name.startswith("PG")}
        settings[_ADDRESS] = start_postgres(folder)
    else:
        stop_postgres(folder)  # a server that was killed may have left it
        if options.url:
            settings[_ADDRESS] = options.url
    return Database(kind, keep_days, settings)


def without_address(environment: Mapping[str, str]) -> dict[str, str]:
    """For processes that have nothing to do with the database."""
    return {name: value for name, value in environment.items() if name not in _OWN_DATABASE}


def restore_database(kind: Kind, folder: Path) -> None:
    """A PostgreSQL of ours may have been killed alone; the server that runs finds it again."""
    if kind == "postgres":
        start_postgres(folder)


def check_same_database(options: DatabaseOptions, kind: Kind, days: int | None, pid: int) -> None:
    """Raises `ConfigError` where the server that runs as `pid` has something else than is asked for."""
    if options.postgres and kind != "postgres":
        raise ConfigError(f"a server runs already, with database: {_SHOWN[kind]}; {_STOP_IT} --postgres")
    if options.url is not None and options.url != _address_of(pid):
        raise ConfigError(f"a server runs already, with another database; {_STOP_IT} --database")
    if options.keep_days not in (None, days):
        kept = f"{days} days" if days else "for ever" if days == 0 else "as Prefect's settings say"
        raise ConfigError(f"a server runs already and keeps runs {kept}; {_STOP_IT} --keep-days")


_STOP_IT = "stop it first with `avatar down`, then start it with"
_SHOWN: Mapping[Kind, str] = {"sqlite": "SQLite", "postgres": "Postgres", "own": "your own"}


def describe_database(kind: Kind, keep_days: int | None, folder: Path) -> str:
    place = ""
    if kind == "postgres":
        ended = running_postgres(folder) is None
        place = f" in {data_folder(folder)}{' (has ended; `avatar up` starts it again)' if ended else ''}"
    retention = f"; finished runs go after {keep_days} days (--keep-days)" if keep_days else ""
    return f"database: {_SHOWN[kind]}{place}{retention}"


def history_elsewhere(kind: Kind, folder: Path) -> str | None:
    """Says so where this state folder has runs in a database that is not the one in use."""
    if kind == "sqlite" and data_folder(folder).exists():
        return "runs recorded in Postgres before are not shown with SQLite; `avatar up --postgres` has them"
    return None


def _kind(options: DatabaseOptions, environment: Mapping[str, str]) -> Kind:
    option = "--postgres" if options.postgres else "--database" if options.url else None
    own = _names_set(_OWN_DATABASE, environment)
    if option and own:
        raise ConfigError(f"{option} and {own[0]} both say which database; give one of them")
    return "postgres" if options.postgres else "own" if options.url or own else "sqlite"


def _days_kept(options: DatabaseOptions, kind: Kind, environment: Mapping[str, str]) -> int | None:
    own = _names_set(_OWN_RETENTION, environment)
    if own and options.keep_days is not None:
        raise ConfigError(
            f"--keep-days {options.keep_days} and {own[0]} both say how long runs are kept; give one of them"
        )
    if own or options.keep_days is not None:
        return options.keep_days
    return None if kind == "own" else KEEP_DAYS  # others may have runs there too: they go only if asked for


def _retention_settings(days: int | None, environment: Mapping[str, str]) -> dict[str, str]:
    """What goes after `days`: finished runs with all that belongs to them, and events. 0 is for ever."""
    if days is None:
        return {}
    if days == 0:
        return {f"{_VACUUM}_ENABLED": "orphans"}  # an empty list would mean the default, which has events
    settings = {f"{_VACUUM}_ENABLED": "events,flow_runs", f"{_VACUUM}_RETENTION_PERIOD": str(days * 86400)}
    if not _names_set(_EVENT_RETENTION, environment):  # of its two names Prefect reads ours first
        settings[_EVENT_RETENTION[0]] = f"P{days}D"  # here it takes no seconds
    return settings


def _with_driver(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    driver = _DRIVERS.get(scheme)
    if driver is None or not separator:
        # What stands before :// is no secret, but all of it may be one.
        got = f"{scheme}://" if separator else "no address"
        raise ConfigError(
            f"--database: got {got}; it is postgresql://USER:PASSWORD@HOST/NAME or sqlite:////PATH/TO/FILE"
        )
    if driver.startswith("sqlite"):
        return f"{driver}:///{_sqlite_file(rest)}"
    try:
        parts = urlsplit(url)
        readable = parts.netloc.count("@") < 2 and parts.port != 0
    except ValueError:
        readable = False
    if not readable:
        raise ConfigError(
            "--database: its host or port cannot be read; characters such as @ / : # ? in a password are "
            "written as %40 %2F %3A %23 %3F"
        )
    # What psql and hosted databases call sslmode, the driver calls ssl.
    return f"{driver}://" + re.sub("([?&])sslmode=", r"\1ssl=", rest)


def _sqlite_file(rest: str) -> Path:
    """Absolute: the server works in a folder of its own."""
    name = rest.removeprefix("/")
    if name == rest or name.startswith(":") or not name:
        raise ConfigError("--database: SQLite needs a file, as in sqlite:////PATH/TO/FILE")
    file = Path(name).expanduser().absolute()
    if not file.parent.is_dir():
        raise ConfigError(f"--database: there is no folder {file.parent}; make it first")
    return file


def _address_of(pid: int) -> str | None:
    """The database in the environment with which a process was started."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    begin = f"{_ADDRESS}=".encode()
    return next((os.fsdecode(v.removeprefix(begin)) for v in variables if v.startswith(begin)), None)


def _names_set(names: tuple[str, ...], environment: Mapping[str, str]) -> list[str]:
    return [name for name in names if environment.get(name)]
