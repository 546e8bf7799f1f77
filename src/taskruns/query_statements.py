"""The queries that answer questions: as in ``statements``, built once for each kind of question.

What a question gives is bound by name: see :func:`parameters`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    Integer,
    Select,
    String,
    and_,
    bindparam,
    func,
    literal_column,
    or_,
    select,
    text,
    true,
    union_all,
)

from taskruns.filters import RunFilter, RunOrder
from taskruns.globs import Glob, upper_bound
from taskruns.model import MAX_ATTEMPT, PROBLEMS, TaskPhase
from taskruns.schema import IS_PROBLEM, task_runs
from taskruns.statements import COLUMNS, clock

_T = task_runs
_C = task_runs.c
_LIMIT = bindparam("limit", type_=Integer)
_NO_LIMIT: ColumnElement[int] = literal_column(str(2**31 - 1))
"""A limit keeps an optimizer from moving what is outside of a subquery into it."""


_FAR = 2**63 - 1
"""The highest number that a database takes."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, without the values: questions that are equal have the same statement."""

    names: frozenset[str]
    """Which parameters there are."""
    phases: frozenset[TaskPhase] | None
    recovered: bool | None
    active: bool | None

    @property
    def is_of_one_task(self) -> bool:
        """Whether the runs are of one task."""
        return "task" in self.names

    @property
    def has_no_problems(self) -> bool:
        """Whether only other phases are asked for."""
        return self.phases is not None and not self.phases & PROBLEMS

    @property
    def only_problems(self) -> bool:
        """Whether no phase but problems is asked for."""
        return bool(self.phases) and self.phases is not None and self.phases <= PROBLEMS


@lru_cache(maxsize=256)
def question_of(wanted: RunFilter, dialect: str) -> tuple[Question, Mapping[str, Any]]:
    """Return what a filter asks, and its values."""
    values = parameters(wanted, dialect)
    phases = wanted.phases
    assert phases is None or isinstance(phases, frozenset)  # noqa: S101  (for mypy: the filter has seen to it)
    return Question(frozenset(values), phases, wanted.recovered, wanted.active), MappingProxyType(values)


def parameters(wanted: RunFilter, dialect: str) -> dict[str, Any]:
    """Return the values of a question, by the names that its statement has for them."""
    glob = None if wanted.task_glob is None else Glob(wanted.task_glob)
    windows = wanted.tightened()
    values = {
        "task": wanted.task_id,
        "pattern": glob and (glob.sqlite() if dialect == "sqlite" else glob.regex()),
        "started_since": windows.started.since,
        "started_until": windows.started.until,
        "finished_since": windows.finished.since,
        "finished_until": windows.finished.until,
        "least": _microseconds(wanted.min_duration),
        "most": _microseconds(wanted.max_duration),
        "exit_code": wanted.exit_code,
        "source": wanted.source,
        "submission": wanted.submission,
        "error": wanted.error,
    }
    if glob is not None and glob.prefix:
        values |= {"first_task": glob.prefix, "no_task": upper_bound(glob.prefix)}
    return {name: value for name, value in values.items() if value is not None}


