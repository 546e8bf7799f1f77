"""What bench_recording.py compares: the driver alone, taskruns, and the ORM as it is first written.

All write the same columns of the same tables. A close is of an active run only, and each call is committed.
"""

import inspect
import secrets
import socket
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import psycopg
import pymysql
from databases import Database
from pymysql.constants import ER
from shapes import THREADS, Contender
from sqlalchemy import create_engine, event, func, make_url, select
from sqlalchemy.orm import Session

from taskruns import TaskPhase, TaskRunHistory, TaskRunRow
from taskruns.aio import AsyncTaskRunHistory

HOST = socket.gethostname()
BUSY = 30
"""Seconds that a writer waits for another one, as taskruns does."""


class OnTaskRuns(Contender):
    """A contender on the tables of taskruns."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def prepare(self) -> None:
        self.database.empty()


class Raw(OnTaskRuns):
    """The driver alone, one connection a thread that commits each statement by itself."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        driver = {"sqlite": "sqlite3", "postgresql": "psycopg", "mysql": "pymysql", "mariadb": "pymysql"}
        self.name = f"raw {driver[database.kind]}"

    def start(self) -> None:
        self._callers: list[RawCaller] = []

    def caller(self) -> "RawCaller":
        caller = CALLERS[self.database.kind](self.database)
        self._callers.append(caller)
        return caller

    def stop(self) -> None:
        for caller in self._callers:
            caller.connection.close()


class RawCaller:
    """A connection, and the two statements."""

    connection: Any
    mark = "%s"
    unless_taken = " ON CONFLICT (task_id, attempt) DO NOTHING"

    def __init__(self, _database: Database) -> None:
        mark, columns = self.mark, "task_id, started_at, source, supervisor_id, attempt, phase"
        values = f"{mark}, {mark}, {mark}, {mark}, coalesce(max(attempt), 0) + 1, 'running'"
        self.open_sql = (
            f"INSERT INTO task_runs ({columns}) SELECT {values} FROM task_runs WHERE task_id = {mark}"
            f"{self.unless_taken} RETURNING attempt"
        )
        self.close_sql = (
            f"UPDATE task_runs SET phase = {mark}, finished_at = {mark}, error = {mark}, exit_code = {mark}"
            f" WHERE task_id = {mark} AND attempt = {mark} AND finished_at IS NULL"
        )
        self.supervisor_id = secrets.randbits(62)

    def open(self, task_id: str) -> int:
        raise NotImplementedError

    def close(self, task_id: str, attempt: int) -> None:
        raise NotImplementedError


class RawSqlite(RawCaller):
    """The module sqlite3; times are text."""

    mark = "?"

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.connection = sqlite3.connect(
            database.path, timeout=BUSY, isolation_level=None, check_same_thread=False, cached_statements=16
        )
        self.connection.execute("PRAGMA journal_mode = WAL").fetchall()
        self.connection.execute(f"PRAGMA synchronous = {database.synchronous}")

    def open(self, task_id: str) -> int:
        now = datetime.now(UTC).isoformat(" ", "microseconds")[:-6]
        given = (task_id, now, HOST, self.supervisor_id, task_id)
        return int(self.connection.execute(self.open_sql, given).fetchall()[0][0])

    def close(self, task_id: str, attempt: int) -> None:
        now = datetime.now(UTC).isoformat(" ", "microseconds")[:-6]
        given = ("succeeded", now, None, 0, task_id, attempt)
        assert self.connection.execute(self.close_sql, given).rowcount == 1


