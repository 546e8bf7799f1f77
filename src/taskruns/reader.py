"""What a history answers: each call is one transaction."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, timedelta, tzinfo
from functools import partial
from typing import TYPE_CHECKING, Self, TypeVar

from sqlalchemy import Connection, Engine

from taskruns import migrate
from taskruns.connections import Connections
from taskruns.filters import ANY_TIME, Phases, RunFilter, RunOrder, filter_of
from taskruns.model import TaskRun
from taskruns.repository import TaskRunRepository
from taskruns.retrying import OnRetry, Retry

if TYPE_CHECKING:
    from taskruns.checks import TaskCheck
    from taskruns.following import Following
    from taskruns.liveness import Supervisor
    from taskruns.reading import RunPage
    from taskruns.stats import RunStats, Span
    from taskruns.summaries import TaskSummary
    from taskruns.windows import Window

T = TypeVar("T")

Operation = Callable[[Connection, bool], T]
"""What to do on a connection; the flag says that an earlier try may have been written although its answer was lost."""

RETRY_FOR = 5.0
"""Seconds for which a call goes on trying after a transient error."""

PAGE = 500
"""Runs that a stream fetches at a time."""


class Reader:
    """A database and the questions to it: the part of :class:`taskruns.TaskRunHistory` that changes nothing."""

    def __init__(self, engine: Engine, *, retry_for: float, on_retry: OnRetry | None) -> None:
        self._engine = engine
        self._connections = Connections(engine)
        self.on_retry = on_retry
        self._retry_for = retry_for
        self._is_current = False

    def dispose(self) -> None:
        """Close the idle connections. A later call opens new ones."""
        self._connections.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.dispose()

    def check_version(self) -> None:
        """Check that the database's tables suit this code; every other call does it too, once.

        Raises:
            SchemaVersionError: they are missing, too old, or of another major version.
        """
        self._call(lambda _connection, _lost: None)

    def get_run(self, task_id: str, attempt: int) -> TaskRun | None:
        """Return a run; None if there is no such run."""
        return self._ask(lambda runs: runs.get_run(task_id, attempt))

    def last_run(self, task_id: str, *, phases: Phases = None) -> TaskRun | None:
        """Return the task's run with the highest attempt, of those in ``phases``; None if there is none."""
        wanted = RunFilter(phases=phases).phases  # a second try must not find them used up
        return self._ask(lambda runs: runs.last_run(task_id, phases=wanted))

    def runs(
        self,
        wanted: str | RunFilter | None = None,
        *,
        phases: Phases = None,
        order: RunOrder = RunOrder.NEWEST,
        limit: int = 50,
        after: str | None = None,
    ) -> RunPage:
        """Return a page of runs, of a task, a filter, or all: see :meth:`TaskRunRepository.runs`."""
        wanted = filter_of(wanted, phases)
        return self._ask(lambda runs: runs.runs(wanted, order=order, limit=limit, after=after))

    def iter_runs(
        self,
        wanted: str | RunFilter | None = None,
        *,
        phases: Phases = None,
        order: RunOrder = RunOrder.NEWEST,
    ) -> Iterator[TaskRun]:
        """Yield all runs of a task, a filter, or all, a page at a time.

        None comes twice, and none is missed that is the same all the while. The memory it takes is constant, but for
        the keys of runs whose inferred start or end is what they are sorted by.
        """
        from taskruns.reading import Unrepeated  # noqa: PLC0415  (not for who only records)

        wanted = filter_of(wanted, phases)
        unrepeated = Unrepeated(wanted, RunOrder(order))
        after = None
        while True:
            page = self.runs(wanted, order=order, limit=PAGE, after=after)
            yield from unrepeated.of(page.runs)
            after = page.next_cursor
            if after is None:
                return

    def count_runs(self, wanted: str | RunFilter | None = None, *, phases: Phases = None) -> int:
        """Return how many runs there are, of a task, a filter, or all."""
        wanted = filter_of(wanted, phases)
        return self._ask(lambda runs: runs.count_runs(wanted))

    def active_runs(self, wanted: str | RunFilter | None = None) -> list[TaskRun]:
        """Return the active runs, of a task, a filter, or all, in the order they started."""
        return self._ask(lambda runs: runs.active_runs(wanted))

    def follow(self, wanted: str | RunFilter | None = None, *, interval: float = 1.0) -> Iterator[TaskRun]:
        """Yield runs as they start and again as they end, of a task, a filter, or all, without an end.

        First come those that are active. Each is yielded if it meets the filter as it is then: one with ``phases`` of
        an end yields no starts. An outcome that changes within a minute is yielded again. What is written down later
        than 10 s after its start, such as by an import, is yielded if it is still active, or nothing newer was seen.
        A step makes two cheap queries, three where something happened: all of them find their runs by an index.

        Args:
            wanted: which runs.
            interval: seconds between two steps, at least 0.1; with much to tell they follow each other sooner.

        Raises:
            ValueError: the interval is too short.
        """
        from taskruns.following import Following  # noqa: PLC0415  (as above)

        following = Following(filter_of(wanted), interval=interval)
        while True:
            yield from self.take_step(following)
            time.sleep(following.pause)

    def take_step(self, following: Following) -> list[TaskRun]:
        """Return what has happened since the last step of some following."""
        return self._call(lambda connection, _lost: following.step(connection))

    def all_runs(self, task_id: str | None = None) -> Iterator[TaskRun]:
        """Yield the runs of one task or of all, in the order of task id and attempt: the memory it takes is constant.

        Runs that are opened meanwhile are yielded if they come later in this order; none is repeated or missed.
        """
        after = None
        while page := self._ask(partial(TaskRunRepository.all_runs, task_id=task_id, limit=PAGE, after=after)):
            yield from page
            after = (page[-1].task_id, page[-1].attempt)

    def tasks(self, *, limit: int | None = None, after: str | None = None) -> list[TaskRun]:
        """Return the latest run of every task, in the order of the task ids, those greater than ``after``."""
        return self._ask(lambda runs: runs.tasks(limit=limit, after=after))

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
        """Return how tasks are doing, in the order of their ids: see :meth:`TaskRunRepository.summaries`."""
        phases = RunFilter(phases=phases).phases
        return self._ask(
            lambda runs: runs.summaries(
                task_glob, phases=phases, stale_after=stale_after, window=window, limit=limit, after=after
            )
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
        """Return whether tasks are well, in the order of their ids: see :meth:`TaskRunRepository.check`."""
        return self._ask(
            lambda runs: runs.check(
                task_glob,
                succeeded_within=succeeded_within,
                max_problems=max_problems,
                max_running=max_running,
                zone=zone,
                limit=limit,
                after=after,
            )
        )

    def stats(
        self,
        wanted: str | RunFilter | None = None,
        *,
        phases: Phases = None,
        by: Span | None = None,
        zone: tzinfo = UTC,
    ) -> RunStats:
        """Return statistics of runs, of a task, a filter, or all: see :meth:`TaskRunRepository.stats`."""
        wanted = filter_of(wanted, phases)
        return self._ask(lambda runs: runs.stats(wanted, by=by, zone=zone))

    def supervisors(self) -> list[Supervisor]:
        """Return the processes that are registered to watch over runs, in the order they came."""
        return self._ask(lambda runs: runs.supervisors())

    def _ask(self, question: Callable[[TaskRunRepository], T]) -> T:
        return self._call(lambda connection, _lost: question(TaskRunRepository(connection)))

    def _call(self, operation: Operation[T], *, first: Callable[[], T | None] | None = None) -> T:
        """Do an operation, again where that may help. ``first``: a quicker way, which may lead to nothing."""
        retry = Retry(self._retry_for, self.on_retry)
        result: T = retry.call(self._call_once, operation, retry, first)
        return result

    def _call_once(self, operation: Operation[T], retry: Retry, first: Callable[[], T | None] | None = None) -> T:
        if first is not None and self._is_current and not retry.lost:
            found = first()
            if found is not None:
                return found
        connection = self._connections.take()
        try:
            self._require_current(connection)
            return operation(connection, retry.lost)
        finally:
            self._connections.give_back(connection)

    def _require_current(self, connection: Connection) -> None:
        """Check the tables' version, once: migrations within a major never take away what this code needs."""
        if not self._is_current:
            migrate.require(connection)
            connection.commit()
            self._is_current = True
