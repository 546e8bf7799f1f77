"""What happens around recorded code: its handle, its outcome, and the rule that recording never breaks it."""

import asyncio
import inspect
import logging
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar, cast, get_args

from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from taskruns import engine, spool
from taskruns.errors import SchemaVersionError
from taskruns.model import Outcome, TaskPhase, TaskRun, checked_exit_code, checked_phase
from taskruns.retrying import cause_of
from taskruns.url import with_sync_driver
from taskruns.writing import Start

OnError = Literal["warn", "raise"]
"""What to do when a run cannot be recorded: log it and go on, or raise."""

PAUSE = 30.0
"""Seconds without a new try after the database could not be used, and between two goes at what is spooled."""

REPLAY_FOR = 5.0
"""Seconds of one go."""

LOOK = 300.0
"""Seconds between two looks at whether others have left something in the spool."""

T = TypeVar("T")
P = ParamSpec("P")

_log = logging.getLogger("taskruns")


def checked_on_error(value: OnError) -> OnError:
    """Return ``value`` if it says what to do with an error."""
    if value not in get_args(OnError):
        raise ValueError(f"on_error is one of {', '.join(get_args(OnError))}, not {value!r}")
    return value


@dataclass(slots=True)
class RecordedRun:
    """The handle of a run that is being recorded. What is set here is stored when the run closes.

    An ``error``, or an ``exit_code`` other than 0, makes it failed unless ``phase`` says otherwise.
    """

    run: TaskRun | None = None
    """The stored run; None if it could not be recorded."""
    phase: TaskPhase | None = None
    """The outcome, where it is not to be inferred."""
    error: str | None = None
    """What went wrong; for an exception its text is the default."""
    exit_code: int | None = None
    """An exit code, such as that of a process that was run."""
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    """When the recorded code began."""
    _clock: float = field(default_factory=time.monotonic)
    _kept: TaskRun | None = None
    """The run as the spool has it, where its start could not be written."""
    _finished_at: datetime | None = None

    @property
    def attempt(self) -> int | None:
        """The run's number; None if it could not be recorded."""
        return None if self.run is None else self.run.attempt

    def outcome(self, exception: BaseException | None) -> dict[str, Any]:
        """Return how the code ended, as the arguments of ``close_run``; the duration is the monotonic clock's."""
        if self._finished_at is None:  # the spool may ask again after the database
            self._finished_at = self.started_at + timedelta(seconds=time.monotonic() - self._clock)
        phase, error, exit_code = _judge(exception)
        error = error if self.error is None else str(self.error)
        exit_code = self._usable_exit_code(exit_code)
        said = self._usable_phase()
        if said is not None and not (exception is not None and said is TaskPhase.SUCCEEDED):
            phase = said
        elif phase is TaskPhase.SUCCEEDED and (error or exit_code):
            phase = TaskPhase.FAILED
        if phase is TaskPhase.SUCCEEDED:
            error = None
        return {"phase": phase, "error": error, "exit_code": exit_code, "finished_at": self._finished_at}

    # What cannot be used is left out: the run has to end, and the code has nothing to learn from it any more.

    def _usable_phase(self) -> TaskPhase | None:
        if self.phase is None:
            return None
        try:
            phase = checked_phase(self.phase)
        except ValueError as error:
            _log.warning("run.phase is left out: %s", error)
            return None
        if phase.is_active:
            _log.warning("run.phase is left out: a run cannot end as %s", phase)
            return None
        return phase

    def _usable_exit_code(self, default: int | None) -> int | None:
        try:
            code = checked_exit_code(self.exit_code)
        except (TypeError, ValueError) as error:
            _log.warning("run.exit_code is left out: %s", error)
            return default
        return default if code is None else code


def _judge(exception: BaseException | None) -> tuple[TaskPhase, str | None, int | None]:
    if exception is None:
        return TaskPhase.SUCCEEDED, None, None
    text = "".join(traceback.format_exception_only(exception)).strip()
    if isinstance(exception, SystemExit):
        return _judge_exit(exception.code)
    if isinstance(exception, KeyboardInterrupt | asyncio.CancelledError | GeneratorExit):
        return TaskPhase.CANCELED, text, None
    if isinstance(exception, TimeoutError):
        return TaskPhase.TIMEOUT, text, None
    return TaskPhase.FAILED, text, None


