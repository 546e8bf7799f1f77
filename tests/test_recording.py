"""record(): what is stored of the code inside."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event

from taskruns import TaskPhase, TaskRun, TaskRunHistory
from taskruns.aio import AsyncTaskRunHistory


class OwnError(Exception):
    pass


class Mute(Exception):  # noqa: N818  (a test's own)
    def __str__(self) -> str:
        return ""


def only_run(history: TaskRunHistory) -> TaskRun:
    [run] = history.runs("job").runs
    return run


def test_body_that_ends_well_is_succeeded(history: TaskRunHistory) -> None:
    before = datetime.now(UTC)
    with history.record("job", source="web-1", submission="s-1") as handle:
        running = only_run(history)
        assert handle.run == running
        assert handle.attempt == 1
        assert running.phase is TaskPhase.RUNNING
    run = only_run(history)
    assert handle.run == run
    assert (run.phase, run.error, run.exit_code) == (TaskPhase.SUCCEEDED, None, None)
    assert (run.source, run.submission, run.started_at) == ("web-1", "s-1", running.started_at)
    assert run.finished_at is not None
    assert before <= run.started_at <= run.finished_at <= datetime.now(UTC) + timedelta(seconds=1)


ENDS: list[tuple[BaseException, TaskPhase, str | None, int | None]] = [
    (OwnError("boom"), TaskPhase.FAILED, "test_recording.OwnError: boom", None),
    (ValueError("é\x00"), TaskPhase.FAILED, "ValueError: é\ufffd", None),
    (Mute(), TaskPhase.FAILED, "test_recording.Mute", None),
    (TimeoutError("too slow"), TaskPhase.TIMEOUT, "TimeoutError: too slow", None),
    (KeyboardInterrupt(), TaskPhase.CANCELED, "KeyboardInterrupt", None),
    (asyncio.CancelledError(), TaskPhase.CANCELED, "asyncio.exceptions.CancelledError", None),
    (SystemExit(), TaskPhase.SUCCEEDED, None, 0),
    (SystemExit(None), TaskPhase.SUCCEEDED, None, 0),
    (SystemExit(0), TaskPhase.SUCCEEDED, None, 0),
    (SystemExit(3), TaskPhase.FAILED, "exited with status 3", 3),
    (SystemExit(256 + 3), TaskPhase.FAILED, "exited with status 3", 3),
    (SystemExit(256), TaskPhase.SUCCEEDED, None, 0),
    (SystemExit(-1), TaskPhase.FAILED, "exited with status 255", 255),
    (SystemExit("no such file"), TaskPhase.FAILED, "no such file", 1),
    (SystemExit(True), TaskPhase.FAILED, "exited with status 1", 1),
]


@pytest.mark.parametrize(("exception", "phase", "error", "exit_code"), ENDS, ids=lambda value: repr(value)[:30])
def test_exception_is_stored_and_goes_on(
    sqlite: str, exception: BaseException, phase: TaskPhase, error: str | None, exit_code: int | None
) -> None:
    with TaskRunHistory.connect(sqlite) as history:
        with pytest.raises(type(exception)) as caught, history.record("job"):
            raise exception
        assert caught.value is exception
        run = only_run(history)
        assert (run.phase, run.error, run.exit_code) == (phase, error, exit_code)


def test_exceptions_are_stored_on_every_database(history: TaskRunHistory) -> None:
    for exception in (OwnError("boom"), TimeoutError("slow"), SystemExit(3)):
        with pytest.raises(type(exception)), history.record("job"):
            raise exception
    assert [run.phase for run in history.runs("job").runs] == ["failed", "timeout", "failed"]


HANDLES: list[tuple[dict[str, Any], Exception | None, TaskPhase, str | None, int | None]] = [
    ({"exit_code": 0}, None, TaskPhase.SUCCEEDED, None, 0),
    ({"exit_code": 4}, None, TaskPhase.FAILED, None, 4),
    ({"error": "half done"}, None, TaskPhase.FAILED, "half done", None),
    ({"phase": TaskPhase.CANCELED}, None, TaskPhase.CANCELED, None, None),
    ({"phase": "exhausted", "error": "gave up"}, None, TaskPhase.EXHAUSTED, "gave up", None),
    ({"phase": TaskPhase.SUCCEEDED, "exit_code": 1, "error": "but"}, None, TaskPhase.SUCCEEDED, None, 1),
    ({"error": "mine"}, OwnError("boom"), TaskPhase.FAILED, "mine", None),
    ({"phase": TaskPhase.EXHAUSTED}, OwnError("boom"), TaskPhase.EXHAUSTED, "test_recording.OwnError: boom", None),
    ({"phase": TaskPhase.SUCCEEDED}, OwnError("boom"), TaskPhase.FAILED, "test_recording.OwnError: boom", None),
    ({"exit_code": 7}, TimeoutError("slow"), TaskPhase.TIMEOUT, "TimeoutError: slow", 7),
]


@pytest.mark.parametrize(("settings", "exception", "phase", "error", "exit_code"), HANDLES)
def test_handle_tells_what_is_not_to_be_inferred(
    sqlite: str,
    settings: dict[str, Any],
    exception: Exception | None,
    phase: TaskPhase,
    error: str | None,
    exit_code: int | None,
) -> None:
    with TaskRunHistory.connect(sqlite) as history:

        @contextmanager
        def told() -> Iterator[None]:
            with history.record("job") as handle:
                for name, value in settings.items():
                    setattr(handle, name, value)
                yield

        if exception is None:
            with told():
                pass
        else:
            with pytest.raises(type(exception)), told():
                raise exception
        run = only_run(history)
        assert (run.phase, run.error, run.exit_code) == (phase, error, exit_code)


def test_duration_is_the_monotonic_clocks(sqlite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with TaskRunHistory.connect(sqlite) as history:
        with history.record("job") as handle:
            handle._clock -= 90.5  # as if the body had taken so long, whatever the wall clock did
        duration = only_run(history).duration
        assert duration is not None
        assert timedelta(seconds=90.5) <= duration < timedelta(seconds=100)


def test_function_is_recorded_at_each_call(database: str) -> None:
    calls: list[int] = []

    def double(number: int, *, by: int = 2) -> int:
        """Return more."""
        calls.append(number)
        if number < 0:
            raise OwnError("negative")
        return number * by

    with TaskRunHistory.connect(database) as history:
        recorded = history.record("job")(double)
        assert (recorded.__name__, recorded.__doc__) == ("double", "Return more.")
        assert (recorded(1), recorded(2, by=5)) == (2, 10)
        with pytest.raises(OwnError, match="negative"):
            recorded(-1)
        assert calls == [1, 2, -1]
        assert [run.phase for run in history.runs("job").runs] == ["failed", "succeeded", "succeeded"]


def test_recursive_function_has_a_run_for_each_call(sqlite: str) -> None:
    with TaskRunHistory.connect(sqlite) as history:

        @history.record("job")
        def countdown(number: int) -> int:
            return countdown(number - 1) + 1 if number else 0

        assert countdown(3) == 3
        runs = history.runs("job").runs
        assert [run.attempt for run in runs] == [4, 3, 2, 1]
        assert all(run.phase is TaskPhase.SUCCEEDED for run in runs)
        finished = [run.finished_at for run in runs if run.finished_at]
        assert finished == sorted(finished)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_coroutine_function_is_recorded_by_both_histories(database: str, asynchronous: bool) -> None:
    async def main() -> None:
        history: Any = (AsyncTaskRunHistory if asynchronous else TaskRunHistory).connect(database)

        async def work(number: int) -> int:
            await asyncio.sleep(0.01)
            if number < 0:
                raise OwnError("negative")
            return number

        recorded = history.record("job")(work)
        assert sorted(await asyncio.gather(*(recorded(number) for number in range(5)))) == [0, 1, 2, 3, 4]
        with pytest.raises(OwnError):
            await recorded(-1)
        disposal = history.dispose()
        if disposal is not None:
            await disposal

    asyncio.run(main())
    with TaskRunHistory.connect(database) as history:
        phases = [run.phase for run in history.runs("job").runs]
        assert phases == [TaskPhase.FAILED] + [TaskPhase.SUCCEEDED] * 5


def test_sync_history_does_not_hold_up_the_event_loop(sqlite: str) -> None:
    async def main(history: TaskRunHistory) -> str:
        loop_thread = threading.get_ident()
        threads = set()
        event.listen(history._engine, "before_cursor_execute", lambda *_: threads.add(threading.get_ident()))

        @history.record("job")
        async def work() -> str:
            return "done"

        result = await work()
        assert threads
        assert loop_thread not in threads
        return result

    with TaskRunHistory.connect(sqlite) as history:
        assert asyncio.run(main(history)) == "done"


@pytest.mark.parametrize("history_class", [TaskRunHistory, AsyncTaskRunHistory])
def test_generators_are_refused(sqlite: str, history_class: Any) -> None:
    def generator() -> Iterator[int]:
        yield 1

    async def asynchronous() -> Any:
        yield 1

    for function in (generator, asynchronous):
        with pytest.raises(TypeError, match="a generator cannot be recorded"):
            history_class.connect(sqlite).record("job")(function)


def test_asynchronous_history_refuses_a_plain_function(sqlite: str) -> None:
    function: Any = len
    with pytest.raises(TypeError, match="records coroutine functions"):
        AsyncTaskRunHistory.connect(sqlite).record("job")(function)


def test_on_error_is_warn_or_raise(history: TaskRunHistory) -> None:
    word: Any = "ignore"
    with pytest.raises(ValueError, match="on_error is one of warn, raise, not 'ignore'"):
        history.record("job", on_error=word)