def _microseconds(span: timedelta | None) -> int | None:
    # The longest of all do not fit; no run is as long as what does.
    return None if span is None else max(-_FAR, min(span // timedelta(microseconds=1), _FAR))


def _bind(name: str, column: ColumnElement[Any]) -> Any:
    return bindparam(name, type_=column.type)


def _number(name: str) -> Any:
    return bindparam(name, type_=BigInteger)


def duration(dialect: str) -> ColumnElement[int]:
    """Return how long a run took, in microseconds; null while it is active."""
    texts = {
        # Times have milliseconds there at most, and those above 999.5 would make a second more.
        "sqlite": "(strftime('%s', substr(finished_at, 1, 19)) - strftime('%s', substr(started_at, 1, 19))) * 1000000"
        " + substr(finished_at, 21, 6) - substr(started_at, 21, 6)",
        "postgresql": "CAST(extract(epoch FROM finished_at - started_at) * 1000000 AS bigint)",
    }
    return literal_column(
        f"({texts.get(dialect, 'timestampdiff(MICROSECOND, started_at, finished_at)')})", type_=BigInteger()
    )


def conditions(question: Question, dialect: str, *, tasks_in_range: bool = True) -> list[ColumnElement[bool]]:
    """Return what a run must meet. Without ``tasks_in_range`` nothing leads an optimizer to the key of the tasks."""
    names = question.names
    span = duration(dialect)
    given: dict[str, ColumnElement[bool]] = {
        "task": _C.task_id == _bind("task", _C.task_id),
        "pattern": _matches(dialect),
        "started_since": _C.started_at >= _bind("started_since", _C.started_at),
        "started_until": _C.started_at < _bind("started_until", _C.started_at),
        "finished_since": _C.finished_at >= _bind("finished_since", _C.finished_at),
        "finished_until": _C.finished_at < _bind("finished_until", _C.finished_at),
        "least": span >= _number("least"),
        "most": span <= _number("most"),
        "exit_code": _C.exit_code == _bind("exit_code", _C.exit_code),
        "source": _C.source == _bind("source", _C.source),
        "submission": _C.submission == _bind("submission", _C.submission),
        "error": _contains(dialect),
    }
    if tasks_in_range:
        given |= {
            "first_task": _C.task_id >= _bind("first_task", _C.task_id),
            "no_task": _C.task_id < _bind("no_task", _C.task_id),
        }
    found = [condition for name, condition in given.items() if name in names]
    if question.phases is not None:
        found += _phases(question.phases, question, dialect)
    if question.recovered is not None:
        found.append(_C.recovered.is_(question.recovered) if dialect != "sqlite" else _flag(question.recovered))
    if question.active is not None:
        found.append(_C.finished_at.is_(None) if question.active else _C.finished_at.is_not(None))
    return found


def _flag(value: bool) -> ColumnElement[bool]:  # noqa: FBT001  (one value, one meaning)
    return literal_column("recovered" if value else "NOT recovered")


def _phases(phases: Collection[TaskPhase], question: Question, dialect: str) -> list[ColumnElement[bool]]:
    """Return the condition of some phases in the words by which an index is found: see docs/databases.md."""
    found: list[ColumnElement[bool]] = []
    if question.only_problems:
        found.append(text(IS_PROBLEM))  # type: ignore[arg-type]  # it may stand in a WHERE
        if dialect not in ("sqlite", "postgresql"):
            found.append(_C.finished_at.is_not(None))
    elif phases == {TaskPhase.RUNNING}:
        return [_C.finished_at.is_(None)]
    if phases != PROBLEMS:
        named = ", ".join(f"'{phase.value}'" for phase in sorted(phases))
        found.append(literal_column(f"phase IN ({named})" if named else "1 = 0"))
    return found


def _matches(dialect: str) -> ColumnElement[bool]:
    pattern = _bind("pattern", _C.task_id)
    if dialect == "sqlite":
        # The plus keeps it from being made a range of the key, which is asked for by itself where it is wanted.
        return literal_column("+task_runs.task_id", String).op("GLOB", is_comparison=True)(pattern)
    return _C.task_id.op("~" if dialect == "postgresql" else "REGEXP", is_comparison=True)(pattern)


def _contains(dialect: str) -> ColumnElement[bool]:
    wanted = bindparam("error", type_=String)
    find = {"sqlite": func.instr, "postgresql": func.strpos}.get(dialect, func.instr)
    found: ColumnElement[bool] = find(_C.error, wanted) > 0
    return found


def runs(
    question: Question,
    order: RunOrder,
    is_following: bool,  # noqa: FBT001  (by place, as what is kept is found by them)
    by_key: bool,  # noqa: FBT001  (likewise)
    limit: int,
    dialect: str,
) -> Select[Any]:
    """Select a page of runs: ``limit`` of them, after the run of a cursor if it is ``following`` one.

    The limit is written out: PostgreSQL makes a new plan at each call if it does not know it.

    ``by_key``: those of a range of tasks are found by the key and sorted. Otherwise an index gives all runs in the
    order of a time, and those of other tasks are left out.
    """
    keys = _order(question, order, dialect)
    where = conditions(question, dialect, tasks_in_range=by_key)
    if is_following:
        where.append(_after(keys, descending=order is not RunOrder.OLDEST))
    if order is RunOrder.LONGEST:
        where.append(_C.finished_at.is_not(None))
    descending = order is not RunOrder.OLDEST
    if by_key and "first_task" in question.names and order is not RunOrder.LONGEST:
        fenced = select(*COLUMNS, *(key.label(name) for name, key, _ in keys)).where(*where).limit(_NO_LIMIT)
        inner = fenced.subquery("found")
        columns = [inner.c[column.name] for column in COLUMNS]
        sorting = [inner.c[name].desc() if descending else inner.c[name].asc() for name, _, _ in keys]
        return select(*columns).order_by(*sorting).limit(_number_of(limit))
    sorting = [key.desc() if descending else key.asc() for _, key, _ in keys]
    query = select(*COLUMNS).where(*where).order_by(*sorting).limit(_number_of(limit))
    return by_problems_of_task(query, question)


def by_problems_of_task(query: Select[Any], question: Question) -> Select[Any]:
    """Return a query for the problems of one task that is served by their index."""
    # Without statistics SQLite takes the key of the table, and reads all of the task's runs.
    if question.is_of_one_task and question.only_problems:
        return query.with_hint(_T, "INDEXED BY ix_task_runs_problems_of_task", "sqlite")
    return query


def last_beside_problems(question: Question, dialect: str) -> Select[Any]:
    """Select the newest run of a task in phases that are no problems, without a look at the problems that follow it.

    Their index has gaps where other runs are, and each gap is a range of the key. For a heap, where each run that is
    looked at lies on a page of its own: a tenth of the time, if there are 90,000 problems.
    """
    given = _C.task_id == _bind("task", _C.task_id)
    of_task = select(_C.attempt).where(given, text(IS_PROBLEM))
    following = func.lead(_C.attempt).over(order_by=_C.attempt.desc())
    newest = of_task.with_only_columns(func.max(_C.attempt)).scalar_subquery()
    above = select(
        literal_column(str(MAX_ATTEMPT + 1), BigInteger).label("upper"), func.coalesce(newest, 0).label("lower")
    )
    between = of_task.with_only_columns(_C.attempt.label("upper"), func.coalesce(following, 0).label("lower"))
    gap = union_all(above, between).subquery("gap")
    within = and_(_C.attempt < gap.c.upper, _C.attempt > gap.c.lower)
    newest_run = select(*COLUMNS).where(*conditions(question, dialect), within).order_by(_C.attempt.desc()).limit(1)
    run = newest_run.correlate(gap).lateral("run")
    query = select(*(run.c[column.name] for column in COLUMNS)).select_from(gap.join(run, true()))
    return (
        query.where(gap.c.upper - gap.c.lower > literal_column("1")).order_by(gap.c.upper.desc()).limit(_number_of(1))
    )


_Key = tuple[str, ColumnElement[Any], Any]


def _order(question: Question, order: RunOrder, dialect: str) -> Sequence[_Key]:
    """Return what a list is sorted by, each with the name of its value in a cursor. The last of it are the key."""
    attempt = ("at_attempt", _C.attempt, _bind("at_attempt", _C.attempt))
    task = ("at_task", _C.task_id, _bind("at_task", _C.task_id))
    if order is RunOrder.LONGEST:
        return [("at_span", duration(dialect), _number("at_span")), task, attempt]
    if question.is_of_one_task:
        return [attempt]
    time = _C.finished_at if question.only_problems else _C.started_at
    return [("at_time", time, _bind("at_time", time)), task, attempt]


def _after(keys: Sequence[_Key], *, descending: bool) -> ColumnElement[bool]:
    """Return whether a run comes after that of the cursor, in words that every database turns into a range."""
    _, first, value = keys[0]
    if len(keys) == 1:
        beyond: ColumnElement[bool] = first < value if descending else first > value
        return beyond
    (_, task, at_task), (_, attempt, at_attempt) = keys[1:]
    if descending:
        tie = or_(task < at_task, and_(task == at_task, attempt < at_attempt))
        return and_(first <= value, or_(first < value, tie))
    tie = or_(task > at_task, and_(task == at_task, attempt > at_attempt))
    return and_(first >= value, or_(first > value, tie))


def _number_of(limit: int) -> ColumnElement[int]:
    return literal_column(str(limit))


def starts(question: Question, are_active: bool, limit: int, dialect: str) -> Select[Any]:  # noqa: FBT001  (by place, see runs)
    """Select when runs started, their keys, and whether that is past: ``limit`` after a place, in the order of starts.

    The index alone knows all of it, on SQLite at least, where it has to be named: it would read all runs of a task.
    """
    keys = _order(Question(frozenset(), None, None, None), RunOrder.OLDEST, dialect)
    where = [*conditions(question, dialect, tasks_in_range=False), _after(keys, descending=False)]
    if are_active:
        where.append(_C.finished_at.is_(None))
    columns = [key for _, key, _ in keys]
    is_past = _C.started_at <= select(clock(dialect)).scalar_subquery()
    query = select(*columns, is_past).where(*where).order_by(*columns).limit(_number_of(limit))
    return query.with_hint(_T, f"INDEXED BY ix_task_runs_{'active' if are_active else 'started'}", "sqlite")


def active_between() -> Select[Any]:
    """Select the active runs of a range of tasks that started before a moment, in the order of the starts.

    SQLite has to be told the index: it would read all runs of the tasks.
    """
    tasks = and_(_C.task_id >= _bind("first_task", _C.task_id), _C.task_id <= _bind("last_task", _C.task_id))
    is_early = _C.started_at < _bind("started_until", _C.started_at)
    query = select(*COLUMNS).where(_C.finished_at.is_(None), is_early, tasks).order_by(_C.started_at, _C.attempt)
    return query.with_hint(_T, "INDEXED BY ix_task_runs_active", "sqlite")


def count(question: Question, dialect: str) -> Select[Any]:
    """Select how many runs there are."""
    where = conditions(question, dialect)
    return by_problems_of_task(select(func.count()).select_from(_T).where(*where), question)


def some_of_range(has_end: bool) -> Select[Any]:  # noqa: FBT001  (by place, as the key of what is kept)
    """Select how many runs the tasks of a range have, counting up to ``most``."""
    within = [_C.task_id >= _bind("first_task", _C.task_id)]
    if has_end:
        within.append(_C.task_id < _bind("no_task", _C.task_id))
    return _some(within)


def some_started(question: Question, dialect: str) -> Select[Any]:
    """Select how many runs started in a window, counting up to ``most``."""
    return _some(conditions(question, dialect))


def _some(where: Sequence[ColumnElement[bool]]) -> Select[Any]:
    return _counted(select(literal_column("1")).select_from(_T).where(*where))


def _counted(some: Select[Any]) -> Select[Any]:
    return select(func.count()).select_from(some.limit(bindparam("most", type_=Integer)).subquery("some"))


def following_runs() -> Select[Any]:
    """Select the task's runs after an attempt, in order."""
    query = select(*COLUMNS).where(_C.task_id == _bind("task", _C.task_id), _C.attempt > _bind("attempt", _C.attempt))
    return query.order_by(_C.attempt).limit(_LIMIT)


def runs_of_following_tasks(is_following: bool) -> Select[Any]:  # noqa: FBT001  (by place, see runs)
    """Select the runs of the tasks after one, or of all, in order."""
    query = select(*COLUMNS).order_by(_C.task_id, _C.attempt).limit(_LIMIT)
    return query.where(_C.task_id > _bind("after", _C.task_id)) if is_following else query


def some_problems() -> Select[Any]:
    """Select how many problems a task has had after an attempt, counting up to ``most``."""
    after = [_C.task_id == _bind("task", _C.task_id), _C.attempt > _bind("attempt", _C.attempt)]
    problems: Select[Any] = select(literal_column("1")).select_from(_T).where(*after, text(IS_PROBLEM))
    return _counted(problems.with_hint(_T, "INDEXED BY ix_task_runs_problems_of_task", "sqlite"))


def last_success_at() -> Select[Any]:
    """Select when the success of a task that ended last did: it reads all runs of the task."""
    is_success = literal_column("phase = 'succeeded'", Boolean)
    return select(func.max(_C.finished_at)).where(_C.task_id == _bind("task", _C.task_id), is_success)


def newest_phases(limit: int) -> Select[Any]:
    """Select the phases of a task's newest runs, newest first."""
    query = select(_C.phase).where(_C.task_id == _bind("task", _C.task_id))
    return query.order_by(_C.attempt.desc()).limit(_number_of(limit))
