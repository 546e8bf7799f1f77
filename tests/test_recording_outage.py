"""A recorder that cannot record never breaks the code inside."""

import asyncio
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from histories import Histories
from servers import free_port, wait_for
from sqlalchemy import URL, event
from sqlalchemy.exc import OperationalError

from taskruns import (
    PROBLEMS,
    RunNotFoundError,
    SchemaVersionError,
    TaskPhase,
    TaskRunHistory,
    engine as engines,
    recording,
    spool,
)
from taskruns.model import Outcome
from taskruns.recording import RecordedRun
from taskruns.writing import Start


class OwnError(Exception):
    pass


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, "taskruns")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "taskruns"]


class Down:
    """A history whose database can be put out of use; it counts who asks."""

    def __init__(self, history: TaskRunHistory) -> None:
        self.is_down = False
        self.asked = 0
        event.listen(history._engine, "before_cursor_execute", self._fail)

    def _fail(self, *_: object) -> None:
        self.asked += 1
        if self.is_down:
            raise OperationalError("SELECT", {}, Exception("the disk is full"))


def replayed(history: Any) -> None:
    """Wait for the replay, which one success begins."""
    history._outage._until = 0
    with history.record("last"):
        pass
    wait_for(lambda: not spool.files(url_of(history)), "what was kept is not replayed")
    history._outage._replaying.join()


def url_of(history: Any) -> URL:
    engine = getattr(history._engine, "sync_engine", history._engine)
    found = engines.url_of(engine)
    assert found is not None
    return found


@pytest.fixture
def recorded(sqlite: str) -> Iterator[TaskRunHistory]:
    with TaskRunHistory.connect(sqlite, retry_for=0.1) as history:
        history.tasks()
        yield history


def test_body_runs_as_if_there_were_no_recorder(recorded: TaskRunHistory, messages: Callable[[], list[str]]) -> None:
    down = Down(recorded)
    down.is_down = True
    with recorded.record("job") as handle:
        handle.exit_code = 3
    assert (handle.run, handle.attempt) == (None, None)
    assert recorded.record("job")(lambda: "result")() == "result"
    with pytest.raises(OwnError, match="mine"), recorded.record("job"):
        raise OwnError("mine")
    [message] = messages()
    assert message.startswith(f"runs are kept in {spool.directory()}/")
    assert message.endswith(".jsonl until the database can be used again: the disk is full")


def test_error_on_closing_replaces_neither_result_nor_exception(
    recorded: TaskRunHistory, messages: Callable[[], list[str]]
) -> None:
    down = Down(recorded)

    @recorded.record("job")
    def work(error: Exception | None) -> str:
        down.is_down = True
        if error is not None:
            raise error
        return "result"

    assert work(None) == "result"
    down.is_down = False
    recorded._outage._until = 0
    with pytest.raises(OwnError, match="mine"):
        work(OwnError("mine"))
    assert len(messages()) == 2
    down.is_down = False
    replayed(recorded)
    assert [run.phase for run in recorded.runs("job").runs] == [TaskPhase.FAILED, TaskPhase.SUCCEEDED]


def test_raise_raises_the_databases_error(recorded: TaskRunHistory) -> None:
    down = Down(recorded)
    down.is_down = True
    with pytest.raises(OperationalError, match="the disk is full"), recorded.record("job", on_error="raise"):
        pytest.fail("the body must not run")
    down.is_down = False
    with pytest.raises(OperationalError, match="the disk is full"), recorded.record("job", on_error="raise"):
        down.is_down = True
    down.is_down = False

    @recorded.record("job", on_error="raise")
    def work() -> None:
        down.is_down = True
        raise OwnError("mine")

    with pytest.raises(OwnError, match="mine"):
        work()


