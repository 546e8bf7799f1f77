"""Connections that are kept between calls.

To have one checked out of SQLAlchemy's pool and reset afterwards takes longer than SQLite needs to write a run.
"""

import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue

from sqlalchemy import Connection, Engine, QueuePool
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from taskruns.engine import only_reads

MOST = 15
"""Connections that are open at a time; further callers wait for one."""

PATIENCE = 30.0
"""Seconds that they wait at most, as with SQLAlchemy's pool."""


class Connections:
    """The connections of an engine, each for one caller at a time.

    Kept are those that are as they came: on which nothing was executed but prepared statements. The others go back to
    SQLAlchemy's pool, which resets them.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # What was written since cannot be seen through one that reads a file which nobody has open for writing.
        self._keeps = not only_reads(engine)
        self._options = engine.get_execution_options()
        self.idle: list[Connection] = []
        self.begin_anew()
        _all.add(self)

    def begin_anew(self) -> list[Connection]:
        """Forget the connections, which are a parent's, without closing them, and return those that nobody uses."""
        idle, self.idle = self.idle, []
        self._lock = threading.RLock()  # a signal handler may record while its thread holds it
        self._open = 0  # kept or in use
        # What those who wait are given, each by a queue of its own, or the next caller would take it before they wake.
        self._waiting: deque[SimpleQueue[Connection | None]] = deque()
        return idle

    def take(self) -> Connection:
        """Return a connection that nobody else uses until it is given back.

        Raises:
            TimeoutError: (SQLAlchemy's) all were in use for too long.
        """
        try:
            return self.idle.pop()
        except IndexError:
            connection = self._wait()
        if connection is not None:
            return connection
        try:
            return self._engine.connect()
        except BaseException:
            with self._lock:
                self._return(None)
            raise

    def _wait(self) -> Connection | None:
        """Wait for a connection, or for leave to open one, which is None."""
        given: SimpleQueue[Connection | None] = SimpleQueue()
        with self._lock, suppress(IndexError):
            if self._open < MOST:
                self._open += 1
                return None
            self._waiting.append(given)
            connection = self.idle.pop()  # given back since just now
            self._waiting.pop()
            return connection
        try:
            return given.get(timeout=PATIENCE)
        except BaseException as error:
            with self._lock:
                try:
                    self._waiting.remove(given)
                except ValueError:
                    self._return(given.get())
            if isinstance(error, Empty):
                raise PoolTimeoutError(f"all {MOST} connections were in use for {PATIENCE:g} s") from None
            raise

    def give_back(self, connection: Connection) -> None:
        """Keep a connection for the next caller, or leave it to the pool."""
        is_lost = connection.invalidated
        if (
            self._keeps
            and not is_lost
            and not connection.in_transaction()
            and connection.get_execution_options() is self._options
        ):
            self.idle.append(connection)
            if self._waiting:
                with self._lock, suppress(IndexError):
                    self._return(self.idle.pop())
            return
        try:
            connection.close()
        finally:
            with self._lock:
                self._return(None)
            if is_lost:  # what has ended one connection has most likely ended every one
                self._close_idle(are_lost=True)
                pool = self._engine.pool
                if isinstance(pool, QueuePool) and not pool.checkedout():  # or they came back to one that is gone
                    self._engine.dispose()

    def _return(self, connection: Connection | None) -> None:
        """Leave a connection, or leave to open one, to the next one. The caller holds the lock."""
        if self._waiting:
            self._waiting.popleft().put(connection)
        elif connection is not None:
            self.idle.append(connection)
        else:
            self._open -= 1

    @contextmanager
    def one(self) -> Iterator[Connection]:
        """Take a connection, and give it back at the end."""
        connection = self.take()
        try:
            yield connection
        finally:
            self.give_back(connection)

    def dispose(self) -> None:
        """Close those that nobody uses."""
        self._close_idle(are_lost=False)
        self._engine.dispose()

    def _close_idle(self, *, are_lost: bool) -> None:
        while True:
            try:
                connection = self.idle.pop()
            except IndexError:
                return
            try:
                if are_lost:
                    connection.invalidate()
                else:
                    connection.detach()  # its pool may be gone, and would leave it open
                connection.close()
            finally:
                with self._lock:
                    self._return(None)


_all: weakref.WeakSet[Connections] = weakref.WeakSet()
_inherited: list[object] = []


def _forget_connections() -> None:
    """Give a forked child connections of its own, and leave the parent's sockets alone."""
    for connections in list(_all):
        _inherited.extend(connections.begin_anew())  # collecting them would reset what the parent still uses


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_connections)
