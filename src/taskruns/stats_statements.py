"""The queries of statistics: as in ``query_statements``."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Integer,
    Select,
    String,
    Subquery,
    case,
    func,
    literal_column,
    select,
)

from taskruns.model import TaskPhase
from taskruns.query_statements import Question, by_problems_of_task, conditions, duration
from taskruns.schema import task_runs
from taskruns.stats import Span

_C = task_runs.c


def ended(question: Question, limit: int, dialect: str, *some: ColumnElement[bool]) -> Select[Any]:
    """Select what statistics are made of, of at most ``limit`` runs, and the tasks if they are of ``some``."""
    columns = [_C.phase, _C.started_at, _C.finished_at, *([_C.task_id] if some else [])]
    query = select(*columns).where(*conditions(question, dialect), *some)
    return by_problems_of_task(query.limit(_constant(limit)), question)


def of_tasks(task_ids: Sequence[str], *, by_key: bool) -> ColumnElement[bool]:
    """Return whether a run is of one of some tasks. Unless ``by_key`` SQLite must not find them by the key."""
    task_id = _C.task_id if by_key else literal_column("+task_runs.task_id", String)
    return task_id.in_(task_ids)


Segments = tuple[tuple[datetime | None, int], ...]
"""The offsets of a time zone: until when each holds, None for ever, and its seconds."""

_ERA = 62_135_596_800
"""Seconds from the year 1 until 1970: databases round what is negative differently."""


_SECOND = 1_000_000
"""A second in microseconds."""


def starts(question: Question, dialect: str) -> Select[Any]:
    """Select when the first and the last run started."""
    return select(func.min(_C.started_at), func.max(_C.started_at)).where(*conditions(question, dialect))


ALL: ColumnElement[Any] = literal_column("0", type_=Integer)
"""The part that all runs are in."""

TASK: ColumnElement[Any] = _C.task_id
"""The parts that are tasks."""


def part_number(by: Span, segments: Segments, dialect: str) -> ColumnElement[int]:
    """Return the number of the day or hour in which a run started: see :class:`stats.Span`."""
    seconds = {
        "sqlite": f"(CAST(strftime('%s', substr(started_at, 1, 19)) AS INTEGER) + {_ERA})",
        "postgresql": f"(CAST(floor(extract(epoch FROM started_at)) AS bigint) + {_ERA})",
    }.get(dialect, "timestampdiff(SECOND, '0001-01-01', started_at)")
    offset: ColumnElement[int] = _constant(segments[-1][1])
    if len(segments) > 1:
        offset = case(*((_C.started_at < until, _constant(value)) for until, value in segments[:-1]), else_=offset)
    shifted = literal_column(seconds, type_=BigInteger()) + offset
    number = _divided(shifted, by.seconds, dialect)
    if by is Span.DAY:
        return number - _constant(_ERA // by.seconds)
    return number * _constant(by.seconds) - offset - _constant(_ERA)


def _constant(value: int) -> ColumnElement[int]:
    return literal_column(str(value), type_=BigInteger())


def _divided(value: ColumnElement[int], divisor: int, dialect: str) -> ColumnElement[int]:
    divide = "/" if dialect in ("sqlite", "postgresql") else "DIV"
    return value.self_group().op(divide)(_constant(divisor))


def parts(
    question: Question, part: ColumnElement[Any], percents: Sequence[int], dialect: str, *some: ColumnElement[bool]
) -> Select[Any]:
    """Select, for each part and phase, what the statistics of the part are made of: all of it as of one moment.

    These are how many runs there are, of their durations the sum, in seconds and microseconds, the least and the most,
    the last end, and of the percentiles of the part, at the nearest rank, those that are the duration of a run in this
    phase.
    """
    run = _runs(question, part, dialect, *some)
    in_order = func.row_number().over(partition_by=run.c.part, order_by=func.coalesce(run.c.span, _constant(2**63 - 1)))
    size = func.count(run.c.span).over(partition_by=run.c.part)
    ranked = select(*run.c, in_order.label("place"), size.label("size")).subquery("ranked")

    def at(percent: int) -> ColumnElement[int]:
        rank = _divided(ranked.c.size * _constant(percent) + _constant(99), 100, dialect)
        return func.min(case((ranked.c.place == rank, ranked.c.span)))

    span = ranked.c.span
    told = [func.count(), *_sums(span, dialect), func.min(span), func.max(span), func.max(ranked.c.finished_at)]
    of_phase = select(ranked.c.part, ranked.c.phase, *told, *map(at, percents))
    return of_phase.group_by(ranked.c.part, ranked.c.phase)


def _sums(span: ColumnElement[int], dialect: str) -> list[ColumnElement[Any]]:
    """Return a sum of seconds and one of microseconds. Only SQLite has no wider number than those that are summed."""
    if dialect != "sqlite":
        return [_constant(0), func.sum(span)]
    return [func.sum(_divided(span, _SECOND, dialect)), func.sum(span % _constant(_SECOND))]


def _runs(question: Question, part: ColumnElement[Any], dialect: str, *some: ColumnElement[bool]) -> Subquery:
    phase: ColumnElement[Any] = _C.phase
    if dialect not in ("sqlite", "postgresql"):  # whose tables in between have room for the longest text there may be
        phase = literal_column(f"CAST(phase AS CHAR({max(map(len, TaskPhase))}))", phase.type)
    query = select(part.label("part"), phase.label("phase"), duration(dialect).label("span"), _C.finished_at)
    query = by_problems_of_task(query.where(*conditions(question, dialect), *some), question)
    if dialect == "sqlite":  # which else computes a duration anew wherever it is named
        query = query.limit(literal_column("-1"))
    return query.subquery("run")
