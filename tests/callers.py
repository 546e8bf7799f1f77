"""Callers that come together at a history with group commit: threads, or tasks of asyncio."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from taskruns import TaskRunHistory
from taskruns.aio import AsyncTaskRunHistory
from taskruns.commit import Call, Writer

Work = Callable[[Any], Any]
"""What a caller does with a history; with one for asyncio it returns what is to be awaited."""

FIRST = "the first of all"
"""The task of a call with which the writer waits until the others have come."""

_LIMIT = 30
"""Seconds after which a caller hangs."""


class Batches:
    """What the writers of a test were given: the tasks of each batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tasks: list[list[str]] = []
        self.is_held = threading.Event()
        self.go_on = threading.Event()
        write = Writer.write

        def watched(writer: Writer, calls: list[Call]) -> None:
            self.tasks.append([call.task_id for call in calls])
            if [call.task_id for call in calls] == [FIRST]:
                self.is_held.set()
                assert self.go_on.wait(_LIMIT)
            write(writer, calls)

        monkeypatch.setattr(Writer, "write", watched)

    def hold(self) -> None:
        """Have the next call of the first task wait, and forget what was written before."""
        self.is_held.clear()
        self.go_on.clear()
        self.tasks.clear()


class Callers:
    """Those of one history. What they get is a run or an error."""

    history: Any

    def call(self, work: Work) -> Any:
        """Have one do something, and return what it got."""
        raise NotImplementedError

    def together(
        self, *works: Work, batches: Batches | None = None, waiting: int | None = None, limit: float = _LIMIT
    ) -> list[Any]:
        """Have all do something at once, and return what each got.

        With ``batches`` they wait for the same batch: all of them, or as many as get so far.
        """
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def is_waiting(self, count: int) -> bool:
        return len(self.history._group._pending) == count


class Threads(Callers):
    def __init__(self, url: str, **options: Any) -> None:
        self.history = TaskRunHistory.connect(url, source="here", group_commit=True, **options)

    def call(self, work: Work) -> Any:
        return work(self.history)

    def together(
        self, *works: Work, batches: Batches | None = None, waiting: int | None = None, limit: float = _LIMIT
    ) -> list[Any]:
        found: list[Any] = [None] * len(works)

        def call(number: int) -> None:
            try:
                found[number] = works[number](self.history)
            except BaseException as error:  # noqa: BLE001  (it is what this caller got)
                found[number] = error

        threads = [threading.Thread(target=call, args=(number,), daemon=True) for number in range(len(works))]
        if batches is not None:
            batches.hold()
            threads.append(threading.Thread(target=self.history.open_run, args=(FIRST,), daemon=True))
            threads[-1].start()
            assert batches.is_held.wait(_LIMIT)
        for thread in threads[: len(works)]:
            thread.start()
        if batches is not None:
            deadline = time.monotonic() + _LIMIT
            while not self.is_waiting(len(works) if waiting is None else waiting):
                assert time.monotonic() < deadline, "they do not wait together"
                time.sleep(0.001)
            batches.go_on.set()
        for thread in threads:
            thread.join(limit)
        assert not any(thread.is_alive() for thread in threads), "a caller hangs"
        return found

    def close(self) -> None:
        self.history.dispose()


class Tasks(Callers):
    def __init__(self, url: str, **options: Any) -> None:
        self.history = AsyncTaskRunHistory.connect(url, source="here", group_commit=True, **options)
        self.runner = asyncio.Runner()

    def call(self, work: Work) -> Any:
        return self.runner.run(work(self.history))

    def together(
        self, *works: Work, batches: Batches | None = None, waiting: int | None = None, limit: float = _LIMIT
    ) -> list[Any]:
        return self.runner.run(self._together(works, batches, waiting, limit))

    async def _together(
        self, works: Sequence[Work], batches: Batches | None, waiting: int | None, limit: float
    ) -> list[Any]:
        first = None
        async with asyncio.timeout(limit):
            if batches is not None:
                batches.hold()
                first = asyncio.create_task(self.history.open_run(FIRST))
                while not batches.is_held.is_set():  # noqa: ASYNC110  (another thread sets it)
                    await asyncio.sleep(0.001)
            tasks = [asyncio.ensure_future(work(self.history)) for work in works]
            if batches is not None:
                while not self.is_waiting(len(works) if waiting is None else waiting):  # noqa: ASYNC110  (as above)
                    await asyncio.sleep(0.001)
                batches.go_on.set()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            if first is not None:
                await first
        return found

    def close(self) -> None:
        self.runner.run(self.history.dispose())
        self.runner.close()


CALLERS = {"threads": Threads, "tasks": Tasks}
