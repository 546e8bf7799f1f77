"""Connections that are kept between calls, for asyncio."""

import asyncio
import os
import weakref
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from taskruns.connections import MOST, PATIENCE
from taskruns.engine import only_reads


class AsyncConnections:
    """The twin of :class:`taskruns.connections.Connections`, of one event loop."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._keeps = not only_reads(engine.sync_engine)
        self._options = engine.sync_engine.get_execution_options()
        self.idle: list[AsyncConnection] = []
        self.begin_anew()
        _all.add(self)

    def begin_anew(self) -> list[AsyncConnection]:
        """Forget the connections, and return those that nobody uses: see :meth:`Connections.begin_anew`."""
        idle, self.idle = self.idle, []
        self._open = 0  # kept or in use
        self._waiting: deque[asyncio.Future[AsyncConnection | None]] = deque()
        return idle

    async def take(self) -> AsyncConnection:
        """Return a connection that nobody else uses until it is given back: see :meth:`Connections.take`."""
        if self.idle:
            return self.idle.pop()
        if self._open < MOST:
            self._open += 1
            connection = None
        else:
            connection = await self._wait()
        if connection is not None:
            return connection
        try:
            return await self._engine.connect()
        except BaseException:
            self._return(None)
            raise

    async def _wait(self) -> AsyncConnection | None:
        given: asyncio.Future[AsyncConnection | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(given)
        try:
            async with asyncio.timeout(PATIENCE):
                return await given
        except BaseException as error:
            if given.done() and not given.cancelled():
                self._return(given.result())
            if isinstance(error, TimeoutError):
                raise PoolTimeoutError(f"all {MOST} connections were in use for {PATIENCE:g} s") from None
            raise

    async def give_back(self, connection: AsyncConnection) -> None:
        """Keep a connection for the next caller, or leave it to the pool: see :meth:`Connections.give_back`."""
        is_lost = connection.invalidated
        if (
            self._keeps
            and not is_lost
            and not connection.in_transaction()
            and connection.sync_connection is not None
            and connection.sync_connection.get_execution_options() is self._options
        ):
            self._return(connection)
        else:
            await asyncio.shield(self._give_up(connection, is_lost=is_lost))

    async def _give_up(self, connection: AsyncConnection, *, is_lost: bool) -> None:
        try:
            await connection.close()
        finally:
            self._return(None)
            if is_lost:
                await self._close_idle(are_lost=True)

    def _return(self, connection: AsyncConnection | None) -> None:
        """Leave a connection, or leave to open one, to the next one."""
        while self._waiting:
            given = self._waiting.popleft()
            if not given.done():
                given.set_result(connection)
                return
        if connection is not None:
            self.idle.append(connection)
        else:
            self._open -= 1

    @asynccontextmanager
    async def one(self) -> AsyncIterator[AsyncConnection]:
        """Take a connection, and give it back at the end."""
        connection = await self.take()
        try:
            yield connection
        finally:
            await self.give_back(connection)

    async def dispose(self) -> None:
        """Close those that nobody uses."""
        await self._close_idle(are_lost=False)
        await self._engine.dispose()

    async def _close_idle(self, *, are_lost: bool) -> None:
        while self.idle:
            connection = self.idle.pop()
            try:
                if are_lost:
                    await connection.invalidate()
                await connection.close()
            finally:
                self._return(None)


_all: weakref.WeakSet[AsyncConnections] = weakref.WeakSet()
_inherited: list[object] = []


def _forget_connections() -> None:
    for connections in list(_all):
        _inherited.extend(connections.begin_anew())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_connections)
