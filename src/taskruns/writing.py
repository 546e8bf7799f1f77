"""How a run is opened and closed on a connection: numbers, conflicts, and the order of outcomes."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row
from sqlalchemy.exc import DBAPIError, IntegrityError

from taskruns import engine, statements, supervisor_statements
from taskruns.errors import AttemptConflictError, RunClosedError, RunExistsError, RunNotFoundError
from taskruns.model import MAX_ATTEMPT, RANK, SUPERSEDED, Outcome, TaskRun, checked_attempt, checked_name
from taskruns.prepared import prepared, runs_of_rows
from taskruns.retrying import is_conflict

_TRIES = 50
"""How often a number is asked for anew when writers that hold no lock keep taking it."""


@dataclass(frozen=True, slots=True)
class Start:
    """A start as its caller tells it, checked. Unless it is ``numbered``, the store gives the attempt."""

    run: TaskRun
    numbered: bool

    @classmethod
    def of(
        cls,
        task_id: str,
        attempt: int | None,
        started_at: datetime | None,
        source: str | None,
        submission: str | None,
        source_attempt: int | None,
        supervisor_id: int | None = None,
    ) -> "Start":
        """Check what a caller tells of a start."""
        run = TaskRun.starting(
            task_id,
            1 if attempt is None else attempt,
            started_at=started_at,
            source=source,
            submission=submission,
            source_attempt=source_attempt,
            supervisor_id=supervisor_id,
        )
        return cls(run, attempt is not None)

    def parameters(self) -> dict[str, Any]:
        """Return the values of the statements that concern a start."""
        run = self.run
        return {
            "task_id": run.task_id,
            "attempt": run.attempt,
            "started_at": run.started_at,
            "source": run.source,
            "submission": run.submission,
            "source_attempt": run.source_attempt,
            "supervisor_id": run.supervisor_id,
        }

    def watched_by(self, supervisor_id: int | None) -> "Start":
        """Return the same start of a run that this supervisor watches over."""
        if self.run.supervisor_id == supervisor_id:
            return self
        return Start(self.run.watched_by(supervisor_id), self.numbered)


def open_alone(connection: Connection, start: Start, *, lost: bool, superseded: Collection[int] = ()) -> TaskRun:
    """Open a run in a transaction of its own: one statement or, if its number was taken meanwhile, under a lock.

    ``lost`` says that an earlier try may have been written although its answer was lost. ``superseded`` are the
    attempts that this start shows to be over, see :func:`supersede`.
    """
    if not (lost or superseded):
        try:
            run = _try(connection, start)
        except DBAPIError as error:
            if not is_conflict(error):
                raise
            run = None
        if run is not None:
            return run
        connection.rollback()
    with engine.transaction(connection, lock=start.run.task_id):
        run = open_start(connection, start, again=lost)
        if run.is_active and run.supervisor_id == start.run.supervisor_id:  # else it has been told before
            supersede(connection, run, superseded)
        return run


def supersede(connection: Connection, run: TaskRun, attempts: Collection[int]) -> None:
    """Close active runs of the same task and supervisor, of which this later start shows that they are over."""
    for attempt in attempts:
        if attempt != run.attempt:
            values = {"end": run.started_at, "why": SUPERSEDED, "watcher": run.supervisor_id}
            connection.execute(
                supervisor_statements.recover_run(supervisor_statements.Watched.BY_A_SUPERVISOR),
                key_of(run.task_id, attempt) | values,
            )


def open_start(connection: Connection, start: Start, *, again: bool = False) -> TaskRun:
    """Open a run in the caller's transaction, which had better hold the task's lock.

    ``again``: it may have been opened before.
    """
    if again and (found := _find(connection, start)) is not None:
        return found
    for _ in range(_TRIES):
        run = _try(connection, start)
        if run is not None:
            return run
    raise AttemptConflictError(start.run.task_id)


def _try(connection: Connection, start: Start) -> TaskRun | None:
    """Open a run by one statement; None if another writer took its number at the same moment."""
    dialect = connection.dialect
    run, parameters = start.run, start.parameters()
    try:
        if not start.numbered and dialect.insert_returning:
            given = prepared(dialect, statements.open_next, dialect.name).fetch(connection, parameters)
            return run.numbered(given[0][0]) if given else None
        if not start.numbered:  # MySQL, and SQLite before 3.35, cannot tell which number was given
            last = connection.scalar(statements.last_attempt(), parameters) or 0
            if last == MAX_ATTEMPT:
                return None
            run = run.numbered(last + 1)
        parameters["attempt"] = run.attempt
        if prepared(dialect, statements.open_numbered, dialect.name).write(connection, parameters):
            return run
    except IntegrityError:
        if dialect.name in ("sqlite", "postgresql"):
            raise
        # Without ON CONFLICT a taken number is an error.
    if not start.numbered:
        return None
    stored = _stored(connection, key_of(run.task_id, run.attempt))
    if stored is None or stored.started_at != run.started_at:
        raise RunExistsError(run.task_id, run.attempt)
    return stored  # the same start, told twice


def _find(connection: Connection, start: Start) -> TaskRun | None:
    """Return the run that this very start has opened, if it has."""
    row = connection.execute(statements.find_start(numbered=start.numbered), start.parameters()).first()
    return None if row is None else run_of(row)


def close_alone(
    connection: Connection, task_id: str, attempt: int, outcome: Outcome, *, lost: bool, opened: TaskRun | None = None
) -> TaskRun:
    """Close a run in a transaction of its own; ``lost`` as in :func:`open_alone`."""
    try:
        return close(connection, task_id, attempt, outcome, opened)
    except RunClosedError as error:
        if lost and outcome.is_within(error.run):
            return error.run
        raise


def close(
    connection: Connection, task_id: str, attempt: int, outcome: Outcome, opened: TaskRun | None = None
) -> TaskRun:
    """Close a run, or find that it has ended in a way that says as much.

    ``opened``: as it was opened, if that is known. All else that is stored of it is what the outcome says.
    """
    key = key_of(task_id, attempt)
    while True:
        closed = _end(connection, key, outcome, opened)
        if closed is not None:
            return closed
        stored = _stored(connection, key)
        if stored is None:
            raise RunNotFoundError(task_id, attempt)
        if outcome.is_that_of(stored):
            return stored
        if stored.is_active or stored.recovered:
            continue  # since just now
        rank, stored_rank = RANK.get(outcome.phase, 0), RANK.get(stored.phase, 0)
        if 0 < rank < stored_rank:
            return stored
        if not 0 < stored_rank < rank:
            raise RunClosedError(stored)
        connection.execute(
            statements.refine_run(outcome.phase), key | {"why": outcome.error, "code": outcome.exit_code}
        )
        refined = _stored(connection, key)
        if refined is not None and refined.phase is outcome.phase:
            return refined


def _end(connection: Connection, key: dict[str, Any], outcome: Outcome, opened: TaskRun | None) -> TaskRun | None:
    """Close a run by one statement, and return it; None if it has ended already, or does not exist."""
    dialect = connection.dialect
    values = key | {"to": outcome.phase, "end": outcome.finished_at, "why": outcome.error, "code": outcome.exit_code}
    if opened is None and dialect.update_returning:
        rows = prepared(dialect, statements.close_unknown).fetch(connection, values)
        return runs_of_rows(rows)[0] if rows else None
    if not prepared(dialect, statements.close_run).write(connection, values):
        return None
    return _stored(connection, key) if opened is None else opened.ended(outcome)


def _stored(connection: Connection, key: dict[str, Any]) -> TaskRun | None:
    # A host's transaction may have an older snapshot than what a write has met; a locking read has not.
    row = connection.execute(statements.get_run().with_for_update(), key).first()
    return None if row is None else run_of(row)


def key_of(task_id: str, attempt: int) -> dict[str, Any]:
    """Return a run's key as parameters.

    Checked, as a database may take another name for this one (MariaDB pads with spaces) or fail to take it at all.
    """
    return {"of_task": checked_name(task_id, "task id"), "of_attempt": checked_attempt(attempt)}


def run_of(row: Row[Any]) -> TaskRun:
    """Return the run that a row of ``statements.COLUMNS`` holds."""
    return TaskRun(*tuple(row))
