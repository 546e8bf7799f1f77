"""Connections that are kept between calls, and the statements that go through them."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from histories import Histories
from sqlalchemy import event
from test_retries import cut, servers_history
from watchers import until

from taskruns import TaskPhase, TaskRun, TaskRunHistory, connections

__all__ = ["servers_history"]  # a fixture


def pair(history: TaskRunHistory) -> TaskRun:
    run = history.open_run("job")
    return history.close_run("job", run.attempt, TaskPhase.SUCCEEDED)


def test_one_connection_serves_one_caller_after_another(database: str, histories: Histories) -> None:
    history: Any = histories.connect(database)
    own = getattr(history._engine, "sync_engine", history._engine)
    opened: list[object] = []
    event.listen(own, "connect", lambda *_: opened.append(_))
    for _ in range(3):
        pair(history)
        history.last_run("job")
    kept = list(history._connections.idle)
    assert len(opened) == len(kept) == 1
    pair(history)
    assert history._connections.idle == kept
    history.dispose()
    assert history._connections.idle == []
    assert own.pool.checkedout() == 0
    pair(history)
    assert len(opened) == 2


def test_no_two_threads_have_a_connection_at_once(database: str) -> None:
    together, count = threading.Barrier(6), 6
    with TaskRunHistory.connect(database) as history:
        history.check_version()
        connections = history._connections

        def use(_: int) -> set[int]:
            found = set()
            for _ in range(20):
                with connections.one() as connection:
                    together.wait(30)
                    found.add(id(connection))
                    in_use.add(id(connection))
                    together.wait(30)
                    assert len(in_use) == count
                    together.wait(30)
                    in_use.clear()
                    together.wait(30)
            return found

        in_use: set[int] = set()
        with ThreadPoolExecutor(count) as pool:
            used = set.union(*pool.map(use, range(count)))
        assert len(used) == count
        assert {id(connection) for connection in connections.idle} == used


def test_cut_connection_is_kept_no_longer(servers_history: tuple[Any, Any]) -> None:
    history, admin = servers_history
    pair(history)
    (kept,) = history._connections.idle
    assert cut(admin) > 0
    pair(history)
    (another,) = history._connections.idle
    assert another is not kept
    assert kept.closed
    admin.dispose()


def test_connection_of_a_transaction_is_not_kept(database: str, histories: Histories) -> None:
    history: Any = histories.connect(database)
    pair(history)
    (kept,) = history._connections.idle
    with history.begin() as runs:
        runs.open_run("job")
        assert kept not in history._connections.idle
    assert kept not in history._connections.idle
    pair(history)


def test_connection_that_only_reads_a_file_is_not_kept(sqlite: str, histories: Histories) -> None:
    with TaskRunHistory.connect(sqlite) as writer:
        run = pair(writer)
    history: Any = histories.connect(sqlite, read_only=True)
    assert history.last_run("job") == run
    assert history._connections.idle == []
    with TaskRunHistory.connect(sqlite) as writer:
        later = pair(writer)
    assert history.last_run("job") == later


def test_listener_hears_every_statement_and_there_is_one_for_each_call(database: str, histories: Histories) -> None:
    history: Any = histories.connect(database)
    pair(history)
    heard: list[str] = []
    own = getattr(history._engine, "sync_engine", history._engine)
    event.listen(own, "before_cursor_execute", lambda _c, _d, statement, *_: heard.append(statement.split()[0]))
    for _ in range(3):
        assert not pair(history).is_active
    assert heard == ["INSERT", "UPDATE"] * 3


def test_driver_is_sent_one_statement_for_each_call(sqlite: str) -> None:
    sent: list[str] = []
    with TaskRunHistory.connect(sqlite) as history:
        pair(history)
        with history._connections.one() as connection:
            driver: Any = connection.connection.driver_connection
            driver.set_trace_callback(sent.append)
        for _ in range(3):
            pair(history)
        driver.set_trace_callback(None)
    assert [statement.split()[0] for statement in sent] == ["INSERT", "UPDATE"] * 3


def test_who_waits_is_served_before_who_comes_later(sqlite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST", 1)
    with TaskRunHistory.connect(sqlite) as history:
        kept = history._connections
        served: list[str] = []

        def wait() -> None:
            with kept.one():
                served.append("who waits")

        connection = kept.take()
        waiting = threading.Thread(target=wait)
        waiting.start()
        until(lambda: len(kept._waiting) == 1, "somebody waits")
        kept.give_back(connection)
        with kept.one():  # at once: the other has not woken yet
            served.append("who comes later")
        waiting.join()
    assert served == ["who waits", "who comes later"]
