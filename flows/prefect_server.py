"""The program of the server's process: Prefect's own command, with SQLite kept from standing still."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from prefect.cli import app
from sqlalchemy import Connection, Engine, event


class _Cursor(sqlite3.Cursor):
    """Resets a statement that failed at once, in the thread that ran it.

    Python 3.11 leaves that to the garbage collector, which may run in the thread of the event loop. There it
    waits for the statement's connection, and so, if that waits for a lock by then, for whoever holds the lock
    and needs the event loop to go on: for the minute after which Prefect has SQLite give up.
    """

    def execute(self, *words: Any) -> "_Cursor":
        with self._closed_by_errors():
            return super().execute(*words)

    def executemany(self, *words: Any) -> "_Cursor":
        with self._closed_by_errors():
            return super().executemany(*words)

    @contextmanager
    def _closed_by_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise


class _Connection(sqlite3.Connection):
    def cursor(self, factory: type[sqlite3.Cursor] = _Cursor) -> sqlite3.Cursor:  # type: ignore[override]
        return super().cursor(factory)


class _Transaction:
    is_open = True


_around: ContextVar[_Transaction | None] = ContextVar("_around", default=None)
"""The transaction within which a task, or those that it started, opens another connection."""
_HELD = "avatar_transaction"


def keep_sqlite_moving(engine: Engine | type[Engine] = Engine) -> None:
    """Has no effect on engines of other databases."""
    event.listen(engine, "do_connect", _connect)
    event.listen(engine, "before_cursor_execute", _begin, retval=True)
    event.listen(engine, "commit", _end)
    event.listen(engine, "rollback", _end)


def _connect(dialect: Any, record: Any, arguments: Any, parameters: dict[str, Any]) -> None:
    if dialect.name == "sqlite":
        parameters["factory"] = _Connection


def _begin(
    connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
) -> tuple[str, Any]:
    """Take the lock at the begin of a transaction. One that has read cannot write after another has: it
    fails, and Prefect's clients try again after some seconds. One within another would wait for that."""
    around = _around.get()
    if statement.startswith("BEGIN ") and not (around and around.is_open):
        connection.info[_HELD] = transaction = _Transaction()
        _around.set(transaction)
        statement = "BEGIN IMMEDIATE"
    return statement, parameters


def _end(connection: Connection) -> None:
    if transaction := connection.info.pop(_HELD, None):
        transaction.is_open = False


if __name__ == "__main__":
    keep_sqlite_moving()
    app()
