"""Group commit: callers that come together are written together, and none of them notices the others."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from callers import CALLERS, FIRST, Batches, Callers, Work
from servers import Databases

from taskruns import (
    AttemptConflictError,
    RunClosedError,
    RunExistsError,
    RunNotFoundError,
    SchemaVersionError,
    TaskPhase,
    TaskRun,
    TaskRunHistory,
)
from taskruns import commit
from taskruns.model import MAX_ATTEMPT, SUPERSEDED, clean_error

NOON = datetime(2026, 11, 24, 12, 0, 0, 123456, tzinfo=UTC)
HOUR = timedelta(hours=1)
FAILED, SUCCEEDED = TaskPhase.FAILED, TaskPhase.SUCCEEDED

Connect = Callable[..., Callers]


@pytest.fixture(params=CALLERS)
def connect(request: pytest.FixtureRequest, database: str) -> Iterator[Connect]:
    """Connects callers with each database: threads, and tasks of asyncio."""
    connected: list[Callers] = []

    def of_database(**options: Any) -> Callers:
        connected.append(CALLERS[request.param](database, **options))
        return connected[-1]

    yield of_database
    for callers in connected:
        callers.close()


@pytest.fixture
def callers(connect: Connect) -> Callers:
    return connect()


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    return Batches(monkeypatch)


@pytest.fixture
def plain(database: str) -> Iterator[TaskRunHistory]:
    """Another history of the same database, without group commit."""
    with TaskRunHistory.connect(database, source="another") as history:
        yield history


def opening(task: str, **options: Any) -> Work:
    return lambda history: history.open_run(task, **options)


def closing(task: str, attempt: int, phase: TaskPhase = SUCCEEDED, **options: Any) -> Work:
    return lambda history: history.close_run(task, attempt, phase, **options)


def names(what: str, count: int) -> list[str]:
    return [f"{what} {number}" for number in range(count)]


def stored(plain: TaskRunHistory) -> dict[tuple[str, int], TaskRun]:
    return {(run.task_id, run.attempt): run for run in plain.all_runs() if run.task_id != FIRST}


def test_what_comes_together_is_one_batch(callers: Callers, batches: Batches, plain: TaskRunHistory) -> None:
    name, error = "'\"\\ é😀 %(x)s :y $.z", "1\n2\t\u2028\x7f" + "é😀\\" * 1000
    opened = callers.together(*[opening(task, submission=name) for task in names(name, 64)], batches=batches)
    assert [len(tasks) for tasks in batches.tasks] == [1, 64]
    assert all(
        run == TaskRun.starting(run.task_id, 1, started_at=run.started_at, source="here", submission=name)
        for run in opened
    )
    assert [run.task_id for run in opened] == names(name, 64)
    assert stored(plain) == {(run.task_id, 1): run for run in opened}
    works = [closing(run.task_id, 1, FAILED, error=error, exit_code=-1) for run in opened[:32]]
    works += [opening(f"more {run.task_id}") for run in opened[32:]]
    found = callers.together(*works, batches=batches)
    assert [len(tasks) for tasks in batches.tasks] == [1, 64]
    assert [(run.phase, run.error, run.exit_code) for run in found[:32]] == [(FAILED, clean_error(error), -1)] * 32
    expected = found + opened[32:]
    assert stored(plain) == {(run.task_id, run.attempt): run for run in expected}


BAD: dict[str, tuple[Work, type[Exception], bool]] = {
    "closed differently": (closing("closed", 1, FAILED), RunClosedError, True),
    "started at another time": (opening("closed", attempt=1, started_at=NOON + HOUR), RunExistsError, True),
    "taken by another": (opening("another's", attempt=1, started_at=NOON + HOUR), RunExistsError, True),
    "does not exist": (closing("nothing", 1), RunNotFoundError, True),
    "no more numbers": (opening("full"), AttemptConflictError, True),
    "no name": (opening(" "), ValueError, False),
    "no exit code": (closing("closed", 1, FAILED, exit_code=2**31), ValueError, False),
}
"""What cannot be done, the error, and whether that is known only to the database."""


def test_what_cannot_be_done_harms_nobody_else(callers: Callers, batches: Batches, plain: TaskRunHistory) -> None:
    closed = plain.close_run("closed", plain.open_run("closed", started_at=NOON).attempt, SUCCEEDED)
    taken = plain.open_run("another's", started_at=NOON)
    full = plain.open_run("full", attempt=MAX_ATTEMPT, started_at=NOON)
    others = 64 - 1
    opened = callers.together(*[opening(name) for name in names("open", others // 2)])
    for number, (bad, error, is_in_batch) in enumerate(BAD.values()):
        good = [closing(run.task_id, run.attempt) for run in opened]
        good += [opening(name) for name in names(f"new {number}", others - len(good))]
        found = callers.together(*good[:20], bad, *good[20:], batches=batches, waiting=others + is_in_batch)
        assert [len(tasks) for tasks in batches.tasks] == [1, others + is_in_batch]
        caught = found.pop(20)
        assert type(caught) is error, caught
        assert [run.is_active for run in found] == [False] * len(opened) + [True] * (others - len(opened))
        now = stored(plain)
        assert [now[run.task_id, run.attempt] for run in found] == found
        opened = found[len(opened) :][: len(opened)]
    assert [run for run in stored(plain).values() if run.source == "another"] == [taken, closed, full]
