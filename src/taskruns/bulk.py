"""Many runs at once, stored as they are, by the fastest way that their database has.

What takes a microsecond here takes a second of a million runs: so they pass as rows, plain tuples of what is stored.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from itertools import groupby
from operator import itemgetter
from typing import Any

from sqlalchemy import Connection, insert
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import IntegrityError

from taskruns import engine, statements
from taskruns.model import (
    MAX_ATTEMPT,
    TaskPhase,
    TaskRun,
    checked_exit_code,
    checked_name,
    checked_number,
    checked_run,
    clean_error,
)
from taskruns.schema import task_runs
from taskruns.times import rfc3339

_TRIES = 10
"""How often runs are added anew when other writers keep adding the same ones."""

_LOOK_UP = 200
"""Keys that are looked up by one statement."""

Key = tuple[str, int]

Row = tuple[str, int, str, str, str | None, str | None, int | None, bool, bool, str | None, str | None, int | None]
"""The columns of a run but its supervisor, with its times as RFC 3339. Equal rows are equal runs."""

_key = itemgetter(0, 1)


def row_of(run: TaskRun) -> Row:
    """Return a run as a row.

    Raises:
        ValueError: it has a name or a number that cannot be stored.
    """
    return _row(checked_run(run))


def _row(run: TaskRun) -> Row:
    return (
        run.task_id,
        run.attempt,
        run.phase.value,
        rfc3339(run.started_at),
        None if run.finished_at is None else rfc3339(run.finished_at),
        run.error,
        run.exit_code,
        run.recovered,
        run.start_inferred,
        run.source,
        run.submission,
        run.source_attempt,
    )


_is_written_so = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z").fullmatch
_ENDS = frozenset(phase.value for phase in TaskPhase if phase.is_terminal)


def row_from_wire(wire: Mapping[str, Any]) -> Row:
    """Return the row of the run that a JSON object describes: as :meth:`TaskRun.from_wire` does, and raises.

    The run itself is not made where all is written as :meth:`TaskRun.to_wire` writes it, which takes a third of the
    time.
    """
    if type(wire) is not dict or "recovered" in wire or "startInferred" in wire:
        return row_of(TaskRun.from_wire(wire))
    get = wire.get
    task_id, attempt = get("taskId"), get("attempt")
    phase, started_at, finished_at = get("phase"), get("startedAt"), get("finishedAt")
    error, exit_code = get("error"), get("exitCode")
    source, submission, source_attempt = get("source"), get("submission"), get("sourceAttempt")
    if (
        task_id is None
        or attempt is None
        or not (type(phase) is type(started_at) is type(finished_at) is str)
        or phase not in _ENDS
        or (error is not None and phase == TaskPhase.SUCCEEDED)
        or not (_is_written_so(started_at) and _is_written_so(finished_at))
        or started_at > finished_at
    ):
        return row_of(TaskRun.from_wire(wire))
    try:
        datetime.fromisoformat(started_at)
        datetime.fromisoformat(finished_at)
    except ValueError:
        return row_of(TaskRun.from_wire(wire))  # which tells what is wrong
    return (
        checked_name(task_id, "task id"),
        checked_number(attempt, "attempt", 1, MAX_ATTEMPT),
        phase,
        started_at,
        finished_at,
        None if error is None else clean_error(error),
        None if exit_code is None else checked_exit_code(exit_code),
        False,
        False,
        None if source is None else checked_name(source, "source"),
        None if submission is None else checked_name(submission, "submission"),
        None if source_attempt is None else checked_number(source_attempt, "source_attempt", 0, MAX_ATTEMPT),
    )


@dataclass(frozen=True, slots=True)
class RunsAdded:
    """What became of runs that were to be added."""

    added: int
    equal: int
    """How many were there already, the same in every field."""
    conflicts: list[TaskRun]
    """Those that were not added, as another run has their attempt."""


@dataclass(frozen=True, slots=True)
class RowsAdded:
    """The same of rows."""

    added: int
    equal: int
    conflicts: list[int]
    """Which of the rows are conflicts, counted from 0."""

    def of_runs(self, runs: Sequence[TaskRun]) -> RunsAdded:
        """Return what this says of the runs whose rows these are."""
        return RunsAdded(self.added, self.equal, [runs[place] for place in self.conflicts])


def add_rows(connection: Connection, rows: Sequence[Row]) -> RowsAdded:
    """Add rows in the caller's transaction, those whose runs are not there yet."""
    new: dict[Key, Row] = {}
    again = [place for place, row in enumerate(rows) if new.setdefault((row[0], row[1]), row) is not row]
    in_order = sorted(new.values(), key=_key)
    added, stored = (_add_to_sqlite if connection.dialect.name == "sqlite" else _add)(connection, in_order)
    if added == len(rows):
        return RowsAdded(added, 0, [])
    # Of several with one key the first has been added, unless another was there before.
    told = range(len(rows)) if stored else again
    conflicts = [place for place in told if rows[place] != (stored.get(key := _key(rows[place])) or new[key])]
    return RowsAdded(added, len(rows) - added - len(conflicts), conflicts)


def _add(connection: Connection, rows: list[Row]) -> tuple[int, dict[Key, Row]]:
    """Add the rows that are missing; return how many these are, and the others as they are stored."""
    stored: dict[Key, Row] = {}
    for number in range(_TRIES):
        missing = [row for row in rows if _key(row) not in stored] if stored else rows
        try:
            with connection.begin_nested():
                insert_rows(connection, missing)
        except IntegrityError:
            if number == _TRIES - 1:
                raise
            # A host's transaction may have an older snapshot than what the insert has met; a locking read has not.
            stored |= _stored(connection, missing, lock=number > 0)
        else:
            break
    return len(missing), stored


