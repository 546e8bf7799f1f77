"""Where the events of a stream go: into the database or, while it cannot be used, into the spool."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from sqlalchemy import URL
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

from taskruns import spool
from taskruns.cli import complain
from taskruns.errors import TaskRunsError
from taskruns.events import Event
from taskruns.history import TaskRunHistory
from taskruns.recorder import EventRecorder
from taskruns.replay import Replayed
from taskruns.retention import Retention
from taskruns.retrying import cause_of, is_lost, is_refusal
from taskruns.timeline import Effect
from taskruns.times import rfc3339

T = TypeVar("T")

PATIENCE = 5.0
"""Seconds that events wait for the database."""

_RETRY_FOR = 3.0
"""Seconds of these in which a transient error is followed by another try."""

_LOCK_TIMEOUT = 2.0
"""Seconds that a try waits for another writer of an SQLite file."""

PAUSE = 3.0
"""Seconds between two tries in an outage."""

_REPLAY_FOR = 3.0
"""Seconds of one go at what is spooled."""

_SMALL = 256 * 1024
"""Bytes of the spool that are replayed while the events wait, so that the last ones are overtaken by none."""


class Sink:
    """Takes a stream's events, and lets nobody wait for a database that does not answer.

    All that concerns the database is done in a thread of its own, as only that can be waited for with patience.
    """

    def __init__(self, url: URL, source: str | None, retention: Retention | None) -> None:
        self._url = url
        self._history = TaskRunHistory.connect(
            url, source=source, lock_timeout=_LOCK_TIMEOUT, retry_for=_RETRY_FOR, retention=retention
        )
        self._recorder = EventRecorder(self._history)
        self._spool = self._history.spool()
        self._database = _Beside()
        self._going: Future[Replayed] | None = None
        self._cause = ""
        self._try_at = 0.0
        self.counts = self._recorder.counts
        """How many events did what."""
        self.kept = 0
        """How many events were spooled."""
        self.is_out = False
        """Whether the database cannot be used."""
        self.is_broken = False
        """Whether events were lost, as the spool cannot be written either."""
        self._is_said = False

    def open(self) -> None:
        """Prepare the database, and replay what an earlier process has left for it.

        Raises:
            Exception: the database can never be used; an outage is no reason for that.
        """
        try:
            self._database.call(self._history.prepare, PATIENCE)
            if spool.files(self._url) and not self._database.call(self._replay, PATIENCE).is_complete:
                self.is_out, self._cause = True, "what an earlier process has left comes first"
        except Exception as error:
            if not _is_passing(error):
                raise
            self._begin_outage(error)

    def close(self) -> None:
        """Try once more to write what was spooled here, and leave the database."""
        if self.is_out and time.monotonic() >= self._try_at and not self._database.is_busy:
            self._going = None
            self._catch_up()
        self._database.stop()
        if not self._database.is_busy:
            self._history.dispose()

    def write(self, events: Sequence[Event], wires: Callable[[], Sequence[dict[str, Any]]]) -> list[Effect] | None:
        """Take events, and return what each did; None if they are kept for later, or lost.

        ``wires`` returns them as they were told.
        """
        if not self.is_out or self.is_back():
            try:
                return self._database.call(lambda: self._recorder.record_all(events), PATIENCE)
            except (SQLAlchemyError, TaskRunsError, OSError) as error:
                self._begin_outage(error)
        self._keep(events, wires())
        return None

    def is_back(self) -> bool:
        """Whether the database can be used again and has all that was spooled here; tries it now and then."""
        if self._database.is_busy:
            return False
        going, self._going = self._going, None
        if going is not None and going.exception() is not None:
            self._try_at = time.monotonic() + PAUSE
            return False
        if going is None and time.monotonic() < self._try_at:
            return False
        if going is not None and self._spool.remaining() <= _SMALL:
            return self._catch_up()
        self._going = self._database.begin(self._replay)
        return False

    def _catch_up(self) -> bool:
        """Replay the rest while the events wait."""
        try:
            replayed = self._database.call(self._replay, PATIENCE)
        except Exception:  # noqa: BLE001  (whatever it is, it is tried again)
            self._try_at = time.monotonic() + PAUSE
            return False
        if self._spool.remaining() or not replayed.is_complete:
            self._try_at = time.monotonic() + PAUSE  # somebody else is at it, or there is much
            return False
        self.is_out = self._is_said = False
        complain("the database can be used again")
        return True

    def _replay(self) -> Replayed:
        self._history.prepare()
        return self._recorder.replay(seconds=_REPLAY_FOR)

    def _begin_outage(self, error: Exception) -> None:
        self.is_out = True
        self._try_at = time.monotonic() + PAUSE
        self._cause = cause_of(error) if str(error) else "it does not answer"

    def _keep(self, events: Sequence[Event], wires: Sequence[dict[str, Any]]) -> None:
        """Spool events; one that does not say when it happened did so when it was read."""
        told = [
            wire if wire.get("at") is not None else {**wire, "at": rfc3339(event.at)}
            for wire, event in zip(wires, events, strict=True)
        ]
        try:
            self._spool.add_events(self._history.source, told)
        except OSError as error:
            if not self.is_broken:
                self.is_broken = True
                why = f"{self._cause}; nor can they be kept: {error.strerror or error}"
                complain(f"events are lost, as the database cannot be used: {why}")
            return
        self.kept += len(events)
        if not self._is_said:
            self._is_said = True
            path = self._spool.path
            complain(f"events are kept in {path} until the database can be used again: {self._cause}")


class _Beside:
    """Does one thing after another in a thread. What hangs there is left to itself."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._latest: Future[Any] | None = None
        threading.Thread(target=self._work, daemon=True).start()

    @property
    def is_busy(self) -> bool:
        """Whether something is still being done."""
        return self._latest is not None and not self._latest.done()

    def begin(self, function: Callable[[], T]) -> "Future[T]":
        """Have something done."""
        self._latest = future = Future[T]()
        self._queue.put((future, function))
        return future

    def call(self, function: Callable[[], T], seconds: float) -> T:
        """Have something done, and return its result.

        Raises:
            TimeoutError: it takes longer; then it may be done all the same.
        """
        return self.begin(function).result(seconds)

    def stop(self) -> None:
        """Let the thread end after what it is doing."""
        self._queue.put(None)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            future, function = item
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001  (raised again at the other end)
                future.set_exception(error)


def _is_passing(error: Exception) -> bool:
    """Whether the database may be usable later, though it is not at the start; wrong names and files never will be."""
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return False
    return isinstance(error, OSError | OperationalError | InterfaceError) or is_lost(error) or is_refusal(error)
