"""The lines of the spool, and how those of recorded runs are written: many at once or, where that fails, one by one."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, auto
from typing import Any, Self

from sqlalchemy import Connection
from sqlalchemy.exc import DataError, IntegrityError, OperationalError

from taskruns import bulk, engine, spool, statements
from taskruns.errors import RunClosedError
from taskruns.events import Event
from taskruns.model import MAX_ATTEMPT, Outcome, TaskRun, checked_name, checked_number
from taskruns.prepared import prepared
from taskruns.retrying import is_held_up
from taskruns.times import parse_time
from taskruns.writing import Start, close, key_of, open_start, run_of

_AT_ONCE = 500
"""Moments that one query asks for."""

_OUTCOMES = {kind: phase for phase, kind in spool.KINDS.items()}


class Mark(Enum):
    """What became of a line that did not do what it says."""

    PRUNED = auto()
    """The run that it ends is gone."""
    CONTRADICTED = auto()
    """The run that it ends has ended otherwise, which stands."""
    REJECTED = auto()
    """It cannot be used."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line: an event of a stream, or the start or the end of a recorded run."""

    text: bytes
    begin: int
    """Where it begins in its file."""
    event: Event | None = None
    source: str = ""
    """That of the stream."""
    run: TaskRun | None = None
    outcome: Outcome | None = None
    attempt: int | None = None
    is_forgotten: bool = False

    @classmethod
    def of(cls, text: bytes, begin: int) -> Self:
        """Read a line.

        Raises:
            ValueError: it cannot be used.
            TypeError: likewise.
        """
        try:
            wire = json.loads(text)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        if not isinstance(wire, dict):
            raise TypeError("it is no JSON object")
        if "startedAt" not in wire:
            source = checked_name(wire.pop("source", None), "source")
            return cls(text, begin, event=Event.from_wire(wire), source=source)
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
            return cls(text, begin, run=run, is_forgotten=kind == spool.FORGOTTEN)
        phase = _OUTCOMES.get(kind)
        if phase is None:
            raise ValueError(f"its kind is not known: {kind!r}")
        attempt = get("run")
        return cls(
            text,
            begin,
            run=run,
            outcome=Outcome.of(
                phase, error=get("reason"), exit_code=get("exitCode"), finished_at=parse_time(get("at"), "at")
            ),
            attempt=None if attempt is None else checked_number(attempt, "run", 1, MAX_ATTEMPT),
        )


Kept = tuple[Line, TaskRun]
"""A line of a recorded run, and that run as it started."""


def of_tasks(lines: Iterable[Line]) -> dict[str, list[Kept]]:
    """Return the lines of recorded runs by their tasks, each in its order."""
    tasks: dict[str, list[Kept]] = {}
    for line in lines:
        if line.run is not None:
            tasks.setdefault(line.run.task_id, []).append((line, line.run))
    return tasks


