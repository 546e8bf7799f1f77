"""What each database needs: settings at connect, transactions, locks, fork safety."""

import hashlib
import os
import re
import sqlite3
import stat
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, StaticPool, create_engine, event, func, literal_column, select
from sqlalchemy.exc import DBAPIError, SAWarning

from taskruns.url import ASYNC_DRIVERS, DRIVERS, EXTRAS, is_file, is_in_memory, parse_url

LOCK_TIMEOUT = 30.0
"""Seconds that a writer waits for another one, unless the URL says otherwise."""

CONNECT_TIMEOUT = 5
"""Seconds to wait for a server, unless the URL has a ``connect_timeout``."""

_POOL = {"pool_size": 15, "max_overflow": -1}  # the callers see to it that there are not more: see Connections


def create(url: str | URL, *, read_only: bool = False, lock_timeout: float = LOCK_TIMEOUT) -> Engine:
    """Return an engine on which each statement commits by itself; :func:`transaction` groups them.

    Raises:
        ValueError: the URL is not valid, or names a database that is not supported.
        ModuleNotFoundError: the driver is not installed; the message names the extra that brings it.
    """
    parsed = parse_url(url)
    options = engine_options(parsed, read_only=read_only, lock_timeout=lock_timeout)
    with checked_options(parsed):
        engine = create_engine(options.pop("url"), **options)
    return equipped(engine, parsed, read_only=read_only, lock_timeout=lock_timeout)


@contextmanager
def checked_options(url: URL) -> Iterator[None]:
    """Turn the failed import of a driver into advice, and an unknown option of the URL into an error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", SAWarning)
            yield
    except SAWarning as error:
        raise ValueError(f"an option of the database URL is wrong: {error}") from None
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(url.get_backend_name(), "asyncio")
        message = f"{url.get_backend_name()} needs {error.name}: pip install 'taskruns[{extra}]'"
        raise ModuleNotFoundError(message, name=error.name) from None


def engine_options(url: URL, *, read_only: bool, lock_timeout: float) -> dict[str, Any]:
    """Return the arguments of ``create_engine`` for a parsed URL."""
    backend = url.get_backend_name()
    query = dict(url.query)
    arguments: dict[str, Any] = {}
    if backend == "sqlite":
        query = {name: value for name, value in query.items() if name not in ("synchronous", "cache_size")}  # ours
        if "timeout" not in query:
            arguments["timeout"] = lock_timeout
        if read_only and is_file(url):
            url = url.set(database=f"file:{quote(url.database or '')}")
            query |= {"mode": "ro", "uri": "true"}  # or better, see _reading_mode()
            # A connection that is used again may not see what has been written since, see there.
            return {"url": url.set(query=query), "connect_args": arguments, "pool_recycle": 0}
        if read_only and str(url.database).startswith("file:") and ":memory:" not in str(url.database):
            query.setdefault("mode", "ro")
        options: dict[str, Any] = {"url": url.set(query=query), "connect_args": arguments}
        if not is_in_memory(url):
            options |= _POOL
        else:
            # One database for all threads, which otherwise had one each.
            options["poolclass"] = StaticPool
            if url.get_driver_name() == "pysqlite":
                arguments["check_same_thread"] = False
        return options
    if "connect_timeout" not in query and url.get_driver_name() in {*DRIVERS.values(), *ASYNC_DRIVERS.values()}:
        arguments["connect_timeout"] = CONNECT_TIMEOUT
    if backend == "postgresql":
        threshold = query.pop("prepare_threshold", None)
        if threshold is not None:
            # psycopg gets every option of a URL as text, and would fail to compare this one with a number.
            arguments["prepare_threshold"] = _prepare_threshold(str(threshold))
    else:
        query.setdefault("charset", "utf8mb4")
        # Not every server is strict by default; the others cut what does not fit, without an error.
        wait = max(1, round(lock_timeout))
        arguments["init_command"] = (
            "SET SESSION sql_mode = CONCAT(@@sql_mode, ',STRICT_ALL_TABLES'),"
            f" innodb_lock_wait_timeout = {wait}, lock_wait_timeout = {wait}"
        )
    return {
        "url": url.set(query=query),
        "connect_args": arguments,
        "isolation_level": "AUTOCOMMIT",
        "skip_autocommit_rollback": True,
        **_POOL,
    }


def _prepare_threshold(value: str) -> int | None:
    if value.lower() == "none":
        return None
    if value.isdecimal():
        return int(value)
    raise ValueError(f"prepare_threshold in the database URL is a number or none, not {value!r}")


def equipped(engine: Engine, url: URL, *, read_only: bool, lock_timeout: float) -> Engine:
    """Install what the engine's connections need, and make it safe to fork."""
    if engine.dialect.name == "sqlite":
        _prepare_sqlite(engine, url, read_only=read_only)
    elif (engine.dialect.name, engine.dialect.driver.removesuffix("_async")) == ("postgresql", "psycopg"):
        _limit_waiting(engine, lock_timeout)
    elif engine.dialect.name in ("mysql", "mariadb"):
        _lock_no_gaps(engine)
    if engine.dialect.name != "sqlite":
        _reset_safely(engine)
    _engines[engine] = url
    if read_only:
        _readers.add(engine)
    return engine


