"""Following runs, on every database, sync and async: each start and each end is told, once."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, cast

import pytest
from sqlalchemy import Engine, create_engine, event, update
from test_retries import cut, servers_history

from taskruns import PROBLEMS, RunFilter, TaskPhase, TaskRun, TaskRunHistory, following, statements
from taskruns.filters import filter_of
from taskruns.following import LOOK_BACK, Following
from taskruns.schema import task_runs

__all__ = ["servers_history"]  # a fixture

Told = tuple[str, int, str]


def told(runs: list[TaskRun]) -> list[Told]:
    return [(run.task_id, run.attempt, str(run.phase)) for run in runs]


class Follower:
    """Takes steps until all is told that has happened."""

    def __init__(self, history: Any, wanted: str | RunFilter | None = None) -> None:
        self.following = Following(filter_of(wanted))
        self._history = history

    def runs(self) -> list[TaskRun]:
        found = self.step()
        while self.following.is_behind:
            found += self.step()
        return found

    def step(self) -> list[TaskRun]:
        return cast(list[TaskRun], self._history.take_step(self.following))

    def __call__(self) -> list[Told]:
        return told(self.runs())


def run_once(history: Any, task: str, phase: TaskPhase = TaskPhase.SUCCEEDED, **start: Any) -> TaskRun:
    attempt = history.open_run(task, **start).attempt
    return cast(TaskRun, history.close_run(task, attempt, phase))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "PAGE", 7)
    monkeypatch.setattr(following, "AT_ONCE", 3)


def test_each_start_and_each_end_is_told_once(history: TaskRunHistory) -> None:
    follow = Follower(history)
    assert follow() == []
    history.open_run("a")
    assert follow() == [("a", 1, "running")]
    history.open_run("b")
    assert follow() == [("b", 1, "running")]
    history.close_run("a", 1, TaskPhase.SUCCEEDED)
    assert follow() == [("a", 1, "succeeded")]
    assert follow() == []


def test_run_that_starts_and_ends_between_two_steps_is_told_as_both(history: TaskRunHistory) -> None:
    follow = Follower(history)
    follow()
    run = run_once(history, "a", TaskPhase.FAILED)
    started, ended = follow.runs()
    assert ended == run
    assert started == replace(run, phase=TaskPhase.RUNNING, finished_at=None, error=None)
    assert follow() == []


def test_what_happened_is_in_the_order_of_time(history: TaskRunHistory) -> None:
    follow = Follower(history)
    history.open_run("a")
    follow()
    history.open_run("b")
    history.close_run("a", 1, TaskPhase.CANCELED)
    run_once(history, "c")
    assert follow() == [("b", 1, "running"), ("a", 1, "canceled"), ("c", 1, "running"), ("c", 1, "succeeded")]


def test_it_begins_with_what_is_active_and_without_what_has_ended(history: TaskRunHistory) -> None:
    run_once(history, "just ended")
    history.open_run("b", started_at=datetime.now(UTC) - timedelta(days=3))
    history.open_run("a")
    follow = Follower(history)
    assert follow() == [("b", 1, "running"), ("a", 1, "running")]
    assert follow() == []


def test_start_that_is_committed_after_a_later_one_is_told(history: TaskRunHistory) -> None:
    follow = Follower(history)
    follow()
    run_once(history, "early")
    assert len(follow()) == 2
    late = run_once(history, "late", started_at=datetime.now(UTC) - LOOK_BACK / 2)
    assert [run for run in follow.runs() if not run.is_active] == [late]
    assert follow() == []


def test_old_runs_that_are_imported_are_not_news(history: TaskRunHistory) -> None:
    follow = Follower(history)
    follow()
    noon = datetime.now(UTC) - timedelta(hours=1)
    history.add_runs([TaskRun("a", 1, TaskPhase.FAILED, noon, noon), TaskRun("a", 2, TaskPhase.RUNNING, noon)])
    assert follow() == [("a", 2, "running")]  # which is what goes on now


def test_start_in_the_future_hides_no_other(history: TaskRunHistory) -> None:
    follow = Follower(history)
    follow()
    history.open_run("a", started_at=datetime.now(UTC) + timedelta(hours=1))
    assert follow() == [("a", 1, "running")]
    run_once(history, "b")
    assert follow() == [("b", 1, "running"), ("b", 1, "succeeded")]


def test_deleted_run_is_forgotten_and_its_number_is_news(history: TaskRunHistory) -> None:
    history.open_run("a")
    follow = Follower(history)
    follow()
    history.close_run("a", 1, TaskPhase.SUCCEEDED)
    history.forget("a")
    assert follow() == []
    history.open_run("a")
    assert follow() == [("a", 1, "running")]
    history.close_run("a", 1, TaskPhase.SUCCEEDED)
    assert follow() == [("a", 1, "succeeded")]
    history.forget("a")
    history.open_run("a")
    assert follow() == [("a", 1, "running")]


def test_outcome_that_changes_is_told_again(history: TaskRunHistory, database: str) -> None:
    follow = Follower(history)
    run_once(history, "a", TaskPhase.FAILED)
    history.open_run("b")
    follow()
    history.close_run("b", 1, TaskPhase.FAILED)
    assert follow() == [("b", 1, "failed")]
    history.close_run("b", 1, TaskPhase.TIMEOUT)
    assert follow() == [("b", 1, "timeout")]
    history.open_run("c")
    engine = create_engine(database, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        lost = {"phase": TaskPhase.FAILED, "recovered": True, "finished_at": datetime.now(UTC)}
        connection.execute(update(task_runs).where(task_runs.c.task_id == "c").values(lost))
    engine.dispose()
    assert follow() == [("c", 1, "running"), ("c", 1, "failed")]
    history.close_run("c", 1, TaskPhase.SUCCEEDED)
    assert follow() == [("c", 1, "succeeded")]
    assert follow() == []


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("b2", [("b2", 1, "running"), ("b2", 1, "succeeded")]),
        (RunFilter(task_glob="b*", active=False), [("b1", 1, "failed"), ("b2", 1, "succeeded")]),
        (RunFilter(phases=PROBLEMS), [("a", 1, "timeout"), ("b1", 1, "failed")]),
        (RunFilter(source="there"), [("b2", 1, "running"), ("b2", 1, "succeeded")]),
    ],
)
def test_only_what_is_wanted_is_told(history: TaskRunHistory, wanted: str | RunFilter, expected: list[Told]) -> None:
    follow = Follower(history, wanted)
    follow()
    run_once(history, "a", TaskPhase.TIMEOUT)
    run_once(history, "b1", TaskPhase.FAILED)
    history.open_run("b2", source="there")
    found = follow()
    history.close_run("b2", 1, TaskPhase.SUCCEEDED)
    assert found + follow() == expected


@pytest.mark.usefixtures("small")
def test_many_are_told_over_some_steps_none_twice_and_none_missing(history: TaskRunHistory) -> None:
    old, new = [[f"{name} {number:02}" for number in range(20)] for name in ("old", "new")]
    at = datetime.now(UTC) - timedelta(hours=1)
    with history.begin() as runs:
        for task in old:
            runs.open_run(task, started_at=at)
    follow = Follower(history)
    first = told(follow.step())
    assert first == [(task, 1, "running") for task in old[:3]]
    assert follow() == [(task, 1, "running") for task in old[3:]]
    with history.begin() as runs:
        for task in old[10:]:
            runs.close_run(task, 1, TaskPhase.SUCCEEDED)
        for task in new:
            runs.open_run(task)
    found = [each for _ in range(10) for each in follow()]  # a page of the active runs each
    ended = [(task, 1, "succeeded") for task in old[10:]]
    assert sorted(found) == sorted([(task, 1, "running") for task in new] + ended)


@pytest.mark.usefixtures("small")
def test_step_asks_three_queries_at_most_and_two_where_nothing_happens(
    history: TaskRunHistory,
) -> None:
    queries: list[str] = []
    engine = cast(Any, history)._engine
    with history.begin() as runs:
        for number in range(20):
            runs.open_run(f"a{number}")
    follow = Follower(history)
    event.listen(getattr(engine, "sync_engine", engine), "before_cursor_execute", lambda *args: queries.append(args[2]))
    while follow.step():
        assert 0 < len(queries) <= 3
        queries.clear()
    queries.clear()
    follow.step()
    assert len(queries) == 2


def test_memory_does_not_grow_with_time(history: TaskRunHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "LOOK_BACK", timedelta(0))
    follow = Follower(history)
    follow()
    for _ in range(10):
        run_once(history, "a")
        assert len(follow()) == 2
        assert len(follow.following._ended) <= 2


def test_memory_has_a_limit_whatever_starts(history: TaskRunHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "MOST_REMEMBERED", 8)
    follow = Follower(history)
    follow()
    for _ in range(5):
        with history.begin() as runs:
            for _ in range(4):
                runs.close_run("a", runs.open_run("a").attempt, TaskPhase.SUCCEEDED)
        assert len(follow()) == 8
        assert len(follow.following._ended) <= 12
    assert follow() == []


def test_step_that_fails_is_made_up_for(history: TaskRunHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    history.open_run("a")
    follow = Follower(history)
    follow()
    history.close_run("a", 1, TaskPhase.SUCCEEDED)
    history.open_run("b")
    with monkeypatch.context() as patched:
        patched.setattr(statements, "runs_by_key", broken)
        with pytest.raises(RuntimeError):
            follow()
    assert follow() == [("a", 1, "succeeded"), ("b", 1, "running")]


def broken(*_: object) -> None:
    raise RuntimeError


def test_cut_connection_goes_unnoticed(servers_history: tuple[TaskRunHistory, Engine]) -> None:
    history, admin = servers_history
    follow = Follower(history)
    history.open_run("a")
    assert follow() == [("a", 1, "running")]
    assert cut(admin) > 0
    run_once(history, "b")
    assert follow() == [("b", 1, "running"), ("b", 1, "succeeded")]
    admin.dispose()


def test_follow_goes_on_and_on(history: TaskRunHistory) -> None:
    history.open_run("a")
    runs: Iterator[TaskRun] = iter(history.follow("a", interval=0.1))
    assert told([next(runs)]) == [("a", 1, "running")]
    history.close_run("a", 1, TaskPhase.FAILED)
    run_once(history, "b")
    run_once(history, "a")
    assert told(list(islice(runs, 3))) == [("a", 1, "failed"), ("a", 2, "running"), ("a", 2, "succeeded")]


@pytest.mark.parametrize("interval", [0.05, 0, -1, float("nan")])
def test_too_short_an_interval_is_refused(histories: Any, sqlite: str, interval: float) -> None:
    with pytest.raises(ValueError, match=r"interval must be 0\.1 seconds or more"):
        next(iter(histories.connect(sqlite).follow(interval=interval)))
