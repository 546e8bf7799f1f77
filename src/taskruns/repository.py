"""Runs in a transaction of the caller's: statements in, :class:`TaskRun` out. It never commits."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Select

from taskruns import bulk, engine, recovery, statements
from taskruns.bulk import RunsAdded
from taskruns.liveness import STALE_AFTER, Process, Supervisor
from taskruns.model import MAX_ATTEMPT, Outcome, TaskPhase, TaskRun, checked_name, checked_phase
from taskruns.supervision import Watch
from taskruns.writing import Start, close, key_of, open_start, run_of, supersede

Phases = TaskPhase | Iterable[TaskPhase] | None
"""A phase, several, or None for all."""


@dataclass(frozen=True, slots=True)
class RunPage:
    """Some runs of a task, newest attempt first."""

    runs: list[TaskRun]
    next_cursor: str | None
    """What to give as ``after`` for the page that follows; None if there is none."""


class TaskRunRepository:
    """Opens, closes and reads runs on a connection whose transaction belongs to the caller.

    A host passes its own, such as ``session.connection()``, and its writes and ours become one. ``source`` marks the
    runs that are opened without one. Only in a transaction of a history's (:meth:`TaskRunHistory.begin`) are they
    watched over by a supervisor.
    """

    def __init__(self, connection: Connection, *, source: str | None = None, watch: Watch | None = None) -> None:
        self._connection = connection
        self._source = source
        self._watch = watch

    def open_run(
        self,
        task_id: str,
        *,
        attempt: int | None = None,
        started_at: datetime | None = None,
        source: str | None = None,
        submission: str | None = None,
        source_attempt: int | None = None,
        again: bool = False,
    ) -> TaskRun:
        """Record that a run has started, and return it.

        Without ``attempt`` it gets the task's last number plus one. The same start told twice (task, attempt and
        ``started_at``) gives the stored run; without an attempt it does if it is told ``again``, as after an answer
        that was lost. On PostgreSQL other openings of the task wait for this transaction.

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
        if self._watch is None:
            return open_start(self._connection, start, again=again)
        start = start.watched_by(self._watch.attend(self._connection))
        superseded = self._watch.superseded_by(start)
        run = open_start(self._connection, start, again=again)
        if run.is_active and run.supervisor_id == start.run.supervisor_id:
            supersede(self._connection, run, superseded)
            self._watch.opened(run, superseded)
        return run

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
        outcome = Outcome.of(phase, error=error, exit_code=exit_code, finished_at=finished_at)
        run = close(self._connection, task_id, attempt, outcome)
        if self._watch is not None:
            self._watch.closed(task_id, attempt)
        return run

    def recover(
        self,
        *,
        stale_after: float | None = STALE_AFTER,
        unsupervised_after: float | None = None,
        task_id: str | None = None,
        dry_run: bool = False,
    ) -> list[TaskRun]:
        """Close the active runs of dead supervisors, of one task or of all, and return them.

        See :meth:`TaskRunHistory.recover`.
        """
        losses = recovery.find_losses(
            self._connection, Process.here(), stale_after=stale_after, unsupervised_after=unsupervised_after
        )
        losses = [loss for loss in losses if task_id in (None, loss.run.task_id)]
        return [loss.run for loss in losses] if dry_run else recovery.close(self._connection, losses)

    def supervisors(self) -> list[Supervisor]:
        """Return the processes that are registered to watch over runs, in the order they came."""
        return recovery.supervisors(self._connection)

    def add_runs(self, runs: Sequence[TaskRun]) -> RunsAdded:
        """Store runs as they are, finished or active, such as those of another database.

        A run that is there already is skipped if it is equal, whoever watches over it, and a conflict if it is not.

        Raises:
            ValueError: a run has a name or a number that cannot be stored.
        """
        return bulk.add_rows(self._connection, list(map(bulk.row_of, runs))).of_runs(runs)

    def get_run(self, task_id: str, attempt: int) -> TaskRun | None:
        """Return a run; None if there is no such run."""
        row = self._connection.execute(statements.get_run(), key_of(task_id, attempt)).first()
        return None if row is None else run_of(row)

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

    def all_runs(
        self, task_id: str | None = None, *, limit: int = 50, after: tuple[str, int] | None = None
    ) -> list[TaskRun]:
        """Return runs of one task or of all, in the order of task id and attempt, those after the key ``after``.

        Raises:
            ValueError: ``limit`` is less than 1, or ``after`` is no key.
        """
        _check_limit(limit)
        # Two questions, as not every database looks up a pair that is greater than another by the key.
        found: list[TaskRun] = []
        if after is not None:
            checked_name(after[0], "task id")
            if task_id in (None, after[0]):
                found = self._runs(statements.following_runs(*after, limit=limit))
        elif task_id is not None:
            found = self._runs(statements.following_runs(checked_name(task_id, "task id"), 0, limit=limit))
        if task_id is None and len(found) < limit:
            last = None if after is None else after[0]
            found += self._runs(statements.runs_of_following_tasks(last, limit=limit - len(found)))
        return found

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

    def _runs(self, query: Select[Any]) -> list[TaskRun]:
        return [run_of(row) for row in self._connection.execute(query)]


def _check_limit(limit: int) -> None:
    if limit < 1:
        raise ValueError(f"limit must be 1 or more, not {limit}")


def _phases(phases: Phases) -> tuple[TaskPhase, ...] | None:
    if phases is None:
        return None
    return tuple(checked_phase(phase) for phase in ([phases] if isinstance(phases, str) else phases))