def url_of(engine: Engine) -> URL:
    """Return the URL that an engine was made from, with our options.

    Raises:
        ValueError: it is of another make; what is written through it might never be committed.
    """
    if engine not in _engines:
        raise ValueError("a history makes its own engine, see connect(); TaskRunRepository takes a connection of yours")
    return _engines[engine]


def _limit_waiting(engine: Engine, seconds: float) -> None:
    """Have PostgreSQL end a wait for a lock, unless a limit is set already, and give times in UTC.

    Not behind PgBouncer, whose sessions are other clients' too. It is known by the number of the process that serves
    the connection, which is not what was told when it was opened.
    """

    @event.listens_for(engine, "connect")
    def connected(dbapi: Any, record: Any) -> None:
        cursor = dbapi.cursor()
        cursor.execute(
            "SELECT set_config('TimeZone', 'UTC', false),"
            " set_config('lock_timeout', coalesce(nullif(current_setting('lock_timeout'), '0'), %s), false)"
            " WHERE pg_backend_pid() = %s",
            (f"{max(1, round(1000 * seconds))}ms", record.driver_connection.info.backend_pid),
        )
        cursor.close()
        dbapi.commit()


def _lock_no_gaps(engine: Engine) -> None:
    """Have MariaDB lock rows, and not the gaps between them, where those that open new tasks meet in deadlocks."""

    @event.listens_for(engine, "connect")
    def connected(dbapi: Any, _record: object) -> None:
        cursor = dbapi.cursor()
        cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
        cursor.close()


def is_own(connection: Connection) -> bool:
    """Whether a connection is of an engine made here, not of a host's."""
    return connection.engine in _engines


def only_reads(engine: Engine) -> bool:
    """Whether an engine was made to read only."""
    return engine in _readers


def _prepare_sqlite(engine: Engine, url: URL, *, read_only: bool) -> None:
    settings = _sqlite_settings(url)

    @event.listens_for(engine, "do_connect")
    def prepare_file(_dialect: Any, _record: object, arguments: list[Any], _options: object) -> None:
        if is_file(url) and read_only:
            arguments[0] = arguments[0].replace("mode=ro", _reading_mode(str(url.database)))
        elif is_file(url):
            _make_file(Path(str(url.database)))

    @event.listens_for(engine, "connect")
    def connected(dbapi: Any, _record: object) -> None:
        # None makes the driver commit each statement. SQLAlchemy's own AUTOCOMMIT would do so too, but together with
        # the hook below it lost acknowledged writes.
        dbapi.isolation_level = None
        cursor = dbapi.cursor()
        if read_only:
            cursor.execute("PRAGMA query_only = ON")
        else:
            _use_wal(cursor)
            for setting in settings:
                cursor.execute(f"PRAGMA {setting}")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        mode = connection.get_execution_options().get("taskruns_begin")
        if mode is not None:
            connection.exec_driver_sql(f"BEGIN {mode}")


def _sqlite_settings(url: URL) -> list[str]:
    """Return the pragmas of a connection that writes."""
    synchronous = str(url.query.get("synchronous", "FULL")).upper()
    if synchronous not in ("FULL", "NORMAL"):
        raise ValueError(f"synchronous in the database URL is FULL or NORMAL, not {synchronous!r}")
    settings = [f"synchronous = {synchronous}"]
    if "cache_size" in url.query:
        size = str(url.query["cache_size"])
        if not re.fullmatch("[1-9][0-9]{0,4}", size):
            raise ValueError(f"cache_size in the database URL is a number of MiB, not {size!r}")
        settings.append(f"cache_size = {-1024 * int(size)}")  # negative: of KiB
    return settings


def _make_file(path: Path) -> None:
    """Make a missing database file, and its directory, readable for its owner only; the WAL takes the file's mode."""
    if path.exists():
        return
    if not path.parent.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, stat.S_IRUSR | stat.S_IWUSR))


