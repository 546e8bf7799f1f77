"""Each task at a glance."""

from collections.abc import Iterator, Sequence, Set as AbstractSet
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

from sqlalchemy import Connection

from taskruns import reading
from taskruns.filters import ANY_TIME, Phases, RunFilter
from taskruns.globs import Glob, upper_bound
from taskruns.model import PROBLEMS, TaskPhase, TaskRun
from taskruns.stats import RunStats
from taskruns.windows import Window

OUTCOMES = 20
"""Runs whose phases a summary holds."""

_AT_ONCE = 100
"""Tasks that are looked at together."""


@dataclass(frozen=True, slots=True)
class TaskSummary:
    """How a task is doing."""

    last_run: TaskRun
    """The run with the highest attempt."""
    last_success: TaskRun | None
    """The succeeded run with the highest attempt, which need not be the success that ended last."""
    last_problem: TaskRun | None
    """The failed, timed out or exhausted run with the highest attempt."""
    outcomes: tuple[TaskPhase, ...]
    """The phases of its 20 newest runs, newest first."""
    stats: RunStats
    """Statistics of the runs that started in the window."""

    @property
    def task_id(self) -> str:
        """The task."""
        return self.last_run.task_id

    def to_wire(self) -> dict[str, Any]:
        """Return it as a JSON object: that of the last run, with more."""
        return {
            **self.last_run.to_wire(),
            **({} if self.last_success is None else {"lastSuccess": self.last_success.to_wire()}),
            **({} if self.last_problem is None else {"lastProblem": self.last_problem.to_wire()}),
            "outcomes": [phase.value for phase in self.outcomes],
            "stats": self.stats.to_wire(),
        }


def summaries(
    connection: Connection,
    *,
    task_glob: str | None,
    phases: Phases,
    stale_after: timedelta | None,
    window: Window,
    limit: int,
    after: str | None,
) -> list[TaskSummary]:
    """Return the summaries of some tasks, in the order of their ids: see :meth:`TaskRunRepository.summaries`."""
    limit = reading.check_limit(limit)
    found: list[TaskSummary] = []
    wanted = RunFilter(phases=phases).phases
    glob = None if task_glob is None else Glob(task_glob)
    lately = None if stale_after is None else within_last(stale_after, datetime.now(UTC))
    is_all = glob is None and wanted is None and stale_after is None
    at_once = min(limit, _AT_ONCE) if is_all else _AT_ONCE
    for latest in latest_runs(connection, glob, after, at_once=at_once):
        matching = (
            run
            for run in latest
            if (glob is None or glob.matches(run.task_id))
            and (wanted is None or run.phase in wanted)
            and (lately is None or _is_stale(connection, run, lately))
        )
        some = list(islice(matching, limit - len(found)))
        if some:
            found += _summarised(connection, some, window)
        if len(found) == limit:
            break
    return found


def latest_runs(
    connection: Connection, glob: Glob | None, after: str | None, *, at_once: int
) -> Iterator[list[TaskRun]]:
    """Yield the latest runs of tasks that may match, some at a time."""
    if glob is not None and glob.literal is not None:
        run = reading.last_run(connection, RunFilter(glob.literal))
        if run is not None and (after is None or after < run.task_id):
            yield [run]
        return
    first = glob.prefix if glob is not None and glob.prefix else None
    end = None if first is None else upper_bound(first)
    if first is not None and after is not None and after >= first:
        first = None
    while runs := reading.tasks(connection, first=first, after=after if first is None else None, limit=at_once):
        yield runs
        first, after = None, runs[-1].task_id
        if end is not None and after >= end:
            return


def _is_stale(connection: Connection, latest: TaskRun, lately: Window) -> bool:
    ended_at = last_success_at(connection, last_success(connection, latest), lately)
    return ended_at is None or not lately.contains(ended_at)


def within_last(span: timedelta, now: datetime) -> Window:
    """Return the time since so long ago."""
    try:
        return Window(now - span)
    except OverflowError:
        return ANY_TIME


def last_success(connection: Connection, latest: TaskRun) -> TaskRun | None:
    """Return the success with the highest attempt of a task, which is given by its latest run."""
    return _last(connection, latest, {TaskPhase.SUCCEEDED})


def last_success_at(connection: Connection, success: TaskRun | None, lately: Window) -> datetime | None:
    """Return when a success of a task ended ``lately``, or else the last one of all, given that of the highest attempt.

    That one nearly always tells. But runs may overlap, or be imported: an earlier attempt may have ended later.
    """
    if success is None:
        return None
    if success.finished_at is not None and lately.contains(success.finished_at):
        return success.finished_at
    return reading.last_success_at(connection, success.task_id)


def _summarised(connection: Connection, latest: Sequence[TaskRun], window: Window) -> Iterator[TaskSummary]:
    stats = reading.stats_of_tasks(connection, RunFilter(started=window), latest)
    for run in latest:
        yield TaskSummary(
            run,
            last_success(connection, run),
            _last(connection, run, PROBLEMS),
            reading.newest_phases(connection, run.task_id, OUTCOMES),
            stats.get(run.task_id, RunStats()),
        )


def _last(connection: Connection, latest: TaskRun, phases: AbstractSet[TaskPhase]) -> TaskRun | None:
    if latest.phase in phases:
        return latest
    return reading.last_run(connection, RunFilter(latest.task_id, phases=phases))
