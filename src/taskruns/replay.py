"""Writes into a database what was kept for it while it was out of use: once, in order, however often it is begun."""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import URL, Connection, Engine
from sqlalchemy.exc import DataError, IntegrityError

from taskruns import engine as engines, kept, migrate, recovery, spool
from taskruns.errors import TaskRunsError
from taskruns.kept import Line, Mark
from taskruns.liveness import Process
from taskruns.model import TaskRun
from taskruns.retrying import Retry, cause_of
from taskruns.stream import Stream
from taskruns.supervision import Supervision
from taskruns.timeline import Effect

RETRY_FOR = 5.0
"""Seconds for which each transaction is tried again after a transient error."""

_LINES, _BYTES = 4000, 1024 * 1024
"""Most lines, and roughly most bytes, between two looks at the clock: mostly one transaction."""

_LINES_OF_RUNS = 2000
"""The same of recorded runs. More are hardly quicker, and others would wait longer for the lock of an SQLite file."""

_LINES_ONE_BY_ONE = 500
"""The same where they are not written together; a fiftieth of it on servers, where each task is a transaction."""

_HOLDUP = 1.0
"""Seconds that many lines wait for what somebody else has locked; then each waits for its own."""

_FAULTS = (DataError, IntegrityError, TaskRunsError, ValueError, TypeError)
"""What a line is to blame for, not the database."""

_log = logging.getLogger("taskruns")


@dataclass(slots=True)
class Replayed:
    """What became of what was kept."""

    events: int = 0
    files: int = 0
    """Those that were done to their end."""
    marks: Counter[Mark] = field(default_factory=Counter)
    left: list[Path] = field(default_factory=list)
    """Files that belong to living processes."""
    is_complete: bool = True
    """Whether all others were done: neither was the time over, nor is another process at it."""


def replay(
    engine: Engine,
    url: URL,
    *,
    supervision: Supervision | None = None,
    stream: Stream | None = None,
    seconds: float | None = None,
    wait: bool = False,
) -> Replayed:
    """Write what is kept for the database of ``url`` through ``engine``, and remove it.

    Files of living processes are left. A run that is replayed gets its task's next number.

    Args:
        engine: One that :func:`taskruns.engine.create` has made.
        url: What it was made from.
        supervision: Who watches over the runs of ``stream`` here.
        stream: Through which the events of its source go, as others follow.
        seconds: The time after which no further transaction is begun; what is left waits for the next time.
        wait: Wait for another process that is replaying, instead of leaving it to that.

    Raises:
        SQLAlchemyError: the database cannot be used.
        SchemaVersionError: its tables do not suit this code.
        OSError: the files cannot be used.
    """
    replayed = Replayed()
    if not spool.files(url):
        return replayed
    until = None if seconds is None else time.monotonic() + seconds
    with spool.replay_lock(url, wait=wait) as is_ours:
        if not is_ours:
            replayed.is_complete = False
            return replayed
        replaying = _Replaying(engine, replayed, until, supervision, stream)
        with closing(replaying):
            replaying.persist(migrate.require)
            for path in spool.files(url):
                descriptor = spool.take(path)
                if descriptor is None:
                    if path.exists():
                        replayed.left.append(path)
                    continue
                try:
                    with os.fdopen(descriptor, "rb", closefd=False) as file:
                        replaying.replay_file(path, file)
                finally:
                    spool.release(descriptor)
                if not replayed.is_complete:
                    break
        spool.end_outage(url)
    return replayed


