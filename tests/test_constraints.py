"""What the database itself refuses and keeps, whoever writes."""

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, inspect, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from taskruns import TaskRun, TaskRunRow
from taskruns.schema import task_runs

ROW: dict[str, Any] = {
    "task_id": "job",
    "attempt": 1,
    "phase": "failed",
    "started_at": "2026-11-24 12:00:00.123456",
    "finished_at": "2026-11-24 12:00:01.000001",
    "error": "boom",
}
RUNNING = {"phase": "running", "finished_at": None, "error": None}


@pytest.fixture
def connection(database: str) -> Iterator[Connection]:
    engine = create_engine(database)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def put(connection: Connection, row: dict[str, Any]) -> None:
    columns = ", ".join(row)
    values = ", ".join(f":{name}" for name in row)
    connection.execute(text(f"INSERT INTO task_runs ({columns}) VALUES ({values})"), row)


@pytest.mark.parametrize(
    ("constraint", "change"),
    [
        ("attempt", {"attempt": 0}),
        ("attempt", {"attempt": -1}),
        ("attempt", {"attempt": 4294967296}),
        ("phase", {"phase": "pending"}),
        ("phase", {"phase": "FAILED"}),
        ("phase", {"phase": ""}),
        ("active", {"finished_at": None}),
        ("active", {"phase": "running", "error": None}),
        ("times", {"finished_at": "2026-11-24 12:00:00.123455"}),
        ("error", {"phase": "succeeded"}),
        ("error", {"phase": "running", "finished_at": None}),
    ],
)
def test_violation_in_raw_sql_is_refused(connection: Connection, constraint: str, change: dict[str, Any]) -> None:
    put(connection, ROW)
    connection.rollback()
    with pytest.raises((IntegrityError, OperationalError)) as caught:
        put(connection, ROW | change)
    assert f"ck_task_runs_{constraint}" in str(caught.value.orig)
    assert not isinstance(caught.value, OperationalError) or caught.value.orig.args[0] == 4025  # type: ignore[union-attr]  # the driver's


@pytest.mark.parametrize("column", ["task_id", "attempt", "phase", "started_at"])
def test_missing_value_is_refused(connection: Connection, column: str) -> None:
    with pytest.raises(DBAPIError, match=column):
        put(connection, ROW | {column: None})


def test_second_run_with_a_key_is_refused(connection: Connection) -> None:
    put(connection, ROW)
    put(connection, ROW | {"attempt": 2})
    put(connection, ROW | {"task_id": "JOB"})
    with pytest.raises(IntegrityError):
        put(connection, ROW | RUNNING)


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        ROW | RUNNING,
        ROW | {"attempt": 4294967295},
        ROW | {"finished_at": ROW["started_at"]},
        ROW | {"error": None},
        *(ROW | {"phase": phase} for phase in ("timeout", "canceled", "exhausted")),
        ROW | {"phase": "succeeded", "error": None},
    ],
)
def test_valid_row_is_accepted_and_is_not_recovered_unless_told(connection: Connection, row: dict[str, Any]) -> None:
    put(connection, row)
    assert connection.scalar(text("SELECT count(*) FROM task_runs WHERE NOT recovered")) == 1


def test_every_constraint_has_a_violation_above(connection: Connection) -> None:
    names = {constraint["name"] for constraint in inspect(connection).get_check_constraints("task_runs")}
    # MariaDB keeps a boolean as a number and needs no check for it.
    assert names == {f"ck_task_runs_{name}" for name in ("attempt", "phase", "active", "times", "error")}


def test_columns_keep_their_comments(connection: Connection) -> None:
    assert all(column.comment for column in task_runs.columns)
    inspector = inspect(connection)
    if connection.dialect.name == "sqlite":  # which has no comments
        return
    found = {column["name"]: column["comment"] for column in inspector.get_columns("task_runs")}
    assert found == {column.name: column.comment for column in task_runs.columns}
    assert inspector.get_table_comment("task_runs") == {"text": task_runs.comment}


def test_the_run_the_row_and_the_table_have_the_same_fields_in_order(connection: Connection) -> None:
    names = [field.name for field in fields(TaskRun)]
    assert [column.name for column in task_runs.columns] == names
    assert [attribute.key for attribute in inspect(TaskRunRow).column_attrs] == names
    assert [column["name"] for column in inspect(connection).get_columns("task_runs")] == names


def test_types_keep_microseconds_and_tell_bytes_apart(connection: Connection) -> None:
    kind = connection.dialect.name
    if kind == "sqlite":
        created = str(connection.scalar(text("SELECT sql FROM sqlite_master WHERE name = 'task_runs'")))
        assert created.rstrip().endswith("WITHOUT ROWID")
        assert "COLLATE" not in created
    elif kind == "postgresql":
        columns = text(
            "SELECT column_name, datetime_precision, data_type, collation_name FROM information_schema.columns"
            " WHERE table_name = 'task_runs'"
        )
        found = {row.column_name: row for row in connection.execute(columns)}
        for name in ("started_at", "finished_at"):
            assert (found[name].data_type, found[name].datetime_precision) == ("timestamp with time zone", 6)
        assert found["task_id"].collation_name == "C"
    else:
        created = str(connection.execute(text("SHOW CREATE TABLE task_runs")).one()[1])
        assert re.findall(r"`(\w+)` datetime\(6\)", created) == ["started_at", "finished_at"]
        assert "`error` mediumtext" in created
        assert "CHARSET=utf8mb4 COLLATE=utf8mb4_bin" in created
        assert "latin1" not in created
