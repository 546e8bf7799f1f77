"""Runs in a transaction of the caller's: statements in, :class:`TaskRun` out. It never commits."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from taskruns import engine, recovery
from taskruns.filters import ANY_TIME, Phases, RunFilter, RunOrder, filter_of
from taskruns.liveness import STALE_AFTER, Process, Supervisor
from taskruns.model import Outcome, TaskPhase, TaskRun, checked_name
from taskruns.supervision import Watch
from taskruns.writing import Start, close, open_start, supersede

if TYPE_CHECKING:
    from taskruns.bulk import RunsAdded
    from taskruns.checks import TaskCheck
    from taskruns.reading import RunPage
    from taskruns.stats import RunStats, Span
    from taskruns.summaries import TaskSummary
    from taskruns.windows import Window


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
        from taskruns import bulk

        return bulk.add_rows(self._connection, list(map(bulk.row_of, runs))).of_runs(runs)

    def get_run(self, task_id: str, attempt: int) -> TaskRun | None:
        """Return a run; None if there is no such run."""
        from taskruns import reading

        return reading.get_run(self._connection, task_id, attempt)

    def last_run(self, task_id: str, *, phases: Phases = None) -> TaskRun | None:
        """Return the task's run with the highest attempt, of those in ``phases``; None if there is none."""
        from taskruns import reading

        return reading.last_run(self._connection, RunFilter(checked_name(task_id, "task id"), phases=phases))

    def runs(
        self,
        wanted: str | RunFilter | None = None,
        *,
        phases: Phases = None,
        order: RunOrder = RunOrder.NEWEST,
        limit: int = 50,
        after: str | None = None,
    ) -> RunPage:
        """Return a page of runs: those of a task, those that a filter wants, or of all.

        Runs that are opened, closed or deleted meanwhile neither shift nor repeat what the following pages hold. Only
        one whose start or end turns out to be another meanwhile, such as one that was recovered, may come again.

        Raises:
            ValueError: ``limit`` is less than 1, ``after`` is no cursor of such a list, a phase does not exist, or the
                longest runs are wanted neither of one task nor in a window of time.
        """
        from taskruns import reading

        return reading.page(self._connection, filter_of(wanted, phases), order, limit=limit, after=after)

    def count_runs(self, wanted: str | RunFilter | None = None, *, phases: Phases = None) -> int:
        """Return how many runs there are: of a task, of those that a filter wants, or of all."""
        from taskruns import reading

        return reading.count(self._connection, filter_of(wanted, phases))

    def active_runs(self, wanted: str | RunFilter | None = None) -> list[TaskRun]:
        """Return the active runs, of a task, of those that a filter wants, or of all, in the order they started."""
        from taskruns import reading

        return reading.active_runs(self._connection, filter_of(wanted))

    def all_runs(
        self, task_id: str | None = None, *, limit: int = 50, after: tuple[str, int] | None = None
    ) -> list[TaskRun]:
        """Return runs of one task or of all, in the order of task id and attempt, those after the key ``after``.

        Raises:
            ValueError: ``limit`` is less than 1, or ``after`` is no key.
        """
        from taskruns import reading

        return reading.all_runs(self._connection, task_id, limit=limit, after=after)

    def tasks(self, *, limit: int | None = None, after: str | None = None) -> list[TaskRun]:
        """Return the latest run of every task, in the order of the task ids, those greater than ``after``.

        Raises:
            ValueError: ``limit`` is less than 1, or ``after`` is no task id.
        """
        from taskruns import reading

        return reading.tasks(self._connection, limit=limit, after=after)

    def summaries(
        self,
        task_glob: str | None = None,
        *,
        phases: Phases = None,
        stale_after: timedelta | None = None,
        window: Window = ANY_TIME,
        limit: int = 50,
        after: str | None = None,
    ) -> list[TaskSummary]:
        """Return how tasks are doing, in the order of their ids.

        Args:
            task_glob: Only the tasks that match: ``*``, ``?`` and ``[...]`` as in the shell, ``[*]`` is a star.
            phases: Only the tasks whose last run is in one of these.
            stale_after: Only the tasks of which no success, of whatever attempt, has ended for so long.
            window: Within which runs started that count in the statistics.
            limit: How many tasks.
            after: The task id after which to begin: the last one of the page before.

        Raises:
            ValueError: an argument is outside its rules.
        """
        from taskruns.summaries import summaries

        return summaries(
            self._connection,
            task_glob=task_glob,
            phases=phases,
            stale_after=stale_after,
            window=window,
            limit=limit,
            after=after,
        )

    def check(
        self,
        task_glob: str,
        *,
        succeeded_within: timedelta | None = None,
        max_problems: int | None = None,
        max_running: timedelta | None = None,
        zone: tzinfo = UTC,
        limit: int = 50,
        after: str | None = None,
    ) -> list[TaskCheck]:
        """Return whether tasks are well, and why not, in the order of their ids.

        Without any of the rules, a task is well if its latest run that has ended is no problem.

        Args:
            task_glob: The tasks that match: ``*``, ``?`` and ``[...]`` as in the shell, ``[*]`` is a star. Without any
                of these it is a task id, and a task that was never seen is not well.
            succeeded_within: For how long there may be no success, of whatever attempt, that ended.
            max_problems: How many problems may follow each other without a success.
            max_running: For how long a run may be active.
            zone: The time zone of what the reasons tell.
            limit: How many tasks.
            after: The task id after which to begin: the last one of the page before.

        Raises:
            ValueError: an argument is outside its rules.
        """
        from taskruns import checks

        rules = checks.Rules(succeeded_within, max_problems, max_running, zone)
        return checks.check(self._connection, task_glob, rules, limit=limit, after=after)

    def stats(
        self,
        wanted: str | RunFilter | None = None,
        *,
        phases: Phases = None,
        by: Span | None = None,
        zone: tzinfo = UTC,
    ) -> RunStats:
        """Return statistics of runs: of a task, of those that a filter wants, or of all.

        Args:
            wanted: A task id or a filter; None for all runs.
            phases: Only the runs in one of these.
            by: Also by the day, or the hour, in which they started.
            zone: The time zone of these.
        """
        from taskruns import reading

        return reading.stats(self._connection, filter_of(wanted, phases), by=by, zone=zone)
