"""Who watches over the runs: histories that register, beat while they have an active run, and know which are theirs."""

import asyncio
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from histories import Histories
from sqlalchemy import delete, event
from watchers import Watcher, age, database_time, known, register, until, write

from taskruns import EventRecorder, TaskPhase, TaskRun, TaskRunHistory, supervision
from taskruns.aio import AsyncTaskRunHistory
from taskruns.liveness import Process
from taskruns.model import SUPERSEDED
from taskruns.schema import supervisors

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
QUICK = 0.05
"""Seconds between two heartbeats where the test waits for them."""


@pytest.fixture
def source() -> str:
    """A name that no other supervisor has."""
    return uuid.uuid4().hex


@pytest.fixture
def history(database: str, histories: Histories, source: str) -> TaskRunHistory:
    return histories.connect(database, source=source, heartbeat=3600)


@pytest.fixture
def quick(database: str, histories: Histories, source: str) -> TaskRunHistory:
    return histories.connect(database, source=source, heartbeat=QUICK)


def hearts(history: Any) -> list[threading.Thread]:
    own = history._supervision
    found = [thread for thread in threading.enumerate() if thread.name == "taskruns-heartbeat"]
    return [thread for thread in found if getattr(getattr(thread, "_target", None), "__self__", None) is own]


def succeed(history: TaskRunHistory, run: TaskRun, **options: Any) -> TaskRun:
    return history.close_run(run.task_id, run.attempt, TaskPhase.SUCCEEDED, **options)


