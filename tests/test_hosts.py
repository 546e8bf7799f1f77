"""Questions on the connections of a host, whose engine is as it has made it, and of those who only read."""

import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from histories import Histories
from sqlalchemy import create_engine, event, literal, make_url, select
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from taskruns import (
    PROBLEMS,
    RunExistsError,
    RunFilter,
    RunOrder,
    Span,
    TaskPhase,
    TaskRun,
    TaskRunHistory,
    TaskRunRepository,
    Window,
)

NOON = datetime(2026, 11, 24, 12, 0, 0, 999_500, tzinfo=UTC)
PAST = Window(NOON - timedelta(days=1), NOON + timedelta(days=1))
BERLIN = ZoneInfo("Europe/Berlin")
RUNS = [
    *(
        TaskRun(f"job {n % 4}%", n, list(PROBLEMS)[n % 3], NOON, NOON + timedelta(microseconds=n), error="100%\\")
        for n in range(1, 30)
    ),
    TaskRun("job 1%", 90, TaskPhase.SUCCEEDED, NOON, NOON + timedelta(seconds=1), exit_code=0),
    TaskRun("é", 1, TaskPhase.RUNNING, NOON.replace(microsecond=0)),
]
QUESTIONS: list[Callable[[Any], Any]] = [
    lambda runs: runs.get_run("job 1%", 90),
    lambda runs: runs.last_run("job 1%", phases=PROBLEMS),
    lambda runs: runs.last_run("job 1%", phases=TaskPhase.SUCCEEDED),
    lambda runs: runs.runs(limit=7),
    lambda runs: runs.runs(limit=7, after=runs.runs(limit=7).next_cursor),
    lambda runs: runs.runs(RunFilter(task_glob="job [12]%*", started=PAST, error="%\\"), order=RunOrder.LONGEST),
    lambda runs: runs.runs(RunFilter(finished=PAST, min_duration=timedelta(microseconds=9)), phases=PROBLEMS),
    lambda runs: runs.count_runs(RunFilter(recovered=False, active=False, task_glob="*%")),
    lambda runs: runs.active_runs(),
    lambda runs: runs.tasks(),
    lambda runs: runs.summaries("*%", window=PAST, stale_after=timedelta(days=9)),
    lambda runs: runs.stats(by=Span.HOUR, zone=BERLIN),
    lambda runs: runs.stats("job 1%", by=Span.DAY, zone=BERLIN),
]
ENGINES: dict[str, list[dict[str, Any]]] = {
    "sqlite": [
        {},
        {"native_datetime": True, "connect_args": {"detect_types": sqlite3.PARSE_DECLTYPES | sqlite3.PARSE_COLNAMES}},
        {"isolation_level": "AUTOCOMMIT"},
    ],
    "postgresql": [
        {},
        {"connect_args": {"options": "-c timezone=Asia/Kolkata", "prepare_threshold": 0}},
        {"isolation_level": "SERIALIZABLE"},
        {"isolation_level": "AUTOCOMMIT", "poolclass": NullPool},
    ],
    "mariadb": [
        {},
        {"connect_args": {"init_command": "SET time_zone = '+05:30', sql_mode = 'ANSI_QUOTES,NO_BACKSLASH_ESCAPES'"}},
        {"isolation_level": "SERIALIZABLE"},
    ],
}


