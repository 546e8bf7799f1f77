"""Which run an event belongs to: the runs of one task that came from one source, in the order they started.

Streams repeat, reorder, lose and replay events. So what an event does follows from the runs and from its time, and the
history is the same whatever the order in which the events of a run arrive. Plain values, no database.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Protocol

from taskruns.events import Event, Role
from taskruns.model import MAX_ATTEMPT, RANK, SUPERSEDED, Outcome, TaskPhase

_SOON = timedelta(seconds=1)
"""Within this a supervisor tells what it makes of the end of an attempt; Taskvisor does so at once."""


class Effect(StrEnum):
    """What an event did."""

    OPENED = "opened"
    """A run has been opened."""
    CLOSED = "closed"
    """A run has been closed, or created closed as its start was not observed."""
    AMENDED = "amended"
    """A run has become more exact: its true start, a higher outcome."""
    REPEATED = "repeated"
    """Nothing: all of it was known."""
    CONTRADICTED = "contradicted"
    """Nothing: the run has ended in another way."""
    PRUNED = "pruned"
    """Nothing: the run is older than the oldest one that is kept."""
    UNMATCHED = "unmatched"
    """Nothing: it names no attempt, and there is no run that it could mean."""
    FULL = "full"
    """Nothing: the task has used up its numbers."""
    NONE = "none"
    """Nothing: it concerns no run."""
    UNKNOWN = "unknown"
    """Nothing: its kind is not known."""


@dataclass(slots=True, eq=False)
class Entry:
    """A run as it is to be stored."""

    attempt: int
    phase: TaskPhase
    started_at: datetime
    finished_at: datetime | None
    error: str | None
    exit_code: int | None
    recovered: bool
    start_inferred: bool
    submission: str | None
    source_attempt: int | None
    stored: tuple[TaskPhase, bool] | None
    """The phase, and whether it was recovered, of the stored run; None of a new one."""
    is_changed: bool = False

    @property
    def place(self) -> tuple[datetime, int, int]:
        """Its place among the others; attempts that start at the same moment are in the order of their numbers."""
        return self.started_at, self.source_attempt or 0, self.attempt

    def is_over_before(self, at: datetime) -> bool:
        """Whether the run has started, and ended if that is known, before a moment."""
        return self.started_at < at and (self.finished_at is None or self.finished_at < at)

    def is_end_of(self, number: int | None, at: datetime) -> bool:
        """Whether this may be the run of an attempt that started at ``at``, of which only the end was told so far."""
        is_later = self.finished_at is not None and at <= self.finished_at
        return self.start_inferred and self.source_attempt == number and is_later

    def is_attempt(self, number: int | None) -> bool:
        """Whether this may be the attempt to which its supervisor gives ``number``."""
        return number is None or self.source_attempt is None or number == self.source_attempt


class Kept(Protocol):
    """What a timeline asks of the stored runs of its task when it has to know more."""

    def latest_of_submission(self, task_id: str, submission: str, at: datetime) -> Entry | None:
        """Return the source's latest run of a submission that started at ``at`` or before."""

    def lowest(self, task_id: str, least: int = 1) -> int | None:
        """Return the lowest number from ``least`` on."""


def _place(entry: Entry) -> tuple[datetime, int, int]:
    return entry.place


def _start(entry: Entry) -> datetime:
    return entry.started_at


