"""Histories of either twin behind one face."""

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from taskruns import TaskRunHistory
from taskruns.aio import AsyncTaskRunHistory, AsyncTaskRunRepository


class Driven:
    """An asynchronous object with its methods run to their end, so that one suite covers both twins."""

    def __init__(self, twin: Any, runner: asyncio.Runner) -> None:
        self._twin = twin
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._twin, name)
        return self._drive(value) if inspect.ismethod(value) else value

    def _drive(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def driven(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            if inspect.iscoroutine(result):
                return self._runner.run(result)
            if hasattr(result, "__aenter__"):
                return self._entered(result)
            if hasattr(result, "__anext__"):
                return self._iterated(result)
            return result

        return driven

    @contextmanager
    def _entered(self, manager: Any) -> Iterator[Any]:
        value = self._runner.run(manager.__aenter__())
        try:
            yield Driven(value, self._runner) if isinstance(value, AsyncTaskRunRepository) else value
        except BaseException as error:
            if not self._runner.run(manager.__aexit__(type(error), error, error.__traceback__)):
                raise
        else:
            self._runner.run(manager.__aexit__(None, None, None))

    def _iterated(self, iterator: Any) -> Iterator[Any]:
        async def following() -> Any:
            return await anext(iterator, None)

        while (value := self._runner.run(following())) is not None:
            yield value


class Histories:
    """Connects histories of one twin, and sees to it that they give their connections back."""

    def __init__(self, runner: asyncio.Runner | None, **options: Any) -> None:
        self._runner = runner
        self._options = options
        self._connected: list[TaskRunHistory] = []

    def connect(self, url: str, **options: Any) -> TaskRunHistory:
        options = self._options | options
        if self._runner is None:
            history = TaskRunHistory.connect(url, **options)
        else:
            twin = AsyncTaskRunHistory.connect(url, **options)
            history = cast(TaskRunHistory, Driven(twin, self._runner))
        self._connected.append(history)
        return history

    def close(self) -> None:
        busy = [in_use(cast(Any, history)) for history in self._connected]
        for history in self._connected:
            history.dispose()
        # A connection of aiosqlite that could not be opened, or was cut, ends by itself: before its event loop does.
        for thread in threading.enumerate():
            if "connection_worker" in thread.name:
                thread.join(10)
        assert not any(busy), "connections were not given back"


def in_use(history: Any) -> int:
    """The number of its connections that somebody has taken and not given back."""
    checked_out: int = history._engine.pool.checkedout()
    return checked_out - (len(history._connections.idle))
