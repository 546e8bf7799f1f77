"""Runs in a transaction of the caller's: statements in, :class:`TaskRun` out. It never commits."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, Select
from sqlalchemy.exc import DBAPIError, IntegrityError

from taskruns import engine, statements
from taskruns.errors import AttemptConflictError, RunClosedError, RunExistsError, RunNotFoundError
from taskruns.model import MAX_ATTEMPT, Outcome, TaskPhase, TaskRun, checked_attempt, checked_name, checked_phase

Phases = TaskPhase | Iterable[TaskPhase] | None
"""A phase, several, or None for all."""

_TRIES = 50
"""How often a number is asked for anew when writers that hold no lock keep taking it."""

_RANK = {TaskPhase.FAILED: 1, TaskPhase.EXHAUSTED: 2, TaskPhase.TIMEOUT: 3}
"""Which outcome may replace which: the higher says more about the same end."""


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
    ) -> "Start":
        """Check what a caller tells of a start."""
        run = TaskRun.starting(
            task_id,
            1 if attempt is None else attempt,
            started_at=started_at,
            source=source,
            submission=submission,
            source_attempt=source_attempt,
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
        }


@dataclass(frozen=True, slots=True)
class RunPage:
    """Some runs of a task, newest attempt first."""

    runs: list[TaskRun]
    next_cursor: str | None
    """What to give as ``after`` for the page that follows; None if there is none."""


class TaskRunRepository:
    """Opens, closes and reads runs on a connection whose transaction belongs to the caller.

    A host passes its own, such as ``session.connection()``, and its writes and ours become one. ``source`` marks the
    runs that are opened without one.
    """

    def __init__(self, connection: Connection, *, source: str | None = None) -> None:
        self._connection = connection
        self._source = source

    def open_run(
        self,
        task_id: str,
        *,
        attempt: int | None = None,
        started_at: datetime | None = None,
        source: str | None = None,
        submission: str | None = None,
        source_attempt: int | None = None,
    ) -> TaskRun:
        """Record that a run has started, and return it.

        Without ``attempt`` it gets the task's last number plus one. The same start told twice (task, attempt and
        ``started_at``) gives the stored run. On PostgreSQL other openings of the task wait for this transaction.

        Raises:
            RunExistsError: the attempt was opened by another start.
            AttemptConflictError: no free number was found.
            ValueError: an argument is outside its rules.
        """
        start = Start.of(
            task_id, attempt, started_at, self._source if source is None else source, submission, source_attempt
        )
        if attempt is None:
            engine.lock_task(self._connection, task_id)
        return self.open_start(start)

    def open_start(self, start: "Start") -> TaskRun:
        """Open a run until a number is free."""
        for _ in range(_TRIES):
            run = self.try_start(start)
            if run is not None:
                return run
        raise AttemptConflictError(start.run.task_id)

    def try_start(self, start: "Start") -> TaskRun | None:
        """Open a run by one statement; None if another writer took its number at the same moment."""
        dialect = self._connection.dialect
        returning = dialect.insert_returning
        run = start.run
        if not (returning or start.numbered):  # MySQL, and SQLite before 3.35, cannot tell which number was given
            last = self._connection.scalar(statements.last_attempt(), start.parameters()) or 0
            if last == MAX_ATTEMPT:
                return None
            run = replace(run, attempt=last + 1)
        statement = statements.open_run(dialect.name, numbered=start.numbered or not returning, returning=returning)
        try:
            result = self._connection.execute(statement, start.parameters() | {"attempt": run.attempt})
            if not returning and result.rowcount:
                return run
            inserted = result.all() if returning else []  # every row, as SQLite commits only then
        except IntegrityError:
            if dialect.name in ("sqlite", "postgresql"):
                raise
            inserted = []  # without ON CONFLICT a taken number is an error
        if inserted:
            return replace(run, attempt=inserted[0][0])
        return self._told_twice(start) if start.numbered else None

    def _told_twice(self, start: "Start") -> TaskRun:
        stored = self.get_run(start.run.task_id, start.run.attempt)
        if stored is None or stored.started_at != start.run.started_at:
            raise RunExistsError(start.run.task_id, start.run.attempt)
        return stored

    def find_start(self, start: Start) -> TaskRun | None:
        """Return the run that this very start has opened, if it has."""
        row = self._connection.execute(statements.find_start(numbered=start.numbered), start.parameters()).first()
        return None if row is None else _run(row)

    def close_run(
        self,
        task_id: str,
        attempt: int,
        phase: TaskPhase,
        *,
        error: str | None = None,
        exit_code: int | None = None,
        finished_at: datetime | None = None,
    ) -> TaskRun:
        """Record how a run ended, and return it.

        The same outcome told again gives the stored run, whatever its ``finished_at``. Of failed, exhausted and
        timeout the later in this order replaces the earlier, and an earlier one that comes later changes nothing. An
        outcome that was only inferred gives way to the real one.

        Raises:
            RunNotFoundError: there is no such run.
            RunClosedError: it has ended with another outcome; ``run`` is what is stored.
            ValueError: ``phase`` is not terminal, or an argument is outside its rules.
        """
        return self.close_with(
            task_id, attempt, Outcome.of(phase, error=error, exit_code=exit_code, finished_at=finished_at)
        )

    def close_with(self, task_id: str, attempt: int, outcome: Outcome) -> TaskRun:
        """Record a checked outcome."""
        key = _key(task_id, attempt)
        values = {"to": outcome.phase, "end": outcome.finished_at, "why": outcome.error, "code": outcome.exit_code}
        returning = self._connection.dialect.update_returning
        result = self._connection.execute(statements.close_run(returning=returning), key | values)
        if returning:
            rows = result.all()
            if rows:
                return _run(rows[0])
        elif result.rowcount:
            return self._stored(task_id, attempt)
        while True:
            stored = self._stored(task_id, attempt)
            if outcome.is_that_of(stored):
                return stored
            rank, stored_rank = _RANK.get(outcome.phase, 0), _RANK.get(stored.phase, 0)
            if 0 < rank < stored_rank:
                return stored
            if not 0 < stored_rank < rank:
                raise RunClosedError(stored)
            refinement = {"why": outcome.error, "code": outcome.exit_code}
            if self._connection.execute(statements.refine_run(outcome.phase), key | refinement).rowcount:
                return self._stored(task_id, attempt)

    def get_run(self, task_id: str, attempt: int) -> TaskRun | None:
        """Return a run; None if there is no such run."""
        row = self._connection.execute(statements.get_run(), _key(task_id, attempt)).first()
        return None if row is None else _run(row)

    def last_run(self, task_id: str, *, phases: Phases = None) -> TaskRun | None:
        """Return the task's run with the highest attempt, of those in ``phases``; None if there is none."""
        found = self._runs(statements.runs(checked_name(task_id, "task id"), phases=_phases(phases), limit=1))
        return found[0] if found else None

    def runs(self, task_id: str, *, phases: Phases = None, limit: int = 50, after: str | None = None) -> RunPage:
        """Return a page of the task's runs, newest attempt first.

        Runs that are opened meanwhile neither shift nor repeat what the following pages hold.

        Raises:
            ValueError: ``limit`` is less than 1, ``after`` is no cursor, or a phase does not exist.
        """
        checked_name(task_id, "task id")
        _check_limit(limit)
        if after is not None and not (after.isascii() and after.isdecimal() and int(after) <= MAX_ATTEMPT):
            raise ValueError(f"not a cursor of a page of runs: {after!r}")
        before = None if after is None else int(after)
        found = self._runs(statements.runs(task_id, phases=_phases(phases), limit=limit + 1, before=before))
        page = found[:limit]
        return RunPage(page, str(page[-1].attempt) if len(found) > limit else None)

    def active_runs(self, task_id: str | None = None) -> list[TaskRun]:
        """Return the active runs, of one task or of all, in the order they started."""
        return self._runs(statements.active_runs(None if task_id is None else checked_name(task_id, "task id")))

    def tasks(self, *, limit: int | None = None, after: str | None = None) -> list[TaskRun]:
        """Return the latest run of every task, in the order of the task ids, those greater than ``after``.

        Raises:
            ValueError: ``limit`` is less than 1, or ``after`` is no task id.
        """
        if limit is not None:
            _check_limit(limit)
        if after is not None:
            checked_name(after, "task id")
        postgresql = self._connection.dialect.name == "postgresql"
        walk = self._connection.dialect.name == "sqlite" or (postgresql and not self._is_citus())
        return self._runs(statements.tasks(walk=walk, lateral=postgresql, limit=limit, after=after))

    def _is_citus(self) -> bool:
        return bool(self._connection.scalar(statements.citus()))

    def _stored(self, task_id: str, attempt: int) -> TaskRun:
        # A host's transaction may have an older snapshot than what the update has seen; a locking read has not.
        row = self._connection.execute(statements.get_run().with_for_update(), _key(task_id, attempt)).first()
        if row is None:
            raise RunNotFoundError(task_id, attempt)
        return _run(row)

    def _runs(self, query: Select[Any]) -> list[TaskRun]:
        return [_run(row) for row in self._connection.execute(query)]


