"""The tables come from migrations, are what the code knows, and stand beside a host's."""

import asyncio
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from servers import Databases
from sqlalchemy import Connection, Engine, Inspector, create_engine, inspect, make_url, text

from taskruns import TaskRunHistory, engine, migrate
from taskruns.aio import AsyncTaskRunHistory
from taskruns.schema import SCHEMA_VERSION, VERSION_TABLE, metadata
from taskruns.url import parse_url

REPOSITORY = Path(__file__).parents[1]


def config(url: str, monkeypatch: pytest.MonkeyPatch) -> Config:
    """What `alembic` has when it is run in the repository."""
    monkeypatch.setenv("TASKRUNS_DB", url)
    return Config(REPOSITORY / "alembic.ini", stdout=StringIO())


@pytest.fixture
def own(empty_database: str) -> Iterator[Engine]:
    made = engine.create(empty_database)
    yield made
    made.dispose()


def tables(own: Engine) -> set[str]:
    with own.connect() as connection:
        return set(inspect(connection).get_table_names())


def version(own: Engine) -> str | None:
    with own.connect() as connection:
        return migrate.current(connection)


def shape(url: str) -> dict[str, Any]:
    """All that a database says of our table, as its server words it."""
    own = create_engine(url)
    with own.connect() as connection:
        inspector = inspect(connection)
        found: dict[str, Any] = {
            "columns": [
                {key: str(value) for key, value in column.items() if key != "type"}
                | {"type": repr(column["type"]), "ddl": column["type"].compile(own.dialect)}
                for column in inspector.get_columns("task_runs")
            ],
            "key": inspector.get_pk_constraint("task_runs"),
            "checks": sorted(map(str, inspector.get_check_constraints("task_runs"))),
            "indexes": sorted(
                str(
                    {
                        **index,
                        "dialect_options": {key: str(value) for key, value in index.get("dialect_options", {}).items()},
                    }
                )
                for index in inspector.get_indexes("task_runs")
            ),
            "options": inspector.get_table_options("task_runs"),
        }
        if own.dialect.name == "sqlite":
            query = "SELECT name, sql FROM sqlite_master WHERE tbl_name = 'task_runs' ORDER BY name"
            found["created"] = [(row.name, " ".join(row.sql.split())) for row in connection.execute(text(query))]
        elif own.dialect.name == "postgresql":
            query = "SELECT indexdef FROM pg_indexes WHERE tablename = 'task_runs' ORDER BY 1"
            found["created"] = connection.scalars(text(query)).all()
            found["storage"] = connection.scalar(text("SELECT reloptions FROM pg_class WHERE relname = 'task_runs'"))
        else:
            lines = str(connection.execute(text("SHOW CREATE TABLE task_runs")).one()[1]).splitlines()
            found["created"] = sorted(line.rstrip(",") for line in lines)  # the order of indexes says nothing
    own.dispose()
    return found


def test_one_line_of_revisions_ends_with_the_codes_version() -> None:
    scripts = ScriptDirectory(str(REPOSITORY / "migrations"))
    assert scripts.get_heads() == [SCHEMA_VERSION]
    for script in scripts.walk_revisions():
        assert Path(script.path).name.startswith(f"{script.revision}_")
        assert re.fullmatch(r"\d+_\d{4}", script.revision)


def test_revisions_import_nothing_of_ours() -> None:
    for file in (REPOSITORY / "migrations" / "versions").glob("*.py"):
        assert "taskruns" not in re.sub(r'".*?"', "", file.read_text(encoding="utf-8")).replace("task_runs", "")


def test_upgrade_makes_the_tables_and_may_be_repeated(own: Engine, empty_database: str) -> None:
    assert version(own) is None
    migrate.upgrade(own)
    assert tables(own) == {"task_runs", "supervisors", VERSION_TABLE}
    assert version(own) == SCHEMA_VERSION
    with TaskRunHistory.connect(empty_database) as history:
        run = history.open_run("job")
        history.upgrade()
        assert history.tasks() == [run]
    with own.connect() as connection:
        assert migrate.check(connection) == []


