"""Group commit: what callers want written at the same time is written by one transaction.

As in the logs of databases, one of the callers leads, and the others follow. Who comes while nobody writes is the
leader, and writes what has come by then; those that come meanwhile are the next batch. There is no timer: a lone caller
waits for nobody.
"""

import os
import threading
import time
import weakref
from collections import deque
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from sqlalchemy import URL, Connection
from sqlalchemy.exc import NotSupportedError, ProgrammingError, SQLAlchemyError

from taskruns import engine
from taskruns.batches import Batch
from taskruns.connections import Connections
from taskruns.errors import TaskRunsError
from taskruns.model import Outcome, TaskRun
from taskruns.retrying import is_held_up, is_lost, is_refusal
from taskruns.supervision import Supervision
from taskruns.writing import Start

MOST_AT_ONCE = 512
"""Calls that one transaction writes, at most."""

MOST_TEXT = 2**21
"""Characters in the errors of one transaction, at most: with six bytes for each MariaDB, as installed, takes it."""

MOST_WAITING = 4096
"""Calls that may wait to be written; further callers wait until there is room."""

_HOLDUP = 1.0
"""Seconds that a batch waits for a row that somebody else has locked; then its callers wait each for their own."""


@dataclass(slots=True, eq=False)
class Call:
    """What a caller wants written: a start, or how a run has ended.

    What becomes of it is a run or an error; where it is neither, the caller has to see to it without the others.
    """

    task_id: str
    start: Start | None = None
    is_certain: bool = False
    attempt: int = 0
    outcome: Outcome | None = None
    run: TaskRun | None = None
    error: Exception | None = None
    wake: Any = None  # how to tell the caller that it is written, or has to lead
    batch: list["Call"] = field(default_factory=list)  # what it writes as the leader, until the others are told

    def result(self) -> TaskRun | None:
        """Return the run, or None if there is neither a run nor an error."""
        if self.error is not None:
            raise self.error
        return self.run


class Writer:
    """Writes the calls of a history, through connections of its own."""

    def __init__(self, url: URL, supervision: Supervision, *, lock_timeout: float) -> None:
        # SQLite has one lock, and whom it holds up is held up in a batch or without.
        wait = lock_timeout if url.get_backend_name() == "sqlite" else min(lock_timeout, _HOLDUP)
        self._connections = Connections(engine.create(url, lock_timeout=wait))
        self._supervision = supervision
        self._is_able = True

    def dispose(self) -> None:
        """Close the idle connections."""
        self._connections.dispose()

    def write(self, calls: list[Call]) -> None:
        """Write calls of different tasks, and note in each what has become of it."""
        try:
            self._write(calls)
        except BaseException:
            _fail(calls, ConnectionAbortedError("the thread that was writing was interrupted"))
            raise

    def _write(self, calls: list[Call]) -> None:
        try:
            with self._connections.one() as connection:
                # MySQL, and SQLite before 3.35, cannot tell which numbers were given.
                self._is_able = self._is_able and connection.dialect.insert_returning
                if len(calls) == 1:
                    self._write_one(connection, calls[0])
                elif self._is_able:
                    self._write_all(connection, calls)
        except (SQLAlchemyError, TimeoutError) as error:
            # Where it may be one call's fault, or it is somebody's lock, each finds out without the others.
            if is_lost(error) or (is_refusal(error) and not is_held_up(error)):
                _fail(calls, error)

    def _write_one(self, connection: Connection, call: Call) -> None:
        supervision = self._supervision
        try:
            if call.start is not None:
                call.run = supervision.open(connection, call.start, lost=False, is_certain=call.is_certain)
            elif call.outcome is not None:
                call.run = supervision.close(
                    connection, call.task_id, call.attempt, call.outcome, lost=False, leave=False
                )
        except TaskRunsError as error:
            call.error = error

    def _write_all(self, connection: Connection, calls: list[Call]) -> None:
        supervision = self._supervision
        opening, closing = self._fitting(calls, supervision.attend(connection))
        batch = Batch([start for _, start in opening], [(run, outcome) for _, run, outcome in closing])
        try:
            opened, closed = batch.write(connection)
        except (ProgrammingError, NotSupportedError):
            self._is_able = False  # the server is too old, or distributed
            raise
        for call, start in opening:
            attempt = opened.get(call.task_id)
            if attempt is not None:
                call.run = start.run.numbered(attempt)
                supervision.opened(call.run, is_certain=call.is_certain)
        for call, run, outcome in closing:
            if (call.task_id, call.attempt) in closed:
                call.run = run.ended(outcome)
                supervision.closed(call.task_id, call.attempt)

    def _fitting(
        self, calls: list[Call], number: int | None
    ) -> tuple[list[tuple[Call, Start]], list[tuple[Call, TaskRun, Outcome]]]:
        """Return what a batch can write: no start that ends another run, and no end of a run that is not known here."""
        supervision, room = self._supervision, MOST_TEXT
        opening: list[tuple[Call, Start]] = []
        closing: list[tuple[Call, TaskRun, Outcome]] = []
        for call in calls:
            if call.start is not None:
                if not supervision.superseded_by(call.start):
                    opening.append((call, call.start.watched_by(number)))
            elif call.outcome is not None:
                run = supervision.as_opened(call.task_id, call.attempt)
                room -= len(call.outcome.error or "")
                if run is not None and room >= 0:
                    closing.append((call, run, call.outcome))
        return opening, closing


