"""A stream of events on its way into the database: what is stored of its tasks is read, changed and written back."""

from collections import OrderedDict
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, Select
from sqlalchemy.exc import IntegrityError

from taskruns import bulk, engine, statements
from taskruns.errors import AttemptConflictError
from taskruns.events import Event, Role
from taskruns.model import checked_name
from taskruns.timeline import Effect, Entry, Timeline
from taskruns.times import rfc3339

_TRIES = 50
"""How often events are applied anew because others have written to the same runs meanwhile."""

_BEHIND = 16
"""Runs before an event that are read with those after it: so far it may come late at no further cost."""

_AHEAD = 1024
"""Most runs after an event that are read at once; a replay goes through them."""

_CACHED = 40_000
"""Runs that are remembered, of all tasks together: some 10 MB."""

_AT_ONCE = 500
"""Tasks that one query asks for."""


class _OutrunError(Exception):
    """Others have changed what was read."""


class Stream:
    """The runs of one source, as far as its latest events concern them. What it remembers is only a cache."""

    def __init__(self, source: str) -> None:
        self.source = checked_name(source, "source")
        self._timelines: OrderedDict[str, Timeline] = OrderedDict()
        self._active: set[str] = set()

    @property
    def is_active(self) -> bool:
        """Whether a run of the stream is active, as far as it has told."""
        return bool(self._active)

    def write(self, connection: Connection, events: Sequence[Event], supervisor_id: int | None = None) -> list[Effect]:
        """Do what events say, in a transaction of its own, and return what each did.

        The supervisor watches over the runs that are opened.

        Raises:
            AttemptConflictError: others keep writing to the same runs.
        """
        for number in range(_TRIES):
            try:
                with engine.transaction(connection):
                    if number:  # where the first try has met somebody
                        for task_id in sorted({event.task_id for event in events if event.task_id}):
                            engine.lock_task(connection, task_id)
                    writing = _Writing(self.source, self._timelines, connection, supervisor_id)
                    effects = writing.write(events)
            except BaseException as error:
                self._timelines.clear()
                if not isinstance(error, _OutrunError | IntegrityError):
                    raise  # the caller tries again where that is worth it
            else:
                self._active = (self._active - writing.idle) | writing.active
                return effects
        raise AttemptConflictError(events[0].task_id)


