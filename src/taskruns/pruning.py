"""Deleting runs on a connection: passes over the table, slices of it, and single tasks, in short transactions."""

import logging
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, select

from taskruns import engine, pruning_statements, statements
from taskruns.events import Event
from taskruns.globs import Glob
from taskruns.model import MAX_ATTEMPT, TaskPhase, checked_attempt, checked_name
from taskruns.retention import TURN, Cutoffs, Retention
from taskruns.timeline import Effect

BATCH = 500
"""Runs that are looked at by one step, and deleted by its transaction."""

SLICE = 250
"""The most runs that :func:`tidy` deletes for each task it is given; it looks at up to three times ``BATCH``."""

REACH = 1000
"""Attempts among which :func:`tidy` looks for a later success; beyond it leaves the run to a pass."""

_MOST_TURNS = 16
"""The most turns that one call which records events takes, at once: they delete more runs than it can bring."""

REMOVED = "[removed]"
"""What stands where an error has been forgotten."""

_REST = 5
"""How much longer than its transaction a pass rests on SQLite."""

Key = tuple[str, int]

_random = secrets.SystemRandom()  # not of the seed that the program may have set

_log = logging.getLogger("taskruns")


@dataclass(slots=True)
class _Place:
    """Where a pass is: in which task, and what it has seen of it, newest first."""

    task_id: str | None = None
    attempt: int = 0
    seen: int = 0
    has_success: bool = False
    is_idle: bool = False
    last: Key | None = None
    """The latest run of an idle task. It goes after all the others, so that no number is given again before."""


class Pruning:
    """A pass that deletes what a policy does not keep: tasks in falling order, the newest runs of each first.

    Seen in this order, a run's fate depends on what has been seen of its task. Each :meth:`step` reads some runs and
    deletes those of them that are due. A pass that has been given up leaves nothing behind, and the next one may as
    well start again.
    """

    def __init__(self, retention: Retention, *, task: str | None = None, dry_run: bool = False) -> None:
        self.count = 0
        """How many runs have been deleted, or would have been."""
        self.pause = 0.0
        """Seconds for which the next step had better wait, for other writers to have their turn."""
        self.is_done = False
        self._retention = retention
        self._keep = max(retention.keep, 1)  # the latest run stays
        self._dry_run = dry_run
        glob = Glob("*" if task is None else task)
        self._is_wanted = glob.matches
        self._is_single = glob.literal is not None
        self._place = _Place(glob.literal, MAX_ATTEMPT + 1) if self._is_single else _Place()
        self._cutoffs: Cutoffs | None = None
        self._idle: set[str] = set()  # of this step

    def step(self, connection: Connection, _lost: bool) -> None:  # noqa: FBT001  (as a history calls it)
        """Look at the next runs. It may be repeated where it has failed: nothing is remembered before the end."""
        if self._cutoffs is None:
            self._cutoffs = _cutoffs(connection, self._retention)
        before = self._cutoffs.latest
        page = self._page(connection) if before is not None else []
        place = replace(self._place)
        self._idle = {place.task_id} if place.is_idle and place.task_id is not None else set()
        self._idle |= self._idle_tasks(connection, page) if page else set()
        due = self._judge(place, page, self._idle) if page else _left(place)
        self.pause = 0.0
        if due and not self._dry_run:
            began = time.monotonic()
            connection.rollback()
            with engine.transaction(connection):
                self.count += _delete(connection, self._unless_woken(connection, place, due), before)
            # Whoever waits for the lock of an SQLite file only asks now and then, ten times a second in the end: it has
            # to be free most of the time, even if there are two passes.
            self.pause = _REST * (time.monotonic() - began) if connection.dialect.name == "sqlite" else 0.0
        else:
            self.count += len(due)
        self._place = place
        self.is_done = not page

    def _unless_woken(self, connection: Connection, place: _Place, due: list[Key]) -> list[Key]:
        """Return what is due without the runs of tasks that were idle and are not any more: the next pass judges."""
        assert self._cutoffs is not None  # noqa: S101  (for mypy)
        woken = self._idle - _idle(connection, self._idle, self._cutoffs)
        if place.task_id in woken:
            place.attempt, place.last = 0, None  # on to the next task
        return [key for key in due if key[0] not in woken]

    def _page(self, connection: Connection) -> Sequence[Any]:
        place, page = self._place, list[Any]()
        if place.task_id is not None:
            page += connection.execute(pruning_statements.older_runs(place.task_id, place.attempt, limit=BATCH)).all()
        if len(page) < BATCH and not self._is_single:
            preceding = pruning_statements.runs_of_preceding_tasks(place.task_id, limit=BATCH - len(page))
            page += connection.execute(preceding).all()
        return page

    def _idle_tasks(self, connection: Connection, page: Sequence[Any]) -> set[str]:
        """Return the tasks of which nothing is active or has ended lately, of those that begin on this page."""
        assert self._cutoffs is not None  # noqa: S101  (for mypy)
        latest: dict[str, datetime | None] = {}
        for task_id, _, _, finished_at in page:
            if task_id != self._place.task_id:
                latest.setdefault(task_id, finished_at)
        some = [task_id for task_id, finished_at in latest.items() if self._cutoffs.is_idle(finished_at)]
        if self._is_single and self._place.seen == 0:
            some = [page[0][0]] if self._cutoffs.is_idle(page[0][3]) else []
        return _idle(connection, some, self._cutoffs)

    def _judge(self, place: _Place, page: Sequence[Any], idle: set[str]) -> list[Key]:
        """Return which runs of a page are to be deleted, and move on behind it."""
        assert self._cutoffs is not None  # noqa: S101  (for mypy)
        due: list[Key] = []
        for task_id, attempt, phase, finished_at in page:
            if task_id != place.task_id:
                due += _left(place)
                place.task_id, place.seen, place.has_success = task_id, 0, False
            if place.seen == 0:
                place.is_idle = task_id in idle and self._is_wanted(task_id)
            place.seen, place.attempt = place.seen + 1, attempt
            if place.is_idle and place.seen == 1:
                place.last = (task_id, attempt)
            elif place.is_idle or (
                place.seen > self._keep
                and self._cutoffs.is_old(phase, finished_at)
                and (place.has_success or phase is not TaskPhase.SUCCEEDED)
                and self._is_wanted(task_id)
            ):
                due.append((task_id, attempt))
            place.has_success = place.has_success or phase is TaskPhase.SUCCEEDED
        if not self._is_wanted(page[-1][0]):
            place.attempt = 0  # whatever else there is of it
        return due


