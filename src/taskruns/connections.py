"""Connections that are kept between calls.

To have one checked out of SQLAlchemy's pool and reset afterwards takes longer than SQLite needs to write a run.
"""

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine, QueuePool

from taskruns.engine import only_reads


class Connections:
    """The connections of an engine, for one caller each: those of the pool, kept out of it while nobody waits there.

    Kept are only those that are as they came: on which nothing was executed but prepared statements.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # What was written since cannot be seen through one that reads a file which nobody has open for writing.
        self._keeps = not only_reads(engine)
        self._options = engine.get_execution_options()
        self._idle: list[Connection] = []
        self._waiting = 0
        self._lock = threading.Lock()
        _all.add(self)

    def begin_anew(self) -> list[Connection]:
        """Forget the connections, which are a parent's, without closing them, and return those that nobody uses."""
        idle, self._idle = self._idle, []
        self._waiting = 0
        self._lock = threading.Lock()
        return idle

    def take(self) -> Connection:
        """Return a connection that nobody else uses until it is given back."""
        try:
            return self._idle.pop()
        except IndexError:
            return self._wait()

    def _wait(self) -> Connection:
        with self._lock:
            self._waiting += 1
        try:
            # Who gave one back before it was known that somebody waits has kept it: then that is left to the pool, too.
            self._release_one()
            return self._engine.connect()
        finally:
            with self._lock:
                self._waiting -= 1

    def give_back(self, connection: Connection) -> None:
        """Keep a connection for the next caller, or leave it to the pool."""
        if connection.invalidated:
            connection.close()
            self._give_up()
        elif (
            self._keeps
            and not connection.in_transaction()
            and connection.get_execution_options() is self._options
            and not connection.closed
        ):
            self._idle.append(connection)
            if self._waiting:
                self._release_one()
        else:
            connection.close()

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
        while self._release_one():
            pass
        self._engine.dispose()

    def _give_up(self) -> None:
        """Close all that nobody uses: what has ended one connection has most likely ended every one."""
        while self._release_one(is_lost=True):
            pass
        pool = self._engine.pool
        if isinstance(pool, QueuePool) and not pool.checkedout():  # or those would come back to a pool that is gone
            self._engine.dispose()

    def _release_one(self, *, is_lost: bool = False) -> bool:
        try:
            connection = self._idle.pop()
        except IndexError:
            return False
        if is_lost:
            connection.invalidate()
        connection.close()
        return True


_all: weakref.WeakSet[Connections] = weakref.WeakSet()
_inherited: list[object] = []


def _forget_connections() -> None:
    """Give a forked child connections of its own, and leave the parent's sockets alone."""
    for connections in list(_all):
        _inherited.extend(connections.begin_anew())  # collecting them would reset what the parent still uses


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_connections)
