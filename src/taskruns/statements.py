"""Every query of the library, as pure functions from arguments to SQLAlchemy statements.

Those of the write path take their values as bound parameters, so each is built once per database.
"""

from collections.abc import Collection, Mapping
from datetime import datetime
from functools import cache
from importlib import import_module
from typing import Any

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Insert,
    Integer,
    Select,
    Table,
    Update,
    and_,
    bindparam,
    case,
    false,
    func,
    insert,
    literal,
    literal_column,
    not_,
    or_,
    select,
    true,
    update,
)

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


def own_insert(dialect: str, table: Table) -> Any:
    """Return an INSERT that can do what only those of this database can.

    Just the dialect in use is loaded: the others take longer than the start of a run.
    """
    return import_module(f"sqlalchemy.dialects.{'mysql' if dialect == 'mariadb' else dialect}").insert(table)


def _bind(name: str) -> Any:
    """Return a bound parameter of a column's own type."""
    return bindparam(name, type_=_C[name].type)


_RUNNING = literal_column("'running'", type_=_C.phase.type).label("phase")


@cache
def open_next(dialect: str) -> Insert:
    """Insert an active run with the task's last number plus one, and return that; nothing if none is left.

    Nothing is inserted either if another run takes the number meanwhile; see :func:`open_numbered`.
    """
    given = [_bind(name) for name in _GIVEN]
    following = (func.coalesce(func.max(_C.attempt), literal_column("0")) + literal_column("1")).label("attempt")
    found = select(following).where(_C.task_id == _bind("task_id"))
    # The limit keeps the condition below out of it, which SQLite would take for a second use of the maximum: it would
    # go through all runs of the task instead of to the last one.
    last = found.limit(literal_column("1")).offset(literal_column("0")).subquery("last")
    values = select(*given, last.c.attempt, _RUNNING).where(last.c.attempt <= literal_column(str(MAX_ATTEMPT)))
    return _insert(dialect, values).returning(_C.attempt)


@cache
def open_numbered(dialect: str) -> Insert:
    """Insert an active run; nothing is inserted if another run has its number.

    On MariaDB and MySQL, which lack ON CONFLICT, the taken number is an error instead.
    """
    given = [_bind(name) for name in _GIVEN]
    # SQLite needs a WHERE before ON CONFLICT, to tell it from the ON of a join.
    return _insert(dialect, select(*given, _bind("attempt"), _RUNNING).where(true()))


def _insert(dialect: str, values: Select[Any]) -> Insert:
    columns = [*_GIVEN, "attempt", "phase"]
    insertion: Insert
    if dialect in ("sqlite", "postgresql"):
        insertion = own_insert(dialect, _T).from_select(columns, values).on_conflict_do_nothing(index_elements=KEY)
    else:
        insertion = insert(_T).from_select(columns, values)
    return insertion


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


LAST_AT_ONCE = 100
"""Tasks that :func:`last_of_each` had better ask for."""


@cache
def last_of_each(count: int) -> Select[Any]:
    """Select the highest numbers of ``task_0``, ``task_1`` and so on, in one row; each is one entry of the key."""
    of_task = (_C.task_id == bindparam(f"task_{place}", type_=_C.task_id.type) for place in range(count))
    return select(*(select(func.max(_C.attempt)).where(same).scalar_subquery() for same in of_task))


@cache
def runs_started_at(dialect: str) -> Select[Any]:
    """Select the runs of all tasks that started at some moments, by the index, whatever is known of the table."""
    moment = _C.started_at.type
    if dialect == "postgresql":
        # The offset keeps it from being planned as one join. Without statistics that reads the table, as a list would.
        told = func.unnest(bindparam("moments", type_=ARRAY(moment))).table_valued("moment").render_derived("told")
        then = select(*COLUMNS).where(_C.started_at == told.c.moment).offset(literal_column("0")).lateral("then")
        return select(then).select_from(told).join(then, true())
    query = select(*COLUMNS).where(_C.started_at.in_(bindparam("moments", type_=moment, expanding=True)))
    return query.with_hint(_T, "FORCE INDEX (ix_task_runs_started)", dialect) if dialect != "sqlite" else query


@cache
def close_run() -> Update:
    """Close a run that is active, or whose outcome was only inferred."""
    finished_at = bindparam("end", type_=_C.finished_at.type)
    return (
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


@cache
def close_unknown() -> Update:
    """Close a run likewise, and return it."""
    return close_run().returning(*COLUMNS)


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


def runs_by_key(keys: Mapping[str, Collection[int]]) -> Select[Any]:
    """Select the runs with these attempts of these tasks."""
    # Not a list of pairs, which not every database looks up by the key.
    of_tasks = [and_(_C.task_id == task_id, _C.attempt.in_(attempts)) for task_id, attempts in keys.items()]
    return select(*COLUMNS).where(or_(*of_tasks))


def active_count() -> Select[Any, Any]:
    """Select the number of active runs, and when the oldest of them started."""
    return select(func.count(), func.min(_C.started_at)).where(_C.finished_at.is_(None))


def oldest_runs(*, limit: int) -> Select[Any]:
    """Select when the oldest runs of all tasks started and finished: some entries of the index, never the table."""
    return select(_C.started_at, _C.finished_at).order_by(_C.started_at).limit(limit)
