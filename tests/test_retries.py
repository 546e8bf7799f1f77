"""What is tried again, and that a second try finds what the first has done."""

import sqlite3
import threading
from contextlib import suppress
from typing import Any

import pytest
from histories import Histories
from sqlalchemy import Engine, Transaction, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from taskruns import Event, TaskPhase, TaskRunHistory
from taskruns.retrying import is_lost, is_refusal
from taskruns.stream import Stream
from taskruns.timeline import Effect


def is_transient(error: BaseException) -> bool:
    return is_lost(error) or is_refusal(error)


def caught(url: str, statement: str) -> DBAPIError:
    own = create_engine(url)
    try:
        with own.begin() as connection:
            connection.execute(text(statement))
    except DBAPIError as error:
        return error
    finally:
        own.dispose()
    pytest.fail("no error")


def test_mistakes_are_not_tried_again(database: str) -> None:
    for statement in ("SELECT nothing FROM task_runs", "SELEC", "INSERT INTO task_runs (attempt) VALUES (0)"):
        assert not is_transient(caught(database, statement))
    assert not is_transient(ValueError("x"))
    assert not is_transient(IntegrityError("x", {}, Exception("x")))
    assert is_transient(ConnectionResetError())


def test_busy_sqlite_is_tried_again_until_it_is_free(sqlite: str, histories: Histories) -> None:
    history = histories.connect(sqlite, lock_timeout=0.05, retry_for=20)
    history.tasks()
    blocker = sqlite3.connect(str(make_url(sqlite).database), isolation_level=None, check_same_thread=False)
    blocker.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.4, blocker.execute, ["COMMIT"])
    timer.start()
    assert history.open_run("job").attempt == 1
    timer.join()
    blocker.execute("BEGIN IMMEDIATE")
    impatient = histories.connect(sqlite, lock_timeout=0.05, retry_for=0.2)
    with pytest.raises(OperationalError, match="locked") as caught:
        impatient.open_run("job")
    assert is_transient(caught.value)
    blocker.execute("ROLLBACK")
    blocker.close()
    assert len(history.runs("job").runs) == 1


@pytest.fixture(params=["postgresql", "mariadb"])
def servers_history(request: pytest.FixtureRequest, histories: Histories) -> tuple[TaskRunHistory, Engine]:
    """A history on a server, with the means to cut its connections."""
    database = request.getfixturevalue(request.param)
    return histories.connect(database, source="here"), create_engine(database, isolation_level="AUTOCOMMIT")


def cut(admin: Engine) -> int:
    """End every other connection to the database, as an administrator or a fail-over does."""
    with admin.connect() as connection:
        if admin.dialect.name == "postgresql":
            query = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            kill = "SELECT pg_terminate_backend({})"
        else:
            query = "SELECT id FROM information_schema.processlist WHERE db = database() AND id <> connection_id()"
            kill = "KILL {}"
        others = list(connection.scalars(text(query)))
        for other in others:
            with suppress(OperationalError):  # it has ended by itself
                connection.execute(text(kill.format(other)))
    return len(others)


def test_cut_idle_connection_goes_unnoticed(servers_history: tuple[TaskRunHistory, Engine]) -> None:
    history, admin = servers_history
    assert history.open_run("job").attempt == 1
    assert cut(admin) > 0
    assert history.open_run("job").attempt == 2
    assert cut(admin) > 0
    assert history.close_run("job", 1, TaskPhase.SUCCEEDED).phase is TaskPhase.SUCCEEDED
    assert cut(admin) > 0
    assert [run.is_active for run in history.runs("job").runs] == [True, False]
    admin.dispose()