class Timeline:
    """The runs of one task from one source: all of them that started from ``since`` on and before ``until``."""

    def __init__(
        self,
        entries: Iterable[Entry] = (),
        *,
        last: int = 0,
        since: datetime | None = None,
        until: datetime | None = None,
        active: Iterable[Entry] = (),
    ) -> None:
        """Begin with the runs between two moments; None means that there are none beyond.

        ``last`` is the task's highest number, 0 if it has none; ``active`` are the active runs that are not among
        ``entries``.
        """
        self.last = last
        self.changed: list[Entry] = []
        self._entries = sorted(entries, key=_place)
        self._submissions = Counter(entry.submission for entry in self._entries)
        self._since, self._until = since, until
        self._elsewhere = list(active)
        self._active = [entry for entry in (*self._entries, *self._elsewhere) if entry.finished_at is None]

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def is_active(self) -> bool:
        """Whether one of the runs is active."""
        return bool(self._active)

    def covers(self, at: datetime) -> bool:
        """Whether the runs around a moment are known."""
        return (self._since is None or self._since < at) and (self._until is None or at < self._until)

    def trim(self, size: int) -> None:
        """Forget the runs that started first, but for the active ones, when they are more than twice ``size``."""
        gone = self._entries[:-size] if len(self._entries) > 2 * size else []
        self._elsewhere = [entry for entry in (*self._elsewhere, *gone) if entry.finished_at is None]
        if gone:
            del self._entries[:-size]
            self._submissions = Counter(entry.submission for entry in self._entries)
            self._since = self._entries[0].started_at

    def apply(self, event: Event, kept: Kept) -> Effect:
        """Do what an event says, and note in ``changed`` what has to be stored."""
        self._kept = kept
        if event.role is Role.START:
            return self._apply_start(event)
        entry = self._at(event)
        if entry is not None and entry.is_attempt(event.attempt):
            return self._apply_end(entry, event)
        if event.attempt is None or event.role is Role.REMARK:
            return Effect.UNMATCHED
        return self._create_closed(event)

    def _apply_start(self, event: Event) -> Effect:
        at, number, submission = event.at, event.attempt, event.submission
        last = self._entries[-1] if self._entries else None
        if last is None or (_matches(last, submission) and last.is_over_before(at)):
            return self._create(event, at, None)  # nearly always
        place = self._place_after(at)
        for entry in self._before(place, submission):
            if entry.started_at != at:
                break
            if entry.is_attempt(number):
                return self._confirm_start(entry, at)
        neighbours = (next(self._before(place, submission), None), next(self._after(place, submission), None))
        for neighbour in neighbours:
            # Its end came first. Attempts of a stream follow one another, so no run lies between the two.
            if neighbour is not None and neighbour.is_end_of(number, at):
                return self._confirm_start(neighbour, at)
        return self._create(event, at, None)

    def _confirm_start(self, entry: Entry, at: datetime) -> Effect:
        """Take the true start of a run of which the end came first."""
        if not entry.start_inferred:
            return Effect.REPEATED
        entry.start_inferred = False
        self._move(entry, at)
        return Effect.AMENDED

    def _apply_end(self, entry: Entry, event: Event) -> Effect:
        outcome = event.outcome(entry.source_attempt)
        if entry.finished_at is None:
            return self._close(entry, outcome)
        if event.role in (Role.CLOSING, Role.REMARK):
            return self._close(entry, outcome) if entry.recovered else Effect.REPEATED
        stored = Outcome(entry.phase, entry.error, entry.exit_code, entry.finished_at)
        if stored == outcome and not entry.recovered:
            return Effect.REPEATED
        if _is_of_another_attempt(event, outcome, stored):
            # The supervisor has been restarted, its numbers too, and the start was lost.
            return self._create_closed(event)
        if entry.recovered:
            return self._close(entry, outcome)
        return self._merge(entry, stored, outcome, event.role)

    def _merge(self, entry: Entry, stored: Outcome, told: Outcome, role: Role) -> Effect:
        """Make one outcome of two that are told of a run, as if they had come in the order of their times."""
        are_of_a_kind = _may_be_of_one_end(told.phase, stored.phase)
        is_earlier, is_end = told.finished_at < stored.finished_at, role is Role.END
        if not (are_of_a_kind or (is_earlier and is_end)):
            return Effect.CONTRADICTED
        if is_earlier or (is_end and told.finished_at == stored.finished_at):
            merged = told.refined(stored)
        else:
            merged = stored.refined(told)
        if merged == stored:
            return Effect.REPEATED
        self._set(entry, merged)
        return Effect.AMENDED

    def _create_closed(self, event: Event) -> Effect:
        """Create the run of which only the end is told, unless all that was told so far is the verdict on this end."""
        following = next(self._after(self._place_after(event.at), event.submission), None)
        if following is not None and event.role is Role.END and _is_verdict_on(following, event):
            self._move(following, event.began_at)
            return self._apply_end(following, event)
        for entry in self._before(self._place_after(event.began_at), event.submission):
            if entry.started_at != event.began_at:
                break
            if entry.start_inferred and entry.source_attempt == event.attempt:
                return self._apply_end(entry, event)  # told before
        return self._create(event, event.began_at, event.outcome(None))

    def _create(self, event: Event, at: datetime, outcome: Outcome | None) -> Effect:
        number = self._number(event, at)
        if number is None:
            return Effect.PRUNED
        if number > MAX_ATTEMPT:
            return Effect.FULL
        entry = Entry(
            attempt=number,
            phase=TaskPhase.RUNNING,
            started_at=at,
            finished_at=None,
            error=None,
            exit_code=None,
            recovered=False,
            start_inferred=outcome is not None,
            submission=event.submission,
            source_attempt=event.attempt,
            stored=None,
        )
        self.last = max(self.last, number)
        if outcome is not None:
            self._set(entry, outcome)
        else:
            self._active.append(entry)
            self._change(entry)
        self._insert(entry)
        return Effect.OPENED if outcome is None else Effect.CLOSED

    def _number(self, event: Event, at: datetime) -> int | None:
        """Return the number of a new run; None if it can only be one that has been pruned.

        It is the supervisor's own where that is free and greater than the task's last, else the next. A run before the
        oldest kept one gets its own number if that is free and lower. Otherwise it counts as pruned; but where there
        is number 1 nothing has been, and a submission that overlaps the oldest run may just be told late.
        """
        wanted = event.attempt
        oldest = self._entries[0] if self._entries and self._since is None else None
        if oldest is not None and at < oldest.started_at:
            if wanted is not None and wanted < oldest.attempt and self._kept.lowest(event.task_id, wanted) != wanted:
                return wanted
            if event.submission is None or self._kept.lowest(event.task_id) != 1:
                return None
        return wanted if wanted is not None and wanted > self.last else self.last + 1

    def _move(self, entry: Entry, at: datetime) -> None:
        """Give a run another start."""
        self._entries.remove(entry)
        self._submissions[entry.submission] -= 1
        before, entry.started_at = entry.started_at, at
        self._insert(entry, moved_from=before)

    def _insert(self, entry: Entry, moved_from: datetime | None = None) -> None:
        """Put an entry in its place. A later attempt of a stream ends the earlier ones that are still active."""
        self._change(entry)
        entries = self._entries
        is_last = not entries or entries[-1].started_at < entry.started_at  # nearly always
        place = len(entries) if is_last else bisect_right(entries, entry.place, key=_place)
        entries.insert(place, entry)
        self._submissions[entry.submission] += 1
        for active in tuple(self._active):
            if active is not entry and _matches(active, entry.submission) and active.place < entry.place:
                self._lose(active, entry.started_at)
        previous = next(self._before(place, entry.submission), None)
        if previous is not None and previous.recovered:
            assert previous.finished_at is not None  # noqa: S101  (for mypy: only active runs have none)
            is_later = previous.finished_at <= entry.started_at and previous.finished_at != moved_from
            if not (previous.error == SUPERSEDED and is_later):  # else it is known since a start in between
                self._lose(previous, entry.started_at)
        if not is_last and entry.finished_at is None:
            following = next(self._after(place + 1, entry.submission), None)
            if following is not None:
                self._lose(entry, following.started_at)

    def _lose(self, entry: Entry, at: datetime) -> None:
        """Close a run of which the end was not told, at the moment its successor started."""
        self._set(entry, Outcome(TaskPhase.FAILED, SUPERSEDED, None, at), recovered=True)

    def _close(self, entry: Entry, outcome: Outcome) -> Effect:
        self._set(entry, outcome)
        return Effect.CLOSED

    def _set(self, entry: Entry, outcome: Outcome, *, recovered: bool = False) -> None:
        if entry.finished_at is None and entry in self._active:
            self._active.remove(entry)
            if entry in self._elsewhere:
                self._elsewhere.remove(entry)
        entry.phase, entry.error, entry.exit_code = outcome.phase, outcome.error, outcome.exit_code
        entry.finished_at = max(outcome.finished_at, entry.started_at)
        entry.recovered = recovered
        self._change(entry)

    def _change(self, entry: Entry) -> None:
        if not entry.is_changed:
            entry.is_changed = True
            self.changed.append(entry)

    def _at(self, event: Event) -> Entry | None:
        """Return the run with the greatest start up to an event; of several, the one with its number."""
        at, submission = event.at, event.submission
        latest: Entry | None = None
        for entry in self._before(self._place_after(at), submission):
            if latest is not None and entry.started_at != latest.started_at:
                break
            if entry.is_attempt(event.attempt):
                return entry
            latest = latest or entry
        if latest is None:
            earlier = [e for e in self._elsewhere if e.started_at <= at and _matches(e, submission)]
            latest = max(earlier, key=_place, default=None)
        if latest is None and self._since is not None and submission is not None:
            latest = self._kept.latest_of_submission(event.task_id, submission, at)
            if latest is not None:
                self._elsewhere.append(latest)
        return latest

    def _place_after(self, at: datetime) -> int:
        """Return the place behind all entries that started up to a moment."""
        entries = self._entries
        if not entries or entries[-1].started_at <= at:  # nearly always
            return len(entries)
        return bisect_right(entries, at, key=_start)

    def _has(self, submission: str | None) -> bool:
        return submission is None or self._submissions[submission] > 0

    def _before(self, place: int, submission: str | None) -> Iterator[Entry]:
        """Yield the entries of a stream before a place, the nearest first."""
        for index in range(place - 1, -1, -1) if self._has(submission) else ():
            entry = self._entries[index]
            if submission is None or entry.submission == submission:
                yield entry

    def _after(self, place: int, submission: str | None) -> Iterator[Entry]:
        """Yield the entries of a stream from a place on."""
        for index in range(place, len(self._entries)) if self._has(submission) else ():
            entry = self._entries[index]
            if submission is None or entry.submission == submission:
                yield entry