def test_after_a_failure_the_database_is_left_alone_for_a_while(
    recorded: TaskRunHistory, messages: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(recording, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    down = Down(recorded)

    def asks() -> bool:
        before = down.asked
        with recorded.record("job"):
            pass
        return down.asked > before

    down.is_down = True
    assert asks()
    assert not asks()
    clock[0] += recording.PAUSE - 0.01
    assert not asks()
    clock[0] += 0.01
    assert asks()  # still down: not said again, another pause
    assert not asks()
    assert len(messages()) == 1
    down.is_down = False
    clock[0] += recording.PAUSE
    assert asks()
    replayed(recorded)
    assert asks()
    assert [run.phase for run in recorded.runs("job").runs] == [TaskPhase.SUCCEEDED] * 7
    assert not any(recorded._outage._replaying is thread for thread in threading.enumerate())
    down.is_down = True
    assert asks()
    assert len(messages()) == 2  # a new outage
    assert recording.PAUSE == 30


def test_pause_does_not_silence_who_wants_errors(recorded: TaskRunHistory) -> None:
    down = Down(recorded)
    down.is_down = True
    with recorded.record("job"):
        pass
    with pytest.raises(OperationalError), recorded.record("job", on_error="raise"):
        pass


def test_database_without_tables_is_an_outage(
    empty_database: str, histories: Any, messages: Callable[[], list[str]]
) -> None:
    history = histories.connect(empty_database)
    ran = 0
    for _ in range(3):
        with history.record("job"):
            ran += 1
    assert ran == 3
    [message] = messages()
    assert "taskruns db upgrade" in message
    with pytest.raises(SchemaVersionError), history.record("job", on_error="raise"):
        pass


def test_unreachable_server_delays_the_body_but_once(messages: Callable[[], list[str]]) -> None:
    with TaskRunHistory.connect(f"postgresql://u:secret@127.0.0.1:{free_port()}/x", retry_for=0.2) as history:
        for _ in range(3):
            with history.record("job"):
                pass
    [message] = messages()
    assert message.startswith("runs are kept in ")
    assert "secret" not in message


def test_run_that_somebody_else_closed_is_said_and_recording_goes_on(
    recorded: TaskRunHistory, messages: Callable[[], list[str]]
) -> None:
    with recorded.record("job"):
        recorded.close_run("job", 1, TaskPhase.CANCELED)
    [message] = messages()
    assert "attempt 1 of task 'job' has ended already, as canceled" in message
    with recorded.record("job"):
        pass
    assert recorded.last_run("job", phases=TaskPhase.SUCCEEDED)


@pytest.mark.parametrize("name", ["", "job ", "a\x00b"])
def test_name_that_cannot_be_recorded_is_said_and_the_body_runs(
    recorded: TaskRunHistory, messages: Callable[[], list[str]], name: str
) -> None:
    with recorded.record(name) as handle:
        pass
    assert handle == RecordedRun(started_at=handle.started_at, _clock=handle._clock)
    assert len(messages()) == 1
    with recorded.record("job"):
        pass
    assert not recorded.last_run("job", phases=PROBLEMS)


@pytest.fixture
def outage(history: TaskRunHistory) -> Down:
    """An outage of each database, for either twin."""
    history.tasks()
    engine = history._engine
    down = Down.__new__(Down)
    down.is_down, down.asked = False, 0
    event.listen(getattr(engine, "sync_engine", engine), "before_cursor_execute", down._fail)
    return down


def test_runs_of_an_outage_are_replayed_with_their_times(
    history: TaskRunHistory, outage: Down, messages: Callable[[], list[str]]
) -> None:
    with history.record("job"):
        pass
    outage.is_down = True
    before = datetime.now(UTC)
    with history.record("job", submission="s", source="there") as handle:
        handle.error, handle.exit_code = "see postgresql://me:secret@host/", 3
    with pytest.raises(OwnError), history.record("job"):
        raise OwnError("mine")
    after = datetime.now(UTC)
    assert handle.run is None
    [path] = spool.files(url_of(history))
    assert b"secret" not in path.read_bytes()
    outage.is_down = False
    assert len(history.runs("job").runs) == 1
    replayed(history)
    first, second = history.runs("job", phases=TaskPhase.FAILED).runs[::-1]
    assert (first.attempt, first.exit_code, first.submission, first.source) == (2, 3, "s", "there")
    assert first.error == "see postgresql://me:***@host/"
    assert (second.attempt, second.source) == (3, "here")
    assert second.error is not None
    assert second.error.endswith("OwnError: mine")
    assert before <= first.started_at <= first.finished_at <= second.started_at <= second.finished_at <= after  # type: ignore[operator]  # all have ended
    assert len(messages()) == 1


def test_end_of_a_run_whose_start_is_kept_is_kept_too(history: TaskRunHistory, outage: Down) -> None:
    outage.is_down = True
    with history.record("job"):
        outage.is_down = False
        history._outage._until = 0.0
        with history.record("other"):
            pass
        assert history.last_run("job") is None  # the file is ours as long as the run has no end
    wait_for(lambda: history.last_run("job") is not None, "the run is not replayed")
    history._outage._replaying.join()  # type: ignore[union-attr]  # there is one
    assert [run.phase for run in history.runs("job").runs] == [TaskPhase.SUCCEEDED]
    assert spool.files(url_of(history)) == []


def test_run_that_could_not_be_closed_is_closed_later(history: TaskRunHistory, outage: Down) -> None:
    with history.record("job") as handle:
        outage.is_down = True
    assert handle.attempt == 1
    outage.is_down = False
    assert history.active_runs("job") == [handle.run]
    replayed(history)
    [run] = history.runs("job").runs
    assert (run.phase, run.started_at) == (TaskPhase.SUCCEEDED, handle.started_at)


def test_what_another_process_has_left_is_replayed_by_the_next_writer(database: str, histories: Histories) -> None:
    history = histories.connect(database)
    run = spool.Spool(url_of(history))
    start = run.add_start(Start.of("left", None, datetime.now(UTC), "there", None, None).run)
    run.add_end(start, Outcome.of(TaskPhase.SUCCEEDED, error=None, exit_code=None, finished_at=None))
    assert history.tasks() == []
    replayed(history)
    assert history.last_run("left") is not None


def test_where_nothing_is_kept_there_is_no_thread(history: TaskRunHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def look(url: URL) -> list[Any]:
        looks.append(url)
        return []

    monkeypatch.setattr(spool, "files", look)
    for _ in range(3):
        with history.record("job"):
            pass
    assert history._outage._replaying is None
    assert len(looks) == 1


def test_spool_that_fails_too_is_said_once(
    history: TaskRunHistory, outage: Down, messages: Callable[[], list[str]], state: Any
) -> None:
    (state / "spool").write_text("in the way")
    outage.is_down = True
    for _ in range(3):
        with history.record("job"):
            pass
    [message] = messages()
    assert message.startswith("this run will not be recorded (task 'job'): the disk is full; ")
    (state / "spool").unlink()
    with history.record("job"):
        pass
    assert len(messages()) == 2


def test_calls_by_hand_keep_nothing(history: TaskRunHistory, outage: Down) -> None:
    run = history.open_run("job")
    outage.is_down = True
    with pytest.raises(OperationalError):
        history.open_run("job")
    with pytest.raises(OperationalError):
        history.close_run("job", run.attempt, TaskPhase.SUCCEEDED)
    with pytest.raises(OperationalError), history.record("job", on_error="raise"):
        pass
    outage.is_down = False
    with pytest.raises(RunNotFoundError):
        history.close_run("job", 2, TaskPhase.SUCCEEDED)
    assert spool.files(url_of(history)) == []


def test_database_in_memory_and_reader_keep_nothing(sqlite: str, messages: Callable[[], list[str]]) -> None:
    with TaskRunHistory.connect("sqlite://") as history, history.record("job"):
        pass
    with TaskRunHistory.connect(sqlite, read_only=True) as history, history.record("job"):
        pass
    assert [message.split(",")[0] for message in messages()] == ["runs are not recorded at present"] * 2
    assert spool.waiting() == []


def test_loop_goes_on_while_runs_are_kept(sqlite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from taskruns.aio import AsyncTaskRunHistory

    threads = set()
    append = spool.Spool._append

    def appended(*arguments: Any, **options: Any) -> Any:
        threads.add(threading.current_thread())
        return append(*arguments, **options)

    monkeypatch.setattr(spool.Spool, "_append", appended)

    async def work() -> None:
        async with AsyncTaskRunHistory.connect(f"sqlite:///{os.devnull}/none") as history, history.record("job"):
            pass

    asyncio.run(work())
    assert threads
    assert threading.current_thread() not in threads


def test_process_that_is_killed_in_recorded_code_leaves_its_run(sqlite: str) -> None:
    code = (
        "import os, sys; from taskruns import TaskRunHistory\n"
        "history = TaskRunHistory.connect(sys.argv[1], retry_for=0.1)\n"
        "history._outage._until = 1e18\n"
        "with history.record('done'): pass\n"
        "with history.record('killed'): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, sqlite], check=False).returncode == -9
    with TaskRunHistory.connect(sqlite) as history:
        replayed(history)
        assert [run.phase for run in history.runs("done").runs] == [TaskPhase.SUCCEEDED]
        [run] = history.runs("killed").runs
    assert (run.phase, run.recovered) == (TaskPhase.FAILED, True)