def _judge_exit(code: object) -> tuple[TaskPhase, str | None, int | None]:
    """Read what ``sys.exit`` was given, as a shell would see it."""
    if code is None:
        return TaskPhase.SUCCEEDED, None, 0
    if not isinstance(code, int):
        return TaskPhase.FAILED, str(code), 1
    status = code & 0xFF
    return (TaskPhase.FAILED, f"exited with status {status}", status) if status else (TaskPhase.SUCCEEDED, None, 0)


class Outage:
    """Whether the database can be used at present, as far as is known: it is asked again after a pause.

    Meanwhile runs are kept in the spool. It is replayed in a thread of its own, begun after the first success.
    """

    def __init__(self, url: URL | None) -> None:
        self._url = url if url is not None and spool.has_spool(url) else None
        self._spool = None if self._url is None else spool.Spool(self._url)
        self._until = 0.0
        self._cause = ""
        self._said: set[str] = set()
        self._replay_at = 0.0
        self._replaying: threading.Thread | None = None

    @property
    def is_on(self) -> bool:
        """Whether a try would come too soon after a failure."""
        return time.monotonic() < self._until

    @contextmanager
    def tolerated(self, task_id: str, on_error: OnError) -> Iterator[None]:
        """Take note of what goes wrong inside instead of raising it, unless ``on_error`` says to raise."""
        try:
            yield
        except Exception as error:
            is_outage = isinstance(error, SQLAlchemyError | SchemaVersionError | OSError)
            if is_outage:
                self._until = time.monotonic() + PAUSE
                self._cause = cause_of(error)
            if on_error == "raise":
                raise
            if not is_outage:
                _log.warning("a run of task %r is not recorded as it should be: %s", task_id, error)
        else:
            self._until = 0.0
            self._said.clear()
            self._replay()

    def keep_start(self, handle: RecordedRun, task_id: str, source: str, submission: str | None) -> None:
        """Keep a start that could not be written, if that is because of an outage."""
        if not self.is_on:
            return
        with self._kept(task_id, "this run"):
            run = Start.of(task_id, None, handle.started_at, source, submission, None).run
            if self._spool is not None:
                handle._kept = self._spool.add_start(run)  # noqa: SLF001  (the caller has no use for it)

    def keep_end(self, handle: RecordedRun, task_id: str, exception: BaseException | None) -> bool:
        """Keep the end of a run whose start was kept, or of one that could not be closed because of an outage.

        Return whether that is so, or there is nothing to keep.
        """
        run = handle._kept or handle.run  # noqa: SLF001  (as above)
        if run is None or not (handle._kept or self.is_on):  # noqa: SLF001  (as above)
            return True
        is_kept = False
        with self._kept(task_id, "the end of this run"):
            outcome = Outcome.of(**handle.outcome(exception))
            if self._spool is not None:
                self._spool.add_end(run, outcome, attempt=None if handle._kept else run.attempt)  # noqa: SLF001  (as above)
                is_kept = True
        self._replay_at = 0.0
        if not self.is_on:
            self._replay()
        return is_kept

    @contextmanager
    def _kept(self, task_id: str, what: str) -> Iterator[None]:
        """Say, once in an outage, that runs are kept or, likewise, that they cannot be."""
        try:
            yield
        except OSError as error:
            self._say("%s will not be recorded (task %r): %s; %s", what, task_id, self._cause, error.strerror or error)
        except Exception as error:  # noqa: BLE001  (whatever it is, the recorded code goes on)
            _log.warning("a run of task %r is not recorded as it should be: %s", task_id, error)
        else:
            if self._spool is None:
                self._say("runs are not recorded at present, beginning with task %r: %s", task_id, self._cause)
            elif self.is_on:
                self._say("runs are kept in %s until the database can be used again: %s", self._spool.path, self._cause)

    def _say(self, message: str, *arguments: object) -> None:
        if message not in self._said:
            self._said.add(message)
            _log.warning(message, *arguments)

    def _replay(self) -> None:
        """Have what is spooled replayed, if there is anything, and unless that was tried just now."""
        is_busy = self._replaying is not None and self._replaying.is_alive()
        if self._url is None or is_busy or time.monotonic() < self._replay_at:
            return
        if not spool.files(self._url):
            self._replay_at = time.monotonic() + LOOK
            return
        self._replay_at = time.monotonic() + PAUSE
        self._replaying = threading.Thread(target=replay_quietly, args=(self._url,), daemon=True)
        self._replaying.start()


