"""Each reader that an index is kept for is served by it, and the others by the primary key."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from clients import BLOCKS
from sqlalchemy import Connection, Select, Table, TextClause, create_engine, insert, select, text

from taskruns import (
    PROBLEMS,
    RunFilter,
    RunOrder,
    TaskPhase,
    TaskRun,
    Window,
    batches,
    engine,
    pruning_statements,
    schema,
    statements,
)
from taskruns.batches import Batch
from taskruns.following import PAGE
from taskruns.model import Outcome
from taskruns.prepared import Prepared, prepared
from taskruns.query_statements import question_of, runs, starts
from taskruns.url import parse_url
from taskruns.writing import Start

RUNS = schema.task_runs.c
START = datetime(2026, 11, 17, 6, tzinfo=UTC)  # what follows goes on to 4:40 of the 24th
START_OF_HOUR = START + timedelta(hours=5)
HOUR = Window(START_OF_HOUR, START_OF_HOUR + timedelta(hours=1))
PRIMARY_KEY = {"sqlite": "PRIMARY KEY (task_id=?", "postgresql": "pk_task_runs", "mariadb": "PRIMARY"}
BY_START = dict.fromkeys(("sqlite", "postgresql", "mariadb"), "ix_task_runs_started")
BY_END = dict.fromkeys(("sqlite", "postgresql"), "ix_task_runs_problems ") | {"mariadb": "ix_task_runs_finished"}
# So few problems are found by either of their indexes on PostgreSQL.
OF_TASK = {"sqlite": "problems_of_task", "postgresql": "ix_task_runs_problems", "mariadb": "PRIMARY"}
ACTIVE = dict.fromkeys(("sqlite", "postgresql"), "ix_task_runs_active") | {"mariadb": "ix_task_runs_finished"}

LAST = PRIMARY_KEY | {"postgresql": "Backward using pk_task_runs", "mariadb": "Select tables optimized away"}

QUESTIONS: dict[str, tuple[RunFilter, dict[str, str]]] = {
    "a task's newest runs": (RunFilter("task 3"), PRIMARY_KEY),
    "the last success of a task": (RunFilter("task 3", phases=TaskPhase.SUCCEEDED), PRIMARY_KEY),
    "the problems of a task": (RunFilter("task 3", phases=PROBLEMS), OF_TASK),
    "the failures of a task": (RunFilter("task 3", phases=TaskPhase.FAILED), OF_TASK),
    "the active runs": (RunFilter(active=True), ACTIVE),
    "the newest of all": (RunFilter(), BY_START),
    "what ran in a time window": (RunFilter(started=HOUR), BY_START),
    "what matches in a time window": (RunFilter(task_glob="task*", started=HOUR, exit_code=3), BY_START),
    "an error in a time window": (RunFilter(started=HOUR, error="disk"), BY_START),
    "the newest problems": (RunFilter(phases=PROBLEMS), BY_END),
    "problems by finish time": (RunFilter(phases=PROBLEMS, finished=HOUR), BY_END),
    "timeouts of a task pattern": (RunFilter(task_glob="task*", phases=TaskPhase.TIMEOUT), BY_END),
}
STEPS = {
    (wanted, are_active): ACTIVE if are_active else BY_START
    for wanted in (RunFilter(), RunFilter("task 3"), RunFilter(task_glob="task*"))
    for are_active in (False, True)
}
"""What those ask who follow runs."""
READERS: dict[str, tuple[Select[Any], dict[str, str]]] = {
    "how many are active": (
        statements.active_count(),
        {"sqlite": "ix_task_runs_active", "postgresql": "ix_task_runs_active", "mariadb": "ix_task_runs_finished"},
    ),
    "the oldest runs": (
        statements.oldest_runs(limit=100),
        dict.fromkeys(("sqlite", "postgresql", "mariadb"), "ix_task_runs_started"),
    ),
    "what a pass prunes next": (
        pruning_statements.runs_of_preceding_tasks("task 3", limit=500),
        {"sqlite": "PRIMARY KEY (task_id<?)", "postgresql": "pk_task_runs", "mariadb": "PRIMARY"},
    ),
    "what started first": (
        pruning_statements.runs_started(until=START + timedelta(days=3), limit=500),
        dict.fromkeys(("sqlite", "postgresql", "mariadb"), "ix_task_runs_started"),
    ),
}
DOCUMENTED = {
    "last": PRIMARY_KEY,
    "running": ACTIVE,
    "problems": BY_END,
    "started": BY_START,
    "rates": BY_START,
    "streak": PRIMARY_KEY | {"sqlite": "(task_id=? AND attempt>?)"},
    "attempts": PRIMARY_KEY,
    "exits": PRIMARY_KEY,
    "longest": PRIMARY_KEY,
    "tasks": {"mariadb": "Using index for group-by"},
}
"""Those of docs/sql.md that are said to be served by an index or the key."""


def fill(connection: Connection, table: Table) -> None:
    def run(number: int) -> dict[str, object]:
        started_at = START + timedelta(seconds=30 * number)
        phase = "running" if number % 500 == 499 else "failed" if number % 19 == 0 else "succeeded"
        return {
            "task_id": f"task {number % 20}",
            "attempt": number // 20 + 1,
            "phase": phase,
            "started_at": started_at,
            "finished_at": None if phase == "running" else started_at + timedelta(seconds=2),
        }

    with engine.transaction(connection):
        connection.execute(insert(table), [run(number) for number in range(20_000)])


def plan(connection: Connection, query: Select[Any] | str) -> str:
    keyword = "EXPLAIN QUERY PLAN" if connection.dialect.name == "sqlite" else "EXPLAIN"
    if not isinstance(query, str):
        query = str(query.compile(connection, compile_kwargs={"literal_binds": True}))
    rows = connection.exec_driver_sql(f"{keyword} {query}".replace("%", "%%"))
    return "\n".join(" ".join([*map(str, row), ""]) for row in rows)


def explained(connection: Connection, wanted: RunFilter, order: RunOrder, *, is_following: bool) -> str:
    question, values = question_of(wanted, connection.dialect.name)
    query = runs(question, order, is_following, False, 51, connection.dialect.name)
    place = {"at_time": START_OF_HOUR + timedelta(minutes=20), "at_task": "task 3", "at_attempt": 400}
    return prepared_plan(connection, query, {**values, **place})


def plan_of_step(connection: Connection, wanted: RunFilter, *, are_active: bool) -> str:
    question, values = question_of(wanted, connection.dialect.name)
    since = START if are_active else START + timedelta(seconds=30 * 20_000 - 10)
    place = {"at_time": since, "at_task": "", "at_attempt": 0}
    query = starts(question, are_active, PAGE, connection.dialect.name)
    return prepared_plan(connection, query, {**values, **place})


def prepared_plan(connection: Connection, query: Select[Any] | TextClause, values: dict[str, Any]) -> str:
    statement = Prepared(query, connection.dialect)
    statement.text = f"{'EXPLAIN QUERY PLAN' if connection.dialect.name == 'sqlite' else 'EXPLAIN'} {statement.text}"
    return "\n".join(" ".join([*map(str, row), ""]) for row in statement.fetch(connection, values))


def plan_of_moments(connection: Connection) -> str:
    query = statements.runs_started_at(connection.dialect.name)
    moments = {"moments": [START_OF_HOUR + timedelta(seconds=number) for number in range(500)]}
    if connection.dialect.name == "postgresql":
        return prepared_plan(connection, query, moments)
    return plan(connection, query.params(moments))


def asked(name: str) -> str:
    return BLOCKS[name].strip().replace("'backup'", "'task 3'")


def test_every_reader_has_its_index(database: str) -> None:
    url = parse_url(database)
    kind = {"mysql": "mariadb"}.get(url.get_backend_name(), url.get_backend_name())
    plans: dict[str, tuple[str, str]] = {}
    own = engine.create(url)
    with own.connect() as connection:
        fill(connection, schema.task_runs)
        connection.commit()
        for has_statistics in (False, True):
            if has_statistics:
                connection.exec_driver_sql("ANALYZE TABLE task_runs" if kind == "mariadb" else "ANALYZE task_runs")
                connection.commit()
            elif kind != "sqlite":  # a server makes its statistics by itself, sooner or later
                continue
            for reader, (wanted, index) in QUESTIONS.items():
                for order in (RunOrder.NEWEST, RunOrder.OLDEST):
                    for is_following in (False, True):
                        found = explained(connection, wanted, order, is_following=is_following)
                        plans[f"{reader}, {order}, {is_following=}, {has_statistics=}"] = (found, index[kind])
            for (wanted, are_active), index in STEPS.items():
                found = plan_of_step(connection, wanted, are_active=are_active)
                plans[f"a step, {wanted}, {are_active=}, {has_statistics=}"] = (found, index[kind])
            for reader, (query, index) in READERS.items():
                plans[f"{reader}, {has_statistics=}"] = (plan(connection, query), index[kind])
            plans[f"what may be there already, {has_statistics=}"] = (plan_of_moments(connection), BY_START[kind])
            last = prepared_plan(connection, statements.last_of_each(1), {"task_0": "task 3"})
            plans[f"the last number, {has_statistics=}"] = (last, LAST[kind])
        for name, indexes in DOCUMENTED.items():
            plans[name] = (plan(connection, asked(name)), indexes.get(kind, ""))
    own.dispose()
    wrong = {reader: found for reader, (found, wanted) in plans.items() if wanted not in found}
    assert not wrong


@pytest.mark.parametrize("phases", ["phase = 'failed'", "phase IN ('timeout', 'failed', 'exhausted')"])
def test_sqlite_needs_the_very_condition_of_its_index(phases: str) -> None:
    with create_engine("sqlite://").connect() as connection:
        schema.metadata.create_all(connection)
        assert "ix_task_runs_problems" not in plan(connection, select(RUNS.attempt).where(text(phases)))
        both = select(RUNS.attempt).where(text(schema.IS_PROBLEM), text(phases))
        assert "ix_task_runs_problems" in plan(connection, both)


def test_a_start_takes_sqlite_as_many_steps_whatever_the_task_has_run() -> None:
    own = engine.create("sqlite://")
    steps = []
    with own.connect() as connection:
        schema.metadata.create_all(connection)
        connection.commit()
        fill(connection, schema.task_runs)
        driver: Any = connection.connection.driver_connection
        for task_id in ("task 3", "a new task"):
            opening = prepared(connection.dialect, statements.open_next, "sqlite")
            start = Start.of(task_id, None, START, None, None, None)
            taken: list[None] = []
            driver.set_progress_handler(lambda taken=taken: taken.append(None), 1)
            opening.fetch(connection, start.parameters())
            driver.set_progress_handler(None, 1)
            steps.append(len(taken))
    own.dispose()
    assert steps[0] == pytest.approx(steps[1], abs=50)  # of 1,000 runs and of none


BATCHES: dict[str, list[Callable[[], TextClause]]] = {
    "sqlite": [batches._open_sqlite, batches._close_sqlite],
    "postgresql": [batches._open_postgresql, batches._close_postgresql, batches._both],
    "mariadb": [batches._open_mariadb, batches._close_counted],
}
SCANS = {"sqlite": "SCAN task_runs", "postgresql": "Seq Scan on task_runs", "mariadb": "run ALL "}


def test_a_batch_finds_its_runs_by_their_key(kind: str, database: str) -> None:
    batch = Batch()
    for number in range(64):
        batch.starts.append(Start.of(f"task {number}", None, START, None, None, None))
        ended = TaskRun.starting(f"task {number % 20}", number // 20 + 900, started_at=START)
        batch.ends.append((ended, Outcome.of(TaskPhase.FAILED, error=None, exit_code=1, finished_at=None)))
    plans: dict[str, str] = {}
    own = engine.create(database)
    with own.connect() as connection:
        backend = connection.dialect.name
        values = {"starts": batch._starts(backend), "ends": batch._ends(backend)}
        fill(connection, schema.task_runs)
        connection.commit()
        for has_statistics in (False, True):
            if has_statistics:
                connection.exec_driver_sql("ANALYZE TABLE task_runs" if kind == "mariadb" else "ANALYZE task_runs")
                connection.commit()
            for build in BATCHES[kind]:
                query = build()
                needed = {name: values[name] for name in query.compile().params}
                plans[f"{build.__name__}, {has_statistics=}"] = prepared_plan(connection, query, needed)
    own.dispose()
    assert not {name: found for name, found in plans.items() if PRIMARY_KEY[kind] not in found or SCANS[kind] in found}
