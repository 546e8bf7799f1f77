"""Reading runs, on every database, sync and async: pages, streams, latest runs, active runs."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import create_engine, insert

from taskruns import PROBLEMS, RunFilter, RunOrder, TaskPhase, TaskRun, TaskRunHistory, Window
from taskruns.reader import PAGE
from taskruns.schema import task_runs

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
EARLIEST, LATEST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


def attempts(runs: Iterable[TaskRun]) -> list[int]:
    return [run.attempt for run in runs]


def opened(history: TaskRunHistory, task: str, count: int) -> None:
    with history.begin() as runs:
        for _ in range(count):
            runs.open_run(task, started_at=NOON)  # none of them later than another


def test_run_that_does_not_exist_is_none(history: TaskRunHistory) -> None:
    history.open_run("job")
    assert history.get_run("job", 2) is None
    assert history.get_run("another", 1) is None
    assert history.last_run("another") is None


def test_attempt_that_no_run_can_have_is_refused(history: TaskRunHistory) -> None:
    for attempt in (0, -1, 2**32, 2**63, 2**200):
        with pytest.raises(ValueError, match="attempt must be 1 to 4294967295"):
            history.get_run("job", attempt)


def test_empty_history_has_nothing_to_read(history: TaskRunHistory) -> None:
    page = history.runs("job")
    assert (page.runs, page.next_cursor) == ([], None)
    assert list(history.iter_runs("job")) == []
    assert history.active_runs() == []
    assert history.tasks() == []


def test_last_run_has_the_highest_attempt_not_the_latest_start(history: TaskRunHistory) -> None:
    history.open_run("job", attempt=9, started_at=NOON)
    history.open_run("job", attempt=3, started_at=NOON + timedelta(days=1))
    run = history.last_run("job")
    assert run is not None
    assert run.attempt == 9


def test_last_run_of_some_phases(history: TaskRunHistory) -> None:
    for phase in (TaskPhase.SUCCEEDED, TaskPhase.FAILED, TaskPhase.SUCCEEDED, TaskPhase.TIMEOUT):
        history.close_run("job", history.open_run("job").attempt, phase)
    history.open_run("job")
    found = [
        history.last_run("job", phases=phases)
        for phases in (TaskPhase.SUCCEEDED, PROBLEMS, [TaskPhase.FAILED], (TaskPhase.RUNNING,), TaskPhase.CANCELED, [])
    ]
    assert [run and run.attempt for run in found] == [3, 4, 2, 5, None, None]


def test_pages_walk_from_the_newest_to_the_oldest(history: TaskRunHistory) -> None:
    opened(history, "job", 7)
    opened(history, "another", 2)
    first = history.runs("job", limit=3)
    second = history.runs("job", limit=3, after=first.next_cursor)
    third = history.runs("job", limit=3, after=second.next_cursor)
    assert [attempts(page.runs) for page in (first, second, third)] == [[7, 6, 5], [4, 3, 2], [1]]
    assert third.next_cursor is None


def test_page_that_ends_with_the_last_run_has_no_next(history: TaskRunHistory) -> None:
    opened(history, "job", 4)
    first = history.runs("job", limit=2)
    assert history.runs("job", limit=2, after=first.next_cursor).next_cursor is None
    assert history.runs("job", limit=4).next_cursor is None


def test_page_has_50_runs_unless_told(history: TaskRunHistory) -> None:
    opened(history, "job", 51)
    assert attempts(history.runs("job").runs) == list(range(51, 1, -1))


def test_pages_neither_repeat_nor_skip_while_others_write(history: TaskRunHistory) -> None:
    for attempt in range(2, 21, 2):
        history.open_run("job", attempt=attempt)
    seen: list[int] = []
    cursor, odd = None, 1
    while True:
        page = history.runs("job", limit=3, after=cursor)
        seen += attempts(page.runs)
        cursor = page.next_cursor
        if cursor is None:
            break
        history.open_run("job")
        history.close_run("job", page.runs[-1].attempt, TaskPhase.SUCCEEDED)
        history.open_run("job", attempt=21 - odd if odd % 2 == 0 else 20 + 100 * odd)
        odd += 2
    assert seen == sorted(set(seen), reverse=True)
    assert set(seen) >= set(range(2, 21, 2))


def test_pages_of_some_phases_page_over_those_alone(history: TaskRunHistory) -> None:
    for number in range(1, 10):
        history.open_run("job")
        history.close_run("job", number, TaskPhase.FAILED if number % 3 else TaskPhase.SUCCEEDED)
    first = history.runs("job", phases=TaskPhase.SUCCEEDED, limit=2)
    second = history.runs("job", phases=TaskPhase.SUCCEEDED, limit=2, after=first.next_cursor)
    assert (attempts(first.runs), attempts(second.runs)) == ([9, 6], [3])


NONSENSE: list[dict[str, Any]] = [
    {"limit": 0},
    {"limit": -1},
    *({"after": cursor} for cursor in ("x", "", "-1", "²", "1 OR 1=1", "9" * 20)),
    {"phases": "broken"},
    {"phases": ["failed", "broken"]},
]


def test_page_refuses_what_makes_no_sense(history: TaskRunHistory) -> None:
    history.open_run("job")
    for arguments in NONSENSE:
        with pytest.raises(ValueError):
            history.runs("job", **arguments)


def test_stream_yields_more_runs_than_a_page_holds(database: str, history: TaskRunHistory) -> None:
    count = PAGE + 3
    rows = [
        {"task_id": "job", "attempt": n, "phase": TaskPhase.FAILED, "started_at": NOON, "finished_at": NOON}
        for n in range(1, count + 1)
    ]
    engine = create_engine(database)
    with engine.begin() as connection:
        connection.execute(insert(task_runs), rows)
    engine.dispose()
    assert attempts(history.iter_runs("job")) == list(range(count, 0, -1))
    given_once = iter([TaskPhase.FAILED, TaskPhase.TIMEOUT])
    assert attempts(history.iter_runs("job", phases=given_once)) == list(range(count, 0, -1))


def test_stream_of_some_phases(history: TaskRunHistory) -> None:
    opened(history, "job", 4)
    history.close_run("job", 2, TaskPhase.TIMEOUT)
    assert attempts(history.iter_runs("job", phases=PROBLEMS)) == [2]
    assert attempts(history.iter_runs("job", phases=TaskPhase.RUNNING)) == [4, 3, 1]


def test_stream_that_is_left_early_holds_no_connection(history: TaskRunHistory) -> None:
    opened(history, "job", 3)
    assert next(iter(history.iter_runs("job"))).attempt == 3  # the fixture looks for what is held


def test_active_runs_come_in_the_order_they_started(history: TaskRunHistory) -> None:
    history.open_run("b", started_at=NOON + timedelta(seconds=2))
    history.open_run("a", started_at=NOON + timedelta(seconds=3))
    history.open_run("a", started_at=NOON + timedelta(seconds=1))
    history.open_run("c", started_at=NOON)
    history.close_run("c", 1, TaskPhase.SUCCEEDED)
    assert [(run.task_id, run.attempt) for run in history.active_runs()] == [("a", 2), ("b", 1), ("a", 1)]
    assert attempts(history.active_runs("a")) == [2, 1]
    assert history.active_runs("c") == []


def test_tasks_are_each_with_their_latest_run_in_the_order_of_their_ids(history: TaskRunHistory) -> None:
    names = ["a", "B", "b", "á", "z", "a b", "a!", "Z", "😀", "\ufffd"]
    for name in names:
        opened(history, name, 2)
    history.close_run("b", 2, TaskPhase.FAILED)
    latest = history.tasks()
    assert [run.task_id for run in latest] == sorted(names)
    assert attempts(latest) == [2] * len(names)
    assert [run.task_id for run in latest if not run.is_active] == ["b"]


def test_tasks_page_by_the_last_task_id(history: TaskRunHistory) -> None:
    for name in "abcde":
        opened(history, name, 1)
    assert [run.task_id for run in history.tasks(limit=2)] == ["a", "b"]
    assert [run.task_id for run in history.tasks(limit=2, after="b")] == ["c", "d"]
    assert [run.task_id for run in history.tasks(limit=2, after="d")] == ["e"]
    assert history.tasks(after="e") == []
    assert [run.task_id for run in history.tasks(after="bb")] == ["c", "d", "e"]


def test_tasks_refuse_what_makes_no_sense(history: TaskRunHistory) -> None:
    arguments: list[dict[str, Any]] = [{"limit": 0}, {"limit": -1}, {"after": ""}, {"after": "a\x00"}]
    for nonsense in arguments:
        with pytest.raises(ValueError):
            history.tasks(**nonsense)


def test_reads_of_a_transaction_see_its_own_writes(history: TaskRunHistory) -> None:
    with history.begin() as runs:
        run = runs.open_run("job")
        assert runs.get_run("job", 1) == run
        assert runs.runs("job").runs == [run]
        assert runs.active_runs() == [run]
        assert runs.tasks() == [run]


@pytest.mark.parametrize(
    "wanted",
    [
        {"min_duration": timedelta.min},
        {"max_duration": timedelta.max},
        {"started": Window(EARLIEST), "finished": Window(EARLIEST, LATEST), "max_duration": timedelta.max},
    ],
)
def test_the_ends_of_time_can_be_asked_for(history: TaskRunHistory, wanted: dict[str, Any]) -> None:
    history.close_run("job", history.open_run("job").attempt, TaskPhase.FAILED)
    assert history.count_runs(RunFilter(**wanted)) == 1
    assert history.count_runs(RunFilter(**wanted | {"min_duration": timedelta.max})) == 0


def test_any_number_of_runs_can_be_asked_for(history: TaskRunHistory) -> None:
    run = history.open_run("job")
    for limit in (2**31 - 1, 2**31, 2**70):
        assert history.runs(limit=limit).runs == history.tasks(limit=limit) == [run]
        assert [summary.last_run for summary in history.summaries(limit=limit)] == [run]


@pytest.mark.parametrize("text", ["", "\0", "a\ud800"])
def test_text_that_no_error_has_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="to look for in errors"):
        RunFilter(error=text, started=Window(NOON))


def test_ended_runs_are_not_active(history: TaskRunHistory) -> None:
    history.open_run("job")
    assert history.active_runs(RunFilter(active=False)) == []


def test_a_run_whose_end_is_told_meanwhile_does_not_come_again(
    history: TaskRunHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskruns.reader.PAGE", 1)
    monkeypatch.setattr("taskruns.aio.reader.PAGE", 1)
    ends = [NOON + timedelta(hours=number) for number in range(4)]
    runs = [
        TaskRun("job", 1 + number, TaskPhase.FAILED, NOON, end, recovered=not number) for number, end in enumerate(ends)
    ]
    history.add_runs(runs)
    found = []
    for run in history.iter_runs(phases=PROBLEMS, order=RunOrder.OLDEST):
        found.append(run)
        if run.recovered:
            history.close_run("job", run.attempt, TaskPhase.TIMEOUT, finished_at=ends[2])
    assert found == runs
