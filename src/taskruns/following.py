"""Following runs: what has started and ended since the last look, by few queries whatever there is."""

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

from sqlalchemy import Connection, select

from taskruns import query_statements, statements
from taskruns.filters import RunFilter
from taskruns.model import TaskPhase, TaskRun
from taskruns.prepared import moment_of, prepared
from taskruns.query_statements import question_of
from taskruns.writing import run_of

MIN_INTERVAL = 0.1
"""The least number of seconds between two steps, however much there is to tell."""

LOOK_BACK = timedelta(seconds=10)
"""A start may be seen so much later than one after it: clocks of hosts differ, and transactions commit late."""

PAGE = 5_000
"""Keys of active runs, and of those that started, that a step reads."""

AT_ONCE = 200
"""Runs that a step looks at."""

MOST_REMEMBERED = 50_000
"""Ended runs that are known within ``LOOK_BACK``; with more of them it is shortened."""

_CHANGES_WITHIN = 60.0
"""Seconds for which a run that was told as ended is looked at again, if there may be more to say of its end."""

_MOST_CHANGING = 50

_Key = tuple[str, int]
_Place = tuple[datetime, str, int]

_FIRST: _Place = (datetime(1000, 1, 1, tzinfo=UTC), "", 0)  # MariaDB has no earlier year


