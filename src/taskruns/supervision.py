"""A history's own part in the supervisors: it registers, beats while a run of it is active, and knows which are."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from sqlalchemy import URL, Connection
from sqlalchemy.exc import SQLAlchemyError

from taskruns import engine, recovery, supervisor_statements
from taskruns.errors import RunClosedError, RunNotFoundError
from taskruns.liveness import ID_BITS, Process
from taskruns.model import Outcome, TaskRun
from taskruns.retrying import is_lost, is_refusal
from taskruns.url import is_in_memory, with_sync_driver
from taskruns.writing import Start, close_alone, open_alone

if TYPE_CHECKING:
    from taskruns.events import Event
    from taskruns.stream import Stream
    from taskruns.timeline import Effect

HEARTBEAT = 10.0
"""Seconds between two heartbeats; those that judge a supervisor by them wait for several."""

MAX_HEARTBEAT = 30.0
"""The most seconds between two: who judges waits for 60."""

AT_ONCE = 50
"""Runs of the dead that are closed before a history opens its first run; the heart closes the others."""

_MOST_OWED = 10_000
"""Outcomes that are remembered because they could be written neither into the database nor into the spool."""

_JITTER = 0.1
"""The part of these by which they vary, so that the processes of a host do not all beat at the same moment."""

_random = secrets.SystemRandom()  # not of the seed that the program may have set

_log = logging.getLogger("taskruns")


def _clock() -> float:
    # Goes on while the machine sleeps, unlike the monotonic one: a laptop that wakes up has not beaten for long.
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Supervision:
    """The supervisor that a history is. May be shared between threads; a forked child becomes one of its own.

    No lock is held while the database is waited for: under asyncio that would stop the event loop.
    """

    def __init__(self, url: URL, source: str, interval: float) -> None:
        if not interval > 0:
            raise ValueError(f"heartbeat is a number of seconds above 0, not {interval}")
        # Nobody else sees a database in memory, and it ends with the process.
        self._url = None if is_in_memory(url) else url
        self._source = source
        self._interval = min(interval, MAX_HEARTBEAT)
        self.begin_anew()
        _all.add(self)

    def begin_anew(self) -> None:
        """Be a supervisor that has no runs and is not registered."""
        self._lock = threading.RLock()  # a signal handler may record while its thread holds it
        self._id = _random.getrandbits(ID_BITS)
        self._process: Process | None = None
        self._beaten_at: float | None = None
        self._active: dict[str, dict[int, _Watched]] = {}
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._heart: threading.Thread | None = None
        self._is_stream = False
        self._has_more = False  # of the dead have left runs
        self._owed: dict[tuple[str, int], Outcome] = {}
        self._holds = 0  # reasons to live without an active run

    @property
    def own_number(self) -> int | None:
        """The number that its runs bear; None if nobody else can see the database."""
        return None if self._url is None else self._id

    @property
    def is_new(self) -> bool:
        """Whether it has to be registered."""
        return self._url is not None and self._beaten_at is None

    @property
    def is_due(self) -> bool:
        """Whether it has to beat before it opens a run."""
        return self._url is not None and (self._beaten_at is None or _clock() - self._beaten_at > self._interval)

    def register(self, connection: Connection, *, stream: str | None = None) -> None:
        """Register, and close what the dead of this host have left behind, as far as that takes hardly any time.

        Who records a stream goes on with the runs of another recorder of this stream.
        """
        self._is_stream = self._is_stream or stream is not None
        self.attend(connection)
        try:
            if stream is not None:
                recovery.adopt(connection, Process.here(), self._id, stream)
            closed = list(recovery.recover(connection, Process.here(), stale_after=None, most=AT_ONCE))
            self._has_more = len(closed) == AT_ONCE
        except SQLAlchemyError as error:
            if is_lost(error) or is_refusal(error):
                raise  # the run that is to be opened would have to wait for the same
            _log.debug("the runs of the dead are left to others", exc_info=True)

    def attend(self, connection: Connection) -> int | None:
        """Beat if that is due, before a run is opened: it must not look like one of the dead. Return the own number.

        Not in a transaction that lasts: nobody would see the beat, and the heart would have to wait. None if nobody
        else can see the database.
        """
        if self.is_due:
            began_at = _clock()
            self.tell(connection)
            connection.commit()
            self._beaten_at = began_at
        return self.own_number

    def tell(self, connection: Connection) -> None:
        """Write a sign of life."""
        if self._process is None:
            self._process = Process.here()
        values = recovery.supervisor_values(self._id, self._source, self._process, stream=self._is_stream)
        connection.execute(supervisor_statements.beat(connection.dialect.name), values)

    def beaten(self, at: float) -> None:
        """Take note of a sign of life that was committed."""
        self._beaten_at = at

    def hold(self) -> None:
        """Beat from now on, though no run is active, until :meth:`let_go`."""
        with self._lock:
            self._holds += 1
            self._live()

    def let_go(self) -> None:
        """Beat only while a run is active."""
        with self._lock:
            self._holds -= 1

    def open(self, connection: Connection, start: Start, *, lost: bool, is_certain: bool) -> TaskRun:
        """Open a run in a transaction of its own, and watch over it: see :func:`writing.open_alone`.

        ``is_certain``: its end will be told, whatever else starts meanwhile.
        """
        start = start.watched_by(self.attend(connection))
        superseded = self.superseded_by(start)
        run = open_alone(connection, start, lost=lost, superseded=superseded)
        self.opened(run, superseded=superseded, is_certain=is_certain)
        return run

    def close(
        self, connection: Connection, task_id: str, attempt: int, outcome: Outcome, *, lost: bool, leave: bool
    ) -> TaskRun:
        """Close a run in a transaction of its own, and watch over it no more: see :func:`writing.close_alone`.

        ``leave``: by the same transaction the own row is removed, unless it is needed for another run.
        """
        opened = self.as_opened(task_id, attempt)
        try:
            if not leave:
                run = close_alone(connection, task_id, attempt, outcome, lost=lost, opened=opened)
            else:
                with engine.transaction(connection):
                    run = close_alone(connection, task_id, attempt, outcome, lost=lost, opened=opened)
                    is_last = self._is_last(task_id, attempt)
                    if is_last:
                        connection.execute(supervisor_statements.remove_supervisor(), {"watcher": self._id})
                if is_last:  # whoever opens more is another one: the heart may have beaten just now
                    self._id, self._beaten_at = _random.getrandbits(ID_BITS), None
        except (RunClosedError, RunNotFoundError):
            self.closed(task_id, attempt)
            raise
        self.closed(task_id, attempt)
        return run

    def _is_last(self, task_id: str, attempt: int) -> bool:
        with self._lock:
            return not (self._keys() - {(task_id, attempt)} or self._streams)

    def _keys(self) -> set[tuple[str, int]]:
        return {(task_id, attempt) for task_id, attempts in self._active.items() for attempt in attempts}

    def write(self, connection: Connection, stream: Stream, events: Sequence[Event]) -> list[Effect]:
        """Do what events of a stream say, and watch over its runs: see :meth:`Stream.write`."""
        number = self.attend(connection)
        effects = stream.write(connection, events, number)
        with self._lock:
            self._streams.add(stream)
            if stream.is_active:
                self._live()
        return effects

    def superseded_by(self, start: Start) -> list[int]:
        """Return the attempts of the task that a start shows to be over: a later start by the same supervisor."""
        with self._lock:
            watched = self._active.get(start.run.task_id, {})
            if start.numbered and start.run.attempt in watched:
                return []  # told again
            return [
                attempt
                for attempt, (run, is_certain) in watched.items()
                if not is_certain and run.started_at < start.run.started_at
            ]

    def opened(self, run: TaskRun, *, superseded: Collection[int] = (), is_certain: bool = False) -> None:
        """Watch over a run that was opened here, and no more over those that it has superseded."""
        if not (run.is_active and run.supervisor_id == self.own_number):
            return
        for attempt in superseded:
            self.closed(run.task_id, attempt)
        with self._lock:
            self._active.setdefault(run.task_id, {})[run.attempt] = (run, is_certain)
            self._live()

    def as_opened(self, task_id: str, attempt: int) -> TaskRun | None:
        """Return a run as it was opened, if it is active here."""
        with self._lock:
            watched = self._active.get(task_id, {}).get(attempt)
        return None if watched is None else watched[0]

    def closed(self, task_id: str, attempt: int) -> None:
        """Watch over a run no more."""
        with self._lock:
            watched = self._active.get(task_id, {})
            watched.pop(attempt, None)
            if not watched:
                self._active.pop(task_id, None)

    def owe(self, task_id: str, attempt: int, outcome: Outcome) -> None:
        """Remember how a run has ended that could be told nowhere, and have the heart tell it."""
        with self._lock:
            if len(self._owed) < _MOST_OWED:
                self._owed[task_id, attempt] = outcome
                self._live()

    def _settle(self, connection: Connection) -> None:
        """Tell what is owed, and close what others have left."""
        for (task_id, attempt), outcome in list(self._owed.items()):
            with suppress(RunClosedError, RunNotFoundError):
                close_alone(connection, task_id, attempt, outcome, lost=True)
            self._owed.pop((task_id, attempt), None)
        if self._has_more:
            connection.commit()
            for _ in recovery.recover(connection, Process.here(), stale_after=None):
                pass
            self._has_more = False

    def _live(self) -> None:
        """See to it that there is a heart. The caller holds the lock."""
        if self._heart is None and self._url is not None:
            heart = threading.Thread(target=self._beat_on, name="taskruns-heartbeat", daemon=True)
            with suppress(RuntimeError):  # the interpreter is about to end, or there are too many threads
                heart.start()
                self._heart = heart

    def _has_to_live(self) -> bool:
        is_busy = self._active or self._holds or self._owed or self._has_more
        return bool(is_busy) or any(stream.is_active for stream in self._streams)

    def _beat_on(self) -> None:
        """Beat while there is an active run, through connections of its own: those of the pool may all be in use."""
        assert self._url is not None  # noqa: S101  (for mypy: or there were no heart)
        own, interval = None, self._interval
        while True:
            time.sleep(interval * _random.uniform(1 - _JITTER, 1 + _JITTER))
            with self._lock:
                if not self._has_to_live():
                    self._heart = None
                    return
                watched = self._keys()
            interval = min(self._interval, HEARTBEAT)
            try:
                own = own or engine.create(with_sync_driver(self._url))
                began_at, number = _clock(), self._id
                with own.connect() as connection:
                    self.tell(connection)
                    own_runs = connection.execute(supervisor_statements.active_keys(), {"watcher": number})
                    active = {(task_id, attempt) for task_id, attempt in own_runs}
                    self._settle(connection)
                if number == self._id:
                    self._beaten_at = began_at
                for task_id, attempt in watched - active:  # closed by somebody else
                    self.closed(task_id, attempt)
            except Exception:  # noqa: BLE001  (the next beat may do better)
                _log.debug("a heartbeat was not recorded", exc_info=True)
            if own is not None:
                own.dispose()


class Watch:
    """What a transaction does to the runs that a supervisor watches over, once it is committed.

    ``is_brief``: it lasts so short a time that the supervisor is registered by the transaction itself.
    """

    def __init__(self, supervision: Supervision, *, is_brief: bool) -> None:
        self._supervision = supervision
        self._is_brief = is_brief
        self._began_at: float | None = None
        self._opened: list[tuple[TaskRun, list[int]]] = []
        self._closed: list[tuple[str, int]] = []
        self._here: dict[str, dict[int, TaskRun]] = {}  # those that are opened, and neither closed nor superseded
        self._gone: set[tuple[str, int]] = set()

    def __enter__(self) -> Self:
        if not self._is_brief:
            self._supervision.hold()
        return self

    def __exit__(self, kind: object, _error: object, _traceback: object) -> None:
        if kind is None:
            self._take_over()
        if not self._is_brief:
            self._supervision.let_go()

    def attend(self, connection: Connection) -> int | None:
        """Have the supervisor registered, and return its number."""
        if self._is_brief and self._began_at is None and self._supervision.is_due:
            self._began_at = _clock()
            self._supervision.tell(connection)
        return self._supervision.own_number

    def superseded_by(self, start: Start) -> list[int]:
        """Return the attempts that a start shows to be over, those of this transaction too."""
        task_id, gone = start.run.task_id, self._gone
        here = self._here.get(task_id, {})
        if start.numbered and start.run.attempt in here:
            return []  # told again
        earlier = [run.attempt for run in here.values() if run.started_at < start.run.started_at]
        known = self._supervision.superseded_by(start)
        return earlier + [attempt for attempt in known if (task_id, attempt) not in gone]

    def opened(self, run: TaskRun, superseded: list[int]) -> None:
        """Take note of a run that was opened, and of those that it has superseded."""
        self._opened.append((run, superseded))
        here = self._here.setdefault(run.task_id, {})
        here[run.attempt] = run
        for attempt in superseded:
            here.pop(attempt, None)
            self._gone.add((run.task_id, attempt))

    def closed(self, task_id: str, attempt: int) -> None:
        """Take note of a run that was closed."""
        self._closed.append((task_id, attempt))
        self._here.get(task_id, {}).pop(attempt, None)

    def _take_over(self) -> None:
        if self._began_at is not None:
            self._supervision.beaten(self._began_at)
        for run, superseded in self._opened:
            self._supervision.opened(run, superseded=superseded)
        for task_id, attempt in self._closed:
            self._supervision.closed(task_id, attempt)


_Watched = tuple[TaskRun, bool]
"""A run as it was opened, and whether it is certain that its end will be told."""

_all: weakref.WeakSet[Supervision] = weakref.WeakSet()


def _be_born() -> None:
    """Make a forked child a supervisor of its own: it has no part in its parent's runs."""
    for supervision in list(_all):
        supervision.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_be_born)
