"""The repository for asyncio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection

from taskruns.bulk import RunsAdded
from taskruns.checks import TaskCheck
from taskruns.filters import ANY_TIME, Phases, RunFilter, RunOrder
from taskruns.liveness import STALE_AFTER, Supervisor
from taskruns.model import TaskPhase, TaskRun
from taskruns.reading import RunPage
from taskruns.repository import TaskRunRepository
from taskruns.stats import RunStats, Span
from taskruns.summaries import TaskSummary
from taskruns.supervision import Watch
from taskruns.windows import Window

T = TypeVar("T")
P = ParamSpec("P")


class AsyncTaskRunRepository:
    """The twin of :class:`taskruns.TaskRunRepository` on an asynchronous connection of the caller's."""

    def __init__(self, connection: AsyncConnection, *, source: str | None = None, watch: Watch | None = None) -> None:
        self._connection = connection
        self._source = source
        self._watch = watch

    async def _call(
        self, method: Callable[Concatenate[TaskRunRepository, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        return await self._connection.run_sync(
            lambda connection: method(
                TaskRunRepository(connection, source=self._source, watch=self._watch), *args, **kwargs
            )
        )

    async def open_run(
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
        """Record that a run has started, and return it: see :meth:`TaskRunRepository.open_run`."""
        return await self._call(
            TaskRunRepository.open_run,
            task_id,
            attempt=attempt,
            started_at=started_at,
            source=source,
            submission=submission,
            source_attempt=source_attempt,
            again=again,
        )

    async def close_run(
        self,
        task_id: str,
        attempt: int,
        phase: TaskPhase,
        *,
        error: str | None = None,
        exit_code: int | None = None,
        finished_at: datetime | None = None,
    ) -> TaskRun:
        """Record how a run ended, and return it: see :meth:`TaskRunRepository.close_run`."""
        return await self._call(
            TaskRunRepository.close_run,
            task_id,
            attempt,
            phase,
            error=error,
            exit_code=exit_code,
            finished_at=finished_at,
        )

    async def recover(
        self,
        *,
        stale_after: float | None = STALE_AFTER,
        unsupervised_after: float | None = None,
        task_id: str | None = None,
        dry_run: bool = False,
    ) -> list[TaskRun]:
        """Close the active runs of dead supervisors, and return them: see :meth:`TaskRunHistory.recover`."""
        return await self._call(
            TaskRunRepository.recover,
            stale_after=stale_after,
            unsupervised_after=unsupervised_after,
            task_id=task_id,
            dry_run=dry_run,
        )

    async def supervisors(self) -> list[Supervisor]:
        """Return the processes that are registered to watch over runs, in the order they came."""
        return await self._call(TaskRunRepository.supervisors)

    async def add_runs(self, runs: Sequence[TaskRun]) -> RunsAdded:
        """Store runs as they are: see :meth:`TaskRunRepository.add_runs`."""
        return await self._call(TaskRunRepository.add_runs, runs)

    async def get_run(self, task_id: str, attempt: int) -> TaskRun | None:
        """Return a run; None if there is no such run."""
        return await self._call(TaskRunRepository.get_run, task_id, attempt)

    async def last_run(self, task_id: str, *, phases: Phases = None) -> TaskRun | None:
        """Return the task's run with the highest attempt, of those in ``phases``; None if there is none."""
        return await self._call(TaskRunRepository.last_run, task_id, phases=phases)

    async def runs(
        self,
        wanted: str | RunFilter | None = None,
        *,
        phases: Phases = None,
        order: RunOrder = RunOrder.NEWEST,
        limit: int = 50,
        after: str | None = None,
    ) -> RunPage:
        """Return a page of runs, of a task, a filter, or all: see :meth:`TaskRunRepository.runs`."""
        return await self._call(TaskRunRepository.runs, wanted, phases=phases, order=order, limit=limit, after=after)

    async def count_runs(self, wanted: str | RunFilter | None = None, *, phases: Phases = None) -> int:
        """Return how many runs there are, of a task, a filter, or all."""
        return await self._call(TaskRunRepository.count_runs, wanted, phases=phases)

    async def active_runs(self, wanted: str | RunFilter | None = None) -> list[TaskRun]:
        """Return the active runs, of a task, a filter, or all, in the order they started."""
        return await self._call(TaskRunRepository.active_runs, wanted)

    async def all_runs(
        self, task_id: str | None = None, *, limit: int = 50, after: tuple[str, int] | None = None
    ) -> list[TaskRun]:
        """Return runs of one task or of all, in order: see :meth:`TaskRunRepository.all_runs`."""
        return await self._call(TaskRunRepository.all_runs, task_id, limit=limit, after=after)

    async def tasks(self, *, limit: int | None = None, after: str | None = None) -> list[TaskRun]:
        """Return the latest run of every task, in the order of the task ids, those greater than ``after``."""
        return await self._call(TaskRunRepository.tasks, limit=limit, after=after)

    async def summaries(
        self,
        task_glob: str | None = None,
        *,
        phases: Phases = None,
        stale_after: timedelta | None = None,
        window: Window = ANY_TIME,
        limit: int = 50,
        after: str | None = None,
    ) -> list[TaskSummary]:
        """Return how tasks are doing, in the order of their ids: see :meth:`TaskRunRepository.summaries`."""
        return await self._call(
            TaskRunRepository.summaries,
            task_glob,
            phases=phases,
            stale_after=stale_after,
            window=window,
            limit=limit,
            after=after,
        )

    async def check(
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
        """Return whether tasks are well, in the order of their ids: see :meth:`TaskRunRepository.check`."""
        return await self._call(
            TaskRunRepository.check,
            task_glob,
            succeeded_within=succeeded_within,
            max_problems=max_problems,
            max_running=max_running,
            zone=zone,
            limit=limit,
            after=after,
        )

    async def stats(
        self,
        wanted: str | RunFilter | None = None,
        *,
        phases: Phases = None,
        by: Span | None = None,
        zone: tzinfo = UTC,
    ) -> RunStats:
        """Return statistics of runs, of a task, a filter, or all: see :meth:`TaskRunRepository.stats`."""
        return await self._call(TaskRunRepository.stats, wanted, phases=phases, by=by, zone=zone)
