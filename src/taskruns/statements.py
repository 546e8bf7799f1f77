"""Every query of the library, as pure functions from arguments to SQLAlchemy statements.

Those of the write path take their values as bound parameters, so each is built once per database.
"""

from collections.abc import Collection, Mapping
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Insert,
    Integer,
    Select,
    Update,
    and_,
    bindparam,
    case,
    column,
    exists,
    false,
    func,
    insert,
    literal,
    literal_column,
    not_,
    or_,
    select,
    table,
    true,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from taskruns.model import MAX_ATTEMPT, TaskPhase
from taskruns.schema import UTCDateTime, task_runs

_T = task_runs
_C = task_runs.c
KEY = [_C.task_id, _C.attempt]
_START = ("source", "submission", "source_attempt")
_GIVEN = ("task_id", "started_at", *_START, "supervisor_id")

COLUMNS = tuple(_T.columns)

# The names differ from the columns' own, which an UPDATE keeps for the values it sets.
THE_RUN = (
    _C.task_id == bindparam("of_task", type_=_C.task_id.type),
    _C.attempt == bindparam("of_attempt", type_=_C.attempt.type),
)


def _bind(name: str) -> Any:
    """Return a bound parameter of a column's own type."""
    return bindparam(name, type_=_C[name].type)


@cache
def open_run(dialect: str, *, numbered: bool, returning: bool) -> Insert:
    """Insert an active run and return its attempt; nothing is inserted if another run has its number, or none is left.

    Not ``numbered``: the number is the task's last one plus one, found by the same statement.
    On MariaDB and MySQL, which lack ON CONFLICT, the taken number is an error instead.
    """
    given = [_bind(name) for name in _GIVEN]
    running = literal_column("'running'", type_=_C.phase.type).label("phase")
    if numbered:
        # SQLite needs a WHERE before ON CONFLICT, to tell it from the ON of a join.
        values = select(*given, _bind("attempt"), running).where(true())
    else:
        following = (func.coalesce(func.max(_C.attempt), 0) + 1).label("attempt")
        last = select(following).where(_C.task_id == _bind("task_id")).subquery("last")
        values = select(*given, last.c.attempt, running).where(last.c.attempt <= MAX_ATTEMPT)
    columns = [*_GIVEN, "attempt", "phase"]
    insertion: Insert
    if dialect == "postgresql":
        insertion = postgresql.insert(_T).from_select(columns, values).on_conflict_do_nothing(index_elements=KEY)
    elif dialect == "sqlite":
        insertion = sqlite.insert(_T).from_select(columns, values).on_conflict_do_nothing(index_elements=KEY)
    else:
        insertion = insert(_T).from_select(columns, values)
    return insertion.returning(_C.attempt) if returning else insertion


@cache
def find_start(*, numbered: bool) -> Select[Any]:
    """Select the run that a start like this has opened."""
    same = [_C[name].is_not_distinct_from(_bind(name)) for name in _START]
    query = select(*COLUMNS).where(_C.task_id == _bind("task_id"), _C.started_at == _bind("started_at"), *same)
    if numbered:
        query = query.where(_C.attempt == _bind("attempt"))
    return query.order_by(_C.attempt.desc()).limit(1)


@cache
def last_attempt() -> Select[Any]:
    """Select a task's highest number; a locking read, which sees what other transactions have committed."""
    return select(func.max(_C.attempt)).where(_C.task_id == _bind("task_id")).with_for_update()


@cache
def close_run(*, returning: bool) -> Update:
    """Close a run that is active, or whose outcome was only inferred."""
    finished_at = bindparam("end", type_=_C.finished_at.type)
    closing = (
        update(_T)
        .where(*THE_RUN, or_(_C.finished_at.is_(None), _C.recovered))
        .values(
            phase=bindparam("to", type_=_C.phase.type),
            finished_at=case((_C.started_at > finished_at, _C.started_at), else_=finished_at),
            error=bindparam("why", type_=_C.error.type),
            exit_code=bindparam("code", type_=_C.exit_code.type),
            recovered=false(),
        )
    )
    return closing.returning(*COLUMNS) if returning else closing