def _left(place: _Place) -> list[Key]:
    """Return what is left to delete of the task that a pass leaves."""
    last, place.last = place.last, None
    return [] if last is None else [last]


def tidy(connection: Connection, retention: Retention, task_ids: Sequence[str]) -> int:
    """Delete some of what a policy does not keep, of some tasks and of others, and return how many runs that were.

    It takes some milliseconds for each task, however large the table is: of the task the lowest numbers are looked at,
    of the others those that started earliest, and those since a moment that chance chooses. Called after every ``TURN``
    runs it keeps a table within bounds. Some runs are left to a pass: the success before many failures, and idle tasks
    that have more runs than the policy keeps of a task.
    """
    cutoffs = _cutoffs(connection, retention)
    before = cutoffs.latest
    if before is None:
        return 0
    keep = max(retention.keep, 1)
    pages = [
        pruning_statements.first_runs(checked_name(task, "task id"), limit=BATCH) for task in dict.fromkeys(task_ids)
    ]
    oldest = connection.execute(pruning_statements.runs_started(until=before, limit=1)).first()
    if oldest is not None:
        moment = oldest.started_at + _random.random() * (before - oldest.started_at)
        limit = BATCH * len(task_ids)
        pages += [pruning_statements.runs_started(until=before, since=since, limit=limit) for since in (None, moment)]
    due: dict[Key, None] = {}
    small: dict[str, None] = {}
    most = SLICE * len(task_ids)
    _random.shuffle(pages)  # or one that has always enough, of tasks that turn out not to be idle, hid the others
    for page in pages:
        left = most - len(due) - len(small)
        if left <= 0:
            break
        query = pruning_statements.with_standing(page, **asdict(cutoffs), keep=keep, reach=REACH, limit=left)
        for run in connection.execute(query):
            is_needed = run.phase is TaskPhase.SUCCEEDED and run.later_success is None
            if run.more is None and cutoffs.is_idle(run.finished_at):
                small[run.task_id] = None
            if cutoffs.is_old(run.phase, run.finished_at) and run.attempt < (run.floor or 0) and not is_needed:
                due[run.task_id, run.attempt] = None
    idle, keys = sorted(_idle(connection, small, cutoffs)), sorted(due)
    if not (keys or idle):
        return 0
    connection.rollback()
    with engine.transaction(connection):
        count = _delete(connection, keys, before) if keys else 0
        if idle := sorted(_idle(connection, idle, cutoffs)):  # as it is now
            whole = [{"of_task": task, "before": cutoffs.idle} for task in idle]
            count += connection.execute(pruning_statements.delete_runs(), whole).rowcount
    return count