def _add_to_sqlite(connection: Connection, rows: list[Row]) -> tuple[int, dict[Key, Row]]:
    """Do the same without a savepoint, which the driver commits if it is the first statement of a host's transaction.

    There is no race: from the first insert on the file is locked.
    """
    if not rows:
        return 0, {}
    statement = _sqlite_insert(skip=True)
    added = connection.exec_driver_sql(statement, list(map(_sqlite_values, rows))).rowcount
    return added, _stored(connection, rows) if added < len(rows) else {}


def _stored(connection: Connection, rows: Iterable[Row], *, lock: bool = False) -> dict[Key, Row]:
    found = {}
    for keys in _portions(rows):
        query = statements.runs_by_key(keys)
        for values in connection.execute(query.with_for_update(read=True) if lock else query):
            row = _row(TaskRun(*tuple(values)))
            found[_key(row)] = row
    return found


def _portions(rows: Iterable[Row]) -> Iterator[dict[str, list[int]]]:
    """Yield the attempts of each task, for some keys at a time."""
    keys: dict[str, list[int]] = {}
    size = 0
    for task_id, of_task in groupby(rows, key=itemgetter(0)):
        for row in of_task:
            keys.setdefault(task_id, []).append(row[1])
            size += 1
            if size == _LOOK_UP:
                yield keys
                keys, size = {}, 0
    if keys:
        yield keys


_COLUMNS = [column.name for column in task_runs.columns if column.name != "supervisor_id"]
_COPY = f"COPY {task_runs.name} ({', '.join(_COLUMNS)}) FROM STDIN WITH (ENCODING 'UTF8')"
_INSERT = insert(task_runs)


def insert_rows(connection: Connection, rows: Sequence[Row], supervisor_id: int | None = None) -> None:
    """Insert rows in the caller's transaction; the supervisor is that of the active runs.

    Raises:
        IntegrityError: one of the runs exists. The caller has to roll back: on some databases others were inserted.
    """
    if supervisor_id is not None:
        active = [_parameters(row) | {"supervisor_id": supervisor_id} for row in rows if row[4] is None]
        if active:  # few: a stream's runs have mostly ended by the time they are written
            connection.execute(_INSERT, active)
            rows = [row for row in rows if row[4] is not None]
    if not rows:
        return
    dialect = connection.dialect
    if (dialect.name, dialect.driver) == ("postgresql", "psycopg"):
        _copy(connection, "".join(map(_copy_line, rows)).encode())
    elif dialect.name == "sqlite":
        connection.exec_driver_sql(_sqlite_insert(skip=False), list(map(_sqlite_values, rows)))
    else:
        connection.execute(_INSERT, list(map(_parameters, rows)))


def _parameters(row: Row) -> dict[str, Any]:
    parameters: dict[str, Any] = dict(zip(_COLUMNS, row, strict=True))
    parameters["started_at"] = datetime.fromisoformat(row[3])
    parameters["finished_at"] = None if row[4] is None else datetime.fromisoformat(row[4])
    return parameters


@cache
def _sqlite_insert(*, skip: bool) -> str:
    statement = sqlite.insert(task_runs)
    if skip:
        statement = statement.on_conflict_do_nothing(index_elements=["task_id", "attempt"])
    return str(statement.compile(dialect=sqlite.dialect(), column_keys=_COLUMNS))


def _sqlite_values(row: Row) -> tuple[Any, ...]:
    # What the types of the columns would make of it, in a fraction of the time.
    started_at, finished_at = row[3], row[4]
    end = None if finished_at is None else f"{finished_at[:10]} {finished_at[11:26]}"
    return (*row[:3], f"{started_at[:10]} {started_at[11:26]}", end, *row[5:])


def _copy_line(row: Row) -> str:
    task_id, attempt, phase, started_at, finished_at, error, exit_code = row[:7]
    recovered, inferred, source, submission, number = row[7:]
    return (
        f"{_copy_text(task_id)}\t{attempt}\t{phase}\t{started_at}\t{finished_at or _NULL}\t{_copy_text(error)}"
        f"\t{_NULL if exit_code is None else exit_code}\t{recovered}\t{inferred}"
        f"\t{_copy_text(source)}\t{_copy_text(submission)}\t{_NULL if number is None else number}\n"
    )


_NULL = r"\N"
_ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})
_needs_escapes = re.compile(r"[\\\t\n\r]").search


def _copy_text(value: str | None) -> str:
    if value is None:
        return _NULL
    return value.translate(_ESCAPES) if _needs_escapes(value) else value


def _copy(connection: Connection, block: bytes) -> None:
    """Send a block of COPY's text format, with errors as SQLAlchemy raises them."""
    if not connection.in_transaction():
        connection.begin()  # as any other statement does
    dialect = connection.dialect
    driver: Any = connection.connection.dbapi_connection
    try:
        if dialect.is_async:
            driver.run_async(lambda driver: _copy_asynchronously(driver, block))
        else:
            with driver.cursor() as cursor, cursor.copy(_COPY) as copy:
                copy.write(block)
    except dialect.loaded_dbapi.Error as error:
        raise engine.as_sqlalchemy(connection, error, _COPY) from error
    except BaseException as error:
        connection.invalidate(error)  # interrupted, or canceled: nobody knows where it stopped
        raise


async def _copy_asynchronously(driver: Any, block: bytes) -> None:
    async with driver.cursor() as cursor, cursor.copy(_COPY) as copy:
        await copy.write(block)
