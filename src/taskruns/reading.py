"""Answers to questions, on a connection."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import ColumnElement, Connection, Dialect

from taskruns import query_statements, statements, stats_statements, task_statements
from taskruns.filters import RunFilter, RunOrder
from taskruns.model import MAX_ATTEMPT, TaskPhase, TaskRun, checked_name, checked_number
from taskruns.prepared import PHASES, ended_of_rows, moment_of, prepared, runs_of_rows
from taskruns.query_statements import Question, question_of
from taskruns.stats import (
    PERCENTS,
    DurationStats,
    Ended,
    RunStats,
    Span,
    StatsPart,
    last_ends,
    mean_of,
    stats_by,
    stats_of,
)
from taskruns.times import parse_time, rfc3339
from taskruns.writing import key_of

_ALL = 2**31 - 2

FEW = 5_000
"""Runs that are sorted rather than found in order; and that statistics are made of here, not by the database."""

MANY = 50_000
"""Runs that the statistics of several tasks are made of here."""


@dataclass(frozen=True, slots=True)
class RunPage:
    """Some runs, in the order that was asked for."""

    runs: list[TaskRun]
    next_cursor: str | None
    """What to give as ``after`` for the page that follows; None if there is none."""


class Unrepeated:
    """Leaves out the runs of a list that come again: their true start or end was told meanwhile, which is their place.

    Only those are remembered of which it can be told yet.
    """

    def __init__(self, wanted: RunFilter, order: RunOrder) -> None:
        self._may_come_again: set[tuple[str, int]] = set()
        self._is_by_attempt = wanted.task_id is not None and order is not RunOrder.LONGEST
        self._is_by_start = order is not RunOrder.LONGEST and not wanted.only_problems

    def of(self, runs: list[TaskRun]) -> list[TaskRun]:
        """Return those of a page that have not come before."""
        known = self._may_come_again
        new = [run for run in runs if (run.task_id, run.attempt) not in known] if known else runs
        if not self._is_by_attempt:
            known.update((run.task_id, run.attempt) for run in runs if self._may_move(run))
        return new

    def _may_move(self, run: TaskRun) -> bool:
        return run.start_inferred or (run.recovered and not self._is_by_start)


def page(connection: Connection, wanted: RunFilter, order: RunOrder, *, limit: int, after: str | None) -> RunPage:
    """Return a page of runs.

    Raises:
        ValueError: ``limit`` is less than 1, ``after`` is no cursor of this list, or it has no order without a window.
    """
    limit, order = check_limit(limit), RunOrder(order)
    found = _fetched(connection, wanted, order, limit=limit + 1, after=after)
    if len(found) <= limit:
        return RunPage(found, None)
    question, _ = question_of(wanted, connection.dialect.name)
    return RunPage(found[:limit], str(_Cursor.of(found[limit - 1], question, order)))


def last_run(connection: Connection, wanted: RunFilter) -> TaskRun | None:
    """Return the run that is the newest; None if there is none."""
    question, values = question_of(wanted, connection.dialect.name)
    if connection.dialect.name == "postgresql" and question.is_of_one_task and question.has_no_problems:
        statement = prepared(connection.dialect, query_statements.last_beside_problems, question, "postgresql")
        found = runs_of_rows(statement.fetch(connection, values))
    else:
        found = _fetched(connection, wanted, RunOrder.NEWEST, limit=1)
    return found[0] if found else None


def active_runs(connection: Connection, wanted: RunFilter) -> list[TaskRun]:
    """Return those that are active, in the order they started."""
    if wanted.active is False:
        return []
    found = _fetched(connection, replace(wanted, active=True), RunOrder.OLDEST, limit=_ALL)
    return found if wanted.task_id is None else sorted(found, key=lambda run: (run.started_at, run.attempt))


def active_between(connection: Connection, first: str, last: str, before: datetime) -> list[TaskRun]:
    """Return the runs of the tasks from one to another that started before a moment and are active, in that order."""
    statement = prepared(connection.dialect, query_statements.active_between)
    return runs_of_rows(statement.fetch(connection, {"first_task": first, "last_task": last, "started_until": before}))


def _fetched(
    connection: Connection, wanted: RunFilter, order: RunOrder, *, limit: int, after: str | None = None
) -> list[TaskRun]:
    if order is RunOrder.LONGEST and wanted.task_id is None and not wanted.has_window:
        raise ValueError("the longest runs are found of one task or in a window of time: give one of them")
    dialect = connection.dialect.name
    question, values = question_of(wanted, dialect)
    if after is not None:
        values = {**values, **_Cursor.parse(after, question, order).parameters()}
    by_key = _is_small(connection, question, values)
    shape = (question, order, after is not None, by_key, limit, dialect)
    return runs_of_rows(prepared(connection.dialect, query_statements.runs, *shape).fetch(connection, values))


def newest_phases(connection: Connection, task_id: str, most: int) -> tuple[TaskPhase, ...]:
    """Return the phases of a task's newest runs, newest first."""
    rows = prepared(connection.dialect, query_statements.newest_phases, most).fetch(connection, {"task": task_id})
    return tuple([PHASES[phase] for (phase,) in rows])


