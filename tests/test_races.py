"""Many processes on one database: nothing is lost, doubled or left half done."""

import os
import random
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from subprocess import run as run_command
from typing import Any

import pytest
from servers import KINDS
from sqlalchemy import create_engine, make_url, text
from watchers import until
from writers import Writer, race

from taskruns import TaskPhase, TaskRun, TaskRunHistory


def sizes(small: tuple[int, ...], large: tuple[int, ...]) -> Any:
    return [pytest.param(*small, id="small"), pytest.param(*large, id="large", marks=pytest.mark.soak)]


def attempts(url: str, task_id: str) -> list[int]:
    with TaskRunHistory.connect(url) as history:
        return [run.attempt for run in history.iter_runs(task_id)]


@pytest.mark.parametrize(("processes", "count"), sizes((8, 10), (16, 50)))
def test_racing_opens_of_one_task_are_numbered_densely(database: str, processes: int, count: int) -> None:
    given = race(database, *[("open", "job", count)] * processes)
    total = processes * count
    assert sorted(attempt for answers in given for attempt in answers) == list(range(1, total + 1))
    assert all(answers == sorted(answers) for answers in given)
    assert attempts(database, "job") == list(range(total, 0, -1))


@pytest.mark.parametrize(("processes", "count"), sizes((5, 10), (16, 50)))
def test_racing_opens_with_one_scheduled_time_are_different_runs(database: str, processes: int, count: int) -> None:
    scheduled = datetime(2026, 11, 24, 3, tzinfo=UTC).isoformat()
    given = race(database, *[("open", "job", count, scheduled)] * processes)
    total = processes * count
    assert sorted(attempt for answers in given for attempt in answers) == list(range(1, total + 1))
    assert attempts(database, "job") == list(range(total, 0, -1))


@pytest.mark.parametrize(("processes", "count"), sizes((3, 10), (16, 50)))
def test_lock_of_a_transaction_covers_what_it_reads(database: str, processes: int, count: int) -> None:
    given = race(database, *[("open in transactions", "job", count)] * processes)
    pairs = sorted(pair for answers in given for pair in answers)
    assert pairs == [[number, number + 1] for number in range(processes * count)]


@pytest.mark.parametrize(("processes", "count", "tasks"), sizes((6, 15, 5), (20, 100, 20)))
def test_writers_and_a_reader_do_not_hinder_each_other(database: str, processes: int, count: int, tasks: int) -> None:
    writers = [("open and close", tasks, count, first) for first in range(processes)]
    race(database, *writers, ("list", tasks, count))
    with TaskRunHistory.connect(database) as history:
        assert history.active_runs() == []
        latest = history.tasks()
        assert [run.task_id for run in latest] == sorted(f"task {number}" for number in range(tasks))
        assert sum(run.attempt for run in latest) == processes * count
        for run in latest:
            assert [found.attempt for found in history.iter_runs(run.task_id)] == list(range(run.attempt, 0, -1))


@pytest.mark.parametrize("count", sizes((50,), (1000,)))
def test_of_two_outcomes_one_wins_and_the_loser_is_told(database: str, count: int, tmp_path: Path) -> None:
    steps = tmp_path / "steps"
    steps.write_bytes(bytes(8))
    with TaskRunHistory.connect(database) as history:
        with history.begin() as runs:
            for _ in range(count):
                runs.open_run("job")
        succeeded, failed = race(
            database, ("close", "succeeded", count, steps, 0), ("close", "failed", count, steps, 1)
        )
        stored = {run.attempt: run.phase.value for run in history.iter_runs("job")}
    assert len(succeeded) == len(failed) == count
    for attempt, answers in enumerate(zip(succeeded, failed, strict=True), 1):
        phase = stored[attempt]
        assert sorted(answers) == [["lost", phase], ["won", phase]]
    assert len(set(stored.values())) == 2, "there was no race"


@pytest.mark.parametrize(("kills", "seconds"), sizes((3, 0), (20, 2)))
def test_killed_writer_leaves_every_acknowledged_write(database: str, kills: int, seconds: float) -> None:
    known: dict[int, bool] = {}
    random_moment = random.Random(2)
    for _ in range(kills):
        with Writer("acknowledge", database, 10_000) as writer:
            writer.wait_until_ready()
            writer.start()
            time.sleep(random_moment.uniform(0.02, 0.15 + seconds))
            acknowledged = writer.kill()
        known |= {attempt: closed for attempt, closed in acknowledged}  # noqa: C416  (pairs are lists)
        with TaskRunHistory.connect(database) as history:
            stored = {run.attempt: run for run in history.iter_runs("job")}
        for attempt, closed in known.items():
            assert not (closed and stored[attempt].is_active), f"attempt {attempt} lost its end"
        # One write may have been on its way when the kill came: told or not, it is whole.
        assert set(range(1, max(stored) + 1)) == set(stored)
        assert len(stored) - len(known) <= kills
        for run in stored.values():
            if run.recovered:  # of an earlier writer
                continue
            assert (run.phase, run.error, run.exit_code) in [
                (TaskPhase.RUNNING, None, None),
                (TaskPhase.FAILED, "e" * 5000, 1),
            ]
    assert known
    check_integrity(database)