def turns_of(events: Sequence[Event], effects: Sequence[Effect]) -> list[str]:
    """Return the tasks for which a database that prunes itself does so when it has recorded events: few at a time.

    Every run ends once, so the ends are counted, also of those whose start nobody saw.
    """
    ended = [event.task_id for event, effect in zip(events, effects, strict=True) if effect is Effect.CLOSED]
    turns = len(ended) / TURN
    count = int(turns) + (_random.random() < turns % 1)
    return _random.sample(ended, min(count, _MOST_TURNS))


def _cutoffs(connection: Connection, retention: Retention) -> Cutoffs:
    now = connection.execute(select(statements.clock(connection.dialect.name))).scalar_one()
    return retention.cutoffs(now)


def _idle(connection: Connection, tasks: Iterable[str], cutoffs: Cutoffs) -> set[str]:
    """Return those of some tasks of which nothing is active or has ended lately."""
    idle = set(tasks)
    if idle:
        given = {"task_ids": sorted(idle), "since": cutoffs.idle}
        idle -= set(connection.scalars(pruning_statements.busy_tasks(), given))
    return idle


def _delete(connection: Connection, keys: Iterable[Key], before: datetime | None) -> int:
    values = [{"of_task": task_id, "of_attempt": attempt, "before": before} for task_id, attempt in keys]
    return connection.execute(pruning_statements.delete_run(), values).rowcount


class Forgetting:
    """Deletes a task's runs that have ended, one of them or all, or their errors; :meth:`step` by step."""

    def __init__(self, task_id: str, attempt: int | None = None, *, error_only: bool = False) -> None:
        self.count = 0
        """How many runs have been changed or deleted."""
        self.is_done = False
        self._task_id = checked_name(task_id, "task id")
        self._first = 1 if attempt is None else checked_attempt(attempt)
        self._attempt = attempt
        self._statement = pruning_statements.forget_errors(REMOVED) if error_only else pruning_statements.forget_runs()

    def step(self, connection: Connection, _lost: bool) -> None:  # noqa: FBT001  (as a history calls it)
        """Go on with the next runs, oldest first: a number is not given again before all are gone."""
        is_sqlite = connection.dialect.name == "sqlite"
        given = {"of_task": self._task_id, "first": self._first, "most": BATCH}
        last = connection.scalar(pruning_statements.last_of_range(), given) if self._attempt is None else self._attempt
        if last is None or last < self._first:
            self.is_done = True
            if is_sqlite:
                _empty_log(connection)
            return
        if is_sqlite:
            connection.exec_driver_sql("PRAGMA secure_delete = ON")  # or the text stays in the file's free space
        connection.rollback()
        with engine.transaction(connection):
            count = connection.execute(self._statement, given | {"last": last}).rowcount
        self.count += count
        self._first = last + 1


def compact(connection: Connection, _lost: bool) -> None:  # noqa: FBT001  (as a history calls it)
    """Give the space of deleted runs back to the file system. Writers wait meanwhile, on PostgreSQL readers too."""
    dialect = connection.dialect.name
    if dialect == "sqlite":
        connection.exec_driver_sql("VACUUM")
        _empty_log(connection)
    elif dialect == "postgresql":
        connection.exec_driver_sql("VACUUM FULL task_runs")
    else:
        connection.exec_driver_sql("OPTIMIZE TABLE task_runs").all()


def _empty_log(connection: Connection) -> None:
    """Write all of an SQLite database's log into its file, and make the log empty."""
    is_busy = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").all()[0][0]
    if is_busy:
        _log.warning("the -wal file of the database is in use and still holds what has been deleted")