def last_success_at(connection: Connection, task_id: str) -> datetime | None:
    """Return when the success of a task that ended last did, of all its runs; None if there is none."""
    ((ended_at,),) = prepared(connection.dialect, query_statements.last_success_at).fetch(connection, {"task": task_id})
    return None if ended_at is None else moment_of(ended_at)


def problems_after(connection: Connection, task_id: str, attempt: int, most: int) -> int:
    """Return how many problems a task has had after an attempt, ``most`` if there are more."""
    statement = prepared(connection.dialect, query_statements.some_problems)
    return int(statement.fetch(connection, {"task": task_id, "attempt": attempt, "most": most})[0][0])


def get_run(connection: Connection, task_id: str, attempt: int) -> TaskRun | None:
    """Return a run; None if there is no such run."""
    statement = prepared(connection.dialect, statements.get_run)
    found = runs_of_rows(statement.fetch(connection, key_of(task_id, attempt)))
    return found[0] if found else None


def all_runs(
    connection: Connection, task_id: str | None, *, limit: int, after: tuple[str, int] | None
) -> list[TaskRun]:
    """Return runs of one task or of all, in the order of task id and attempt, those after a key.

    Raises:
        ValueError: ``limit`` is less than 1, or ``after`` is no key.
    """
    limit = check_limit(limit)
    # Two questions, as not every database looks up a pair that is greater than another by the key.
    found: list[TaskRun] = []
    dialect = connection.dialect
    of_task = None if after is None else checked_name(after[0], "task id")
    if after is not None:
        checked_number(after[1], "attempt", 0, MAX_ATTEMPT)
    if task_id is not None and of_task is None:
        of_task, after = checked_name(task_id, "task id"), (task_id, 0)
    if of_task is not None and after is not None and task_id in (None, of_task):
        statement = prepared(dialect, query_statements.following_runs)
        values = {"task": of_task, "attempt": after[1], "limit": limit}
        found = runs_of_rows(statement.fetch(connection, values))
    if task_id is None and len(found) < limit:
        statement = prepared(dialect, query_statements.runs_of_following_tasks, of_task is not None)
        rest = {"limit": limit - len(found)} | ({} if of_task is None else {"after": of_task})
        found += runs_of_rows(statement.fetch(connection, rest))
    return found


def tasks(
    connection: Connection, *, limit: int | None, after: str | None = None, first: str | None = None
) -> list[TaskRun]:
    """Return the latest run of tasks, in the order of the task ids: those after one, or from one on.

    Raises:
        ValueError: ``limit`` is less than 1, or ``after`` is no task id.
    """
    values: dict[str, Any] = {"limit": _ALL if limit is None else check_limit(limit)}
    start = None
    if after is not None:
        start, values["after"] = "after", checked_name(after, "task id")
    elif first is not None:
        start, values["first"] = "first", first
    is_postgresql = connection.dialect.name == "postgresql"
    walk = connection.dialect.name == "sqlite" or (is_postgresql and not _is_citus(connection))
    statement = prepared(connection.dialect, task_statements.tasks, walk, is_postgresql, start)
    return runs_of_rows(statement.fetch(connection, values))