def open_alone(connection: Connection, start: Start, *, lost: bool) -> TaskRun:
    """Open a run in a transaction of its own: one statement or, if its number was taken meanwhile, under a lock.

    ``lost`` says that an earlier try may have been written although its answer was lost.
    """
    runs = TaskRunRepository(connection)
    if not lost:
        try:
            run = runs.try_start(start)
        except DBAPIError as error:
            if not engine.is_refusal(error):
                raise
            run = None  # MariaDB finds racing writers in a deadlock
        if run is not None:
            return run
        connection.rollback()
    with engine.transaction(connection, lock=start.run.task_id):
        return (runs.find_start(start) if lost else None) or runs.open_start(start)


def close_alone(connection: Connection, task_id: str, attempt: int, outcome: Outcome, *, lost: bool) -> TaskRun:
    """Close a run in a transaction of its own; ``lost`` as in :func:`open_alone`."""
    try:
        return TaskRunRepository(connection).close_with(task_id, attempt, outcome)
    except RunClosedError as error:
        if lost and outcome.is_within(error.run):
            return error.run
        raise


def _key(task_id: str, attempt: int) -> dict[str, Any]:
    # Checked, as a database may take another name for this one (MariaDB pads with spaces) or fail to take it at all.
    return {"of_task": checked_name(task_id, "task id"), "of_attempt": checked_attempt(attempt)}


def _check_limit(limit: int) -> None:
    if limit < 1:
        raise ValueError(f"limit must be 1 or more, not {limit}")


def _phases(phases: Phases) -> tuple[TaskPhase, ...] | None:
    if phases is None:
        return None
    return tuple(checked_phase(phase) for phase in ([phases] if isinstance(phases, str) else phases))


def _run(row: Row[Any]) -> TaskRun:
    return TaskRun(*tuple(row))
