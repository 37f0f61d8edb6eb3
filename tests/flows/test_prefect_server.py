"""Prefect's database on SQLite, with what our server's process changes of it."""

import asyncio
import gc
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prefect.server.database.configurations import AioSqliteConfiguration
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from flows.prefect_server import keep_sqlite_moving


class Database:
    def __init__(self, path: Path) -> None:
        self.configuration = AioSqliteConfiguration(f"sqlite+aiosqlite:///{path}")
        self.engine: AsyncEngine

    async def open(self) -> None:
        self.engine = await self.configuration.engine()
        keep_sqlite_moving(self.engine.sync_engine)
        async with self.transaction() as session:
            await session.execute(text("CREATE TABLE runs (name TEXT UNIQUE)"))

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        session = await self.configuration.session(self.engine)
        async with session, self.configuration.begin_transaction(session):
            yield session


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "prefect.db")


def test_what_has_read_can_write_after_others_have(database: Database) -> None:
    async def add(name: str) -> None:
        async with database.transaction() as session:
            await session.execute(text("SELECT count(*) FROM runs"))
            await asyncio.sleep(0.05)
            await session.execute(text("INSERT INTO runs VALUES (:name)"), {"name": name})

    async def count() -> int:
        await database.open()
        await asyncio.gather(*(add(f"run-{number}") for number in range(5)))
        async with database.transaction() as session:
            return int((await session.execute(text("SELECT count(*) FROM runs"))).scalar_one())

    assert asyncio.run(count()) == 5


def test_another_session_can_read_within_a_transaction(database: Database) -> None:
    """As the server does where a queue is paused."""

    async def read_within() -> list[int]:
        await database.open()
        counts = []
        for name in ("before", "after"):
            async with database.transaction() as session:
                await session.execute(text("INSERT INTO runs VALUES (:name)"), {"name": name})
                async with await database.configuration.session(database.engine) as other:
                    counts.append((await other.execute(text("SELECT count(*) FROM runs"))).scalar_one())
        return counts

    assert asyncio.run(asyncio.wait_for(read_within(), 20.0)) == [0, 1]


def test_a_statement_that_fails_is_not_left_to_the_garbage_collector(database: Database) -> None:
    async def fail() -> None:
        await database.open()
        async with database.transaction() as session:
            insert = text("INSERT INTO runs VALUES ('night')")
            await session.execute(insert)
            await session.execute(insert)

    with pytest.raises(IntegrityError) as error:
        asyncio.run(fail())
    cursors = [each for each in gc.get_objects() if isinstance(each, sqlite3.Cursor)]
    assert cursors, "the error holds the one that failed"
    for cursor in cursors:
        with pytest.raises(sqlite3.ProgrammingError, match="closed cursor"):
            cursor.fetchone()
    del error