def _fail(calls: list[Call], error: Exception) -> None:
    for call in calls:
        if call.run is None and call.error is None:
            call.error = copy(error)  # each to be raised in a thread of its own


def take(pending: deque[Call]) -> tuple[list[Call], deque[Call]]:
    """Return the next batch, and those that are left: at most one call of a task, so that they stay in their order."""
    batch: list[Call] = []
    left: deque[Call] = deque()
    tasks: set[str] = set()
    for call in islice(pending, MOST_AT_ONCE):
        if call.task_id in tasks:
            left.append(call)
        else:
            tasks.add(call.task_id)
            batch.append(call)
    left.extend(islice(pending, MOST_AT_ONCE, None))
    return batch, left


class GroupCommit:
    """Has the calls of many threads written together, by one of them at a time."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.begin_anew()
        _all.add(self)

    def begin_anew(self) -> None:
        """Forget the callers: in a forked child they do not exist."""
        self._here = threading.local()
        self._lock = threading.Lock()
        self._has_room = threading.Condition(self._lock)
        self._pending: deque[Call] = deque()
        self._leader: Call | None = None
        self._last = 1  # calls in the last batch

    def dispose(self) -> None:
        """Close the idle connections. What is being written goes on: its callers are waiting for it."""
        self.writer.dispose()

    def open(self, start: Start, *, is_certain: bool) -> TaskRun | None:
        """Open a run and return it when it is durable; None if that has to be done without the others.

        Raises:
            TaskRunsError: it cannot be done.
            SQLAlchemyError: it may, or may not, have been written.
        """
        return self._write(Call(start.run.task_id, start, is_certain))

    def close(self, task_id: str, attempt: int, outcome: Outcome) -> TaskRun | None:
        """Close a run, likewise."""
        return self._write(Call(task_id, attempt=attempt, outcome=outcome))

    def _write(self, call: Call) -> TaskRun | None:
        if getattr(self._here, "is_inside", False):
            return None  # a signal handler, or a finalizer, of a thread for which the others may be waiting
        call.wake = threading.Lock()
        call.wake.acquire()
        try:
            self._here.is_inside = True
            with self._lock:
                while len(self._pending) >= MOST_WAITING:
                    self._has_room.wait()
                self._pending.append(call)
                if self._leader is None:
                    self._leader = call
            if self._leader is not call:
                call.wake.acquire()  # until it is written, or has to lead
            if self._leader is call:
                self._lead(call)
        except BaseException:  # an interrupt, at whatever moment: the others must go on
            with self._lock, suppress(ValueError):
                self._pending.remove(call)
            self._retire(call)
            raise
        finally:
            self._here.is_inside = False
        return call.result()

    def _lead(self, leader: Call) -> None:
        self._let_come()
        with self._lock:
            leader.batch, self._pending = take(self._pending)  # both or none, should an interrupt come
            self._has_room.notify(len(leader.batch))
        self._last = len(leader.batch)
        self.writer.write(leader.batch)
        self._retire(leader)

    def _let_come(self) -> None:
        """Give way to those whom the last batch has woken, as they may have more to tell: not for any time."""
        for _ in range(4 * self._last):
            if len(self._pending) >= self._last:
                return
            time.sleep(0)

    def _retire(self, leader: Call) -> None:
        """Leave the lead to the next one, if this caller has it, and tell the followers. An interrupt may repeat it."""
        with self._lock:
            if self._leader is leader:
                self._leader = self._pending[0] if self._pending else None
                if self._leader is not None:
                    leader.batch.append(self._leader)
        while leader.batch:
            if leader.batch[-1] is not leader:
                with suppress(RuntimeError):  # woken just before an interrupt
                    leader.batch[-1].wake.release()
            leader.batch.pop()


_all: weakref.WeakSet[GroupCommit] = weakref.WeakSet()


def _begin_anew() -> None:
    for group in list(_all):
        group.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