def _is_citus(connection: Connection) -> bool:
    found = _citus.get(connection.dialect)
    if found is None:
        found = _citus[connection.dialect] = bool(connection.scalar(task_statements.citus()))
    return found


_citus: WeakKeyDictionary[Dialect, bool] = WeakKeyDictionary()


def count(connection: Connection, wanted: RunFilter) -> int:
    """Return how many runs there are."""
    dialect = connection.dialect.name
    question, values = question_of(wanted, dialect)
    statement = prepared(connection.dialect, query_statements.count, question, dialect)
    return int(statement.fetch(connection, values)[0][0])


def stats(
    connection: Connection, wanted: RunFilter, *, by: Span | None, zone: tzinfo, few: int | None = None
) -> RunStats:
    """Return statistics of runs: of all, and by the time they started.

    A ``few`` are fetched and looked at here, which is quicker; of more the database sorts the durations, so that the
    memory is constant.
    """
    dialect = connection.dialect
    few = FEW if few is None else few  # no default, which no test could change
    by = None if by is None else Span(by)
    question, values = question_of(wanted, dialect.name)
    rows = prepared(dialect, stats_statements.ended, question, few + 1, dialect.name).fetch(connection, values)
    parts: dict[int, RunStats] = {}
    if len(rows) <= few:
        runs = ended_of_rows(rows)
        found = stats_of(runs)
        if by is not None:
            parts = stats_by(runs, lambda started_at: by.number(started_at, zone))
    else:
        # There may be none left, since others write.
        found = _sorted_there(connection, question, values, stats_statements.ALL).get(0, RunStats())
        if by is not None:
            parts = _parts_there(connection, question, values, by, zone)
    if by is None:
        return found
    return replace(found, parts=tuple(StatsPart(by.start(number, zone), parts[number]) for number in sorted(parts)))


def _parts_there(
    connection: Connection, question: Question, values: Mapping[str, Any], by: Span, zone: tzinfo
) -> dict[int, RunStats]:
    dialect = connection.dialect.name
    first, last = connection.execute(stats_statements.starts(question, dialect), dict(values)).one()
    if first is None:
        return {}
    part = stats_statements.part_number(by, by.segments(zone, first, last), dialect)
    return _sorted_there(connection, question, values, part)


def stats_of_tasks(connection: Connection, wanted: RunFilter, latest: Sequence[TaskRun]) -> dict[str, RunStats]:
    """Return the statistics of each of some tasks, given by their latest runs, of those that have wanted runs."""
    dialect = connection.dialect.name
    by_key = True
    if dialect == "sqlite" and sum(run.attempt for run in latest) > MANY:
        # It has no statistics by which to leave the key for the window; and of many runs, once through is enough.
        by_key = not _is_short(connection, wanted)
        if by_key:
            each = {run.task_id: replace(wanted, task_id=run.task_id) for run in latest}
            return {task_id: stats(connection, one, by=None, zone=UTC, few=MANY) for task_id, one in each.items()}
    question, values = question_of(wanted, dialect)
    some = stats_statements.of_tasks([run.task_id for run in latest], by_key=by_key)
    query = stats_statements.ended(question, MANY + 1, dialect, some)
    rows = connection.execute(query, dict(values)).all()
    if len(rows) > MANY:
        return _sorted_there(connection, question, values, stats_statements.TASK, some)
    runs: dict[str, list[Ended]] = {}
    for *ended, task_id in rows:
        runs.setdefault(task_id, []).append((ended[0], ended[1], ended[2]))
    return {task_id: stats_of(of_task) for task_id, of_task in runs.items()}


def _sorted_there(
    connection: Connection,
    question: Question,
    values: Mapping[str, Any],
    part: ColumnElement[Any],
    *some: ColumnElement[bool],
) -> dict[Any, RunStats]:
    """Return the statistics of each part of some runs, of which the database has sorted the durations."""
    query = stats_statements.parts(question, part, PERCENTS, connection.dialect.name, *some)
    parts: dict[Any, list[Any]] = {}
    for key, *of_phase in connection.execute(query, dict(values)):
        parts.setdefault(key, []).append(of_phase)
    return {key: _stats_of_phases(phases) for key, phases in parts.items()}


