"""Writes into a database what was kept for it while it was out of use: once, in order, however often it is begun."""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum, auto
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Self

from sqlalchemy import URL, Connection, Engine
from sqlalchemy.exc import DataError, IntegrityError

from taskruns import engine as engines, migrate, recovery, spool, statements
from taskruns.errors import RunClosedError, TaskRunsError
from taskruns.events import Event
from taskruns.liveness import Process
from taskruns.model import MAX_ATTEMPT, Outcome, TaskRun, checked_name, checked_number
from taskruns.retrying import Retry, cause_of
from taskruns.stream import Stream
from taskruns.supervision import Supervision
from taskruns.timeline import Effect
from taskruns.times import parse_time
from taskruns.writing import Start, close, key_of, open_start, run_of

RETRY_FOR = 5.0
"""Seconds for which each transaction is tried again after a transient error."""

_LINES, _BYTES = 4000, 1024 * 1024
"""Most lines, and roughly most bytes, between two looks at the clock: one transaction, if they are of a stream."""

_LINES_OF_RUNS = 500
"""The same of the lines of recorded runs; a fiftieth of it on servers, where each task is a transaction of its own."""

_FAULTS = (DataError, IntegrityError, TaskRunsError, ValueError, TypeError)
"""What a line is to blame for, not the database."""

_OUTCOMES = {kind: phase for phase, kind in spool.KINDS.items()}

_log = logging.getLogger("taskruns")


class Mark(Enum):
    """What became of a line that did not do what it says."""

    PRUNED = auto()
    """The run that it ends is gone."""
    CONTRADICTED = auto()
    """The run that it ends has ended otherwise, which stands."""
    REJECTED = auto()
    """It cannot be used."""


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


