"""Each reader that an index is kept for is served by it, and the others by the primary key."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from clients import BLOCKS
from sqlalchemy import Connection, Select, Table, create_engine, insert, select, text
from sqlalchemy.pool import NullPool

from taskruns import pruning_statements, schema, statements
from taskruns.model import TaskPhase
from taskruns.url import parse_url

RUNS = schema.task_runs.c
START = datetime(2026, 11, 17, 6, tzinfo=UTC)  # what follows goes on to 4:40 of the 24th
READERS: dict[str, tuple[Select[Any], dict[str, str]]] = {
    "a task's newest runs": (
        statements.runs("task 3", limit=50, before=900),
        {"sqlite": "PRIMARY KEY (task_id=? AND attempt<?)", "postgresql": "pk_task_runs", "mariadb": "PRIMARY"},
    ),
    "the last success of a task": (
        statements.runs("task 3", phases=[TaskPhase.SUCCEEDED], limit=1),
        {"sqlite": "PRIMARY KEY (task_id=?)", "postgresql": "pk_task_runs", "mariadb": "PRIMARY"},
    ),
    "the active runs": (
        statements.active_runs(),
        {"sqlite": "ix_task_runs_active", "postgresql": "ix_task_runs_active", "mariadb": "ix_task_runs_finished"},
    ),
    "how many are active": (
        statements.active_count(),
        {"sqlite": "ix_task_runs_active", "postgresql": "ix_task_runs_active", "mariadb": "ix_task_runs_finished"},
    ),
    "the oldest runs": (
        statements.oldest_runs(limit=100),
        dict.fromkeys(("sqlite", "postgresql", "mariadb"), "ix_task_runs_started"),
    ),
    "problems by finish time": (
        select(*statements.COLUMNS)
        .where(text(schema.IS_PROBLEM), RUNS.finished_at.is_not(None))
        .order_by(RUNS.finished_at.desc())
        .limit(50),
        {"sqlite": "ix_task_runs_problems", "postgresql": "ix_task_runs_problems", "mariadb": "ix_task_runs_finished"},
    ),
    "what a pass prunes next": (
        pruning_statements.runs_of_preceding_tasks("task 3", limit=500),
        {"sqlite": "PRIMARY KEY (task_id<?)", "postgresql": "pk_task_runs", "mariadb": "PRIMARY"},
    ),
    "what started first": (
        pruning_statements.runs_started(until=START + timedelta(days=3), limit=500),
        dict.fromkeys(("sqlite", "postgresql", "mariadb"), "ix_task_runs_started"),
    ),
    "what ran in a time window": (
        select(*statements.COLUMNS)
        .where(RUNS.started_at >= START + timedelta(hours=5), RUNS.started_at < START + timedelta(hours=6))
        .order_by(RUNS.started_at),
        dict.fromkeys(("sqlite", "postgresql", "mariadb"), "ix_task_runs_started"),
    ),
}


KEY = {"sqlite": "task_runs USING PRIMARY KEY (task_id=?", "postgresql": "pk_task_runs", "mariadb": "PRIMARY"}
STARTED = dict.fromkeys(("sqlite", "postgresql", "mariadb"), "ix_task_runs_started")
QUESTIONS = {
    "last": KEY,
    "running": dict(READERS["the active runs"][1]),
    "problems": dict(READERS["problems by finish time"][1]),
    "started": STARTED,
    "rates": STARTED,
    "streak": KEY | {"sqlite": "PRIMARY KEY (task_id=? AND attempt>?)"},
    "attempts": KEY,
    "exits": KEY,
    "longest": KEY,
    "tasks": {"mariadb": "Using index for group-by"},
}
"""Those of docs/sql.md that are said to be served by an index or the key."""


def fill(connection: Connection, table: Table) -> None:
    def run(number: int) -> dict[str, object]:
        started_at = START + timedelta(seconds=30 * number)
        phase = "running" if number % 500 == 499 else "failed" if number % 20 == 0 else "succeeded"
        return {
            "task_id": f"task {number % 20}",
            "attempt": number // 20 + 1,
            "phase": phase,
            "started_at": started_at,
            "finished_at": None if phase == "running" else started_at + timedelta(seconds=2),
        }

    connection.execute(insert(table), [run(number) for number in range(20_000)])


def plan(connection: Connection, query: Select[Any] | str) -> str:
    keyword = "EXPLAIN QUERY PLAN" if connection.dialect.name == "sqlite" else "EXPLAIN"
    if not isinstance(query, str):
        query = str(query.compile(connection, compile_kwargs={"literal_binds": True}))
    rows = connection.exec_driver_sql(f"{keyword} {query}".replace("%", "%%"))
    return "\n".join(" ".join(map(str, row)) for row in rows)


def asked(name: str) -> str:
    return BLOCKS[name].strip().replace("'backup'", "'task 3'")


def test_every_reader_has_its_index(database: str) -> None:
    url = parse_url(database)
    kind = {"mysql": "mariadb"}.get(url.get_backend_name(), url.get_backend_name())
    with create_engine(url, poolclass=NullPool).connect() as connection:
        fill(connection, schema.task_runs)
        connection.commit()
        connection.exec_driver_sql("ANALYZE TABLE task_runs" if kind == "mariadb" else "ANALYZE task_runs")
        connection.commit()
        plans = {reader: plan(connection, query) for reader, (query, _) in READERS.items()}
        plans |= {name: plan(connection, asked(name)) for name in QUESTIONS}
    wanted = {reader: indexes for reader, (_, indexes) in READERS.items()} | QUESTIONS
    wrong = {reader: found for reader, found in plans.items() if wanted[reader].get(kind, "") not in found}
    assert not wrong


@pytest.mark.parametrize("phases", ["phase = 'failed'", "phase IN ('timeout', 'failed', 'exhausted')"])
def test_sqlite_needs_the_very_condition_of_its_index(phases: str) -> None:
    with create_engine("sqlite://").connect() as connection:
        schema.metadata.create_all(connection)
        assert "ix_task_runs_problems" not in plan(connection, select(RUNS.attempt).where(text(phases)))
        both = select(RUNS.attempt).where(text(schema.IS_PROBLEM), text(phases))
        assert "ix_task_runs_problems" in plan(connection, both)
