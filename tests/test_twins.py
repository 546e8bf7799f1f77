"""The asynchronous classes are twins of the synchronous ones, and who needs neither does not load them."""

import inspect
import subprocess
import sys
from typing import Any

import pytest

import taskruns
from taskruns import TaskPhase, TaskRunHistory, TaskRunRepository
from taskruns.aio import AsyncTaskRunHistory, AsyncTaskRunRepository
from taskruns.recording import AsyncRecording, Recording

# Steps between a history and its repository, no calls of a user's.
INNER = {"open_start", "try_start", "find_start", "close_with", "take_step"}
TWINS = [(TaskRunHistory, AsyncTaskRunHistory), (TaskRunRepository, AsyncTaskRunRepository)]

# What a process does not load that records runs on SQLite, and asks no questions.
FOREIGN = {"sqlalchemy.dialects.postgresql", "sqlalchemy.dialects.mysql", "psycopg", "pymysql"}
UNASKED = {f"taskruns.{name}" for name in ("reading", "checks", "following", "pruning", "replay", "bulk", "stream")}


def public(twin: type) -> dict[str, Any]:
    found = {name: value for cls in reversed(twin.__mro__) for name, value in vars(cls).items()}
    return {name: value for name, value in found.items() if not name.startswith("_") and name not in INNER}


@pytest.mark.parametrize(("sync", "twin"), TWINS)
def test_twins_have_the_same_public_names(sync: type, twin: type) -> None:
    assert list(public(twin)) == list(public(sync))


@pytest.mark.parametrize(("sync", "twin"), TWINS)
def test_twins_have_the_same_parameters(sync: type, twin: type) -> None:
    for name in public(sync):
        ours, theirs = (inspect.signature(getattr(cls, name)) for cls in (sync, twin))
        assert list(theirs.parameters.values()) == list(ours.parameters.values()), name
    initial, twin_initial = (list(inspect.signature(cls).parameters) for cls in (sync, twin))
    assert initial == twin_initial


@pytest.mark.parametrize(("sync", "twin"), TWINS)
def test_what_talks_to_the_database_is_awaited(sync: type, twin: type) -> None:
    plain = {"connect", "record", "spool"}
    for name, method in public(twin).items():
        function = inspect.unwrap(getattr(method, "__func__", method))
        is_asynchronous = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
        assert is_asynchronous is (name not in plain), name


@pytest.mark.parametrize(("sync", "twin"), [*TWINS, (Recording, AsyncRecording)])
def test_twins_are_documented(sync: type, twin: type) -> None:
    for cls in (sync, twin):
        assert cls.__doc__
        assert all(inspect.getdoc(getattr(cls, name)) for name in public(cls))


def test_all_public_names_are_there() -> None:
    for name in taskruns.__all__:
        assert getattr(taskruns, name).__doc__
    assert set(taskruns.__all__) <= set(dir(taskruns))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = taskruns.nothing


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import taskruns", {"sqlalchemy", "alembic", "tenacity", "click", "asyncio"}),
        ("from taskruns import TaskRun, RunClosedError", {"sqlalchemy", "alembic", "tenacity", "click", "asyncio"}),
        (
            "from taskruns import TaskRunHistory",
            {"sqlalchemy.ext.asyncio", "alembic", "sqlalchemy.orm", "tenacity", "click", *FOREIGN, *UNASKED},
        ),
        ("import taskruns.aio", {"alembic", "tenacity", "click", "aiosqlite", "psycopg"}),
    ],
)
def test_importing_loads_no_more_than_it_needs(code: str, absent: set[str]) -> None:
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert "taskruns" in done.stdout.split()
    assert absent & set(done.stdout.split()) == set()


def test_recording_on_a_current_database_needs_no_alembic(sqlite: str) -> None:
    script = (
        "import sys\nfrom taskruns import TaskRunHistory\n"
        "with TaskRunHistory.connect(sys.argv[1]) as history, history.record('job'): pass\n"
        "print(history.last_run('job').phase, *sys.modules); history.dispose()"
    )
    done = subprocess.run([sys.executable, "-c", script, sqlite], check=True, capture_output=True, text=True)
    phase, *modules = done.stdout.split()
    assert phase == "succeeded"
    assert {"alembic", "sqlalchemy.orm", "sqlalchemy.ext.asyncio"} & set(modules) == set()


def test_exec_on_sqlite_loads_no_more_than_it_needs(sqlite: str) -> None:
    command = ["-X", "importtime", "-m", "taskruns", "--db", sqlite, "exec", "job", "--", "true"]
    done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"sqlalchemy", "sqlite3", "taskruns.exec", "taskruns.supervision"} <= loaded
    assert {"alembic", "sqlalchemy.orm", "sqlalchemy.ext.asyncio", "tenacity", "tomllib", "rich"} & loaded == set()
    assert (FOREIGN | UNASKED) & loaded == set()
    with TaskRunHistory.connect(sqlite) as history:
        assert history.last_run("job", phases=TaskPhase.SUCCEEDED) is not None
