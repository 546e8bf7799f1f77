"""Group commit for asyncio: what tasks want written at the same time is written by one transaction."""

import asyncio
import os
import threading
import weakref
from collections import deque
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from taskruns.commit import MOST_WAITING, Call, Writer, take
from taskruns.model import Outcome, TaskRun
from taskruns.writing import Start


class AsyncGroupCommit:
    """The twin of :class:`taskruns.commit.GroupCommit`: a thread leads while there is something to write.

    One that wakes all tasks of a batch at once takes a fraction of what an asynchronous driver takes for each of them.
    """

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.begin_anew()
        _all.add(self)

    def begin_anew(self) -> None:
        """Forget the callers and the thread: in a forked child they do not exist."""
        self._has_room = asyncio.Event()
        self._lock = threading.Lock()
        self._pending: deque[Call] = deque()
        self._is_led = False
        self._threads: ThreadPoolExecutor | None = None

    async def dispose(self) -> None:
        """Close the idle connections, and end the thread, when it has written what it is writing."""
        threads, self._threads = self._threads, None
        if threads is not None:
            await asyncio.to_thread(threads.shutdown)
        await asyncio.to_thread(self.writer.dispose)

    def open(self, start: Start, *, is_certain: bool) -> Awaitable[TaskRun | None]:
        """Open a run and return it when it is durable: see :meth:`taskruns.commit.GroupCommit.open`."""
        return self._write(Call(start.run.task_id, start, is_certain))

    def close(self, task_id: str, attempt: int, outcome: Outcome) -> Awaitable[TaskRun | None]:
        """Close a run, likewise."""
        return self._write(Call(task_id, attempt=attempt, outcome=outcome))

    async def _write(self, call: Call) -> TaskRun | None:
        while len(self._pending) >= MOST_WAITING:
            self._has_room.clear()
            await self._has_room.wait()
        loop = asyncio.get_running_loop()
        call.wake = loop.create_future()
        with self._lock:
            self._pending.append(call)
            is_led, self._is_led = self._is_led, True
        if not is_led:
            loop.call_soon(self._start, loop)  # first come the tasks that are ready by now
        try:
            await call.wake
        except asyncio.CancelledError:
            with self._lock, suppress(ValueError):
                self._pending.remove(call)
            self._has_room.set()
            raise
        return call.result()

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, thread_name_prefix="taskruns-commit")
        try:
            self._threads.submit(self._lead, loop)
        except RuntimeError:  # the interpreter is about to end, or there are too many threads: each for itself
            with self._lock:
                batch, self._pending = list(self._pending), deque()
                self._is_led = False
            self._wake(batch)

    def _lead(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            with self._lock:
                batch, self._pending = take(self._pending)
                if not batch:
                    self._is_led = False
                    return
            with suppress(Exception):  # its callers know
                self.writer.write(batch)
            with suppress(RuntimeError):  # the event loop has ended, and with it those that waited
                loop.call_soon_threadsafe(self._wake, batch)

    def _wake(self, batch: list[Call]) -> None:
        self._has_room.set()
        for call in batch:
            if not call.wake.done():  # canceled
                call.wake.set_result(None)


_all: weakref.WeakSet[AsyncGroupCommit] = weakref.WeakSet()


def _begin_anew() -> None:
    for group in list(_all):
        group.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