@cache
def refine_run(phase: TaskPhase) -> Update:
    """Raise the outcome of a run that ended with a lower rank: failed < exhausted < timeout."""
    why, code = bindparam("why", type_=_C.error.type), bindparam("code", type_=_C.exit_code.type)
    if phase is TaskPhase.EXHAUSTED:
        lower, error, exit_code = [TaskPhase.FAILED], func.coalesce(_C.error, why), func.coalesce(_C.exit_code, code)
    else:
        lower = [TaskPhase.FAILED, TaskPhase.EXHAUSTED]
        error, exit_code = func.coalesce(why, _C.error), func.coalesce(code, _C.exit_code)
    refining = update(_T).where(*THE_RUN, _C.phase.in_(lower), not_(_C.recovered))
    return refining.values(phase=literal(phase, _C.phase.type), error=error, exit_code=exit_code)


def clock(dialect: str) -> ColumnElement[datetime]:
    """Return the database's clock, in UTC, as times are stored."""
    clocks = {
        "sqlite": "strftime('%Y-%m-%d %H:%M:%f', 'now') || '000'",
        "postgresql": "clock_timestamp()",
    }
    return literal_column(clocks.get(dialect, "utc_timestamp(6)"), type_=UTCDateTime())


@cache
def get_run() -> Select[Any]:
    """Select a run by its key."""
    return select(*COLUMNS).where(*THE_RUN)


_AMENDED = ("phase", "started_at", "finished_at", "error", "exit_code", "recovered", "start_inferred")


@cache
def amend_run() -> Update:
    """Store all that an event may change of a run, unless somebody else has opened or closed it meanwhile."""
    was_phase = bindparam("was_phase", type_=_C.phase.type)
    was_recovered = bindparam("was_recovered", type_=_C.recovered.type)
    values = {name: bindparam(f"new_{name}", type_=_C[name].type) for name in _AMENDED}
    return update(_T).where(*THE_RUN, _C.phase == was_phase, _C.recovered == was_recovered).values(values)


@cache
def last_attempts() -> Select[Any]:
    """Select the highest number of each of some tasks, those that have one."""
    some = _C.task_id.in_(bindparam("task_ids", expanding=True))
    return select(_C.task_id, func.max(_C.attempt)).where(some).group_by(_C.task_id)


_THE_SOURCE = (_C.task_id == _bind("task_id"), _C.source == _bind("source"))
_MOMENT = bindparam("at", type_=_C.started_at.type)
_LATEST_FIRST = (_C.started_at.desc(), _C.attempt.desc())


@cache
def source_runs_until() -> Select[Any]:
    """Select a task's runs from a source that started up to a moment, the latest first."""
    query = select(*COLUMNS).where(*_THE_SOURCE, _C.started_at <= _MOMENT)
    return query.order_by(*_LATEST_FIRST).limit(bindparam("most", type_=Integer))


@cache
def source_runs_after() -> Select[Any]:
    """Select a task's runs from a source that started after a moment, the earliest first."""
    query = select(*COLUMNS).where(*_THE_SOURCE, _C.started_at > _MOMENT)
    return query.order_by(_C.started_at, _C.attempt).limit(bindparam("most", type_=Integer))


@cache
def source_active_runs() -> Select[Any]:
    """Select a task's active runs from a source."""
    return select(*COLUMNS).where(*_THE_SOURCE, _C.finished_at.is_(None))


@cache
def submission_run_until() -> Select[Any]:
    """Select the latest run of a submission that started up to a moment."""
    same = _C.submission == _bind("submission")
    return select(*COLUMNS).where(*_THE_SOURCE, same, _C.started_at <= _MOMENT).order_by(*_LATEST_FIRST).limit(1)


@cache
def lowest_attempt() -> Select[Any]:
    """Select a task's lowest number from a given one on."""
    least = bindparam("least", type_=_C.attempt.type)
    return select(func.min(_C.attempt)).where(_C.task_id == _bind("task_id"), _C.attempt >= least)


def runs(
    task_id: str, *, phases: Collection[TaskPhase] | None = None, limit: int | None = None, before: int | None = None
) -> Select[Any]:
    """Select a task's runs, newest attempt first, those with a lower number than ``before``."""
    query = select(*COLUMNS).where(_C.task_id == task_id).order_by(_C.attempt.desc())
    if phases is not None:
        query = query.where(_C.phase.in_(phases))
    if before is not None:
        query = query.where(_C.attempt < before)
    return query if limit is None else query.limit(limit)


