"""The rules of a run, on every database, sync and async: opening, closing, refining, transactions."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from histories import Histories
from sqlalchemy import create_engine, insert

from taskruns import (
    AttemptConflictError,
    RunClosedError,
    RunExistsError,
    RunNotFoundError,
    TaskPhase,
    TaskRun,
    TaskRunHistory,
)
from taskruns.model import MAX_ATTEMPT
from taskruns.schema import task_runs

NOON = datetime(2026, 11, 24, 12, 0, 0, 123456, tzinfo=UTC)
TERMINAL = [phase for phase in TaskPhase if phase.is_terminal]
RANKS = {TaskPhase.FAILED: 1, TaskPhase.EXHAUSTED: 2, TaskPhase.TIMEOUT: 3}


def store(url: str, **values: Any) -> TaskRun:
    """Put a row there as another program would."""
    engine = create_engine(url)
    row: dict[str, Any] = {
        "task_id": "job",
        "attempt": 1,
        "phase": TaskPhase.RUNNING,
        "started_at": NOON,
        "recovered": False,
    }
    with engine.begin() as connection:
        connection.execute(insert(task_runs).values({"recovered": False} | row | values))
    engine.dispose()
    return TaskRun(**(row | values))


def test_first_run_of_a_task_is_attempt_1(history: TaskRunHistory) -> None:
    before = datetime.now(UTC)
    run = history.open_run("job")
    assert run == TaskRun("job", 1, TaskPhase.RUNNING, run.started_at, source="here")
    assert before <= run.started_at <= datetime.now(UTC)
    assert history.get_run("job", 1) == run


def test_attempts_count_up_within_each_task(history: TaskRunHistory) -> None:
    assert [history.open_run(task).attempt for task in ("a", "b", "a", "a", "b")] == [1, 1, 2, 3, 2]


def test_open_keeps_every_field(history: TaskRunHistory) -> None:
    run = history.open_run(
        "job", attempt=7, started_at=NOON, source="elsewhere", submission="s-1", source_attempt=MAX_ATTEMPT
    )
    assert run == TaskRun(
        "job",
        7,
        TaskPhase.RUNNING,
        NOON,
        source="elsewhere",
        submission="s-1",
        source_attempt=MAX_ATTEMPT,
    )
    assert history.get_run("job", 7) == run


def test_source_defaults_to_the_name_of_the_host(database: str, histories: Histories) -> None:
    import socket

    assert histories.connect(database).open_run("job").source == socket.gethostname()


def test_times_come_back_to_the_microsecond_in_utc(history: TaskRunHistory) -> None:
    for moment in (
        NOON.replace(microsecond=0),
        NOON.replace(microsecond=1),
        NOON.replace(microsecond=999_999),
        NOON.astimezone(timezone(timedelta(hours=5, minutes=30))),
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
    ):
        attempt = history.open_run("job", started_at=moment).attempt
        history.close_run("job", attempt, TaskPhase.SUCCEEDED, finished_at=moment)
        stored = history.get_run("job", attempt)
        assert stored is not None
        assert stored.finished_at is not None
        assert (stored.started_at, stored.finished_at) == (moment, moment)
        assert stored.started_at.tzinfo is UTC
        assert stored.finished_at.tzinfo is UTC


def test_given_attempt_may_leave_a_gap_and_numbering_goes_on_from_it(history: TaskRunHistory) -> None:
    assert history.open_run("job", attempt=5).attempt == 5
    assert history.open_run("job").attempt == 6
    assert history.open_run("job", attempt=2).attempt == 2
    assert history.open_run("job").attempt == 7


def test_the_highest_attempt_uses_up_the_numbers(history: TaskRunHistory) -> None:
    assert history.open_run("job", attempt=MAX_ATTEMPT).attempt == MAX_ATTEMPT
    with pytest.raises(AttemptConflictError) as caught:
        history.open_run("job")
    assert caught.value.task_id == "job"
    assert history.open_run("another").attempt == 1


def test_attempt_that_is_no_number_of_a_run_is_refused(history: TaskRunHistory) -> None:
    for attempt in (0, -1, MAX_ATTEMPT + 1):
        with pytest.raises(ValueError, match="attempt must be 1 to 4294967295"):
            history.open_run("job", attempt=attempt)
    others: list[Any] = ["1", 1.0, True]
    for other in others:
        with pytest.raises(TypeError, match="attempt is a whole number"):
            history.open_run("job", attempt=other)
    assert history.last_run("job") is None


def test_attempt_that_exists_is_not_opened_again(history: TaskRunHistory) -> None:
    run = history.open_run("job", attempt=3, started_at=NOON)
    with pytest.raises(RunExistsError) as caught:
        history.open_run("job", attempt=3, started_at=NOON + timedelta(microseconds=1))
    assert (caught.value.task_id, caught.value.attempt) == ("job", 3)
    assert history.get_run("job", 3) == run


def test_same_start_told_twice_gives_the_stored_run(history: TaskRunHistory) -> None:
    history.open_run("job", attempt=3, started_at=NOON, submission="first")
    closed = history.close_run("job", 3, TaskPhase.FAILED, error="no")
    again = history.open_run("job", attempt=3, started_at=NOON.astimezone(timezone(timedelta(hours=-8))))
    assert again == closed
    assert history.runs("job").runs == [closed]


def test_the_store_numbers_the_same_time_anew_when_no_number_is_told(history: TaskRunHistory) -> None:
    assert [history.open_run("job", started_at=NOON).attempt for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("phase", TERMINAL)
def test_close_stores_the_outcome(history: TaskRunHistory, phase: TaskPhase) -> None:
    error = None if phase is TaskPhase.SUCCEEDED else "boom\nat line 2"
    end = NOON + timedelta(seconds=1.5)
    for attempt, exit_code in enumerate((None, 0, -(2**31), 2**31 - 1), 1):
        opened = history.open_run("job", started_at=NOON, submission="s", source_attempt=4)
        closed = history.close_run("job", attempt, phase, error=error, exit_code=exit_code, finished_at=end)
        assert closed == opened.finish(phase, error=error, exit_code=exit_code, finished_at=end)
        assert closed.duration == timedelta(seconds=1.5)
        assert history.get_run("job", attempt) == closed


def test_finished_at_defaults_to_now(history: TaskRunHistory) -> None:
    history.open_run("job")
    before = datetime.now(UTC)
    finished_at = history.close_run("job", 1, TaskPhase.SUCCEEDED).finished_at
    assert finished_at is not None
    assert before <= finished_at <= datetime.now(UTC)


def test_close_before_the_start_is_clamped_to_it(history: TaskRunHistory) -> None:
    history.open_run("job", started_at=NOON)
    closed = history.close_run("job", 1, TaskPhase.CANCELED, finished_at=NOON - timedelta(hours=1))
    assert closed.finished_at == NOON
    assert closed.duration == timedelta(0)
    assert history.get_run("job", 1) == closed


NO_OUTCOMES: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"phase": "running"}, ValueError),
    ({"phase": "pending"}, ValueError),
    ({"phase": "broken"}, ValueError),
    ({"phase": "succeeded", "error": "but"}, ValueError),
    ({"phase": "failed", "exit_code": 2**31}, ValueError),
    ({"phase": "failed", "exit_code": -(2**31) - 1}, ValueError),
    ({"phase": "failed", "exit_code": "1"}, TypeError),
    ({"phase": "failed", "error": b"bytes"}, TypeError),
    ({"phase": "failed", "finished_at": datetime(2026, 1, 1)}, ValueError),  # noqa: DTZ001  (naive on purpose)
    ({"phase": "failed", "finished_at": 1.0}, TypeError),
]


def test_close_refuses_what_no_run_can_end_as(history: TaskRunHistory) -> None:
    opened = history.open_run("job")
    for arguments, error in NO_OUTCOMES:
        with pytest.raises(error):
            history.close_run("job", 1, **arguments)
    assert history.get_run("job", 1) == opened


def test_naive_start_is_refused(history: TaskRunHistory) -> None:
    with pytest.raises(ValueError, match="started_at must be an aware datetime"):
        history.open_run("job", started_at=datetime(2026, 1, 1))  # noqa: DTZ001  (naive on purpose)
    assert history.last_run("job") is None


def test_closing_a_run_that_does_not_exist_is_an_error(history: TaskRunHistory) -> None:
    history.open_run("job")
    for task, attempt in [("job", 2), ("another", 1)]:
        with pytest.raises(RunNotFoundError) as caught:
            history.close_run(task, attempt, TaskPhase.SUCCEEDED)
        assert isinstance(caught.value, LookupError)
        assert (caught.value.task_id, caught.value.attempt) == (task, attempt)


@pytest.mark.parametrize("phase", TERMINAL)
def test_same_outcome_told_again_gives_the_stored_run(history: TaskRunHistory, phase: TaskPhase) -> None:
    history.open_run("job", started_at=NOON)
    error = None if phase is TaskPhase.SUCCEEDED else "x" * 100_000
    closed = history.close_run("job", 1, phase, error=error, exit_code=3, finished_at=NOON)
    again = history.close_run("job", 1, phase, error=error, exit_code=3, finished_at=NOON + timedelta(days=1))
    assert again == closed == history.get_run("job", 1)


@pytest.mark.parametrize("first", TERMINAL)
def test_other_outcome_is_refused_unless_it_ranks(history: TaskRunHistory, first: TaskPhase) -> None:
    for attempt, second in enumerate(TERMINAL, 1):
        history.open_run("job", started_at=NOON)
        closed = history.close_run("job", attempt, first, finished_at=NOON)
        if first in RANKS and second in RANKS and first is not second:
            later = history.close_run("job", attempt, second)
            expected = second if RANKS[second] > RANKS[first] else first
            assert later == TaskRun("job", attempt, expected, NOON, NOON, source="here")
        else:
            exit_code = 1 if first is second else None
            with pytest.raises(RunClosedError) as caught:
                history.close_run("job", attempt, second, exit_code=exit_code)
            assert caught.value.run == closed
            later = closed
        assert history.get_run("job", attempt) == later


def test_same_phase_with_another_error_or_code_is_refused(history: TaskRunHistory) -> None:
    history.open_run("job")
    outcome: dict[str, Any] = {"error": "boom", "exit_code": 1}
    closed = history.close_run("job", 1, TaskPhase.FAILED, **outcome)
    changes: list[dict[str, Any]] = [{"error": "another"}, {"exit_code": 2}, {"error": None}, {"exit_code": None}]
    for change in changes:
        with pytest.raises(RunClosedError) as caught:
            history.close_run("job", 1, TaskPhase.FAILED, **(outcome | change))
        assert caught.value.run == closed == history.get_run("job", 1)


def test_exhausted_fills_what_failed_left_empty(history: TaskRunHistory) -> None:
    history.open_run("job", started_at=NOON)
    history.close_run("job", 1, TaskPhase.FAILED, error="first words", finished_at=NOON)
    refined = history.close_run("job", 1, TaskPhase.EXHAUSTED, error="no more retries", exit_code=9)
    assert refined == TaskRun("job", 1, TaskPhase.EXHAUSTED, NOON, NOON, "first words", 9, source="here")
    assert history.get_run("job", 1) == refined


def test_timeout_brings_its_own_error(history: TaskRunHistory) -> None:
    history.open_run("job", started_at=NOON)
    history.close_run("job", 1, TaskPhase.FAILED, error="killed", exit_code=137, finished_at=NOON)
    refined = history.close_run("job", 1, TaskPhase.TIMEOUT, error="timed out after 30 s", exit_code=124)
    assert refined == TaskRun("job", 1, TaskPhase.TIMEOUT, NOON, NOON, "timed out after 30 s", 124, source="here")


def test_timeout_without_an_error_keeps_the_earlier_one(history: TaskRunHistory) -> None:
    history.open_run("job", started_at=NOON)
    history.close_run("job", 1, TaskPhase.EXHAUSTED, error="killed", exit_code=137, finished_at=NOON)
    refined = history.close_run("job", 1, TaskPhase.TIMEOUT)
    assert (refined.phase, refined.error, refined.exit_code) == (TaskPhase.TIMEOUT, "killed", 137)


def test_lower_rank_that_comes_later_changes_nothing(history: TaskRunHistory) -> None:
    history.open_run("job")
    closed = history.close_run("job", 1, TaskPhase.TIMEOUT, error="timed out", exit_code=124)
    assert history.close_run("job", 1, TaskPhase.FAILED, error="killed", exit_code=137) == closed
    assert history.close_run("job", 1, TaskPhase.EXHAUSTED, error="killed", exit_code=137) == closed
    assert history.get_run("job", 1) == closed


@pytest.mark.parametrize("inferred", [TaskPhase.FAILED, TaskPhase.TIMEOUT])
def test_inferred_outcome_gives_way_to_the_real_one(
    database: str, history: TaskRunHistory, inferred: TaskPhase
) -> None:
    for attempt, phase in enumerate(TERMINAL, 1):
        values = {"phase": inferred, "finished_at": NOON + timedelta(hours=1), "error": "run outcome not observed"}
        stored = store(database, attempt=attempt, recovered=True, **values)
        assert history.get_run("job", attempt) == stored
        end = NOON + timedelta(minutes=1)
        closed = history.close_run("job", attempt, phase, finished_at=end)
        assert closed == TaskRun("job", attempt, phase, NOON, end)
        assert history.get_run("job", attempt) == closed


def test_real_outcome_is_final_after_it_replaced_an_inferred_one(database: str, history: TaskRunHistory) -> None:
    store(database, phase=TaskPhase.FAILED, finished_at=NOON, error="not observed", recovered=True)
    history.close_run("job", 1, TaskPhase.SUCCEEDED)
    with pytest.raises(RunClosedError):
        history.close_run("job", 1, TaskPhase.FAILED)


def test_transaction_commits_several_calls_at_once(database: str, history: TaskRunHistory) -> None:
    with history.begin() as runs:
        run = runs.open_run("job")
        runs.close_run("job", run.attempt, TaskPhase.SUCCEEDED)
        second = runs.open_run("job")
        assert runs.last_run("job") == second
    assert [run.attempt for run in history.runs("job").runs] == [2, 1]
    assert second.source == "here"


def test_transaction_is_rolled_back_by_an_exception(history: TaskRunHistory) -> None:
    history.open_run("job")

    def fail_at_the_end() -> None:
        with history.begin() as runs:
            runs.close_run("job", 1, TaskPhase.SUCCEEDED)
            runs.open_run("job")
            raise RuntimeError("host")

    with pytest.raises(RuntimeError, match="host"):
        fail_at_the_end()
    assert [(run.attempt, run.is_active) for run in history.runs("job").runs] == [(1, True)]


@pytest.mark.parametrize("attempt", [None, 4])
def test_error_of_a_rule_leaves_the_transaction_usable(history: TaskRunHistory, attempt: int | None) -> None:
    history.open_run("job", attempt=4)
    with history.begin() as runs:
        with pytest.raises(RunExistsError):
            runs.open_run("job", attempt=4)
        with pytest.raises(RunNotFoundError):
            runs.close_run("job", 99, TaskPhase.SUCCEEDED)
        runs.close_run("job", 4, TaskPhase.SUCCEEDED)
        with pytest.raises(RunClosedError):
            runs.close_run("job", 4, TaskPhase.FAILED)
        runs.open_run("other", attempt=attempt)
    assert [run.is_active for run in history.tasks()] == [False, True]


def test_lock_of_a_transaction_keeps_others_out(database: str, histories: Histories) -> None:
    import threading

    first, second = histories.connect(database), TaskRunHistory.connect(database)
    opened = []

    def open_if_none_is_active() -> None:
        with second.begin(lock="job") as runs:
            if not runs.active_runs("job"):
                opened.append(runs.open_run("job"))

    with first.begin(lock="job") as runs:
        waiting = threading.Thread(target=open_if_none_is_active)
        waiting.start()
        assert not runs.active_runs("job")
        waiting.join(0.3)
        assert waiting.is_alive()
        runs.open_run("job")
    waiting.join(30)
    second.dispose()
    assert not waiting.is_alive()
    assert opened == []
