"""The queries for tasks, each with its latest run: as in ``query_statements``."""

from typing import Any

from sqlalchemy import (
    ColumnElement,
    Integer,
    Select,
    and_,
    bindparam,
    column,
    exists,
    func,
    literal_column,
    select,
    table,
    true,
)

from taskruns.schema import task_runs
from taskruns.statements import COLUMNS

_T = task_runs
_C = task_runs.c
_LIMIT = bindparam("limit", type_=Integer)


def tasks(walk: bool, lateral: bool, start: str | None) -> Select[Any]:  # noqa: FBT001  (by place, see runs)
    """Select the latest run of ``limit`` tasks, in the order of ids: all, those ``after`` one, or from a ``first``.

    ``walk`` steps from one task id to the next through the primary key, which costs time by the number of tasks, not
    of runs: the form for SQLite and, with ``lateral``, PostgreSQL. The other form groups: MariaDB does that as a walk
    of its own (and the recursion a hundred times slower), and Citus knows no recursion over all tasks.
    """
    latest = _walked(start, lateral=lateral) if walk else _grouped(start)
    return latest.order_by(latest.selected_columns.task_id)


def _from(start: str | None, task_id: ColumnElement[str]) -> list[ColumnElement[bool]]:
    if start is None:
        return []
    value = bindparam(start, type_=_C.task_id.type)
    return [task_id > value if start == "after" else task_id >= value]


def _walked(start: str | None, *, lateral: bool) -> Select[Any]:
    first, following, newest = _T.alias("first"), _T.alias("following"), _T.alias("newest")
    begin = select(func.min(first.c.task_id).label("task_id"), literal_column("1", Integer).label("n"))
    ids = begin.where(*_from(start, first.c.task_id)).cte("ids", recursive=True)
    previous = ids.alias("previous")
    step = select(func.min(following.c.task_id)).where(following.c.task_id > previous.c.task_id)
    walk = select(step.correlate(previous).scalar_subquery(), previous.c.n + literal_column("1", Integer))
    # The limit stands here, not outside: an ORDER BY there would have the whole walk done first.
    ids = ids.union_all(walk.where(previous.c.task_id.is_not(None), previous.c.n < _LIMIT))
    if lateral:
        newest_run = select(_T).where(_C.task_id == ids.c.task_id).order_by(_C.attempt.desc()).limit(1)
        run = newest_run.correlate(ids).lateral("run")
        return select(*(run.c[column.name] for column in COLUMNS)).select_from(ids.join(run, true()))
    attempt = (
        select(func.max(newest.c.attempt)).where(newest.c.task_id == ids.c.task_id).correlate(ids).scalar_subquery()
    )
    return select(*COLUMNS).select_from(ids.join(_T, and_(_C.task_id == ids.c.task_id, _C.attempt == attempt)))


def _grouped(start: str | None) -> Select[Any]:
    newest = _T.alias("newest")
    last = select(newest.c.task_id, func.max(newest.c.attempt).label("attempt")).group_by(newest.c.task_id)
    key = last.where(*_from(start, newest.c.task_id)).order_by(newest.c.task_id).limit(_LIMIT).subquery("last")
    return select(*COLUMNS).join(key, and_(_C.task_id == key.c.task_id, _C.attempt == key.c.attempt))


def citus() -> Select[Any]:
    """Select whether this PostgreSQL is Citus."""
    return select(exists().where(column("extname") == "citus").select_from(table("pg_extension")))
