"""The queries that find old runs and delete them: as in ``statements``."""

from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Delete,
    Integer,
    Select,
    Update,
    and_,
    bindparam,
    case,
    delete,
    false,
    func,
    or_,
    select,
    true,
    update,
)

from taskruns.model import TaskPhase
from taskruns.schema import task_runs
from taskruns.statements import THE_RUN

_T = task_runs
_C = task_runs.c


_JUDGED = (_C.task_id, _C.attempt, _C.phase, _C.finished_at)
_BEFORE = _C.finished_at < bindparam("before", type_=_C.finished_at.type)


def older_runs(task_id: str, attempt: int, *, limit: int) -> Select[Any]:
    """Select what a policy judges of the task's runs before an attempt, newest first."""
    query = select(*_JUDGED).where(_C.task_id == task_id, _C.attempt < attempt)
    return query.order_by(_C.attempt.desc()).limit(limit)


def runs_of_preceding_tasks(task_id: str | None, *, limit: int) -> Select[Any]:
    """Select the same of the tasks before this one, or of all, the last task and its newest run first."""
    query = select(*_JUDGED).order_by(_C.task_id.desc(), _C.attempt.desc()).limit(limit)
    return query if task_id is None else query.where(_C.task_id < task_id)


def first_runs(task_id: str, *, limit: int) -> Select[Any]:
    """Select the same of the task's runs with the lowest numbers."""
    return select(*_JUDGED).where(_C.task_id == task_id).order_by(_C.attempt).limit(limit)


def runs_started(*, until: datetime, since: datetime | None = None, limit: int) -> Select[Any]:
    """Select the same, and the start, of the runs that started earliest, since a moment and before another."""
    query = select(*_JUDGED, _C.started_at).where(_C.started_at < until).order_by(_C.started_at).limit(limit)
    return query if since is None else query.where(_C.started_at >= since)


def with_standing(
    page: Select[Any],
    *,
    succeeded: datetime | None,
    others: datetime | None,
    idle: datetime | None,
    keep: int,
    reach: int,
    limit: int,
) -> Select[Any]:
    """Select the runs of a page that are old or of an idle task, with what decides whether their task still needs them.

    The moments are those before which succeeded runs, the others, and all those of an idle task have ended. Most of
    what is looked at is left out here already, at a tenth of what it costs to hand it over.

    ``floor`` is the attempt of the task's ``keep``-th newest run, ``more`` is that of the second one below it, both
    null if there is none, and ``later_success``, of a succeeded run, another within the next ``reach`` attempts. Scalar
    subqueries with a LIMIT: each is a few steps along the key, and no optimizer makes a join of whole tables of them.
    """
    run, other = page.subquery("run"), _T.alias("other")
    same_task = other.c.task_id == run.c.task_id

    def one(query: Select[Any], name: str) -> ColumnElement[Any]:
        return query.where(same_task).limit(1).correlate(run).scalar_subquery().label(name)

    newest = select(other.c.attempt).order_by(other.c.attempt.desc())
    following = and_(other.c.attempt > run.c.attempt, other.c.attempt <= run.c.attempt + reach)
    success = select(other.c.attempt).where(following, other.c.phase == TaskPhase.SUCCEEDED)
    is_success = run.c.phase == TaskPhase.SUCCEEDED
    ages = ((is_success, succeeded), (~is_success, others), (true(), idle))
    old = [and_(condition, run.c.finished_at < moment) for condition, moment in ages if moment is not None]
    standing = select(
        run,
        one(newest.offset(keep - 1), "floor"),
        one(newest.offset(keep + 1), "more"),
        case((is_success, one(success, "next"))).label("later_success"),
    ).where(or_(*old))
    found = standing.subquery("standing")
    is_small = and_(found.c.more.is_(None), found.c.finished_at < idle) if idle is not None else false()
    return select(found).where(or_(found.c.attempt < found.c.floor, is_small)).limit(limit)


@cache
def busy_tasks() -> Select[Any]:
    """Select those of some tasks that have an active run, or one that ended since a moment."""
    some = _C.task_id.in_(bindparam("task_ids", expanding=True))
    since = _C.finished_at >= bindparam("since", type_=_C.finished_at.type)
    return select(_C.task_id).distinct().where(some, or_(_C.finished_at.is_(None), since))


@cache
def delete_run() -> Delete:
    """Delete a run, unless it is active or has got a later end meanwhile."""
    return delete(_T).where(*THE_RUN, _BEFORE)


@cache
def delete_runs() -> Delete:
    """Delete all of a task's runs that ended before a moment."""
    return delete(_T).where(THE_RUN[0], _BEFORE)


_RANGE = _C.attempt.between(bindparam("first", type_=_C.attempt.type), bindparam("last", type_=_C.attempt.type))


@cache
def last_of_range() -> Select[Any]:
    """Select the highest of some of a task's attempts, the lowest ones from a given one on."""
    least, most = bindparam("first", type_=_C.attempt.type), bindparam("most", type_=Integer)
    some = select(_C.attempt).where(THE_RUN[0], _C.attempt >= least).order_by(_C.attempt).limit(most).subquery()
    return select(func.max(some.c.attempt))


@cache
def forget_runs() -> Delete:
    """Delete the runs of a range of a task's attempts that have ended."""
    return delete(_T).where(THE_RUN[0], _RANGE, _C.finished_at.is_not(None))


@cache
def forget_errors(removed: str) -> Update:
    """Replace the errors of a range of a task's attempts."""
    return update(_T).where(THE_RUN[0], _RANGE, _C.error != removed).values(error=removed)