class RawPostgresql(RawCaller):
    """Psycopg; it prepares statements by itself."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.connection = psycopg.connect(
            make_url(database.url).set(drivername="postgresql").render_as_string(hide_password=False), autocommit=True
        )
        self.cursor = self.connection.cursor()

    def open(self, task_id: str) -> int:
        while True:
            given = (task_id, datetime.now(UTC), HOST, self.supervisor_id, task_id)
            row = self.cursor.execute(self.open_sql, given).fetchone()
            if row is not None:  # else another writer took the number at the same moment
                return int(row[0])

    def close(self, task_id: str, attempt: int) -> None:
        given = ("succeeded", datetime.now(UTC), None, 0, task_id, attempt)
        assert self.cursor.execute(self.close_sql, given).rowcount == 1


class RawMariadb(RawCaller):
    """PyMySQL; times have no zone."""

    unless_taken = ""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        url = make_url(database.url)
        self.connection = pymysql.connect(
            host=url.host,
            port=url.port or 3306,
            user=url.username,
            password=url.password or "",
            database=url.database,
            charset="utf8mb4",
            autocommit=True,
        )
        self.cursor = self.connection.cursor()
        # As taskruns has it. By default writers of new tasks meet in deadlocks, over and over in a table that is empty.
        self.cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")

    def open(self, task_id: str) -> int:
        while True:
            try:
                now = datetime.now(UTC).replace(tzinfo=None)
                self.cursor.execute(self.open_sql, (task_id, now, HOST, self.supervisor_id, task_id))
                return int(self.cursor.fetchall()[0][0])
            except (pymysql.IntegrityError, pymysql.OperationalError) as error:
                if error.args[0] not in (ER.DUP_ENTRY, ER.LOCK_DEADLOCK):
                    raise

    def close(self, task_id: str, attempt: int) -> None:
        while True:
            try:
                now = datetime.now(UTC).replace(tzinfo=None)
                assert self.cursor.execute(self.close_sql, ("succeeded", now, None, 0, task_id, attempt)) == 1
            except pymysql.OperationalError as error:
                if error.args[0] != ER.LOCK_DEADLOCK:
                    raise
            else:
                return


CALLERS: dict[str, type[RawCaller]] = {
    "sqlite": RawSqlite,
    "postgresql": RawPostgresql,
    "mysql": RawMariadb,
    "mariadb": RawMariadb,
}


class Taskruns(OnTaskRuns):
    """One history, shared by all threads of a process."""

    name = "taskruns"
    options: dict[str, Any] = {}  # noqa: RUF012  (never changed)

    def start(self) -> None:
        self.history = TaskRunHistory.connect(self.database.url, **self.options)

    def open(self, task_id: str) -> int:
        return self.history.open_run(task_id).attempt

    def close(self, task_id: str, attempt: int) -> None:
        self.history.close_run(task_id, attempt, TaskPhase.SUCCEEDED, exit_code=0)

    def stop(self) -> None:
        self.history.dispose()


class TaskrunsGrouped(Taskruns):
    """The same with group commit."""

    name = "taskruns, group commit"
    options = {"group_commit": True}  # noqa: RUF012  (never changed)


class AsyncTaskruns(OnTaskRuns):
    """One history for asyncio, shared by all tasks."""

    name = "taskruns"
    is_async = True
    options: dict[str, Any] = {}  # noqa: RUF012  (never changed)

    def start(self) -> None:
        self.history = AsyncTaskRunHistory.connect(self.database.url, **self.options)

    async def open(self, task_id: str) -> int:
        return (await self.history.open_run(task_id)).attempt

    async def close(self, task_id: str, attempt: int) -> None:
        await self.history.close_run(task_id, attempt, TaskPhase.SUCCEEDED, exit_code=0)

    async def leave(self) -> None:
        await self.history.dispose()


class AsyncTaskrunsGrouped(AsyncTaskruns):
    """The same with group commit."""

    name = "taskruns, group commit"
    options = {"group_commit": True}  # noqa: RUF012  (never changed)


class NaiveOrm(OnTaskRuns):
    """The ORM as it is first written: a session a call, the last number asked for before, the run got before its end.

    Its engine pools connections, and SQLite's has the same settings as the others'. Two of these that open a run of the
    same task at the same moment give it the same number, and one of them fails.
    """

    name = "naive ORM"

    def start(self) -> None:
        level = {"isolation_level": "READ COMMITTED"} if self.database.kind == "mariadb" else {}
        self.engine = create_engine(self.database.with_driver, pool_size=THREADS, **level)
        if self.database.kind == "sqlite":

            @event.listens_for(self.engine, "connect")
            def connected(connection: sqlite3.Connection, _record: object) -> None:
                with closing(connection.cursor()) as cursor:
                    cursor.execute(f"PRAGMA busy_timeout = {1000 * BUSY}")
                    cursor.execute("PRAGMA journal_mode = WAL")
                    cursor.execute(f"PRAGMA synchronous = {self.database.synchronous}")

    def open(self, task_id: str) -> int:
        with Session(self.engine) as session:
            last = session.scalar(select(func.max(TaskRunRow.attempt)).where(TaskRunRow.task_id == task_id)) or 0
            session.add(
                TaskRunRow(
                    task_id=task_id,
                    attempt=last + 1,
                    phase=TaskPhase.RUNNING,
                    started_at=datetime.now(UTC),
                    source=HOST,
                    supervisor_id=1,
                )
            )
            session.commit()
            return last + 1

    def close(self, task_id: str, attempt: int) -> None:
        with Session(self.engine) as session:
            run = session.get(TaskRunRow, (task_id, attempt))
            assert run is not None
            assert run.finished_at is None
            run.phase = TaskPhase.SUCCEEDED
            run.finished_at = datetime.now(UTC)
            run.exit_code = 0
            session.commit()

    def stop(self) -> None:
        self.engine.dispose()


def has_group_commit(history: type[TaskRunHistory | AsyncTaskRunHistory]) -> bool:
    """Whether this version of taskruns can do it."""
    return "group_commit" in inspect.signature(history.connect).parameters


def of_shape(shape: str) -> list[type[OnTaskRuns]]:
    """Return who takes part, the raw driver first."""
    found: list[type[OnTaskRuns]] = [Raw]
    if shape == "tasks":
        found += [AsyncTaskruns, AsyncTaskrunsGrouped] if has_group_commit(AsyncTaskRunHistory) else [AsyncTaskruns]
    else:
        found += [Taskruns, TaskrunsGrouped] if has_group_commit(TaskRunHistory) else [Taskruns]
    return found if shape == "one-name" else [*found, NaiveOrm]
