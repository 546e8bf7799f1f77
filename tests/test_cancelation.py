"""Cancelation of asynchronous recording at any moment leaves no run behind as running."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from sqlalchemy import event

from taskruns import TaskPhase, TaskRun, TaskRunHistory
from taskruns.aio import AsyncTaskRunHistory


def runs_after(database: str, scenario: Coroutine[Any, Any, None]) -> list[TaskRun]:
    asyncio.run(scenario)
    with TaskRunHistory.connect(database) as history:
        return history.runs("job").runs


def test_cancelation_of_the_body_is_canceled(database: str) -> None:
    async def scenario() -> None:
        async with AsyncTaskRunHistory.connect(database) as history:
            inside = asyncio.Event()

            @history.record("job")
            async def work() -> None:
                inside.set()
                await asyncio.sleep(60)

            task = asyncio.create_task(work())
            await inside.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    [run] = runs_after(database, scenario())
    assert (run.phase, run.error) == (TaskPhase.CANCELED, "asyncio.exceptions.CancelledError")


def test_timeout_of_the_event_loop_is_a_cancelation_inside(database: str) -> None:
    async def scenario() -> None:
        async with AsyncTaskRunHistory.connect(database) as history:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2), history.record("job"):
                    await asyncio.sleep(60)

    [run] = runs_after(database, scenario())
    assert run.phase is TaskPhase.CANCELED


@pytest.mark.parametrize("delay", [0, 0.001, 0.003, 0.01])
def test_cancelation_while_opening_leaves_no_running_run(database: str, delay: float) -> None:
    async def scenario() -> None:
        async with AsyncTaskRunHistory.connect(database) as history:
            await history.tasks()

            async def work() -> None:
                async with history.record("job"):
                    await asyncio.sleep(60)

            tasks = [asyncio.create_task(work()) for _ in range(5)]
            await asyncio.sleep(delay)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results)

    assert all(run.phase is TaskPhase.CANCELED for run in runs_after(database, scenario()))


def test_cancelation_just_after_the_start_was_sent_closes_the_run(database: str) -> None:
    async def scenario() -> None:
        async with AsyncTaskRunHistory.connect(database) as history:
            await history.tasks()
            entered = False

            async def work() -> None:
                nonlocal entered
                async with history.record("job"):
                    entered = True

            task = asyncio.create_task(work())
            loop = asyncio.get_running_loop()

            def sent(_connection: object, _cursor: object, statement: str, *_: object) -> None:
                if statement.startswith("INSERT"):
                    loop.call_soon(task.cancel)

            event.listen(history._engine.sync_engine, "before_cursor_execute", sent)
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not entered

    [run] = runs_after(database, scenario())
    assert run.phase is TaskPhase.CANCELED


def test_cancelation_while_closing_waits_for_the_end(database: str) -> None:
    async def scenario() -> None:
        async with AsyncTaskRunHistory.connect(database) as history:
            await history.tasks()

            async def work() -> None:
                async with history.record("job"):
                    pass

            task = asyncio.create_task(work())
            loop = asyncio.get_running_loop()

            def sent(_connection: object, _cursor: object, statement: str, *_: object) -> None:
                if statement.startswith("UPDATE"):
                    loop.call_soon(task.cancel)

            event.listen(history._engine.sync_engine, "before_cursor_execute", sent)
            with pytest.raises(asyncio.CancelledError):
                await task

    [run] = runs_after(database, scenario())
    assert run.phase is TaskPhase.SUCCEEDED


def test_cancelation_in_a_transaction_rolls_it_back(database: str) -> None:
    async def scenario() -> None:
        async with AsyncTaskRunHistory.connect(database) as history:

            async def open_and_wait() -> None:
                async with asyncio.timeout(0.2), history.begin() as runs:
                    await runs.open_run("job")
                    await asyncio.sleep(60)

            with pytest.raises(TimeoutError):
                await open_and_wait()
            assert await history.tasks() == []
            await history.open_run("job")

    [run] = runs_after(database, scenario())
    assert run.attempt == 1