def _stats_of_phases(phases: Sequence[Any]) -> RunStats:
    ended = [row for row in phases if row[6] is not None]
    duration = None
    if ended:
        runs, seconds, microseconds, least, most, _, *ranks = zip(*(row[1:] for row in ended), strict=True)
        spans = [min(least), *(next(span for span in spans if span is not None) for spans in ranks), max(most)]
        mean = mean_of(int(sum(seconds)) * 1_000_000 + int(sum(microseconds)), sum(runs))
        duration = DurationStats(mean, *(timedelta(microseconds=int(span)) for span in spans))
    last = {row[0]: row[6] for row in ended}
    return RunStats({row[0]: row[1] for row in phases}, duration, *last_ends(last))


def _is_small(connection: Connection, question: Question, values: Mapping[str, Any]) -> bool:
    """Whether the runs of a range of tasks are few enough to sort all of them.

    With more of them, those that come first are soon found by going through the runs of all tasks.
    """
    if "first_task" not in question.names:
        return False
    statement = prepared(connection.dialect, query_statements.some_of_range, "no_task" in question.names)
    return int(statement.fetch(connection, {**values, "most": FEW + 1})[0][0]) <= FEW


def _is_short(connection: Connection, wanted: RunFilter) -> bool:
    """Whether so few runs started in a window that to go through them is quicker than through those of some tasks."""
    question, values = question_of(RunFilter(started=wanted.started), connection.dialect.name)
    statement = prepared(connection.dialect, query_statements.some_started, question, connection.dialect.name)
    return int(statement.fetch(connection, {**values, "most": MANY + 1})[0][0]) <= MANY


def check_limit(limit: int) -> int:
    """Return how many are asked for, if it is a number that can be, or all there can be."""
    if not isinstance(limit, int):
        raise TypeError(f"limit is a number, not {limit!r}")
    if limit < 1:
        raise ValueError(f"limit must be 1 or more, not {limit}")
    return min(limit, _ALL)


_CURSOR = re.compile(r"((?P<time>[0-9T:.Z-]+)/|(?P<span>[0-9]{1,18})us/)?(?P<attempt>[0-9]{1,10})(/(?P<task>.+))?")


@dataclass(frozen=True, slots=True)
class _Cursor:
    """The place of a run in a list: what it is sorted by. One of a task's list is just an attempt."""

    attempt: int
    task_id: str | None = None
    time: datetime | None = None
    span: int | None = None

    @classmethod
    def of(cls, run: TaskRun, question: Question, order: RunOrder) -> "_Cursor":
        """Return the place of a run."""
        if order is RunOrder.LONGEST and run.duration is not None:
            return cls(run.attempt, run.task_id, span=run.duration // timedelta(microseconds=1))
        if question.is_of_one_task:
            return cls(run.attempt)
        return cls(run.attempt, run.task_id, run.finished_at if question.only_problems else run.started_at)

    @classmethod
    def parse(cls, text: str, question: Question, order: RunOrder) -> "_Cursor":
        """Return the place that a text names, if it is one of such a list."""
        match = _CURSOR.fullmatch(text)
        if match is not None:
            time, span, task_id = match["time"], match["span"], match["task"]
            if order is RunOrder.LONGEST:
                is_such = span is not None and task_id is not None
            elif question.is_of_one_task:
                is_such = time is span is task_id is None
            else:
                is_such = time is not None and task_id is not None
            if is_such and int(match["attempt"]) <= MAX_ATTEMPT:
                try:
                    return cls(
                        int(match["attempt"]),
                        None if task_id is None else checked_name(task_id, "task id"),
                        None if time is None else parse_time(time),
                        None if span is None else int(span),
                    )
                except ValueError:
                    pass
        raise ValueError(f"not a cursor of a page of these runs: {text!r}")

    def parameters(self) -> dict[str, Any]:
        """Return it as the parameters of a statement."""
        values = {"at_attempt": self.attempt, "at_task": self.task_id, "at_time": self.time, "at_span": self.span}
        return {name: value for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        place = "" if self.time is None else f"{rfc3339(self.time)}/"
        place = place if self.span is None else f"{self.span}us/"
        return f"{place}{self.attempt}" + ("" if self.task_id is None else f"/{self.task_id}")