def test_downgrade_and_up_again(own: Engine, empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alembic = config(empty_database, monkeypatch)
    command.upgrade(alembic, "head")
    first = shape(empty_database)
    command.downgrade(alembic, "base")
    assert tables(own) == {VERSION_TABLE}
    assert version(own) is None
    command.upgrade(alembic, "head")
    assert shape(empty_database) == first


def test_alembic_finds_no_drift(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alembic = config(empty_database, monkeypatch)
    command.upgrade(alembic, "head")
    command.check(alembic)
    assert "No new upgrade operations detected" in alembic.stdout.getvalue()  # type: ignore[attr-defined]  # a StringIO


@pytest.mark.parametrize(
    ("statement", "word"),
    [
        ("ALTER TABLE task_runs ADD COLUMN extra INTEGER", "extra"),
        ("CREATE INDEX ix_task_runs_extra ON task_runs (source)", "ix_task_runs_extra"),
    ],
)
def test_check_tells_what_differs(own: Engine, statement: str, word: str) -> None:
    migrate.upgrade(own)
    with own.begin() as connection:
        connection.execute(text(statement))
    with own.connect() as connection:
        [line] = migrate.check(connection)
    assert word in line


def test_check_of_an_empty_database_tells_that_the_table_is_missing(own: Engine) -> None:
    with own.connect() as connection:
        lines = migrate.check(connection)
    assert any(line.startswith("add table") and "task_runs" in line for line in lines)


def test_migrated_database_is_the_same_as_a_created_one(
    own: Engine, empty_database: str, kind: str, databases: Databases
) -> None:
    migrate.upgrade(own)
    created = databases.empty(kind)
    other = create_engine(created)
    metadata.create_all(other)
    other.dispose()
    assert shape(empty_database) == shape(created)


def test_commands_from_the_repository_root(databases: Databases, monkeypatch: pytest.MonkeyPatch) -> None:
    url = databases.empty("sqlite")
    monkeypatch.setenv("TASKRUNS_DB", url)

    def alembic(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "alembic", *arguments],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    alembic("upgrade", "head")
    with TaskRunHistory.connect(url) as history:
        history.check_version()
    assert "No new upgrade operations detected" in alembic("check")


@pytest.mark.parametrize("url", ["sqlite://", "postgresql://u:p%40ss@h/d", "mariadb://u:p%40ss@h/d", "mysql://h/d"])
def test_offline_sql_touches_no_database(url: str) -> None:
    script = migrate.sql(parse_url(url))
    assert "CREATE TABLE" in script
    assert f"'{SCHEMA_VERSION}'" in script
    assert "CREATE INDEX" in script
    assert "p@ss" not in script
    assert ("WITHOUT ROWID" in script) is (url == "sqlite://")
    assert ("COLLATE utf8mb4_bin" in script) is url.startswith("m")


def test_offline_sql_builds_the_same_tables(empty_database: str, own: Engine, kind: str, databases: Databases) -> None:
    script = migrate.sql(parse_url(empty_database))
    if kind == "sqlite":
        file = sqlite3.connect(str(own.url.database))
        file.executescript(script)
        file.close()
    else:
        raw = own.raw_connection()
        cursor = raw.cursor()
        for statement in script.split(";\n"):
            if statement.strip():
                cursor.execute(statement)
        raw.commit()
        raw.close()
    assert version(own) == SCHEMA_VERSION
    assert shape(empty_database) == shape(databases.migrated(kind))
    with own.connect() as connection:
        assert migrate.check(connection) == []


def test_threads_upgrade_databases_at_once(databases: Databases, kind: str) -> None:
    urls = [databases.empty(kind) for _ in range(8)]

    def upgrade(url: str) -> int:
        with TaskRunHistory.connect(url) as history:
            history.upgrade()
            return history.open_run("job").attempt

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(upgrade, urls)) == [1] * 8


def test_processes_upgrade_one_database_at_once(own: Engine, empty_database: str) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", Path(__file__).with_name("migrator.py"), empty_database],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    ends = [(process.communicate(timeout=120)[1], process.returncode) for process in processes]
    assert ends == [("", 0)] * 4
    assert version(own) == SCHEMA_VERSION
    with own.connect() as connection:
        assert migrate.check(connection) == []


def test_version_table_that_appears_in_between_is_read(
    own: Engine, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def upgrade_first(connection: Connection) -> Inspector:
        monkeypatch.undo()
        with TaskRunHistory.connect(empty_database) as other:
            other.upgrade()
        return inspect(connection)

    monkeypatch.setattr(migrate, "inspect", upgrade_first)
    assert version(own) == SCHEMA_VERSION


def test_histories_upgrade_at_once_in_one_event_loop(databases: Databases, kind: str) -> None:
    shared = databases.empty(kind)
    urls = [shared, databases.empty(kind), shared]

    async def upgrade(url: str) -> int:
        async with AsyncTaskRunHistory.connect(url) as history:
            await history.upgrade()
            return (await history.open_run(f"job {id(history)}")).attempt

    async def scenario() -> list[int]:
        return await asyncio.wait_for(asyncio.gather(*map(upgrade, urls)), 60)

    assert asyncio.run(scenario()) == [1, 1, 1]
    assert not migrate.lock.locked()


def test_failed_upgrade_leaves_nothing_locked(databases: Databases) -> None:
    missing = make_url(databases.empty("sqlite")).set(database="/dev/null/nothing.db")
    with TaskRunHistory.connect(missing) as history, pytest.raises(OSError):
        history.upgrade()
    assert not migrate.lock.locked()
