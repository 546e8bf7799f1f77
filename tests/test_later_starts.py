"""A later start by the same supervisor closes its earlier active runs of the task, and no others."""

import threading
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from histories import Histories

from taskruns import TaskPhase, TaskRun, TaskRunHistory
from taskruns.model import SUPERSEDED

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


def succeed(history: TaskRunHistory, run: TaskRun, **options: Any) -> TaskRun:
    return history.close_run(run.task_id, run.attempt, TaskPhase.SUCCEEDED, **options)


def test_later_start_closes_the_earlier_run_of_the_same_supervisor(history: TaskRunHistory) -> None:
    first = history.open_run("job", started_at=NOON)
    other = history.open_run("another", started_at=NOON)
    second = history.open_run("job", started_at=NOON + HOUR)
    lost = replace(
        first, phase=TaskPhase.FAILED, error=SUPERSEDED, finished_at=NOON + HOUR, recovered=True, exit_code=None
    )
    assert list(history.iter_runs("job")) == [second, lost]
    assert history.get_run("another", 1) == other
    third = history.open_run("job", started_at=NOON + 2 * HOUR)
    assert history.last_run("job") == third
    assert history.get_run("job", 1) == lost
    assert history.active_runs("job") == [third]


def test_error_of_a_superseded_run() -> None:
    assert SUPERSEDED == "run outcome not observed (a later attempt started first)"


def test_start_that_is_not_later_closes_nothing(history: TaskRunHistory) -> None:
    runs = [history.open_run("job", started_at=NOON + hours * HOUR) for hours in (1, 1, 0)]
    assert {run.attempt for run in history.active_runs("job")} == {run.attempt for run in runs}


def test_start_told_twice_closes_nothing(history: TaskRunHistory) -> None:
    first = history.open_run("job", attempt=1, started_at=NOON)
    with history.begin() as runs:
        assert runs.open_run("job", attempt=1, started_at=NOON) == first
    assert history.open_run("job", attempt=1, started_at=NOON) == first
    assert history.active_runs() == [first]


def test_finished_run_is_not_touched_by_a_later_start(history: TaskRunHistory) -> None:
    run = succeed(history, history.open_run("job"))
    history.open_run("job")
    assert history.get_run("job", 1) == run


def test_runs_of_two_histories_overlap(database: str, histories: Histories) -> None:
    first, second = (histories.connect(database) for _ in range(2))
    runs = [history.open_run("job", started_at=NOON + n * HOUR) for n, history in enumerate((first, second))]
    with second.begin() as own:
        own.open_run("another")
    assert second.active_runs("job") == runs


def test_recorded_code_overlaps_in_threads(database: str) -> None:
    together = threading.Barrier(4)
    active: list[int] = []
    with TaskRunHistory.connect(database) as history:

        @history.record("job")
        def work() -> None:
            together.wait(30)
            active.append(len(history.active_runs("job")))
            together.wait(30)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        runs = list(history.iter_runs("job"))
    assert active == [4] * 4
    assert [(run.phase, run.recovered) for run in runs] == [("succeeded", False)] * 4


def test_recorded_code_is_left_alone_by_what_starts_inside(database: str) -> None:
    with TaskRunHistory.connect(database) as history:
        with history.record("job"):
            with history.record("job"):
                assert len(history.active_runs("job")) == 2
            history.open_run("job")
            assert len(history.active_runs("job")) == 2
        assert [run.phase for run in history.iter_runs("job")] == ["running", "succeeded", "succeeded"]


def test_later_start_in_one_transaction_closes_the_earlier_run(history: TaskRunHistory) -> None:
    history.open_run("job", started_at=NOON)
    with history.begin() as runs:
        runs.open_run("job", started_at=NOON + HOUR)
        runs.open_run("job", started_at=NOON + 2 * HOUR)
    assert [(run.error, run.recovered, run.finished_at) for run in history.iter_runs("job")] == [
        (None, False, None),
        (SUPERSEDED, True, NOON + 2 * HOUR),
        (SUPERSEDED, True, NOON + HOUR),
    ]


def test_later_start_that_is_undone_closes_nothing(history: TaskRunHistory) -> None:
    first = history.open_run("job", started_at=NOON)
    with suppress(ZeroDivisionError), history.begin() as runs:
        runs.open_run("job", started_at=NOON + HOUR)
        raise ZeroDivisionError
    assert list(history.iter_runs("job")) == [first]
    history.open_run("job", started_at=NOON + 2 * HOUR)
    assert [run.finished_at for run in history.iter_runs("job")] == [None, NOON + 2 * HOUR]


def test_real_outcome_replaces_that_of_a_later_start(history: TaskRunHistory) -> None:
    first = history.open_run("job", started_at=NOON)
    second = history.open_run("job", started_at=NOON + HOUR)
    closed = succeed(history, first, exit_code=0, finished_at=NOON + 2 * HOUR)
    assert closed == first.finish(TaskPhase.SUCCEEDED, exit_code=0, finished_at=NOON + 2 * HOUR)
    assert list(history.iter_runs("job")) == [second, closed]
