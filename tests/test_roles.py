"""The roles of docs/operations.md do what they are for, and nothing else."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import URL, Connection, create_engine, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from taskruns import TaskPhase, TaskRunHistory

SUFFIX = f"_{os.getpid()}"


def documented(kind: str, root: Path) -> list[str]:
    text = (root / "docs/operations.md").read_text(encoding="utf-8")
    block = re.search(rf"```sql {kind}\n(.*?)```", text, re.DOTALL)
    assert block is not None
    script = re.sub(r"taskruns_(writer|reader)", rf"taskruns_\1{SUFFIX}", block[1])
    return [statement for statement in script.split(";") if statement.strip()]


@contextmanager
def owner(url: URL) -> Iterator[Connection]:
    with create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT").connect() as connection:
        yield connection


@pytest.fixture
def roles(request: pytest.FixtureRequest, repository_root: Path) -> Iterator[URL]:
    url = make_url(request.getfixturevalue(request.param))
    statements = documented(request.param, repository_root)
    host = "@'%'" if request.param == "mariadb" else ""
    names = [f"taskruns_{role}{SUFFIX}" for role in ("writer", "reader")]
    with owner(url) as connection:
        for statement in statements:
            local = statement.replace("history.", f"{url.database}.").replace("@localhost", host)
            connection.exec_driver_sql(local.replace("%", "%%"))
        yield url
        for name in names:
            if request.param == "postgresql":
                connection.exec_driver_sql(f"DROP OWNED BY {name}")
                connection.exec_driver_sql(f"DROP ROLE {name}")
            else:
                connection.exec_driver_sql(f"DROP USER {name}{host}".replace("%", "%%"))


def as_role(url: URL, role: str) -> TaskRunHistory:
    return TaskRunHistory.connect(url.set(username=f"taskruns_{role}{SUFFIX}", password=None))


@pytest.mark.parametrize("roles", ["postgresql", "mariadb"], indirect=True)
def test_writer_records_and_has_no_other_right(roles: URL) -> None:
    with as_role(roles, "writer") as history:
        run = history.open_run("job")
        assert history.close_run("job", run.attempt, TaskPhase.FAILED, error="e").phase is TaskPhase.FAILED
        with history.begin(lock="job") as runs:
            runs.open_run("job")
        assert [run.attempt for run in history.iter_runs("job")] == [2, 1]
        assert [run.task_id for run in history.tasks()] == ["job"]
        for forbidden in ("DROP TABLE task_runs", "DELETE FROM task_runs", "ALTER TABLE task_runs ADD x integer"):
            with history._engine.connect() as connection, pytest.raises(DBAPIError):
                connection.exec_driver_sql(forbidden)


@pytest.mark.parametrize("roles", ["postgresql", "mariadb"], indirect=True)
def test_reader_reads_and_cannot_write(roles: URL) -> None:
    with as_role(roles, "writer") as history:
        history.open_run("job")
    with as_role(roles, "reader") as history:
        assert [run.attempt for run in history.runs("job").runs] == [1]
        assert len(history.active_runs()) == len(history.tasks()) == 1
        with pytest.raises(DBAPIError):
            history.open_run("job")
        with pytest.raises(DBAPIError):
            history.close_run("job", 1, TaskPhase.SUCCEEDED)
