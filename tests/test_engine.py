"""What each database needs: URLs, drivers, options, private files, forms of statements."""

import os
import stat
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from histories import Histories
from sqlalchemy import event, make_url, select
from sqlalchemy.exc import OperationalError

from taskruns import RunExistsError, TaskRunHistory, task_statements
from taskruns.aio import AsyncTaskRunHistory
from taskruns.schema import task_runs
from taskruns.url import ASYNC_DRIVERS, hide_password, parse_url

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "runs.db",
        "bob:secret@host/runs",
        "oracle://bob:secret@host/runs",
        "postgresql://bob:secret@host:port/runs",
        "postgresql://bob:secret@host:54x32/runs",
        "://bob:secret@host/runs",
        "postgresql://bob:secret@host/runs?prepare_threshold=secret-ish",
        "sqlite:///runs.db?synchronous=OFF",
        "sqlite:///runs.db?cache_size=0",
        "sqlite:///runs.db?cache_size=64MB",
    ],
)
@pytest.mark.parametrize("history_class", [TaskRunHistory, AsyncTaskRunHistory])
def test_wrong_url_is_a_value_error_without_the_password(history_class: Any, url: str) -> None:
    with pytest.raises(ValueError) as caught:
        history_class.connect(url)
    assert "bob" not in str(caught.value)
    assert ":secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("url", "sync", "asynchronous"),
    [
        ("sqlite://", "sqlite+pysqlite", "sqlite+aiosqlite"),
        ("postgres://h/d", "postgresql+psycopg", "postgresql+psycopg"),
        ("postgresql://h/d", "postgresql+psycopg", "postgresql+psycopg"),
        ("mysql://h/d", "mysql+pymysql", "mysql+aiomysql"),
        ("mariadb://h/d", "mariadb+pymysql", "mariadb+aiomysql"),
        ("mariadb+pymysql://h/d", "mariadb+pymysql", "mariadb+aiomysql"),
        ("postgresql+asyncpg://h/d", "postgresql+asyncpg", "postgresql+asyncpg"),
    ],
)
def test_url_gets_its_driver(url: str, sync: str, asynchronous: str) -> None:
    assert parse_url(url).drivername == sync
    assert parse_url(url, drivers=ASYNC_DRIVERS).drivername == asynchronous


def test_relative_path_is_that_of_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with TaskRunHistory.connect("sqlite:///runs.db") as history:
        monkeypatch.chdir("/")
        history.upgrade()
    assert (tmp_path / "runs.db").exists()


def test_password_is_hidden_wherever_it_stands() -> None:
    url = make_url("postgresql://bob:s%40cret@h/d?password=s@cret&sslpassword=s@cret&application_name=x")
    hidden = hide_password(url)
    assert "cret" not in hidden
    assert hidden.startswith("postgresql://bob:***@h/d?")
    assert "application_name=x" in hidden


@pytest.mark.parametrize(
    ("url", "module", "extra"),
    [
        ("postgresql://h/d", "psycopg", "postgres"),
        ("mysql://h/d", "pymysql", "mysql"),
        ("mariadb://h/d", "pymysql", "mysql"),
    ],
)
def test_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch, url: str, module: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {module}: pip install 'taskruns\[{extra}\]'") as caught:
        TaskRunHistory.connect(url)
    assert caught.value.name == module


def test_missing_asynchronous_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiosqlite", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'taskruns\[asyncio\]'"):
        AsyncTaskRunHistory.connect("sqlite:///runs.db")


def test_cache_size_is_in_mebibytes(sqlite: str, histories: Histories) -> None:
    history = histories.connect(f"{sqlite}?cache_size=64")
    with history.begin() as runs:
        connection: Any = runs._connection
        connection = getattr(connection, "sync_connection", connection)

        @event.listens_for(connection.engine, "before_cursor_execute", named=True)
        def look(cursor: Any, **_: object) -> None:
            cursor.execute("PRAGMA cache_size")
            found.append(cursor.fetchone()[0])

        found: list[int] = []
        runs.open_run("job")
    assert set(found) == {-65536}


@pytest.mark.parametrize(("option", "threshold"), [("none", None), ("None", None), ("0", 0), ("7", 7)])
def test_prepare_threshold_reaches_the_driver(postgresql: str, option: str, threshold: int | None) -> None:
    url = make_url(postgresql).update_query_dict({"prepare_threshold": option})
    with TaskRunHistory.connect(url) as history:
        assert history.tasks() == []
        with history._engine.connect() as connection:
            driver: Any = connection.connection.driver_connection
            assert driver.prepare_threshold == threshold