def replay_quietly(url: URL) -> None:
    """Replay what is spooled for some seconds, through connections of its own; what fails is left for the next time.

    It belongs into a daemon thread: a kill at any moment is harmless.
    """
    from taskruns.replay import replay  # noqa: PLC0415  (only where something was kept)

    try:
        url = with_sync_driver(url)
        own = engine.create(url)
        try:
            replay(own, url, seconds=REPLAY_FOR)
        finally:
            own.dispose()
    except Exception as error:  # noqa: BLE001  (there will be another go)
        _log.info("what is spooled could not be replayed: %s", cause_of(error))


class Recording:
    """Records what runs inside it: a context manager, also a decorator for functions and coroutine functions."""

    def __init__(
        self, begin: Callable[[], RecordedRun], end: Callable[[RecordedRun, BaseException | None], None]
    ) -> None:
        self._begin, self._end = begin, end
        self._handle: RecordedRun | None = None

    def __enter__(self) -> RecordedRun:
        _refuse_second_entry(self._handle)
        self._handle = self._begin()
        return self._handle

    def __exit__(self, _type: object, exception: BaseException | None, _traceback: object) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._end(handle, exception)

    def __call__(self, function: Callable[P, T]) -> Callable[P, T]:
        """Return the function, recorded at each call."""
        if _is_coroutine_function(function):
            # Off the event loop's thread: a database that is busy must not hold up the other tasks.
            return cast(Callable[P, T], AsyncRecording(self._begin_beside, self._end_beside)(cast(Any, function)))
        _refuse_generator(function)

        @wraps(function)
        def recorded(*args: P.args, **kwargs: P.kwargs) -> T:
            with Recording(self._begin, self._end):
                return function(*args, **kwargs)

        return recorded

    async def _begin_beside(self) -> RecordedRun:
        return await asyncio.to_thread(self._begin)

    async def _end_beside(self, handle: RecordedRun, exception: BaseException | None) -> None:
        await asyncio.to_thread(self._end, handle, exception)


class AsyncRecording:
    """Records what runs inside it: an asynchronous context manager, also a decorator for coroutine functions."""

    def __init__(
        self,
        begin: Callable[[], Awaitable[RecordedRun]],
        end: Callable[[RecordedRun, BaseException | None], Awaitable[None]],
    ) -> None:
        self._begin, self._end = begin, end
        self._handle: RecordedRun | None = None

    async def __aenter__(self) -> RecordedRun:
        _refuse_second_entry(self._handle)
        opening = asyncio.ensure_future(self._begin())
        try:
            self._handle = await asyncio.shield(opening)
        except asyncio.CancelledError as cancelation:
            # The start may be on its way to the database already; it must not stay there as running.
            await _to_its_end(_ended_at_once(opening, self._end, cancelation))
            raise
        return self._handle

    async def __aexit__(self, _type: object, exception: BaseException | None, _traceback: object) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            await _to_its_end(self._end(handle, exception))

    def __call__(self, function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        """Return the coroutine function, recorded at each call."""
        _refuse_generator(function)
        if not _is_coroutine_function(function):
            raise TypeError(f"an asynchronous history records coroutine functions, and {function!r} is none")

        @wraps(function)
        async def recorded(*args: P.args, **kwargs: P.kwargs) -> T:
            async with AsyncRecording(self._begin, self._end):
                return await function(*args, **kwargs)

        return recorded


async def _ended_at_once(
    opening: "asyncio.Future[RecordedRun]",
    end: Callable[[RecordedRun, BaseException | None], Awaitable[None]],
    cancelation: asyncio.CancelledError,
) -> None:
    await asyncio.wait([opening])
    if not opening.cancelled() and opening.exception() is None:
        await end(opening.result(), cancelation)


async def _to_its_end(work: Awaitable[None]) -> None:
    """Wait for ``work``; a cancelation of the waiter comes through only after it is done."""
    running = asyncio.ensure_future(work)
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


def _refuse_second_entry(handle: RecordedRun | None) -> None:
    if handle is not None:
        raise RuntimeError("this recording is going on already: call record() for each `with`")


def _is_coroutine_function(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _refuse_generator(function: Callable[..., Any]) -> None:
    if not callable(function):
        raise TypeError(f"what is recorded is called, and {function!r} cannot be")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"a generator cannot be recorded as a function; use `with record(...)` inside {function!r}")
