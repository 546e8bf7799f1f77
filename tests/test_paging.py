"""Lists that are paged while four processes open, close, recover, amend and prune runs."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from memory import Wanted, ended, took
from writers import Writer

from taskruns import PROBLEMS, RunFilter, RunOrder, TaskPhase, TaskRun, TaskRunHistory, Window

NOW = datetime.now(UTC)
PAST = Window(NOW - timedelta(days=3), NOW - timedelta(days=1))
OF_TASK, GLOB, EVERY = Wanted("task 7"), Wanted(task_glob="task 1*"), Wanted()
BROKEN, OF_PAST = Wanted(phases=PROBLEMS), Wanted(started=PAST)
LISTS = [
    *((wanted, order) for wanted in (OF_TASK, GLOB, EVERY, BROKEN) for order in (RunOrder.NEWEST, RunOrder.OLDEST)),
    (OF_PAST, RunOrder.LONGEST),
]

Places = dict[tuple[str, int], Any]


def lasting(count: int) -> Iterator[TaskRun]:
    """Make runs that nobody touches; some of each time, so that pages end between equals."""
    for number in range(count):
        start = PAST.since + timedelta(minutes=number // 3) if PAST.since else NOW
        phase = [TaskPhase.FAILED, TaskPhase.SUCCEEDED, TaskPhase.TIMEOUT, TaskPhase.CANCELED][number % 4]
        end = start + timedelta(seconds=number % 50)
        yield TaskRun(f"task {number % 20}", 10**6 + number // 20, phase, start, end)


def places(history: TaskRunHistory, wanted: Wanted, order: RunOrder) -> Places:
    """Return what each run is sorted by that the list has."""

    def place(run: TaskRun) -> Any:
        if order is RunOrder.LONGEST:
            return took(run)
        return wanted.is_of_one_task or (ended(run) if wanted.only_problems else run.started_at)

    found = (run for run in history.all_runs(wanted.task_id) if wanted.matches(run))
    return {
        (run.task_id, run.attempt): place(run) for run in found if not (order is RunOrder.LONGEST and run.is_active)
    }


@contextmanager
def churn(database: str, stop: Path) -> Iterator[None]:
    with ExitStack() as stack:
        writers = [stack.enter_context(Writer("churn", database, number, stop)) for number in range(4)]
        for writer in writers:
            writer.wait_until_ready()
        for writer in writers:
            writer.start()
        yield
        stop.touch()
        assert all(writer.answers()[-1] for writer in writers)


def page_for(history: TaskRunHistory, seconds: float, listed: Callable[..., Iterator[TaskRun]]) -> int:
    """Go through all the lists, again and again; return how many runs changed meanwhile."""
    changed, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        for wanted, order in LISTS:
            before = places(history, wanted, order)
            seen = [(run.task_id, run.attempt) for run in listed(RunFilter(**vars(wanted)), order=order)]
            after = places(history, wanted, order)
            repeated = sorted(key for key in set(seen) if seen.count(key) > 1) if len(set(seen)) < len(seen) else []
            kept = {key for key, place in before.items() if after.get(key) == place}
            assert (wanted, order, repeated, kept - set(seen)) == (wanted, order, [], set())
            changed += len(before.items() ^ after.items())
    return changed


@pytest.mark.parametrize(
    ("count", "seconds"), [(600, 1), pytest.param(5000, 30, marks=pytest.mark.soak)], ids=["small", "large"]
)
def test_no_run_comes_twice_or_is_missed_while_others_write(
    database: str, count: int, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskruns.reader.PAGE", 20)
    with TaskRunHistory.connect(database, retry_for=60) as history:
        history.add_runs(list(lasting(count)))
        with churn(database, tmp_path / "stop"):
            assert page_for(history, seconds, history.iter_runs) > 20
