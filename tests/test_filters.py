"""What a question may be asked with, and what is refused in one line."""

import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from taskruns import PROBLEMS, RunFilter, RunOrder, Span, TaskPhase, TaskRunHistory, Window, reading

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"recovered": 0}, "recovered is bool or None, not 0"),
        ({"active": "no"}, "active is bool or None, not 'no'"),
        ({"started": "7d"}, "started is Window, not '7d'"),
        ({"finished": None}, "finished is Window, not None"),
        ({"task_glob": 5}, "task_glob is str or None, not 5"),
        ({"min_duration": 5}, "min_duration is timedelta or None, not 5"),
        ({"error": b"x", "started": Window(NOON)}, "error is str or None, not b'x'"),
    ],
)
def test_value_of_the_wrong_type_is_refused(values: dict[str, Any], error: str) -> None:
    with pytest.raises(TypeError) as caught:
        RunFilter(**values)
    assert str(caught.value) == error


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"error": "disk"}, "give one of start or end"),
        ({"error": "", "started": Window(NOON)}, "is empty"),
        ({"task_id": ""}, "a task id has 1 to 255 characters"),
        ({"phases": ["lost"]}, "lost"),
        ({"exit_code": 2**31}, "exit_code"),
    ],
)
def test_value_outside_its_rules_is_refused(values: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        RunFilter(**values)


def test_pattern_without_a_wildcard_is_a_task() -> None:
    assert RunFilter(task_glob="a[*]") == RunFilter("a*")


@pytest.fixture
def runs(sqlite: str) -> TaskRunHistory:
    history = TaskRunHistory.connect(sqlite)
    for number in range(3):
        run = history.open_run("job", started_at=NOON + timedelta(hours=number))
        history.close_run("job", run.attempt, TaskPhase.FAILED, error="x")
    return history


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda history: history.runs(["job"]), TypeError),
        (lambda history: history.runs("job", order="sideways"), ValueError),
        (lambda history: history.runs(order="longest"), ValueError),
        (lambda history: history.runs("job", limit=1.5), TypeError),
        (lambda history: history.runs("job", after="1/job"), ValueError),
        (lambda history: history.stats("job", by="week"), ValueError),
        (lambda history: list(history.iter_runs("job", order="sideways")), ValueError),
    ],
)
def test_what_cannot_be_asked_is_refused(
    runs: TaskRunHistory, ask: Callable[[TaskRunHistory], Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        ask(runs)


def test_words_do_for_orders_and_spans(runs: TaskRunHistory) -> None:
    word: Any = "oldest"
    assert [run.attempt for run in runs.runs("job", order=word).runs] == [1, 2, 3]
    assert [run.attempt for run in runs.runs("job", order=RunOrder.OLDEST).runs] == [1, 2, 3]
    word = "hour"
    assert runs.stats("job", by=word) == runs.stats("job", by=Span.HOUR)


def test_phases_that_can_be_told_once_survive_a_second_try(
    runs: TaskRunHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = OperationalError("SELECT", None, sqlite3.OperationalError("database is locked"))
    assert told.orig is not None
    told.orig.sqlite_errorcode = sqlite3.SQLITE_BUSY  # type: ignore[attr-defined]  # as the driver sets it
    last_run, tries = reading.last_run, iter([told])

    def busy_at_first(*arguments: Any) -> Any:
        for error in tries:
            raise error
        return last_run(*arguments)

    monkeypatch.setattr(reading, "last_run", busy_at_first)
    found = runs.last_run("job", phases=(phase for phase in PROBLEMS))
    assert found is not None
    assert found.attempt == 3


def test_database_in_memory_survives_a_number_that_no_driver_takes() -> None:
    with TaskRunHistory.connect("sqlite://") as history:
        history.upgrade()
        history.open_run("job")
        with history.begin() as runs, pytest.raises(ValueError, match="attempt"):
            runs.all_runs("job", after=("job", 2**70))
        assert history.last_run("job") is not None