@dataclass(frozen=True, slots=True)
class _Item:
    """A line: an event of a stream, or the start or the end of a recorded run."""

    line: bytes
    event: Event | None = None
    source: str = ""
    run: TaskRun | None = None
    outcome: Outcome | None = None
    attempt: int | None = None
    is_forgotten: bool = False

    @classmethod
    def of(cls, line: bytes) -> Self:
        """Read a line.

        Raises:
            ValueError: it cannot be used.
            TypeError: likewise.
        """
        try:
            wire = json.loads(line)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        if not isinstance(wire, dict):
            raise TypeError("it is no JSON object")
        if "startedAt" not in wire:
            source = checked_name(wire.pop("source", None), "source")
            return cls(line, event=Event.from_wire(wire), source=source)
        started_at = parse_time(wire["startedAt"], "startedAt")
        get: Callable[[str], Any] = wire.get
        kind = get("kind")
        run = TaskRun.starting(
            get("task"),
            1,
            started_at=started_at,
            source=get("source"),
            submission=get("id"),
            source_attempt=get("attempt"),
        )
        if kind in (spool.STARTED, spool.FORGOTTEN):
            return cls(line, run=run, is_forgotten=kind == spool.FORGOTTEN)
        phase = _OUTCOMES.get(kind)
        if phase is None:
            raise ValueError(f"its kind is not known: {kind!r}")
        attempt = get("run")
        return cls(
            line,
            run=run,
            outcome=Outcome.of(
                phase, error=get("reason"), exit_code=get("exitCode"), finished_at=parse_time(get("at"), "at")
            ),
            attempt=None if attempt is None else checked_number(attempt, "run", 1, MAX_ATTEMPT),
        )


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

    @property
    def _is_over(self) -> bool:
        return self._until is not None and time.monotonic() >= self._until

    def persist(self, operation: Callable[[Connection], None]) -> None:
        """Do something in the database, and again after a transient error: all that is done here may be done twice."""
        from tenacity import Retrying  # noqa: PLC0415  (only where something was kept)

        def persist() -> None:
            with self._engine.connect() as connection:
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
        for batch, position in self._batches(file, _number(progress), starts):
            self._write_all(batch)
            with suppress(OSError):  # where the disk is full it is done again
                progress.write_text(str(position), encoding="ascii")
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
    ) -> Iterator[tuple[list[_Item], int]]:
        """Yield the lines that begin at ``done`` or later, and where they end; ``starts`` are those without an end."""
        batch: list[_Item] = []
        position = first = file.tell()
        for line in file:
            if not line.endswith(b"\n"):
                break  # torn by a kill, and never acknowledged
            is_new = position >= done
            position += len(line)
            item = self._read(line, is_new=is_new)
            if item is None:
                continue
            if item.run is not None:
                identity = spool.identity_of(item.run)
                starts.pop(identity, None)
                if item.outcome is None and not item.is_forgotten:
                    starts[identity] = item.run
            if is_new:
                batch.append(item)
                if len(batch) >= self._most(item) or position - first > _BYTES:
                    yield batch, position
                    batch, first = [], position
        if batch:
            yield batch, position

    def _most(self, item: _Item) -> int:
        if item.run is None:
            return _LINES
        return _LINES_OF_RUNS if self._engine.dialect.name == "sqlite" else _LINES_OF_RUNS // 50

    def _read(self, line: bytes, *, is_new: bool) -> _Item | None:
        try:
            return _Item.of(line)
        except (ValueError, TypeError) as error:
            if is_new:
                self._reject(line, error)
            return None

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

    def _write_all(self, items: list[_Item]) -> None:
        """Write lines in their order; those of recorded runs in that of each task."""
        for source, some in groupby(items, key=lambda item: item.source):
            if source:
                stream = self._streams.setdefault(source, Stream(source))
                self._write(list(some), stream)
            elif self._engine.dialect.name == "sqlite":
                self._write(list(some), None)  # its one lock is all tasks'
            else:
                tasks: dict[str, list[_Item]] = {}
                for item in some:
                    assert item.run is not None  # noqa: S101  (for mypy: a line without a source of its own has one)
                    tasks.setdefault(item.run.task_id, []).append(item)
                for of_task in tasks.values():
                    self._write(of_task, None)
        self._replayed.events += len(items)

    def _write(self, items: list[_Item], stream: Stream | None) -> None:
        """Write lines in one transaction or, if one of them cannot be, each in its own."""
        marks: list[Mark | None] = []

        def operation(connection: Connection) -> None:
            marks[:] = _apply_runs(connection, items) if stream is None else self._apply_told(connection, stream, items)

        try:
            self.persist(operation)
        except _FAULTS as error:
            if len(items) == 1:
                self._reject(items[0].line, error)
                return
            for item in items:
                self._write([item], stream)
            return
        for item, mark in zip(items, marks, strict=True):
            if mark is Mark.REJECTED:
                self._reject(item.line, "the task has used up its attempt numbers")
            elif mark is not None:
                self._replayed.marks[mark] += 1

    def _apply_told(self, connection: Connection, stream: Stream, items: Iterable[_Item]) -> list[Mark | None]:
        events = [item.event for item in items if item.event is not None]
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
                connection, [recovery.Loss(recovery.ended(_opened(connection, run), self._owner, self._seen))]
            )


def _apply_runs(connection: Connection, items: list[_Item]) -> list[Mark | None]:
    runs = [item.run for item in items if item.run is not None]
    with engines.transaction(connection, lock=runs[0].task_id):
        return [_apply(connection, item, run) for item, run in zip(items, runs, strict=True)]


def _apply(connection: Connection, item: _Item, run: TaskRun) -> Mark | None:
    """Do what a line says of a recorded run, unless that was done before."""
    if item.is_forgotten:
        return None
    if item.outcome is None:
        _opened(connection, run)
        return None
    if item.attempt is None:
        stored = _opened(connection, run)
    else:
        row = connection.execute(statements.get_run(), key_of(run.task_id, item.attempt)).first()
        if row is None or run_of(row).started_at != run.started_at:  # or numbers have begun again
            return Mark.PRUNED
        stored = run_of(row)
    try:
        close(connection, stored.task_id, stored.attempt, item.outcome)
    except RunClosedError:
        return Mark.CONTRADICTED
    return None


def _opened(connection: Connection, run: TaskRun) -> TaskRun:
    """Return a run as the database has it; it is opened if it is not there, in a transaction with the task's lock."""
    return open_start(connection, Start(run, numbered=False), again=True)


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
