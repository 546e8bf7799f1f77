"""The queries about supervisors and the runs that they watch over: as in ``statements``."""

from collections.abc import Collection
from enum import Enum, auto
from functools import cache
from typing import Any

from sqlalchemy import (
    Delete,
    Insert,
    Select,
    Update,
    bindparam,
    case,
    delete,
    exists,
    func,
    literal,
    not_,
    select,
    true,
    update,
)

from taskruns.model import TaskPhase
from taskruns.schema import supervisors, task_runs
from taskruns.statements import COLUMNS, KEY, THE_RUN, clock, own_insert

_T = task_runs
_C = task_runs.c
_S = supervisors.c
_WATCHER = bindparam("watcher", type_=_S.id.type)


class Watched(Enum):
    """How a run is watched over that is to be recovered."""

    BY_NOBODY = auto()
    BY_A_SUPERVISOR = auto()
    BY_THE_DEAD = auto()
    """A supervisor that has not beaten meanwhile."""


@cache
def beat(dialect: str) -> Insert:
    """Renew a supervisor's heartbeat; insert the supervisor if it is not there."""
    given: dict[str, Any] = {column.name: bindparam(column.name, type_=column.type) for column in _S}
    given |= {"started_at": clock(dialect), "heartbeat_at": clock(dialect)}
    renewed = {"heartbeat_at": clock(dialect), "stream": given["stream"]}
    insertion = own_insert(dialect, supervisors).values(given)
    beating: Insert
    if dialect in ("sqlite", "postgresql"):
        beating = insertion.on_conflict_do_update(index_elements=["id"], set_=renewed)
    else:
        beating = insertion.on_duplicate_key_update(renewed)
    return beating


@cache
def get_supervisor() -> Select[Any]:
    """Select a supervisor."""
    return select(*_S).where(_S.id == _WATCHER)


@cache
def all_supervisors(dialect: str) -> Select[Any]:
    """Select the supervisors, each with the database's time and the number of its active runs."""
    active = (
        select(_C.supervisor_id, func.count().label("number"))
        .where(_C.finished_at.is_(None))
        .group_by(_C.supervisor_id)
        .subquery("active")
    )
    number = func.coalesce(active.c.number, 0)
    query = select(*_S, clock(dialect), number).outerjoin(active, active.c.supervisor_id == _S.id)
    return query.order_by(_S.started_at, _S.id)


def runs_of_supervisors(ids: Collection[int]) -> Select[Any]:
    """Select the active runs of some supervisors."""
    return select(*COLUMNS).where(_C.finished_at.is_(None), _C.supervisor_id.in_(ids)).order_by(*KEY)


@cache
def unsupervised_runs(dialect: str) -> Select[Any]:
    """Select the database's time and the active runs that no known supervisor watches over."""
    unknown = not_(exists().where(_S.id == _C.supervisor_id))
    return select(clock(dialect), *COLUMNS).where(_C.finished_at.is_(None), unknown).order_by(*KEY)


_UNMOVED = (_S.id == _WATCHER, _S.heartbeat_at == bindparam("last_beat", type_=_S.heartbeat_at.type))


@cache
def recover_run(watched: Watched) -> Update:
    """Close an active run with an inferred outcome, if it is watched over in this way."""
    end = bindparam("end", type_=_C.finished_at.type)
    recovering = update(_T).where(*THE_RUN, _C.finished_at.is_(None))
    if watched is not Watched.BY_NOBODY:
        recovering = recovering.where(_C.supervisor_id.is_not_distinct_from(_WATCHER))
    if watched is Watched.BY_THE_DEAD:
        recovering = recovering.where(exists().where(*_UNMOVED))
    return recovering.values(
        phase=literal(TaskPhase.FAILED, _C.phase.type),
        finished_at=case((_C.started_at > end, _C.started_at), else_=end),
        error=bindparam("why", type_=_C.error.type),
        recovered=true(),
    )


@cache
def adopt_runs() -> Update:
    """Have the active runs of a source watched over by another supervisor."""
    theirs = _C.supervisor_id.in_(bindparam("dead", expanding=True))
    source = _C.source == bindparam("of_source", type_=_C.source.type)
    adopting = update(_T).where(_C.finished_at.is_(None), source, theirs)
    return adopting.values(supervisor_id=_WATCHER)


@cache
def lock_active() -> Select[Any]:
    """Select an active run and lock it; nothing if somebody else has, or it is active no more."""
    return select(_C.attempt).where(*THE_RUN, _C.finished_at.is_(None)).with_for_update(skip_locked=True)


@cache
def active_keys() -> Select[Any]:
    """Select the keys of a supervisor's active runs."""
    return select(*KEY).where(_C.finished_at.is_(None), _C.supervisor_id == _WATCHER)


@cache
def remove_supervisor() -> Delete:
    """Delete a supervisor."""
    return delete(supervisors).where(_S.id == _WATCHER)


@cache
def remove_silent_supervisor() -> Delete:
    """The same, unless it has beaten meanwhile."""
    return delete(supervisors).where(*_UNMOVED)
