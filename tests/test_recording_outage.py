"""A recorder that cannot record never breaks the code inside."""

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from servers import free_port
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from taskruns import PROBLEMS, SchemaVersionError, TaskPhase, TaskRunHistory, recording
from taskruns.recording import RecordedRun


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
    assert messages() == ["runs are not recorded at present, beginning with task 'job': the disk is full"]


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
    assert [run.phase for run in recorded.runs("job").runs] == [TaskPhase.RUNNING] * 2


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
    assert asks()
    assert [run.phase for run in recorded.runs("job").runs] == [TaskPhase.SUCCEEDED] * 2
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
    assert message.startswith("runs are not recorded at present, beginning with task 'job': ")
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