@contextmanager
def written(history: Any) -> Iterator[list[str]]:
    """Collect the tables that statements write to."""
    engine = getattr(history._engine, "sync_engine", history._engine)
    tables: list[str] = []

    def executed(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not statement.lstrip().startswith("SELECT"):
            tables.append("supervisors" if "INTO supervisors" in statement else "task_runs")

    event.listen(engine, "before_cursor_execute", executed)
    yield tables
    event.remove(engine, "before_cursor_execute", executed)


@pytest.mark.parametrize("heartbeat", [0, -1, float("nan")])
def test_heartbeat_is_a_time(sqlite: str, heartbeat: float) -> None:
    with pytest.raises(ValueError, match="heartbeat is a number of seconds above 0"):
        TaskRunHistory.connect(sqlite, heartbeat=heartbeat)


def test_reading_registers_nobody(history: TaskRunHistory, database: str, source: str) -> None:
    history.check_version()
    history.add_runs([TaskRun.starting("job", 1, started_at=NOON)])
    assert history.tasks() == history.active_runs() == list(history.all_runs()) == list(history.iter_runs("job"))
    assert history.get_run("job", 1) == history.last_run("job")
    assert history.recover() == []
    history.close_run("job", 1, TaskPhase.SUCCEEDED)
    assert history.supervisors() == known(database, source) == []


def test_first_open_registers_the_process_by_the_clock_of_the_database(
    history: TaskRunHistory, database: str, source: str
) -> None:
    earliest = database_time(database)
    run = history.open_run("job", started_at=NOON)
    latest = database_time(database)
    (found,) = known(database, source)
    assert found.process == Process.here()
    assert (found.id, found.source, found.active_runs) == (run.supervisor_id, source, 1)
    assert earliest <= found.started_at <= found.heartbeat_at <= latest
    assert [replace(seen, silence=found.silence) for seen in history.supervisors()] == [found]


def test_process_is_told_apart_from_all_others() -> None:
    here = Process.here()
    assert here.is_gone(here) is False
    if sys.platform == "linux":
        assert None not in (here.boot_id, here.pid_namespace, here.started)


def test_one_row_serves_all_runs_of_a_history(history: TaskRunHistory, database: str, source: str) -> None:
    runs = [history.open_run(f"job {number}") for number in range(3)]
    with history.begin() as own:
        runs.append(own.open_run("another"))
    (found,) = known(database, source)
    assert [run.supervisor_id for run in runs] == [found.id] * 4
    assert found.active_runs == 4
    succeed(history, runs[0])
    assert [one.active_runs for one in known(database, source)] == [3]


def test_two_histories_are_two_supervisors(database: str, histories: Histories, source: str) -> None:
    first, second = (histories.connect(database, source=source) for _ in range(2))
    opened = {first.open_run("job").supervisor_id, second.open_run("job").supervisor_id}
    assert opened == {found.id for found in known(database, source)}
    assert len(opened) == 2


def test_first_transaction_registers_and_one_that_is_undone_does_not(
    history: TaskRunHistory, database: str, source: str
) -> None:
    with suppress(ZeroDivisionError), history.begin(brief=True) as runs:
        runs.open_run("job")
        raise ZeroDivisionError
    assert known(database, source) == []
    with history.begin(brief=True) as runs:
        run = runs.open_run("job")
    assert [(found.id, found.active_runs) for found in known(database, source)] == [(run.supervisor_id, 1)]


def test_transaction_that_may_last_is_registered_before_it(history: TaskRunHistory, database: str, source: str) -> None:
    with suppress(ZeroDivisionError), history.begin() as runs:
        runs.open_run("job")
        raise ZeroDivisionError
    assert [found.active_runs for found in known(database, source)] == [0]


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_nobody_watches_over_a_database_in_memory(url: str) -> None:
    with TaskRunHistory.connect(url, heartbeat=QUICK) as history, history._engine.connect():
        history.upgrade()
        first, second = history.open_run("job"), history.open_run("job")
        with history.begin() as runs:
            third = runs.open_run("job")
        assert [run.supervisor_id for run in (first, second, third)] == [None] * 3
        assert (history.supervisors(), hearts(history)) == ([], [])
        assert [run.error for run in history.iter_runs("job")] == [None, SUPERSEDED, SUPERSEDED]


def test_nobody_watches_over_a_database_in_memory_under_asyncio() -> None:
    async def main() -> None:
        async with AsyncTaskRunHistory.connect("sqlite://", heartbeat=QUICK) as history:
            await history.upgrade()
            assert (await history.open_run("job")).supervisor_id is None
            assert (await history.supervisors(), hearts(history)) == ([], [])

    asyncio.run(main())


def test_one_heart_beats_for_all_runs_and_stops_after_the_last(
    quick: TaskRunHistory, database: str, source: str
) -> None:
    assert hearts(quick) == []
    runs = [quick.open_run(f"job {number}") for number in range(5)]
    (heart,) = hearts(quick)
    assert heart.daemon
    (first,) = known(database, source)
    until(lambda: known(database, source)[0].heartbeat_at > first.heartbeat_at, "it beats")
    assert known(database, source)[0].started_at == first.started_at
    for run in runs[1:]:
        succeed(quick, run)
    middle = known(database, source)[0].heartbeat_at
    until(lambda: known(database, source)[0].heartbeat_at > middle, "it beats for the last one")
    assert hearts(quick) == [heart]
    succeed(quick, runs[0])
    heart.join(30)
    assert (heart.is_alive(), hearts(quick)) == (False, [])
    quick.open_run("job")
    assert len(hearts(quick)) == 1


def test_heart_goes_on_when_the_database_fails(
    quick: TaskRunHistory, database: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = []

    def fail(*_: object) -> None:
        failures.append(1)
        raise OSError

    quick.open_run("job")
    monkeypatch.setattr(supervision.Supervision, "tell", fail)
    until(lambda: len(failures) > 1, "it goes on trying")
    monkeypatch.undo()
    (first,) = known(database, source)
    until(lambda: known(database, source)[0].heartbeat_at > first.heartbeat_at, "it beats again")


def test_row_that_was_removed_comes_back_with_the_next_beat(quick: TaskRunHistory, database: str, source: str) -> None:
    run = quick.open_run("job")
    write(database, delete(supervisors).filter_by(source=source))
    until(lambda: known(database, source), "it is registered again")
    assert [found.id for found in known(database, source)] == [run.supervisor_id]


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    clock = supervision._clock
    monkeypatch.setattr(supervision, "_clock", lambda: clock() + seconds)


def test_only_an_open_after_a_pause_beats_and_it_beats_first(
    history: TaskRunHistory, database: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed(history, history.open_run("job"))
    with written(history) as tables:
        succeed(history, history.open_run("job"))
    assert tables == ["task_runs"] * 2
    age(database, 3700, source=source)
    later(monkeypatch, 3700)
    with written(history) as tables:
        succeed(history, history.open_run("job"))
    assert tables == ["supervisors", "task_runs", "task_runs"]
    (found,) = known(database, source)
    assert found.silence < timedelta(seconds=60)


def test_transaction_after_a_pause_beats_first(
    history: TaskRunHistory, database: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed(history, history.open_run("job"))
    age(database, 3700, source=source)
    later(monkeypatch, 3700)
    with suppress(ZeroDivisionError), history.begin(brief=True) as runs:
        runs.open_run("job")
        raise ZeroDivisionError
    assert known(database, source)[0].silence >= timedelta(seconds=3700)
    with written(history) as tables, history.begin(brief=True) as runs:
        runs.open_run("job")
    assert [table for table in tables if table in ("supervisors", "task_runs")][-2:] == ["supervisors", "task_runs"]
    assert known(database, source)[0].silence < timedelta(seconds=60)


def test_idle_supervisor_that_was_removed_registers_again_before_it_opens(
    history: TaskRunHistory, database: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = succeed(history, history.open_run("job"))
    write(database, delete(supervisors).filter_by(source=source))
    later(monkeypatch, 3700)
    assert history.open_run("job").supervisor_id == run.supervisor_id
    assert [found.active_runs for found in known(database, source)] == [1]


def test_leaving_removes_the_row_unless_another_run_needs_it(
    history: TaskRunHistory, database: str, source: str
) -> None:
    first, second = history.open_run("a"), history.open_run("b")
    succeed(history, first, leave=True)
    assert [found.active_runs for found in known(database, source)] == [1]
    assert succeed(history, second, leave=True).phase == "succeeded"
    assert known(database, source) == []
    history.open_run("c")
    assert [found.active_runs for found in known(database, source)] == [1]


def test_events_are_watched_over(database: str, source: str) -> None:
    told = {"kind": "TaskStarting", "task": "job", "attempt": 1, "at": "2026-11-24T12:00:00Z"}
    with TaskRunHistory.connect(database, source=source, heartbeat=QUICK) as history:
        recorder = EventRecorder(history)
        recorder.record(told)
        (found,) = known(database, source)
        assert [run.supervisor_id for run in history.active_runs()] == [found.id]
        (heart,) = hearts(history)
        recorder.record(told | {"kind": "TaskStopped", "at": "2026-11-24T12:00:05Z"})
        heart.join(30)
        assert hearts(history) == []


FORK = """
import os, sys
from taskruns import TaskRunHistory
history = TaskRunHistory.connect(sys.argv[1], source="parent", heartbeat=3600)
run = history.open_run("job")
child = os.fork()
if child == 0:
    supervision = history._supervision
    assert supervision._heart is None and not supervision._active
    supervision._interval = 0.02
    own = history.open_run("job")
    beats = set()
    while len(beats) < 4:
        first, second = sorted(history.supervisors(), key=lambda known: known.process.pid == os.getpid())
        beats.add(second.heartbeat_at)
    os._exit(0 if second.id == own.supervisor_id != run.supervisor_id else 3)
_, status = os.waitpid(child, 0)
assert status == 0, status
before = sorted(history.supervisors(), key=lambda known: known.process.pid == child)
assert [known.process.pid for known in before] == [os.getpid(), child]
assert before[0].heartbeat_at == before[0].started_at, "somebody has beaten for the parent"
lost = history.recover()
assert [(found.attempt, found.supervisor_id) for found in lost] == [(2, before[1].id)], lost
assert [found.process.pid for found in history.supervisors()] == [os.getpid()]
assert [found.attempt for found in history.active_runs()] == [1]
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
def test_forked_child_is_a_supervisor_of_its_own(database: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, database], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


FORK_OF_A_STREAM = """
import os, sys, time
from taskruns import EventRecorder, TaskPhase, TaskRunHistory
history = TaskRunHistory.connect(sys.argv[1], heartbeat=0.02)
recorder = EventRecorder(history)
recorder.record({"kind": "TaskStarting", "task": "job", "attempt": 1, "at": "2026-11-24T12:00:00Z"})
child = os.fork()
if child == 0:
    run = history.open_run("another")
    heart = history._supervision._heart
    history.close_run("another", run.attempt, TaskPhase.SUCCEEDED)
    heart.join(5)
    os._exit(heart.is_alive())
assert os.waitpid(child, 0)[1] == 0, "it beats on"
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
def test_forked_child_does_not_beat_for_a_stream_of_its_parent(sqlite: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK_OF_A_STREAM, sqlite], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_asyncio_has_a_heart_while_something_is_recorded(database: str, source: str) -> None:
    async def main() -> None:
        async with AsyncTaskRunHistory.connect(database, source=source, heartbeat=QUICK) as history:
            assert hearts(history) == []

            together = asyncio.Barrier(5)
            active: list[int] = []

            async def job() -> None:
                async with history.record("job"):
                    (first,) = await asyncio.to_thread(known, database, source)
                    while (await asyncio.to_thread(known, database, source))[0].heartbeat_at == first.heartbeat_at:
                        assert len(hearts(history)) == 1
                        await asyncio.sleep(0.01)
                    await together.wait()
                    active.append(len(await history.active_runs("job")))
                    await together.wait()

            await asyncio.gather(*(job() for _ in range(5)))
            for heart in hearts(history):
                await asyncio.to_thread(heart.join, 30)
            assert hearts(history) == []
            runs = [run async for run in history.iter_runs("job")]
        assert {(run.phase, run.recovered) for run in runs} == {("succeeded", False)}
        assert active == [5] * 5

    asyncio.run(main())


def test_run_that_another_process_holds_is_seen_as_its(database: str) -> None:
    with Watcher("open", database, 3600) as other, TaskRunHistory.connect(database) as history:
        assert other.line() == "open"
        assert [(known.process.pid, known.active_runs) for known in history.supervisors()] == [(other.pid, 1)]
        history.open_run("job")
        assert len(history.active_runs("job")) == 2
        assert other.rest() == ["closed"]


@pytest.mark.parametrize(("host", "is_closed"), [("here", True), ("elsewhere", False)])
def test_what_a_reboot_has_left_is_closed_by_what_records_next(
    history: TaskRunHistory, database: str, host: str, is_closed: bool
) -> None:
    here = Process.here()
    before = replace(here, host=here.host if host == "here" else host, boot_id="another", pid=1)
    register(database, before, "lost", silent=61.0)
    history.open_run("job")
    assert [run.task_id for run in history.active_runs()] == (["job"] if is_closed else ["lost", "job"])


def test_outcome_that_could_be_told_nowhere_is_told_by_the_heart(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("the database is out of use")

    (tmp_path / "file").touch()
    monkeypatch.setenv("TASKRUNS_STATE_DIR", str(tmp_path / "file"))  # where nothing can be kept
    with TaskRunHistory.connect(database, heartbeat=0.1) as history:
        with history.record("job") as handle:
            handle.exit_code = 3
            monkeypatch.setattr(history, "close_run", fail)
        until(lambda: not history.active_runs(), "the heart tells the outcome")
        (run,) = history.runs("job").runs
        assert (run.phase, run.exit_code, run.recovered) == (TaskPhase.FAILED, 3, False)


def test_recorder_goes_on_with_the_runs_of_one_that_was_killed(database: str) -> None:
    script = (
        "import os, sys\nfrom taskruns import EventRecorder, TaskRunHistory\n"
        "recorder = EventRecorder(TaskRunHistory.connect(sys.argv[1]), source='stream')\n"
        "recorder.record({'kind': 'TaskStarting', 'task': 'job', 'attempt': 1, 'at': '2026-03-01T00:00:00Z'})\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, database], check=False)
    with TaskRunHistory.connect(database) as history:
        started = {"kind": "TaskStarting", "task": "other", "attempt": 1, "at": "2026-03-01T00:00:01Z"}
        EventRecorder(history, source="stream").record(started)
        numbers = {run.task_id: run.supervisor_id for run in history.active_runs()}
        assert numbers.keys() == {"job", "other"}
        assert numbers["job"] == numbers["other"]