@pytest.fixture(params=[0, 5000], ids=["there", "here"])
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have statistics made by the database, and here."""
    monkeypatch.setattr("taskruns.reading.FEW", request.param)


@pytest.fixture
def answers(database: str) -> list[Any]:
    """What a history of our own answers."""
    with TaskRunHistory.connect(database) as history:
        history.add_runs(RUNS)
        return [question(history) for question in QUESTIONS]


@pytest.mark.usefixtures("few")
def test_a_hosts_connection_has_the_same_answers(kind: str, database: str, answers: list[Any]) -> None:
    for options in ENGINES[kind]:
        engine = create_engine(database, **options)
        with engine.connect() as connection:
            repository = TaskRunRepository(connection)
            assert [question(repository) for question in QUESTIONS] == answers, options
        engine.dispose()


def test_a_hosts_transaction_sees_what_it_has_written(database: str, answers: list[Any]) -> None:
    engine = create_engine(database)
    with Session(engine) as session:
        repository = TaskRunRepository(session.connection())
        run = repository.open_run("é", started_at=NOON)
        assert (repository.last_run("é"), repository.count_runs("é")) == (run, 2)
        assert repository.stats("é").runs == repository.summaries("é")[0].stats.runs == 2
        session.rollback()
        repository = TaskRunRepository(session.connection())
        assert [question(repository) for question in QUESTIONS] == answers
    engine.dispose()


def test_our_own_transaction_sees_what_it_has_written(database: str, histories: Histories, answers: list[Any]) -> None:
    history = histories.connect(database)
    with pytest.raises(RuntimeError), history.begin() as runs:  # noqa: PT012  (a transaction)
        runs.open_run("é", started_at=NOON)
        assert (runs.count_runs("é"), len(runs.active_runs()), runs.stats("é").runs) == (2, 2, 2)
        raise RuntimeError
    assert [question(history) for question in QUESTIONS] == answers


def test_a_host_may_watch_its_statements(database: str, answers: list[Any]) -> None:
    seen = []
    engine = create_engine(database)
    event.listen(engine, "before_cursor_execute", lambda *arguments: seen.append(arguments[2]))
    with engine.connect() as connection:
        assert TaskRunRepository(connection).get_run("job 1%", 90) == answers[0]
    engine.dispose()
    assert "task_runs" in seen[-1]


def test_citus_has_the_same_answers(postgresql: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with TaskRunHistory.connect(postgresql) as history:
        history.add_runs(RUNS)
        answers = [question(history) for question in QUESTIONS]
    monkeypatch.setattr("taskruns.task_statements.citus", lambda: select(literal(1)))
    with TaskRunHistory.connect(postgresql) as history:
        assert [question(history) for question in QUESTIONS] == answers


def test_who_only_reads_has_the_same_answers(database: str, histories: Histories, answers: list[Any]) -> None:
    history = histories.connect(database, read_only=True)
    assert [question(history) for question in QUESTIONS] == answers


@pytest.mark.parametrize("mode", ["mode=ro", "mode=ro&immutable=1"])
def test_a_hosts_read_only_file_has_the_same_answers(sqlite: str, mode: str) -> None:
    path = Path(str(make_url(sqlite).database))
    with TaskRunHistory.connect(sqlite) as history:
        history.add_runs(RUNS)
        answers = [question(history) for question in QUESTIONS]
    engine = create_engine(f"sqlite:///file:{path}?{mode}&uri=true")
    with engine.connect() as connection:
        repository = TaskRunRepository(connection)
        assert [question(repository) for question in QUESTIONS] == answers
    engine.dispose()


def test_hosts_schema_is_the_one_that_is_read(postgresql: str) -> None:
    engine = create_engine(make_url(postgresql).set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA tenant")
        connection.exec_driver_sql("CREATE TABLE tenant.task_runs (LIKE task_runs INCLUDING ALL)")
    with engine.connect().execution_options(schema_translate_map={None: "tenant"}) as connection, connection.begin():
        runs = TaskRunRepository(connection)
        runs.open_run("job")
        assert runs.get_run("job", 1) == runs.last_run("job") == runs.runs().runs[0]
        assert runs.stats().runs == 1
    with engine.begin() as connection:
        assert TaskRunRepository(connection).runs().runs == []
        connection.exec_driver_sql("DROP SCHEMA tenant CASCADE")
    engine.dispose()


def test_durations_are_not_of_the_clocks_of_a_sessions_zone(postgresql: str) -> None:
    hour = timedelta(hours=1)
    changes = [datetime(2026, 3, 29, 0, 30, tzinfo=UTC), datetime(2026, 10, 25, 0, 30, tzinfo=UTC)]
    with TaskRunHistory.connect(postgresql) as history:
        history.add_runs(
            [TaskRun("job", n, TaskPhase.SUCCEEDED, start, start + hour) for n, start in enumerate(changes, 1)]
        )
    url = make_url(postgresql).set(drivername="postgresql+psycopg")
    engine = create_engine(url, connect_args={"options": "-c timezone=Europe/Berlin"})
    with engine.connect() as connection:
        duration = TaskRunRepository(connection).stats("job").duration
    engine.dispose()
    assert duration is not None
    assert (duration.min, duration.max) == (hour, hour)


def test_host_reads_tables_that_are_not_brought_up_to_date(sqlite: str) -> None:
    engine = create_engine(sqlite)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP INDEX ix_task_runs_problems_of_task")
        runs = TaskRunRepository(connection)
        runs.open_run("job")
        failed = runs.close_run("job", 1, TaskPhase.FAILED, error="x")
        assert runs.runs("job", phases=PROBLEMS).runs == [failed]
    engine.dispose()


def test_numbered_start_is_refused_on_a_connection_of_a_host_too(database: str) -> None:
    engine = create_engine(database)
    with engine.begin() as connection:
        runs = TaskRunRepository(connection)
        run = runs.open_run("job", attempt=5, started_at=NOON)
        assert runs.open_run("job", attempt=5, started_at=NOON) == run
        with pytest.raises(RunExistsError):
            runs.open_run("job", attempt=5, started_at=NOON + timedelta(seconds=1))
    engine.dispose()


def test_statements_are_the_same_where_sqlalchemy_logs_them(database: str, caplog: pytest.LogCaptureFixture) -> None:
    with TaskRunHistory.connect(database) as history, caplog.at_level("INFO", logger="sqlalchemy.engine.Engine"):
        run = history.open_run("job", attempt=5, started_at=NOON)
        with pytest.raises(RunExistsError):
            history.open_run("job", attempt=5)
        assert history.close_run("job", 5, TaskPhase.SUCCEEDED) == history.get_run("job", 5)
    assert run.is_active
    assert "INSERT INTO task_runs" in caplog.text
