"""Many runs at once, stored as they are, by the fastest way that their database has."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from itertools import groupby
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection, Dialect, insert
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError, IntegrityError

from taskruns import statements
from taskruns.model import TaskRun, checked_run
from taskruns.schema import task_runs

_TRIES = 10
"""How often runs are added anew when other writers keep adding the same ones."""

_LOOK_UP = 200
"""Keys that are looked up by one statement."""

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class RunsAdded:
    """What became of runs that were to be added."""

    added: int
    equal: int
    """How many were there already, the same in every field."""
    conflicts: list[TaskRun]
    """Those that were not added, as another run has their attempt."""


def add_runs(connection: Connection, runs: Sequence[TaskRun]) -> RunsAdded:
    """Add runs in the caller's transaction, those that are not there yet.

    Raises:
        ValueError: a run has a name or a number that cannot be stored.
    """
    new: dict[Key, TaskRun] = {}
    again = [run for run in runs if new.setdefault((run.task_id, run.attempt), run) is not run]
    in_order = [checked_run(new[key]) for key in sorted(new)]
    added, stored = (_add_to_sqlite if connection.dialect.name == "sqlite" else _add)(connection, in_order)
    if added == len(runs):
        return RunsAdded(added, 0, [])
    # Of several with one key the first has been added, unless another was there before.
    told = runs if stored else again
    stored = {(run.task_id, run.attempt): run for run in in_order} | stored
    conflicts = [run for run in told if not _are_equal(checked_run(run), stored[run.task_id, run.attempt])]
    return RunsAdded(added, len(runs) - added - len(conflicts), conflicts)


def _are_equal(run: TaskRun, stored: TaskRun) -> bool:
    return replace(run, supervisor_id=None) == replace(stored, supervisor_id=None)


def _add(connection: Connection, runs: list[TaskRun]) -> tuple[int, dict[Key, TaskRun]]:
    """Add the runs that are missing; return how many these are, and the others as they are stored."""
    stored: dict[Key, TaskRun] = {}
    for number in range(_TRIES):
        missing = [run for run in runs if (run.task_id, run.attempt) not in stored] if stored else runs
        try:
            with connection.begin_nested():
                insert_runs(connection, missing)
        except IntegrityError:
            if number == _TRIES - 1:
                raise
            # A host's transaction may have an older snapshot than what the insert has met; a locking read has not.
            stored |= _stored(connection, missing, lock=number > 0)
        else:
            break
    return len(missing), stored


def _add_to_sqlite(connection: Connection, runs: list[TaskRun]) -> tuple[int, dict[Key, TaskRun]]:
    """Do the same without a savepoint, which the driver commits if it is the first statement of a host's transaction.

    There is no race: from the first insert on the file is locked.
    """
    if not runs:
        return 0, {}
    result = connection.exec_driver_sql(_sqlite_insert(connection.dialect, skip=True), list(map(_sqlite_row, runs)))
    added = result.rowcount
    return added, _stored(connection, runs) if added < len(runs) else {}


def _stored(connection: Connection, runs: Iterable[TaskRun], *, lock: bool = False) -> dict[Key, TaskRun]:
    found = {}
    for keys in _portions(runs):
        query = statements.runs_by_key(keys)
        for row in connection.execute(query.with_for_update(read=True) if lock else query):
            run = TaskRun(*tuple(row))
            found[run.task_id, run.attempt] = run
    return found


def _portions(runs: Iterable[TaskRun]) -> Iterator[dict[str, list[int]]]:
    """Yield the attempts of each task, for some keys at a time."""
    keys: dict[str, list[int]] = {}
    size = 0
    for task_id, of_task in groupby(runs, key=attrgetter("task_id")):
        for run in of_task:
            keys.setdefault(task_id, []).append(run.attempt)
            size += 1
            if size == _LOOK_UP:
                yield keys
                keys, size = {}, 0
    if keys:
        yield keys


_COLUMNS = [column.name for column in task_runs.columns if column.name != "supervisor_id"]
_COPY = f"COPY {task_runs.name} ({', '.join(_COLUMNS)}) FROM STDIN WITH (ENCODING 'UTF8')"
_INSERT = insert(task_runs)
_values = attrgetter(*_COLUMNS)


def insert_runs(connection: Connection, runs: Sequence[TaskRun]) -> None:
    """Insert runs as they are, without their supervisors, in the caller's transaction.

    Raises:
        IntegrityError: one of them exists. The caller has to roll back: on some databases others were inserted.
    """
    if not runs:
        return
    dialect = connection.dialect
    if (dialect.name, dialect.driver) == ("postgresql", "psycopg"):
        _copy(connection, "".join(map(_copy_line, runs)).encode())
    elif dialect.name == "sqlite":
        connection.exec_driver_sql(_sqlite_insert(dialect, skip=False), list(map(_sqlite_row, runs)))
    else:
        connection.execute(_INSERT, [dict(zip(_COLUMNS, _values(run), strict=True)) for run in runs])


@cache
def _sqlite_insert(dialect: Dialect, *, skip: bool) -> str:
    statement = sqlite.insert(task_runs)
    if skip:
        statement = statement.on_conflict_do_nothing(index_elements=["task_id", "attempt"])
    return str(statement.compile(dialect=dialect, column_keys=_COLUMNS))


def _sqlite_row(run: TaskRun) -> tuple[Any, ...]:
    # What the types of the columns would make of it, in a third of the time.
    finished_at = run.finished_at
    return (
        run.task_id,
        run.attempt,
        run.phase.value,
        _utc(run.started_at),
        None if finished_at is None else _utc(finished_at),
        run.error,
        run.exit_code,
        run.recovered,
        run.start_inferred,
        run.source,
        run.submission,
        run.source_attempt,
    )


def _utc(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(" ", "microseconds").removesuffix("+00:00")


def _copy_line(run: TaskRun) -> str:
    finished_at, exit_code, source_attempt = run.finished_at, run.exit_code, run.source_attempt
    return "\t".join(
        (
            _copy_text(run.task_id),
            str(run.attempt),
            run.phase,
            run.started_at.isoformat(),
            r"\N" if finished_at is None else finished_at.isoformat(),
            _copy_text(run.error),
            r"\N" if exit_code is None else str(exit_code),
            "t" if run.recovered else "f",
            "t" if run.start_inferred else "f",
            _copy_text(run.source),
            _copy_text(run.submission),
            "\\N\n" if source_attempt is None else f"{source_attempt}\n",
        )
    )


_ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})
_needs_escapes = re.compile(r"[\\\t\n\r]").search


def _copy_text(value: str | None) -> str:
    if value is None:
        return r"\N"
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
        is_lost = dialect.is_disconnect(error, driver, None)
        if is_lost:
            connection.invalidate(error)
        raise DBAPIError.instance(
            _COPY, None, error, dialect.loaded_dbapi.Error, connection_invalidated=is_lost, dialect=dialect
        ) from error
    except BaseException as error:
        connection.invalidate(error)  # interrupted, or canceled: nobody knows where it stopped
        raise


async def _copy_asynchronously(driver: Any, block: bytes) -> None:
    async with driver.cursor() as cursor, cursor.copy(_COPY) as copy:
        await copy.write(block)
