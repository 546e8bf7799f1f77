"""The statements of docs/sql.md, run in each database's own client, make runs like those of the library."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from clients import BLOCKS, TEXT, Client, RefusedError, of_time
from writers import Writer

from taskruns import RunClosedError, RunExistsError, TaskPhase, TaskRun, TaskRunHistory, schema

TASK = "it's 50 % 'Zürich'\\n"  # what would break out of a quotation
START = datetime(2026, 11, 24, 12, 0, 0, 123456, UTC)
END = START + timedelta(hours=1, microseconds=1)
ERROR = 'disk "full" at C:\\temp\n-- \N{SNOWMAN} \N{PILE OF POO}; it\'s'


@pytest.fixture
def client(kind: str, database: str) -> Client:
    return Client(kind, database)


@pytest.fixture
def library(database: str) -> Iterator[TaskRunHistory]:
    with TaskRunHistory.connect(database, source="library") as history:
        yield history


def test_run_is_what_was_written(client: Client, library: TaskRunHistory) -> None:
    assert client.open(TASK, started_at=START) == 1
    running = TaskRun(TASK, 1, TaskPhase.RUNNING, START, source="shell")
    assert library.get_run(TASK, 1) == running
    assert client.close(TASK, 1, "failed", error=ERROR, exit_code=139, finished_at=END)
    closed = running.finish(TaskPhase.FAILED, error=ERROR, exit_code=139, finished_at=END)
    assert library.get_run(TASK, 1) == closed
    assert closed.duration == timedelta(hours=1, microseconds=1)
    assert client.open(TASK, started_at=START) == 2
    assert client.close(TASK, 2, "succeeded", exit_code=0, finished_at=END)
    assert library.last_run(TASK) == TaskRun(
        TASK, 2, TaskPhase.SUCCEEDED, START, finished_at=END, exit_code=0, source="shell"
    )


def test_the_database_has_the_time(client: Client, library: TaskRunHistory) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    client.open("job")
    [started_at] = client.run("SELECT started_at FROM task_runs;")
    client.close("job", 1, "canceled")
    [finished_at] = client.run("SELECT finished_at FROM task_runs;")
    run = library.get_run("job", 1)
    assert run is not None
    assert run.finished_at is not None
    assert before <= run.started_at <= run.finished_at <= datetime.now(UTC)
    for moment, written in ((run.started_at, started_at), (run.finished_at, finished_at)):
        told = datetime.fromisoformat(written)
        assert moment == (told if told.tzinfo else told.replace(tzinfo=UTC))
        if client.kind == "sqlite":
            assert written == of_time(moment, "sqlite")
        else:
            assert moment.microsecond


def test_texts_of_sqlite_sort_with_those_of_the_library(sqlite: str) -> None:
    client = Client("sqlite", sqlite)
    with TaskRunHistory.connect(sqlite) as history:
        for _ in range(3):
            history.open_run("job")
            client.open("job")
        runs = sorted(history.all_runs("job"), key=lambda run: run.started_at)
        assert [run.attempt for run in runs] == [1, 2, 3, 4, 5, 6]
        order = client.run("SELECT attempt FROM task_runs ORDER BY started_at;")
        assert order == ["1", "2", "3", "4", "5", "6"]
    lengths = client.run("SELECT DISTINCT length(started_at), typeof(started_at) FROM task_runs;")
    assert lengths == ["26|text"]


def test_end_before_the_start_is_clamped(client: Client, library: TaskRunHistory) -> None:
    client.open("job", started_at=END)
    assert client.close("job", 1, "succeeded", finished_at=START)
    assert [run.duration for run in library.runs("job").runs] == [timedelta(0)]


def test_library_and_client_close_what_the_other_opened(client: Client, library: TaskRunHistory) -> None:
    assert client.open("job") == 1
    assert library.open_run("job").attempt == 2
    assert client.open("job") == 3
    assert library.close_run("job", 1, TaskPhase.TIMEOUT, error="late", exit_code=124).error == "late"
    assert client.close("job", 2, "timeout", error="late", exit_code=124)
    first, second = (library.get_run("job", attempt) for attempt in (1, 2))
    assert first is not None
    assert second is not None
    assert (first.phase, first.error, first.exit_code) == (second.phase, second.error, second.exit_code)
    assert [run.attempt for run in library.active_runs("job")] == [3]
    with pytest.raises(RunClosedError):
        library.close_run("job", 2, TaskPhase.SUCCEEDED)


def test_second_close_changes_nothing(client: Client, library: TaskRunHistory) -> None:
    client.open("job")
    assert client.close("job", 1, "failed", error="first", exit_code=1)
    stored = library.get_run("job", 1)
    assert not client.close("job", 1, "succeeded")
    assert not client.close("job", 1, "failed", error="first", exit_code=1)
    assert not client.close("job", 2, "succeeded")
    assert not client.close("JOB", 1, "succeeded")
    assert list(library.iter_runs("job")) == [stored]
    assert library.close_run("job", 1, TaskPhase.FAILED, error="first", exit_code=1) == stored


def test_inferred_outcome_gives_way(client: Client, library: TaskRunHistory) -> None:
    client.open("job", started_at=START)
    client.run("UPDATE task_runs SET phase = 'failed', finished_at = started_at, recovered = NOT recovered;")
    assert client.close("job", 1, "succeeded", finished_at=END)
    run = library.get_run("job", 1)
    assert run is not None
    assert (run.phase, run.finished_at, run.recovered) == (TaskPhase.SUCCEEDED, END, False)


def test_known_number_and_the_same_start_told_twice(client: Client, library: TaskRunHistory) -> None:
    values = {"task": TASK, "source": "shell", "attempt": 7, "started_at": START}
    client.run("numbered", **values)
    assert library.open_run(TASK, attempt=7, started_at=START).started_at == START
    with pytest.raises(RunExistsError):
        library.open_run(TASK, attempt=7, started_at=END)
    if client.kind == "mariadb":
        with pytest.raises(RefusedError, match=r"ERROR 1062 .*PRIMARY"):
            client.run("numbered", **values)
    else:
        assert client.run("numbered", **values) == []
    assert client.run("same", **values) == ["t" if client.kind == "postgresql" else "1"]
    assert client.run("same", **values | {"started_at": END}) == ["f" if client.kind == "postgresql" else "0"]
    assert client.open(TASK) == 8


def test_failure_is_refined_upwards_only(client: Client, library: TaskRunHistory) -> None:
    def outcome() -> tuple[Any, ...]:
        run = library.get_run("job", 1)
        assert run is not None
        return run.phase, run.error, run.exit_code, run.finished_at

    key = {"task": "job", "attempt": 1}
    client.open("job", started_at=START)
    client.run("exhausted", **key, error="too early", exit_code=1)
    assert outcome() == ("running", None, None, None)
    client.close("job", 1, "failed", error="no", finished_at=END)
    client.run("exhausted", **key, error="no more", exit_code=1)
    assert outcome() == ("exhausted", "no", 1, END)
    client.run("timeout", **key, error="late", exit_code=124)
    assert outcome() == ("timeout", "late", 124, END)
    client.run("exhausted", **key, error="no more", exit_code=1)
    assert outcome() == ("timeout", "late", 124, END)


VALUES = {"task": "job", "attempt": 1, "source": "shell", "started_at": START}


@pytest.mark.parametrize(
    ("constraint", "script", "change"),
    [
        ("attempt", "numbered", {"attempt": 0}),
        ("attempt", "numbered", {"attempt": 2**32}),
        ("phase", "close", {"phase": "done"}),
        ("phase", "close", {"phase": "pending"}),
        ("active", "close", {"phase": "running"}),
        ("active", "UPDATE task_runs SET phase = 'succeeded';", {}),
        ("times", "UPDATE task_runs SET phase = 'failed', finished_at = '2026-01-01 00:00:00.000000';", {}),
        ("error", "close", {"phase": "succeeded", "error": "e"}),
        ("error", "UPDATE task_runs SET error = 'e';", {}),
    ],
)
def test_constraint_names_what_it_refuses(
    client: Client, library: TaskRunHistory, constraint: str, script: str, change: dict[str, Any]
) -> None:
    client.run("numbered", **VALUES)
    with pytest.raises(RefusedError, match=f"ck_task_runs_{constraint}"):
        client.run(script, **VALUES | change)
    assert [run.is_active for run in library.runs("job").runs] == [True]
    assert f"`ck_task_runs_{constraint}`" in TEXT


def test_server_refuses_what_is_too_long(client: Client) -> None:
    too_long = VALUES | {"source": "s" * 256}
    if client.kind == "sqlite":
        client.run("numbered", **too_long)  # so it is the writer's to check
        return
    with pytest.raises(RefusedError, match=r"22001|ERROR 1406"):
        client.run("numbered", **too_long)


def test_document_tells_of_every_column_and_phase() -> None:
    told = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    phases = [phase.value for phase in TaskPhase if phase is not TaskPhase.PENDING]
    assert sorted(told[:13]) == sorted(field.name for field in fields(TaskRun))
    assert sorted(told[13:19]) == sorted(phases)
    supervisors = re.findall(r"^\| `(\w+)` \| (.*) \|", TEXT[TEXT.index("### Supervisors") :], re.MULTILINE)
    assert supervisors == [(column.name, column.comment) for column in schema.supervisors.c]


def test_a_task_ends_at_the_highest_number(client: Client) -> None:
    client.run("numbered", **VALUES | {"attempt": 2**32 - 1})
    with pytest.raises(RefusedError, match="ck_task_runs_attempt"):
        client.open("job")


def test_key_is_named_as_the_document_says(client: Client) -> None:
    client.run("numbered", **VALUES)
    again = "INSERT INTO task_runs (task_id, attempt, phase, started_at) SELECT task_id, 1, phase, started_at"
    name = {"sqlite": r"task_runs\.task_id, task_runs\.attempt", "postgresql": "pk_task_runs", "mariadb": "PRIMARY"}
    with pytest.raises(RefusedError, match=name[client.kind]):
        client.run(f"{again} FROM task_runs;")


@pytest.mark.parametrize("task", ["job", "Zürich \N{SNOWMAN}"])
def test_lock_is_the_one_of_the_library(task: str, postgresql: str) -> None:
    client = Client("postgresql", postgresql)
    ask = client.statement("lock").replace("pg_advisory", "pg_try_advisory")
    with TaskRunHistory.connect(postgresql) as history, history.begin(lock=task):
        assert client.run(ask.strip(), task=task) == ["f"]
        assert client.run(ask.strip(), task="another") == ["t"]


@pytest.mark.parametrize("task", ["job", "Zürich \N{SNOWMAN}"])
def test_named_lock_is_the_one_of_the_library(task: str, mariadb: str) -> None:
    client = Client("mariadb", mariadb)
    ask = client.statement("lock").replace(", 30)", ", 0)").strip()
    with TaskRunHistory.connect(mariadb) as history:
        with history.begin(lock=task):
            assert client.run(ask, task=task) == ["0"]
            assert client.run(ask, "unlock", task="another") == ["1"]
        assert client.run(ask, "unlock", ask, task=task) == ["1", "1"]


def test_racing_clients_get_dense_numbers(client: Client, library: TaskRunHistory) -> None:
    """Eight clients open ten runs each, a process for each run, and two processes of the library forty each."""
    with ExitStack() as stack, ThreadPoolExecutor(8) as pool:
        others = [stack.enter_context(Writer("open", client.url, "job", 40)) for _ in range(2)]
        for other in others:
            other.wait_until_ready()
        for other in others:
            other.start()
        given = [
            number for ten in pool.map(lambda _: [client.open("job") for _ in range(10)], range(8)) for number in ten
        ]
        given += [number for other in others for number in other.answers()]
    assert sorted(given) == list(range(1, 161))
    assert [run.attempt for run in library.iter_runs("job")] == list(range(160, 0, -1))


def test_statement_for_mysql_tells_its_number(mariadb: str) -> None:
    client = Client("mariadb", mariadb)
    script = BLOCKS["mysql open"]
    with TaskRunHistory.connect(mariadb) as history:
        assert client.run(script.strip(), task="job", source="shell", started_at=START) == ["1"]
        assert history.open_run("job").attempt == 2
        assert client.run(script.strip(), script.strip(), task="job", source="shell") == ["3", "4"]
        assert history.get_run("job", 1) == TaskRun("job", 1, TaskPhase.RUNNING, START, source="shell")
