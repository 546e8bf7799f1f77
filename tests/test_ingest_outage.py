"""`taskruns ingest` without its database: it reads on, keeps what it is told, and loses nothing of it."""

import signal
import socket
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import Home, Shell
from servers import free_port
from sqlalchemy import create_engine, make_url, text
from test_ingest import (
    Ingest,
    all_runs,
    clean_pass,
    encoded,
    facts,
    home,
    ingest,
    many,
    shell,
    shown,
    start,
    stop,
    written,
)

from taskruns import replay, spool
from taskruns.cli import sink
from taskruns.url import parse_url

__all__ = ["home", "ingest", "shell"]  # fixtures


@contextmanager
def out_of_use(database: str) -> Iterator[None]:
    """Take the table away."""
    engine = create_engine(database)

    def rename(old: str, new: str) -> None:
        with engine.begin() as connection:
            connection.execute(text(f"ALTER TABLE {old} RENAME TO {new}"))

    rename("task_runs", "away")
    try:
        yield
    finally:
        rename("away", "task_runs")
        engine.dispose()


def test_outage_is_bridged(ingest: Callable[..., Ingest], database: str) -> None:
    events = many(60)
    running = ingest(database, "--ack")
    running.tell(*events[:20])
    assert [running.acknowledged() for _ in range(20)] == list(range(1, 21))
    with out_of_use(database):
        for number in range(20, 40):
            running.tell(events[number])
            assert running.acknowledged() == number + 1
        assert [waiting.events for waiting in spool.waiting()] == [20]
    assert "events are kept in " in running.complaint()
    assert "the database can be used again" in running.complaint()  # though the input pauses
    assert spool.waiting() == []
    running.tell(*events[40:])
    status, errors = running.wait()
    assert (status, len(errors.splitlines())) == (0, 1)
    assert "20 kept until" in errors
    assert shown(all_runs(database)) == shown(clean_pass(events))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_acknowledged_in_an_outage_is_there_after_it(
    ingest: Callable[..., Ingest], home: Home, sqlite: str, number: signal.Signals
) -> None:
    events = many(3000)
    with out_of_use(sqlite):
        running = ingest(sqlite, "--ack")
        running.tell(*events)
        assert [running.acknowledged() for _ in events] == list(range(1, len(events) + 1))
        running.process.send_signal(number)
        assert running.process.wait(60) == (0 if number == signal.SIGTERM else -number)
    after = ingest(sqlite, "--ack")
    after.tell(start(5000))
    after.acknowledged()
    assert after.wait()[0] == 0
    assert spool.waiting() == []
    assert shown(all_runs(sqlite)) == shown(clean_pass([*events, start(5000)]))


def test_event_without_time_happened_when_it_was_read(ingest: Callable[..., Ingest], sqlite: str) -> None:
    with out_of_use(sqlite):
        running = ingest(sqlite, "--ack")
        running.tell({"kind": "TaskStarting", "task": "job", "startedAt": "nonsense", "more": [[]], "source": 1})
        running.acknowledged()
        assert running.end()[0] == 0
    [path] = spool.directory().glob("*.jsonl")
    content = path.read_bytes()
    for _ in range(2):
        path.write_bytes(content)
        assert ingest(sqlite, stdout=None).wait()[0] == 0
    assert facts(sqlite) == [(1, "running")]


def test_server_that_is_not_there_at_the_start_is_no_reason_to_read_nothing(shell: Shell, tmp_path: Path) -> None:
    database = f"postgresql://postgres@127.0.0.1:{free_port()}/none?connect_timeout=1"
    answer = shell("ingest", "--db", database, "--ack", written(tmp_path / "events", encoded(start(0), stop(1))))
    assert (answer.status, answer.out) == (0, '{"ack": 1}\n{"ack": 2}\n')
    assert "events are kept in " in answer.err
    assert len(answer.err.splitlines()) == 2
    assert [waiting.events for waiting in spool.waiting()] == [2]


def test_what_was_left_comes_first_even_if_it_takes_long(
    shell: Shell, sqlite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = many(20)
    spool.Spool(parse_url(sqlite)).add_events(socket.gethostname(), events[:15])
    monkeypatch.setattr(sink, "_REPLAY_FOR", 0)
    monkeypatch.setattr(replay, "_LINES", 4)
    answer = shell("ingest", "--db", sqlite, written(tmp_path / "events", encoded(*events[15:])))
    assert answer.status == 0
    assert "what an earlier process has left comes first" in answer.err
    assert 0 < len(all_runs(sqlite)) < len(clean_pass(events))
    assert shell("replay", "--db", sqlite).status == 0
    assert shown(all_runs(sqlite)) == shown(clean_pass(events))


def test_without_a_spool_it_reads_on_and_acknowledges_no_more(
    ingest: Callable[..., Ingest], sqlite: str, state: Path
) -> None:
    (state / "spool").write_bytes(b"in the way")
    running = ingest(sqlite, "--ack")
    running.tell(start(0))
    assert running.acknowledged() == 1
    with out_of_use(sqlite):
        running.tell(*many(5000))
        status, errors = running.wait()
    assert (status, len(errors.splitlines())) == (2, 2)
    assert "events are lost" in errors
    assert running.unread() == b""
    assert facts(sqlite) == [(1, "running")]


def test_database_that_does_not_answer_holds_up_nobody(ingest: Callable[..., Ingest], sqlite: str) -> None:
    running = ingest(f"{sqlite}?timeout=600", "--ack")
    running.tell(start(0))
    assert running.acknowledged() == 1
    blocker = sqlite3.connect(str(make_url(sqlite).database), isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    running.tell(stop(1))
    assert running.acknowledged() == 2
    running.tell(start(2, attempt=2))
    assert running.acknowledged() == 3
    status, errors = running.end()
    blocker.execute("ROLLBACK")
    blocker.close()
    assert status == 0
    assert "does not answer" in errors
    assert [waiting.events for waiting in spool.waiting()] == [2]
    assert ingest(sqlite).wait()[0] == 0
    assert facts(sqlite) == [(1, "succeeded"), (2, "running")]


def test_pauses_are_short() -> None:
    assert (sink.PATIENCE, sink.PAUSE) == (5, 3)