def write_many(connection: Connection, lines: Iterable[Line]) -> list[Line]:
    """Do what lines say of recorded runs, in few transactions of few statements; return those that are left to do.

    These are all lines of a task one of which is not plain: it contradicts or refines what is stored, or the database
    does not take it, or another writer takes the task's numbers. No lock of a task is held. The last numbers are read
    before the runs: what another replay adds meanwhile is found here, or its number is the one that is taken here.
    """
    tasks = of_tasks(lines)
    left: list[Kept] = []
    waiting = [sorted(tasks)]
    while waiting:
        some = waiting.pop()
        try:
            with engine.transaction(connection):
                rest = _write(connection, {task_id: tasks[task_id] for task_id in some})
        except (IntegrityError, DataError, _OutrunError):
            if len(some) == 1:
                rest = tasks[some[0]]
            else:  # until whose fault it is stands alone
                rest = []
                waiting += [some[: len(some) // 2], some[len(some) // 2 :]]
        except OperationalError as error:
            if not is_held_up(error):
                raise
            rest = [kept for task_id in some for kept in tasks[task_id]]
        left += rest
    return sorted((line for line, _ in left), key=lambda line: line.begin)


class _OutrunError(Exception):
    """Others have closed what was read."""


class _NotPlainError(Exception):
    """What a line says is not simply to be added to what is stored."""


@dataclass(slots=True)
class _Task:
    """What is stored of a task, as far as some lines concern it, and what they change."""

    last: int
    """The highest number."""
    runs: dict[int, TaskRun]
    """By their numbers."""
    numbers: dict[spool.Identity, int]
    opened: list[int] = field(default_factory=list)
    closed: dict[int, Outcome] = field(default_factory=dict)

    def apply(self, line: Line, run: TaskRun) -> None:
        """Do what a line says, as :func:`write_few` does it in the database."""
        if line.is_forgotten:
            return
        number = self._number(run) if line.attempt is None else line.attempt
        if line.outcome is None:
            return
        stored = self.runs.get(number)
        if stored is None or stored.started_at != run.started_at:
            raise _NotPlainError
        if stored.is_active or stored.recovered:
            self.runs[number] = stored.ended(line.outcome)
            self.closed[number] = line.outcome
        elif not line.outcome.is_that_of(stored):
            raise _NotPlainError

    def _number(self, run: TaskRun) -> int:
        """Return the number of a run, which is opened if it is not there."""
        identity = spool.identity_of(run)
        number = self.numbers.get(identity)
        if number is None:
            if self.last == MAX_ATTEMPT:
                raise _NotPlainError
            self.last = number = self.last + 1
            self.numbers[identity] = number
            self.runs[number] = run.numbered(number)
            self.opened.append(number)
        return number


def _write(connection: Connection, tasks: dict[str, list[Kept]]) -> list[Kept]:
    """Do what is plain, in the caller's transaction, and return the lines of the other tasks."""
    left: list[Kept] = []
    rows: list[bulk.Row] = []
    ends: list[dict[str, Any]] = []
    last = _last_numbers(connection, list(tasks))  # before the runs, see write_many()
    stored = _stored(connection, tasks)
    for task_id, of_task in tasks.items():
        runs = stored.get(task_id, [])
        numbers = {spool.identity_of(run): run.attempt for run in runs}
        task = _Task(last[task_id], {run.attempt: run for run in runs}, numbers)
        try:
            for line, run in of_task:
                task.apply(line, run)
        except _NotPlainError:
            left += of_task
            continue
        rows += [bulk.row_of(task.runs[number]) for number in task.opened]
        for number in task.closed.keys() - set(task.opened):
            outcome = task.closed[number]
            values = {"to": outcome.phase, "end": outcome.finished_at, "why": outcome.error, "code": outcome.exit_code}
            ends.append(key_of(task_id, number) | values)
    bulk.insert_rows(connection, rows)
    if ends and connection.execute(statements.close_run(), ends).rowcount != len(ends):
        raise _OutrunError
    return left


def _last_numbers(connection: Connection, task_ids: list[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    size = 1 if len(task_ids) == 1 else statements.LAST_AT_ONCE
    query = prepared(connection.dialect, statements.last_of_each, size)
    for first in range(0, len(task_ids), size):
        some = task_ids[first : first + size]
        asked = [*some, *some[-1:] * (size - len(some))]
        [numbers] = query.fetch(connection, {f"task_{place}": task_id for place, task_id in enumerate(asked)})
        found |= {task_id: number or 0 for task_id, number in zip(asked, numbers, strict=True)}
    return found


def _stored(connection: Connection, tasks: dict[str, list[Kept]]) -> dict[str, list[TaskRun]]:
    """Return the runs of tasks that started when those of their lines did, in the order of their numbers."""
    moments: list[datetime] = sorted({run.started_at for of_task in tasks.values() for _, run in of_task})
    stored: dict[str, list[TaskRun]] = {}
    for first in range(0, len(moments), _AT_ONCE):
        given = {"moments": moments[first : first + _AT_ONCE]}
        for row in connection.execute(statements.runs_started_at(connection.dialect.name), given):
            if row.task_id in tasks:
                stored.setdefault(row.task_id, []).append(run_of(row))
    for runs in stored.values():
        runs.sort(key=lambda run: run.attempt)
    return stored


def write_few(connection: Connection, lines: Sequence[Line]) -> list[Mark | None]:
    """Do what lines say of recorded runs, one by one in one transaction, and return what became of each.

    The lock is that of the first line's task.
    """
    with engine.transaction(connection, lock=next(iter(of_tasks(lines)))):
        return [None if line.run is None else _apply(connection, line, line.run) for line in lines]


def _apply(connection: Connection, line: Line, run: TaskRun) -> Mark | None:
    """Do what a line says of a recorded run, unless that was done before."""
    if line.is_forgotten:
        return None
    if line.outcome is None:
        opened(connection, run)
        return None
    if line.attempt is None:
        stored = opened(connection, run)
    else:
        row = connection.execute(statements.get_run(), key_of(run.task_id, line.attempt)).first()
        if row is None or run_of(row).started_at != run.started_at:  # or numbers have begun again
            return Mark.PRUNED
        stored = run_of(row)
    try:
        close(connection, stored.task_id, stored.attempt, line.outcome)
    except RunClosedError:
        return Mark.CONTRADICTED
    return None


def opened(connection: Connection, run: TaskRun) -> TaskRun:
    """Return a run as the database has it; it is opened if it is not there, in a transaction with the task's lock."""
    return open_start(connection, Start(run, numbered=False), again=True)