class _Replaying:
    """One go through the files of a database."""

    def __init__(
        self,
        engine: Engine,
        replayed: Replayed,
        until: float | None,
        supervision: Supervision | None,
        stream: Stream | None,
    ) -> None:
        self._engine = engine
        self._replayed = replayed
        self._until = until
        self._supervision = supervision
        self._own = stream
        self._streams: dict[str, Stream] = {} if stream is None else {stream.source: stream}
        self._path = Path()
        self._owner = _NOBODY
        self._number: int | None = None
        self._seen = datetime.now(UTC)
        self._is_said = False

    @cached_property
    def _hasty(self) -> Engine:
        """What writes many lines. Meanwhile it locks runs of many tasks, so it waits for nobody for long."""
        if self._engine.dialect.name == "sqlite":
            return self._engine
        return engines.create(engines.url_of(self._engine), lock_timeout=_HOLDUP)

    def close(self) -> None:
        """Close what was opened here."""
        own = vars(self).get("_hasty", self._engine)  # not to make it for that
        if own is not self._engine:
            own.dispose()

    @property
    def _is_over(self) -> bool:
        return self._until is not None and time.monotonic() >= self._until

    def persist(self, operation: Callable[[Connection], None], engine: Engine | None = None) -> None:
        """Do something in the database, and again after a transient error: all that is done here may be done twice."""
        from tenacity import Retrying  # noqa: PLC0415  (only where something was kept)

        def persist() -> None:
            with (engine or self._engine).connect() as connection:
                operation(connection)

        Retrying(**Retry(RETRY_FOR, None).policy())(persist)

    def replay_file(self, path: Path, file: BinaryIO) -> None:
        """Write what is in a file, and remove it when that is done."""
        self._path = path
        header = _header(file.readline())
        if header is None:
            _log.warning("%s is no file of this version's spool, and is left", path)
            self._replayed.left.append(path)
            return
        self._owner, self._number = header
        self._seen = datetime.fromtimestamp(os.fstat(file.fileno()).st_mtime, UTC)
        # How far the last go came. Before it lines are only read, as the starts among them may have no end.
        progress = path.with_suffix(".done")
        starts: dict[spool.Identity, TaskRun] = {}
        for lines, end in self._batches(file, _number(progress), starts):
            for done in self._write_all(lines, end):
                with suppress(OSError):  # where the disk is full it is done again
                    progress.write_text(str(done), encoding="ascii")
                if self._is_over:
                    self._replayed.is_complete = False
                    return
        for run in starts.values():
            self.persist(lambda connection, run=run: self._abandon(connection, run))  # type: ignore[misc]  # bound at once
        progress.unlink(missing_ok=True)
        path.unlink()
        self._replayed.files += 1

    def _batches(
        self, file: BinaryIO, done: int, starts: dict[spool.Identity, TaskRun]
    ) -> Iterator[tuple[list[Line], int]]:
        """Yield the lines that begin at ``done`` or later, and where they end; ``starts`` are those without an end."""
        batch: list[Line] = []
        for line in _lines(file, starts):
            if line.begin < done:
                continue
            if batch and not (isinstance(line, Line) and _goes_with(batch, line)):
                yield batch, line.begin
                batch = []
            if isinstance(line, Line):
                batch.append(line)
            else:  # after what is before it, or a go that begins in there would reject it again
                self._reject(line.text, line.error)
        if batch:
            yield batch, batch[-1].begin + len(batch[-1].text)

    def _reject(self, line: bytes, error: Exception | str) -> None:
        """Keep a line that cannot be used beside the file."""
        self._replayed.marks[Mark.REJECTED] += 1
        rejects = self._path.with_suffix(".rejected")
        if not self._is_said:
            self._is_said = True
            why = error if isinstance(error, str) else cause_of(error)
            _log.warning("what cannot be replayed is kept in %s: %s", rejects, why)
        descriptor = os.open(rejects, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(descriptor)

    def _write_all(self, lines: list[Line], end: int) -> Iterator[int]:
        """Write lines of one stream, or of recorded runs, and yield up to where all is done: ``end`` at last."""
        source = lines[0].source
        if source:
            self._write(lines, self._streams.setdefault(source, Stream(source)))
            left = []
        else:
            left = self._write_many(lines)
        self._replayed.events += len(lines) - len(left)
        while left:
            some, left = left[: self._most], left[self._most :]
            self._write_few(some)
            self._replayed.events += len(some)
            if left:
                yield left[0].begin
        yield end

    @property
    def _most(self) -> int:
        return _LINES_ONE_BY_ONE if self._engine.dialect.name == "sqlite" else _LINES_ONE_BY_ONE // 50

    def _write_many(self, lines: list[Line]) -> list[Line]:
        """Write the lines of recorded runs that are plain, and return the others."""
        left: list[Line] = []

        def operation(connection: Connection) -> None:
            left[:] = kept.write_many(connection, lines)

        try:
            self.persist(operation, self._hasty)
        except _FAULTS:
            return lines
        return left

    def _write_few(self, lines: list[Line]) -> None:
        """Write the lines of recorded runs in their order, or in that of each task."""
        if self._engine.dialect.name == "sqlite":
            self._write(lines, None)  # its one lock is all tasks'
            return
        for of_task in kept.of_tasks(lines).values():
            self._write([line for line, _ in of_task], None)

    def _write(self, lines: list[Line], stream: Stream | None) -> None:
        """Write lines in one transaction or, if one of them cannot be, each in its own."""
        marks: list[Mark | None] = []

        def operation(connection: Connection) -> None:
            marks[:] = (
                kept.write_few(connection, lines) if stream is None else self._apply_told(connection, stream, lines)
            )

        try:
            self.persist(operation)
        except _FAULTS as error:
            if len(lines) == 1:
                self._reject(lines[0].text, error)
                return
            for line in lines:
                self._write([line], stream)
            return
        for line, mark in zip(lines, marks, strict=True):
            if mark is Mark.REJECTED:
                self._reject(line.text, "the task has used up its attempt numbers")
            elif mark is not None:
                self._replayed.marks[mark] += 1

    def _apply_told(self, connection: Connection, stream: Stream, lines: Iterable[Line]) -> list[Mark | None]:
        events = [line.event for line in lines if line.event is not None]
        if stream is self._own and self._supervision is not None:
            effects = self._supervision.write(connection, stream, events)
        else:
            if self._number is not None:
                recovery.remember(connection, self._number, stream.source, self._owner)
                connection.commit()
            effects = stream.write(connection, events, self._number)
        return [Mark.REJECTED if effect is Effect.FULL else None for effect in effects]

    def _abandon(self, connection: Connection, run: TaskRun) -> None:
        """Close a run whose process is gone."""
        with engines.transaction(connection, lock=run.task_id):
            recovery.close(
                connection, [recovery.Loss(recovery.ended(kept.opened(connection, run), self._owner, self._seen))]
            )


@dataclass(frozen=True, slots=True)
class _Unusable:
    text: bytes
    begin: int
    error: Exception


def _lines(file: BinaryIO, starts: dict[spool.Identity, TaskRun]) -> Iterator[Line | _Unusable]:
    """Read lines; ``starts`` are those of runs without an end so far."""
    end = file.tell()
    for text in file:
        if not text.endswith(b"\n"):
            break  # torn by a kill, and never acknowledged
        begin, end = end, end + len(text)
        try:
            line = Line.of(text, begin)
        except (ValueError, TypeError) as error:
            yield _Unusable(text, begin, error)
            continue
        if line.run is not None:
            identity = spool.identity_of(line.run)
            starts.pop(identity, None)
            if line.outcome is None and not line.is_forgotten:
                starts[identity] = line.run
        yield line


def _goes_with(batch: list[Line], line: Line) -> bool:
    most = _LINES if line.source else _LINES_OF_RUNS
    return line.source == batch[0].source and len(batch) < most and line.begin - batch[0].begin < _BYTES


_NOBODY = Process("", None, None, 0, None)


def _header(line: bytes) -> tuple[Process, int | None] | None:
    """Return the process that a file's header names, and its number as a supervisor; None of another kind of file."""
    if not line.endswith(b"\n"):
        return _NOBODY, None  # torn by a kill: nothing follows
    with suppress(ValueError, TypeError, KeyError):
        header = json.loads(line)
        if header["spool"] == spool.VERSION:
            return Process(**header["process"]), header["supervisor"]
    return None


def _number(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0