class _Writing:
    """One transaction of a stream."""

    def __init__(
        self,
        source: str,
        timelines: "OrderedDict[str, Timeline]",
        connection: Connection,
        supervisor_id: int | None,
    ) -> None:
        self._source = source
        self._timelines = timelines
        self._connection = connection
        self._supervisor_id = supervisor_id
        self._touched: dict[str, Timeline] = {}
        self.active: set[str] = set()
        """The tasks of which a run is active, of those that the events are about."""
        self.idle: set[str] = set()
        """The others."""
        self._last: dict[str, int] = {}

    def write(self, events: Sequence[Event]) -> list[Effect]:
        """Do what events say; what has changed is stored in the end."""
        self._find_tasks(events)
        effects = [self._apply(event) for event in events]
        self._store()
        for task_id in {event.task_id for event in events}.intersection(self._timelines):
            (self.active if self._timelines[task_id].is_active else self.idle).add(task_id)
        self._forget_some(events)
        return effects

    def _apply(self, event: Event) -> Effect:
        if event.role in (Role.NONE, Role.UNKNOWN):
            return Effect.NONE if event.role is Role.NONE else Effect.UNKNOWN
        timeline = self._timelines.get(event.task_id)
        if timeline is None or not timeline.covers(event.at):
            timeline = self._read(event.task_id, event.at)
        effect = timeline.apply(event, self)
        self._touched[event.task_id] = timeline  # not before: it may have asked for more, with what was changed stored
        return effect

    def _find_tasks(self, events: Sequence[Event]) -> None:
        """Ask for the highest numbers of the tasks that are not known, all by one query."""
        unknown = sorted({event.task_id for event in events if event.task_id not in self._timelines and event.task_id})
        for first in range(0, len(unknown), _AT_ONCE):
            some = unknown[first : first + _AT_ONCE]
            self._last |= dict.fromkeys(some, 0)
            for task_id, last in self._connection.execute(statements.last_attempts(), {"task_ids": some}):
                self._last[task_id] = last

    def _read(self, task_id: str, at: datetime) -> Timeline:
        """Read the runs of a task around a moment."""
        self._store()
        known = self._timelines.pop(task_id, None)
        last = self._last[task_id] if known is None else known.last
        if last == 0:
            timeline = Timeline()
        else:
            ahead = max(_BEHIND, min(_AHEAD, _CACHED // 2 // (len(self._timelines) + 1)))
            given = {"task_id": task_id, "source": self._source, "at": at}
            behind = self._entries(statements.source_runs_until(), given | {"most": _BEHIND})
            following = self._entries(statements.source_runs_after(), given | {"most": ahead + 1})
            until = following[-1].started_at if len(following) > ahead else None
            entries = [*behind, *(entry for entry in following if until is None or entry.started_at < until)]
            here = {entry.attempt for entry in entries}
            active = self._entries(statements.source_active_runs(), given)
            timeline = Timeline(
                entries,
                last=last,
                since=behind[-1].started_at if len(behind) == _BEHIND else None,
                until=until,
                active=[entry for entry in active if entry.attempt not in here],
            )
        self._timelines[task_id] = timeline
        return timeline

    def _entries(self, query: Select[Any], given: dict[str, Any]) -> list[Entry]:
        return [_entry(row) for row in self._connection.execute(query, given)]

    def latest_of_submission(self, task_id: str, submission: str, at: datetime) -> Entry | None:
        """Return the source's latest run of a submission that started at ``at`` or before."""
        given = {"task_id": task_id, "source": self._source, "submission": submission, "at": at}
        return next(iter(self._entries(statements.submission_run_until(), given)), None)

    def lowest(self, task_id: str, least: int = 1) -> int | None:
        """Return the task's lowest number from ``least`` on."""
        self._store()
        lowest: int | None = self._connection.scalar(statements.lowest_attempt(), {"task_id": task_id, "least": least})
        return lowest

    def _store(self) -> None:
        """Write what has changed.

        Raises:
            _OutrunError: somebody else has written to one of the runs meanwhile.
        """
        opened, amended = [], []
        for task_id, timeline in self._touched.items():
            for entry in timeline.changed:
                if entry.stored is None:
                    opened.append(self._row(task_id, entry))
                else:
                    amended.append(_amendment(task_id, entry))
                entry.stored, entry.is_changed = (entry.phase, entry.recovered), False
            timeline.changed.clear()
        self._touched.clear()
        if opened:
            bulk.insert_rows(self._connection, opened, self._supervisor_id)
        if amended:
            result = self._connection.execute(statements.amend_run(), amended)
            if result.rowcount != len(amended):
                raise _OutrunError

    def _row(self, task_id: str, entry: Entry) -> bulk.Row:
        return (
            task_id,
            entry.attempt,
            entry.phase.value,
            rfc3339(entry.started_at),
            None if entry.finished_at is None else rfc3339(entry.finished_at),
            entry.error,
            entry.exit_code,
            entry.recovered,
            entry.start_inferred,
            self._source,
            entry.submission,
            entry.source_attempt,
        )

    def _forget_some(self, events: Sequence[Event]) -> None:
        """Keep the cache within its bounds: the last tasks, and the last runs of each."""
        share = max(_BEHIND, _CACHED // 2 // (len(self._timelines) + 1))
        for task_id in {event.task_id for event in events}.intersection(self._timelines):
            self._timelines.move_to_end(task_id)
            self._timelines[task_id].trim(share)
        size = sum(len(timeline) + 1 for timeline in self._timelines.values())
        while size > _CACHED:
            _, timeline = self._timelines.popitem(last=False)
            size -= len(timeline) + 1


def _entry(row: Row[Any]) -> Entry:
    """Return what a row of ``statements.COLUMNS`` holds; it is the table's, so there is nothing to check."""
    values: tuple[Any, ...] = tuple(row)
    _, attempt, phase, started_at, finished_at, error, exit_code, recovered, start_inferred, *others = values
    _, submission, source_attempt, _ = others
    return Entry(
        attempt,
        phase,
        started_at,
        finished_at,
        error,
        exit_code,
        recovered,
        start_inferred,
        submission,
        source_attempt,
        (phase, recovered),
    )


def _amendment(task_id: str, entry: Entry) -> dict[str, Any]:
    assert entry.stored is not None  # noqa: S101  (for mypy)
    was_phase, was_recovered = entry.stored
    return {
        "of_task": task_id,
        "of_attempt": entry.attempt,
        "was_phase": was_phase,
        "was_recovered": was_recovered,
        "new_phase": entry.phase,
        "new_started_at": entry.started_at,
        "new_finished_at": entry.finished_at,
        "new_error": entry.error,
        "new_exit_code": entry.exit_code,
        "new_recovered": entry.recovered,
        "new_start_inferred": entry.start_inferred,
    }