class Following:
    """What is known of the runs that are followed; each step tells what is new.

    The keys of the active runs, and of those that started lately, are read page by page. Those that are not known, or
    are not active any more, are looked up, some at each step; none is passed over because there are many. The memory
    it takes grows with the active runs, not with time.

    Raises:
        ValueError: the interval is less than ``MIN_INTERVAL``.
    """

    def __init__(self, wanted: RunFilter, *, interval: float = 1.0) -> None:
        if not interval >= MIN_INTERVAL:
            raise ValueError(f"interval must be {MIN_INTERVAL} seconds or more, not {interval}")
        self._wanted = wanted
        # What of a run never changes; the rest may be so when it ends.
        self._all = RunFilter(wanted.task_id, wanted.task_glob, source=wanted.source, submission=wanted.submission)
        self._interval = interval
        self._began: datetime | None = None
        self._newest = _FIRST[0]
        """The latest start that is known, none in the future."""
        self._floor = self._at = self._active_at = _FIRST
        self._active: dict[_Key, datetime] = {}
        """When they started that were told as active."""
        self._ended: dict[_Key, datetime] = {}
        """When they started that have ended, of those beyond the floor."""
        self._queue: dict[_Key, None] = {}
        self._changing: dict[_Key, tuple[tuple[TaskPhase, bool], float]] = {}
        """The outcomes of which there may be more to say, and until when."""
        self._has_more, self._has_begun = False, False

    @property
    def is_behind(self) -> bool:
        """Whether there is more to tell by now."""
        return self._has_more or bool(self._queue) or not self._has_begun

    @property
    def pause(self) -> float:
        """Seconds to wait before the next step."""
        return MIN_INTERVAL if self.is_behind else self._interval

    def step(self, connection: Connection) -> list[TaskRun]:
        """Return the runs that have started and those that have ended since the last step, in the order of these times.

        The first step begins with the runs that are active. It makes three queries at most; if one fails, the next
        step tells what this one would have told.
        """
        if self._began is None:
            self._began = connection.execute(select(statements.clock(connection.dialect.name))).scalar_one()
            self._newest = self._began
            self._forget()
            self._at = self._floor
            self._find_active(connection)
        elif len(self._queue) < AT_ONCE:
            self._find_started(connection)
            self._find_active(connection)
        told = [run for run in self._looked_up(connection) if self._wanted.matches(run)]
        return sorted(told, key=lambda run: (run.finished_at or run.started_at, not run.is_active))

    def _find_started(self, connection: Connection) -> None:
        rows = self._page(connection, self._at, are_active=False)
        for started_at, task_id, attempt, is_past in rows:
            key, moment = (task_id, attempt), moment_of(started_at)
            if is_past:
                self._newest = max(self._newest, moment)
            if key in self._ended:
                self._ended[key] = moment
            elif key not in self._active:
                self._queue[key] = None
        self._forget()
        self._has_more = len(rows) == PAGE
        self._at = max(_place(rows[-1]), self._floor) if self._has_more else self._floor

    def _find_active(self, connection: Connection) -> None:
        rows = self._page(connection, self._active_at, are_active=True)
        found = {(task_id, attempt): None for _, task_id, attempt, _ in rows}
        first, last = self._active_at, _place(rows[-1]) if len(rows) == PAGE else None
        for key in [key for key in self._active if key not in found]:
            place = (self._active[key], *key)
            if first < place and (last is None or place <= last):
                self._queue[key] = None
        for key in found:
            if key not in self._active:
                self._queue[key] = None
        self._active_at = last or _FIRST
        self._has_begun = self._has_begun or last is None

    def _page(self, connection: Connection, after: _Place, *, are_active: bool) -> Sequence[Any]:
        dialect = connection.dialect
        question, values = question_of(self._all, dialect.name)
        statement = prepared(dialect, query_statements.starts, question, are_active, PAGE, dialect.name)
        at_time, at_task, at_attempt = after
        place = {"at_time": at_time, "at_task": at_task, "at_attempt": at_attempt}
        return statement.fetch(connection, {**values, **place})

    def _forget(self) -> None:
        """Raise the floor to where starts are not expected any more, and forget what is below."""
        floor = max(self._floor, (self._newest - LOOK_BACK, "", 0))
        if len(self._ended) > MOST_REMEMBERED:
            places = sorted((started_at, *key) for key, started_at in self._ended.items())
            floor = max(floor, places[-MOST_REMEMBERED // 2])
        if floor != self._floor:
            self._floor = floor
            self._ended = {
                key: started_at for key, started_at in self._ended.items() if (started_at, *key) > self._floor
            }

    def _looked_up(self, connection: Connection) -> list[TaskRun]:
        """Return what there is to tell of the runs that are next in the queue, and of those whose end may change."""
        now = time.monotonic()
        self._changing = {key: (outcome, until) for key, (outcome, until) in self._changing.items() if now < until}
        keys = list(islice(self._queue, AT_ONCE))
        attempts: dict[str, set[int]] = {}
        for task_id, attempt in (*keys, *self._changing):
            attempts.setdefault(task_id, set()).add(attempt)
        if not attempts:
            return []
        runs = [run_of(row) for row in connection.execute(statements.runs_by_key(attempts))]
        found = {(run.task_id, run.attempt) for run in runs}
        for key in keys:
            del self._queue[key]
            if key not in found:  # it was deleted
                self._active.pop(key, None)
        return [event for run in runs for event in self._events(run, now)]

    def _events(self, run: TaskRun, now: float) -> list[TaskRun]:
        key = (run.task_id, run.attempt)
        was_active = self._active.pop(key, None) is not None
        before, until = self._changing.pop(key, (None, now + _CHANGES_WITHIN))
        if run.finished_at is None:
            self._active[key] = run.started_at
            return [] if was_active else [run]
        if (run.started_at, *key) > self._floor:
            self._ended[key] = run.started_at
        outcome = (run.phase, run.recovered)
        may_change = run.recovered or run.phase in (TaskPhase.FAILED, TaskPhase.EXHAUSTED)
        if may_change and len(self._changing) < _MOST_CHANGING:
            self._changing[key] = (outcome, until)
        if was_active or before not in (None, outcome):
            return [run]
        assert self._began is not None  # noqa: S101  (for mypy: a step has begun)
        if before == outcome or run.finished_at < self._began:
            return []
        started = replace(run, phase=TaskPhase.RUNNING, finished_at=None, error=None, exit_code=None, recovered=False)
        return [started, run]  # both happened since the last step


def _place(row: Any) -> _Place:
    started_at, task_id, attempt, *_ = row
    return moment_of(started_at), task_id, attempt