def runs_by_key(keys: Mapping[str, Collection[int]]) -> Select[Any]:
    """Select the runs with these attempts of these tasks."""
    # Not a list of pairs, which not every database looks up by the key.
    of_tasks = [and_(_C.task_id == task_id, _C.attempt.in_(attempts)) for task_id, attempts in keys.items()]
    return select(*COLUMNS).where(or_(*of_tasks))


def following_runs(task_id: str, attempt: int, *, limit: int) -> Select[Any]:
    """Select the task's runs after an attempt, in order."""
    query = select(*COLUMNS).where(_C.task_id == task_id, _C.attempt > attempt)
    return query.order_by(_C.attempt).limit(limit)


def runs_of_following_tasks(task_id: str | None, *, limit: int) -> Select[Any]:
    """Select the runs of the tasks after this one, or of all, in order."""
    query = select(*COLUMNS).order_by(*KEY).limit(limit)
    return query if task_id is None else query.where(_C.task_id > task_id)


def active_runs(task_id: str | None = None) -> Select[Any]:
    """Select the active runs, of one task or of all, in the order they started."""
    query = select(*COLUMNS).where(_C.finished_at.is_(None)).order_by(_C.started_at, *KEY)
    return query if task_id is None else query.where(_C.task_id == task_id)


def active_count() -> Select[Any, Any]:
    """Select the number of active runs, and when the oldest of them started."""
    return select(func.count(), func.min(_C.started_at)).where(_C.finished_at.is_(None))


def oldest_runs(*, limit: int) -> Select[Any]:
    """Select when the oldest runs of all tasks started and finished: some entries of the index, never the table."""
    return select(_C.started_at, _C.finished_at).order_by(_C.started_at).limit(limit)


def tasks(*, walk: bool, lateral: bool = False, limit: int | None = None, after: str | None = None) -> Select[Any]:
    """Select the latest run of every task, in the order of the task ids, those greater than ``after``.

    ``walk`` steps from one task id to the next through the primary key, which costs time by the number of tasks, not
    of runs: the form for SQLite and, with ``lateral``, PostgreSQL. The other form groups: MariaDB does that as a walk
    of its own (and the recursion a hundred times slower), and Citus knows no recursion over all tasks.
    """
    latest = _walked(limit, after, lateral=lateral) if walk else _grouped(limit, after)
    return latest.order_by(latest.selected_columns.task_id)


def _walked(limit: int | None, after: str | None, *, lateral: bool) -> Select[Any]:
    first, following, newest = _T.alias("first"), _T.alias("following"), _T.alias("newest")
    start = select(func.min(first.c.task_id).label("task_id"), literal(1).label("n"))
    if after is not None:
        start = start.where(first.c.task_id > after)
    ids = start.cte("ids", recursive=True)
    previous = ids.alias("previous")
    step = select(func.min(following.c.task_id)).where(following.c.task_id > previous.c.task_id)
    walk = select(step.correlate(previous).scalar_subquery(), previous.c.n + 1).where(previous.c.task_id.is_not(None))
    if limit is not None:  # here, not outside: an ORDER BY there would have the whole walk done first
        walk = walk.where(previous.c.n < limit)
    ids = ids.union_all(walk)
    if lateral:
        newest_run = select(_T).where(_C.task_id == ids.c.task_id).order_by(_C.attempt.desc()).limit(1)
        run = newest_run.correlate(ids).lateral("run")
        return select(*(run.c[column.name] for column in COLUMNS)).select_from(ids.join(run, true()))
    attempt = (
        select(func.max(newest.c.attempt)).where(newest.c.task_id == ids.c.task_id).correlate(ids).scalar_subquery()
    )
    return select(*COLUMNS).select_from(ids.join(_T, and_(_C.task_id == ids.c.task_id, _C.attempt == attempt)))


def _grouped(limit: int | None, after: str | None) -> Select[Any]:
    newest = _T.alias("newest")
    last = select(newest.c.task_id, func.max(newest.c.attempt).label("attempt")).group_by(newest.c.task_id)
    if after is not None:
        last = last.where(newest.c.task_id > after)
    if limit is not None:
        last = last.order_by(newest.c.task_id).limit(limit)
    key = last.subquery("last")
    return select(*COLUMNS).join(key, and_(_C.task_id == key.c.task_id, _C.attempt == key.c.attempt))


def citus() -> Select[Any]:
    """Select whether this PostgreSQL is Citus."""
    return select(exists().where(column("extname") == "citus").select_from(table("pg_extension")))