def _matches(entry: Entry, submission: str | None) -> bool:
    return submission is None or entry.submission == submission


def _may_be_of_one_end(one: TaskPhase, other: TaskPhase) -> bool:
    return one is other or (one in RANK and other in RANK)


def _is_verdict_on(entry: Entry, event: Event) -> bool:
    """Whether all that is known of a run is what its supervisor made of the end that an event tells."""
    is_bare = entry.start_inferred and entry.started_at == entry.finished_at
    is_soon = entry.started_at - event.at <= _SOON and entry.source_attempt == event.attempt
    return is_bare and is_soon and _may_be_of_one_end(event.outcome(None).phase, entry.phase)


def _is_of_another_attempt(event: Event, outcome: Outcome, stored: Outcome) -> bool:
    """Whether an event tells of an attempt that began after the end of the stored one with the same number.

    Where it does not say how long the attempt took, an end that comes later than the stored one is that of another
    attempt, unless the two can be told of the same: a timeout, and the failure that it is.
    """
    if event.duration is not None:
        return event.began_at > stored.finished_at
    if outcome.phase is TaskPhase.TIMEOUT and (outcome.phase, outcome.error) == (stored.phase, stored.error):
        return event.at > stored.finished_at + _SOON  # the failure that it is has set the time of the end
    may_be_of_one = outcome.phase is not stored.phase and outcome.phase in RANK and stored.phase in RANK
    return event.role is Role.END and event.at > stored.finished_at and not may_be_of_one