@pytest.mark.parametrize(
    ("kind", "twin", "kills", "seconds"),
    [
        ("sqlite", "threads", 2, 0),
        ("postgresql", "tasks", 2, 0),
        *(pytest.param(kind, twin, 20, 1, marks=pytest.mark.soak) for kind in KINDS for twin in ("threads", "tasks")),
    ],
    indirect=["kind"],
)
def test_killed_callers_of_one_batch_leave_every_acknowledged_write(
    database: str, twin: str, kills: int, seconds: float
) -> None:
    known: dict[tuple[str, int], bool] = {}
    random_moment = random.Random(3)
    callers = 16
    for _ in range(kills):
        with Writer("acknowledge together", database, callers, twin) as writer:
            writer.wait_until_ready()
            writer.start()
            writer.wait_for_answer()
            time.sleep(random_moment.uniform(0.02, 0.15 + seconds))
            acknowledged = writer.kill()
        wait_until_quiet(database)
        for task, attempt, is_closed in acknowledged:
            known[task, attempt] = known.get((task, attempt), False) or is_closed
        with TaskRunHistory.connect(database) as history:
            history.recover()
            assert history.active_runs() == []
            stored = {(run.task_id, run.attempt): run for run in history.all_runs()}
        for key, is_closed in known.items():
            # What was told to be closed is closed as told; of what was only opened, the end may have come just yet.
            assert not stored[key].recovered or not is_closed, f"{key} has lost its end"
        for number in range(4):
            attempts = [attempt for task, attempt in stored if task == f"job {number}"]
            assert attempts == list(range(1, len(attempts) + 1))
        assert len(stored) - len(known) <= kills * callers
        assert {(run.phase, run.recovered) for run in stored.values()} <= {("succeeded", False), ("failed", True)}
    assert any(known.values())
    check_integrity(database)


@pytest.mark.parametrize(
    ("kind", "processes", "callers", "count"),
    [("postgresql", 2, 8, 10), *(pytest.param(kind, 4, 16, 100, marks=pytest.mark.soak) for kind in KINDS)],
    indirect=["kind"],
)
def test_racing_processes_with_group_commit_lose_and_double_nothing(
    database: str, processes: int, callers: int, count: int
) -> None:
    answers = race(database, *[("record together", 20, callers, count)] * processes)
    assert answers == [[callers * count]] * processes
    with TaskRunHistory.connect(database) as history:
        runs = list(history.all_runs())
    assert len(runs) == processes * callers * count
    assert {(run.phase, run.recovered) for run in runs} == {("succeeded", False)}
    for task in range(20):
        attempts = [run.attempt for run in runs if run.task_id == f"task {task}"]
        assert attempts == list(range(1, len(attempts) + 1))


BUSY = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid() AND state <> 'idle'",
    "mysql": "SELECT count(*) FROM information_schema.processlist"
    " WHERE db = database() AND id <> connection_id() AND command <> 'Sleep'",
}


def wait_until_quiet(database: str) -> None:
    """Wait until a server has written what the dead had sent."""
    engine = create_engine(database, isolation_level="AUTOCOMMIT")
    query = BUSY.get({"mariadb": "mysql"}.get(engine.dialect.name, engine.dialect.name))
    if query is not None:
        with engine.connect() as connection:
            until(lambda: connection.scalar(text(query)) == 0, "nobody writes")
    engine.dispose()


def check_integrity(database: str) -> None:
    """Have SQLite look through its file."""
    if make_url(database).get_backend_name() == "sqlite":
        engine = create_engine(database)
        with engine.connect() as connection:
            assert connection.scalar(text("PRAGMA integrity_check")) == "ok"
        engine.dispose()


FORKING = """
import os, sys
from sqlalchemy import event
from taskruns import TaskPhase, TaskRunHistory

lost = []

def record(task):
    for _ in range(20):
        run = history.open_run(task)
        history.close_run(task, run.attempt, TaskPhase.SUCCEEDED)

history = TaskRunHistory.connect(sys.argv[1])
event.listen(history._engine, "invalidate", lambda *_: lost.append(1))
with history.begin() as held:
    history.last_run("parent")
    assert len(history._connections.idle) == 1
    child = os.fork()
    if child == 0:
        assert history._connections.idle == [] and history._engine.pool.checkedin() == 0
        record("child")
        os._exit(0)
    if len(sys.argv) > 2:
        record("parent")
        held.open_run("parent")
    assert os.waitpid(child, 0)[1] == 0
if len(sys.argv) == 2:
    record("parent")
assert not lost
history.dispose()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_child_and_its_parent_both_go_on(kind: str, database: str) -> None:
    # SQLite has one writer at a time, so there the parent's transaction must not be a writing one.
    code = FORKING if kind != "sqlite" else FORKING.replace("history.begin()", "history._engine.connect()")
    arguments = ["in the transaction"] if kind != "sqlite" else []
    done = run_command(
        [sys.executable, "-W", "error", "-c", code, database, *arguments], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    with TaskRunHistory.connect(database) as history:
        assert [run.attempt for run in history.runs("child").runs] == list(range(20, 0, -1))
        assert [run.attempt for run in history.runs("parent").runs] == list(range(20 + len(arguments), 0, -1))
        assert [run.task_id for run in history.active_runs()] == ["parent"] * len(arguments)


def test_threads_share_one_history(database: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with TaskRunHistory.connect(database) as history, ThreadPoolExecutor(8) as pool:

        def record(_: int) -> TaskRun:
            run = history.open_run("job")
            return history.close_run("job", run.attempt, TaskPhase.SUCCEEDED)

        assert sorted(run.attempt for run in pool.map(record, range(64))) == list(range(1, 65))