def test_connection_cut_before_or_after_a_transaction_goes_unnoticed(
    servers_history: tuple[TaskRunHistory, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    history, admin = servers_history
    stream = Stream("here")
    history.open_run("job")
    assert cut(admin) > 0
    assert history.record_events(stream, [told(1)]) == [Effect.OPENED]
    cuts: list[int] = []
    dialect = getattr(history._engine, "sync_engine", history._engine).dialect
    reset = dialect.do_rollback

    def reset_and_cut(connection: Any) -> None:
        reset(connection)
        cuts.append(cut(admin))

    monkeypatch.setattr(dialect, "do_rollback", reset_and_cut)  # all is committed, and it is not yet back in the pool
    assert history.record_events(stream, [told(2)]) == [Effect.OPENED]
    assert history.record_events(stream, [told(3)]) == [Effect.OPENED]
    assert [count > 0 for count in cuts][:2] == [True, True]
    assert len(history.runs("told").runs) == 3
    monkeypatch.undo()
    admin.dispose()


def told(attempt: int) -> Event:
    return Event.from_wire(
        {"kind": "TaskStarting", "task": "told", "attempt": attempt, "at": f"2026-03-01T02:00:0{attempt}Z"}
    )


def test_connection_cut_in_the_middle_of_a_call_is_tried_again(
    servers_history: tuple[TaskRunHistory, Engine],
) -> None:
    history, admin = servers_history
    history.open_run("job")
    held = admin.connect()
    with admin.connect() as blocker:
        transaction = blocker.execution_options(isolation_level="READ COMMITTED").begin()
        blocker.execute(text("SELECT * FROM task_runs WHERE task_id = 'job' FOR UPDATE"))
        blocked = threading.Timer(0.3, cut_and_release, [held, transaction])
        blocked.start()
        closed = history.close_run("job", 1, TaskPhase.FAILED, error="boom")
        blocked.join()
    held.close()
    assert history.get_run("job", 1) == closed
    assert closed.error == "boom"
    admin.dispose()


def cut_and_release(connection: Any, blocking: Transaction) -> None:
    try:
        cut_waiting(connection)
    finally:
        blocking.rollback()


def cut_waiting(connection: Any) -> None:
    """End the connection that waits for a row; that this finds it shows that the call was in the middle."""
    if connection.dialect.name == "postgresql":
        found = text("SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'")
        kill = "SELECT pg_terminate_backend({})"
    else:
        found = text("SELECT id FROM information_schema.processlist WHERE db = database() AND info LIKE 'UPDATE%'")
        kill = "KILL {}"
    [waiting_id] = connection.scalars(found).all()
    connection.execute(text(kill.format(waiting_id)))


class LostAnswer:
    """Lets the next write through, and then breaks the connection before its answer comes."""

    def __init__(self, history: Any) -> None:
        self.is_armed = True
        own = getattr(history._engine, "sync_engine", history._engine)
        event.listen(own, "after_cursor_execute", self._lose)

    def _lose(self, connection: Any, cursor: Any, statement: str, *_: object) -> None:
        if self.is_armed and statement.startswith(("INSERT", "UPDATE")):
            self.is_armed = False
            if cursor.description:
                cursor.fetchall()
            cursor.close()
            connection.invalidate()
            raise ConnectionResetError("the answer was lost")


@pytest.mark.parametrize("attempt", [None, 5])
def test_retried_open_finds_its_own_start(history: TaskRunHistory, attempt: int | None) -> None:
    history.open_run("job", attempt=4)
    lost = LostAnswer(history)
    run = history.open_run("job", attempt=attempt, submission="s")
    assert not lost.is_armed
    assert run.attempt == 5
    assert run.submission == "s"
    assert history.runs("job").runs[0] == run
    assert len(history.runs("job").runs) == 2


def test_retried_close_finds_what_it_has_closed(history: TaskRunHistory) -> None:
    history.open_run("job")
    lost = LostAnswer(history)
    closed = history.close_run("job", 1, TaskPhase.FAILED, error="boom", exit_code=1)
    assert not lost.is_armed
    assert (closed.phase, closed.error, closed.exit_code) == (TaskPhase.FAILED, "boom", 1)


def test_retried_refinement_finds_what_it_has_refined(history: TaskRunHistory) -> None:
    history.open_run("job")
    history.close_run("job", 1, TaskPhase.FAILED, error="boom")
    lost = LostAnswer(history)
    closed = history.close_run("job", 1, TaskPhase.EXHAUSTED, error="no more", exit_code=2)
    assert not lost.is_armed
    assert (closed.phase, closed.error, closed.exit_code) == (TaskPhase.EXHAUSTED, "boom", 2)