@pytest.mark.parametrize(("query", "level"), [("", 2), ("?synchronous=NORMAL", 1), ("?synchronous=full", 2)])
def test_sqlite_is_durable_unless_told(tmp_path: Path, histories: Histories, query: str, level: int) -> None:
    history = histories.connect(f"sqlite:///{tmp_path}/runs.db{query}", lock_timeout=7)
    history.upgrade()
    found: dict[str, Any] = {}

    def look(dbapi: Any, *_: object) -> None:
        for name in ("synchronous", "journal_mode", "busy_timeout", "foreign_keys"):
            cursor = dbapi.cursor()
            cursor.execute(f"PRAGMA {name}")
            found[name] = cursor.fetchone()[0]
            cursor.close()

    own: Any = history._engine
    event.listen(getattr(own, "sync_engine", own), "checkout", look)
    history.tasks()
    assert found == {"synchronous": level, "journal_mode": "wal", "busy_timeout": 7000, "foreign_keys": 1}


@pytest.mark.skipif(sys.platform == "win32", reason="no such modes")
def test_sqlite_file_and_directory_are_private(tmp_path: Path, histories: Histories) -> None:
    file = tmp_path / "new" / "deeper" / "runs.db"
    before = os.umask(0)
    try:
        histories.connect(f"sqlite:///{file}").upgrade()
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in file.parent.iterdir()} == {0o600}
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.parent.parent.stat().st_mode) & 0o077 in (0, 0o077)  # parents are the umask's


@pytest.mark.parametrize("name", ["my runs.db", "100%.db", "a?b#c.db", "é😀.db"])
def test_sqlite_path_may_have_any_characters(tmp_path: Path, histories: Histories, name: str) -> None:
    url: Any = make_url("sqlite://").set(database=str(tmp_path / name))
    history = histories.connect(url)
    history.upgrade()
    run = history.open_run("job")
    assert (tmp_path / name).exists()
    assert histories.connect(url, read_only=True).last_run("job") == run


def test_read_only_creates_nothing(tmp_path: Path, histories: Histories) -> None:
    history = histories.connect(f"sqlite:///{tmp_path}/typo/runs.db", read_only=True, retry_for=0.1)
    with pytest.raises(OperationalError, match="unable to open database file"):
        history.tasks()
    assert list(tmp_path.iterdir()) == []


def test_read_only_reads_and_refuses_to_write(sqlite: str, histories: Histories) -> None:
    run = histories.connect(sqlite).open_run("job")
    history = histories.connect(sqlite, read_only=True)
    assert history.tasks() == [run]
    with pytest.raises(OperationalError, match="readonly"):
        history.open_run("job")
    assert history.tasks() == [run]


def test_history_in_memory_lives_as_long_as_its_object() -> None:
    with TaskRunHistory.connect("sqlite://") as history:
        history.upgrade()
        assert history.open_run("job").attempt == 1
        assert history.open_run("job").attempt == 2


@pytest.mark.parametrize("walk", [(False, False), (True, False), (True, True)])
def test_forms_of_the_task_list_agree(postgresql: str, walk: tuple[bool, bool]) -> None:
    with TaskRunHistory.connect(postgresql) as history:
        for number, name in enumerate(["b", "a", "C", "é", "a!"] * 3):
            history.open_run(name, started_at=NOON + timedelta(seconds=number))
        arguments: list[dict[str, Any]] = [
            {},
            {"limit": 2},
            {"limit": 1, "after": "a"},
            {"after": "b"},
            {"limit": 9, "after": "é"},
        ]
        with history._engine.connect() as connection:
            for extra in arguments:
                query = task_statements.tasks(*walk, "after" if "after" in extra else None)
                found = [tuple(row) for row in connection.execute(query, {"limit": 99} | extra)]
                latest = [(run.task_id, run.attempt) for run in history.tasks(**extra)]
                assert [(row[0], row[1]) for row in found] == latest
                assert latest or extra == {"limit": 9, "after": "é"}


@pytest.fixture
def without_returning(mariadb: str) -> Iterator[TaskRunHistory]:
    """A history on what MySQL is: a MariaDB that lacks INSERT … RETURNING."""
    with TaskRunHistory.connect(mariadb) as history:
        history.tasks()
        history._engine.dialect.insert_returning = False
        yield history


def test_open_without_returning(without_returning: TaskRunHistory) -> None:
    history = without_returning
    assert [history.open_run("job").attempt for _ in range(3)] == [1, 2, 3]
    assert history.open_run("job", attempt=9, started_at=NOON).attempt == 9
    with pytest.raises(RunExistsError):
        history.open_run("job", attempt=9)
    assert history.open_run("job", attempt=9, started_at=NOON).attempt == 9
    with history.begin(lock="job") as runs:
        assert runs.open_run("job").attempt == 10
    with history._engine.connect() as connection:
        assert set(connection.scalars(select(task_runs.c.attempt))) == {1, 2, 3, 9, 10}


def test_racing_opens_without_returning(without_returning: TaskRunHistory) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda _: without_returning.open_run("job").attempt, range(80)))
    assert sorted(given) == list(range(1, 81))


def test_open_without_returning_of_a_time_that_another_run_has(without_returning: TaskRunHistory) -> None:
    without_returning.open_run("job", attempt=10, started_at=NOON)
    assert without_returning.open_run("job", attempt=5, started_at=NOON).attempt == 5