def _reading_mode(path: str) -> str:
    """Return how to open a database file so that reading it leaves nothing behind.

    Whoever opens a database that nobody has open makes the two files that go with it (-wal, -shm). The last one to
    close it removes them, if he may write; otherwise they would stay, be the reader's, and lock out the owner.
    """
    path = os.path.realpath(path)
    if os.access(path, os.W_OK) and os.access(os.path.dirname(path), os.W_OK | os.X_OK):  # noqa: PTH120  (a text)
        return "mode=rw"
    # Without a WAL nobody has it open for writing, and all of it is in the file.
    return "mode=ro" if os.path.exists(f"{path}-wal") else "mode=ro&immutable=1"  # noqa: PTH110  (a text)


def _use_wal(cursor: Any) -> None:
    # The change to WAL needs the file alone, and SQLite does not wait for that by itself.
    deadline = time.monotonic() + 5
    while True:
        cursor.execute("PRAGMA journal_mode")
        if cursor.fetchone()[0] in ("wal", "memory"):
            return
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            cursor.fetchall()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@contextmanager
def transaction(connection: Connection, *, lock: str | None = None) -> Iterator[None]:
    """Make one writing transaction of what is executed inside; ``lock`` is a task that only one of them may hold.

    Raises:
        TimeoutError: another transaction kept the task's lock for too long (MariaDB and MySQL).
    """
    backend = connection.dialect.name
    if backend == "sqlite":
        # IMMEDIATE takes the write lock, and waits for it, before the first read: there is no other lock to need.
        # A deferred transaction that reads first fails at once where it meets another writer.
        connection.execution_options(taskruns_begin="IMMEDIATE")
        with connection.begin():
            yield
        return
    try:
        connection.execution_options(isolation_level="READ COMMITTED")  # later snapshots would be older than the lock
    except connection.dialect.loaded_dbapi.Error as error:  # pymysql talks to the server here
        raise as_sqlalchemy(connection, error, "SET TRANSACTION ISOLATION LEVEL") from error
    if backend == "postgresql":
        with connection.begin():
            if lock is not None:
                lock_task(connection, lock)
            yield
        return
    name = None if lock is None else _lock_name(connection, lock)
    if name is not None:
        # Around the transaction: released inside it, the next holder would not see what it wrote.
        with connection.begin():
            if connection.scalar(select(func.get_lock(name, literal_column("@@lock_wait_timeout")))) != 1:
                raise TimeoutError(f"another transaction kept the lock of task {lock!r}")
    try:
        with connection.begin():
            yield
    finally:
        if name is not None and not connection.invalidated:
            with connection.begin():
                connection.scalar(select(func.release_lock(name)))


def as_sqlalchemy(connection: Connection, error: Any, statement: str) -> DBAPIError:
    """Return an error of the driver's own as SQLAlchemy raises those of its statements."""
    dialect = connection.dialect
    is_lost = dialect.is_disconnect(error, connection.connection.dbapi_connection, None)
    if is_lost:
        connection.invalidate(error)
    known: Any = DBAPIError.instance(
        statement, None, error, dialect.loaded_dbapi.Error, connection_invalidated=is_lost, dialect=dialect
    )
    assert isinstance(known, DBAPIError)  # noqa: S101  (for mypy)
    return known


def _reset_safely(engine: Engine) -> None:
    """Let a connection that is lost while it goes back to the pool fail its next user, who tries again.

    SQLAlchemy would raise the error for what is committed by then, and the pool would never get its connection back.
    """
    dialect: Any = engine.dialect
    reset = dialect.reset_isolation_level

    def reset_or_close(connection: Any) -> None:
        try:
            reset(connection)
        except dialect.loaded_dbapi.Error:
            with suppress(Exception):
                dialect.do_terminate(connection) if dialect.has_terminate else dialect.do_close(connection)

    dialect.reset_isolation_level = reset_or_close


def lock_task(connection: Connection, task_id: str) -> None:
    """Wait for the task's lock and hold it until the transaction ends: PostgreSQL only, elsewhere nothing."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(task_id, _LOCK_SEED))))


_LOCK_SEED = 0x7461736B  # "task": keeps apart from a host's own locks over the same texts


def _lock_name(connection: Connection, task_id: str) -> str:
    # Locks are the server's, not the database's, and their names have at most 64 characters on MySQL.
    database = connection.engine.url.database or ""
    return "taskruns:" + hashlib.sha256(f"{database}\0{task_id}".encode()).hexdigest()[:40]


_engines: weakref.WeakKeyDictionary[Engine, URL] = weakref.WeakKeyDictionary()
_readers: weakref.WeakSet[Engine] = weakref.WeakSet()
_inherited: list[object] = []


def _forget_connections() -> None:
    """Give a forked child pools of its own, and leave the parent's sockets alone."""
    for engine in list(_engines):
        _inherited.append(engine.pool)  # collecting it would close what the parent still uses
        engine.dispose(close=False)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_connections)
