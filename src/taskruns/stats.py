"""Statistics of runs. Pure."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, tzinfo
from enum import StrEnum
from typing import Any

from taskruns.model import PROBLEMS, TaskPhase
from taskruns.times import in_zone, rfc3339

PERCENTS = (50, 95, 99)

_MICROSECOND = timedelta(microseconds=1)
_SECOND = timedelta(seconds=1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_DAY = date(1970, 1, 1).toordinal()
_FIRST_SECOND = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // _SECOND


def nearest_rank(percent: int, count: int) -> int:
    """Return the place, from 1, of a percentile among ``count`` sorted values: the ceiling of percent of the count."""
    return -(-percent * count // 100)


@dataclass(frozen=True, slots=True)
class DurationStats:
    """How long runs took. A percentile is the duration of a run, at the nearest rank, never a value in between."""

    mean: timedelta
    min: timedelta
    p50: timedelta
    p95: timedelta
    p99: timedelta
    max: timedelta

    @classmethod
    def of(cls, spans: Sequence[timedelta]) -> "DurationStats":
        """Return the statistics of some durations; there must be one."""
        ordered = sorted(spans)
        count = len(ordered)
        p50, p95, p99 = [ordered[nearest_rank(percent, count) - 1] for percent in PERCENTS]
        return cls(sum(ordered, timedelta()) / count, ordered[0], p50, p95, p99, ordered[-1])

    def to_wire(self) -> dict[str, int | float]:
        """Return them as a JSON object, in milliseconds, with a fraction where there is one."""
        names = ("mean", "min", "p50", "p95", "p99", "max")
        return {name: _milliseconds(getattr(self, name)) for name in names}


def _milliseconds(span: timedelta) -> int | float:
    whole, rest = divmod(span // _MICROSECOND, 1000)
    return whole + rest / 1000 if rest else whole


@dataclass(frozen=True, slots=True)
class RunStats:
    """How many runs there were, how they ended and how long they took."""

    by_phase: Mapping[TaskPhase, int] = field(default_factory=dict)
    """How many runs are in each phase, of those that occur."""
    duration: DurationStats | None = None
    """How long those took that have ended; None if none has."""
    last_success_at: datetime | None = None
    """When the last of those that succeeded ended."""
    last_problem_at: datetime | None = None
    """When the last of those that failed, timed out or were exhausted ended."""
    parts: tuple["StatsPart", ...] = ()
    """The same by day or by hour, where that is asked for: those in which a run started, in order."""

    @property
    def runs(self) -> int:
        """How many runs there are, active ones too."""
        return sum(self.by_phase.values())

    @property
    def problems(self) -> int:
        """How many failed, timed out or were exhausted."""
        return sum(self.by_phase.get(phase, 0) for phase in PROBLEMS)

    @property
    def success_rate(self) -> float | None:
        """The part of succeeded runs in those that succeeded or were a problem; None if there are neither."""
        succeeded = self.by_phase.get(TaskPhase.SUCCEEDED, 0)
        judged = succeeded + self.problems
        return succeeded / judged if judged else None

    @property
    def attempts_per_success(self) -> float | None:
        """How many runs have ended, in whatever way, for each that succeeded; None if none has."""
        succeeded = self.by_phase.get(TaskPhase.SUCCEEDED, 0)
        ended = self.runs - self.by_phase.get(TaskPhase.RUNNING, 0)
        return ended / succeeded if succeeded else None

    def to_wire(self) -> dict[str, Any]:
        """Return them as a JSON object, without what is null."""
        wire: dict[str, Any] = {
            "runs": self.runs,
            "byPhase": {phase.value: self.by_phase[phase] for phase in TaskPhase if self.by_phase.get(phase)},
            "successRate": self.success_rate,
            "attemptsPerSuccess": self.attempts_per_success,
            "durationMs": None if self.duration is None else self.duration.to_wire(),
            "lastSuccessAt": None if self.last_success_at is None else rfc3339(self.last_success_at),
            "lastProblemAt": None if self.last_problem_at is None else rfc3339(self.last_problem_at),
        }
        return {key: value for key, value in wire.items() if value is not None}


@dataclass(frozen=True, slots=True)
class StatsPart:
    """The statistics of a day or an hour."""

    start: datetime
    """When it begins, in the time zone that was asked for."""
    stats: RunStats


Ended = tuple[str, datetime, datetime | None]
"""What statistics are made of: a run's phase, start and end, which are in UTC if they have no time zone."""


def stats_of(runs: Sequence[Ended]) -> RunStats:
    """Return the statistics of some runs."""
    ends: dict[str, list[Any]] = defaultdict(list)
    for phase, _, end in runs:
        ends[phase].append(end)
    by_phase = {TaskPhase(phase): len(some) for phase, some in ends.items()}
    last: dict[TaskPhase, datetime] = {phase: max(ends[phase]) for phase in by_phase if phase is not TaskPhase.RUNNING}
    spans = [end - start for _, start, end in runs if end is not None]
    return RunStats(by_phase, DurationStats.of(spans) if spans else None, *last_ends(last))


def last_ends(ends: Mapping[TaskPhase, datetime]) -> tuple[datetime | None, datetime | None]:
    """Return the end of the last success and of the last problem, out of the last ones of each phase."""
    success, problems = ends.get(TaskPhase.SUCCEEDED), [ends[phase] for phase in ends if phase in PROBLEMS]
    return None if success is None else _aware(success), _aware(max(problems)) if problems else None


def stats_by(runs: Iterable[Ended], part: Callable[[datetime], int]) -> dict[int, RunStats]:
    """Return the statistics of the runs of each part, which is found by a run's start."""
    parts: dict[int, list[Ended]] = defaultdict(list)
    for run in runs:
        parts[part(_aware(run[1]))].append(run)
    return {number: stats_of(some) for number, some in parts.items()}


def _aware(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


class Span(StrEnum):
    """By what statistics are divided."""

    DAY = "day"
    HOUR = "hour"

    @property
    def seconds(self) -> int:
        """How long one is, but for those in which clocks are put forward or back."""
        return 86400 if self is Span.DAY else 3600

    def number(self, moment: datetime, zone: tzinfo) -> int:
        """Return the day in which a moment is, as days since 1970, or when its hour began, as seconds since then."""
        local = in_zone(moment, zone)
        if self is Span.DAY:
            return local.toordinal() - _FIRST_DAY
        seconds = (moment - _EPOCH) // _SECOND
        return seconds - (seconds + _offset(local)) % 3600

    def start(self, number: int, zone: tzinfo) -> datetime:
        """Return when the day or hour of a number begins, in the time zone."""
        if self is Span.HOUR:
            return in_zone(_EPOCH + max(number, _FIRST_SECOND) * _SECOND, zone)
        midnight = datetime.combine(date.fromordinal(number + _FIRST_DAY), datetime.min.time(), zone)
        return in_zone(in_zone(midnight, UTC), zone)  # clocks may be put forward at midnight

    def segments(self, zone: tzinfo, since: datetime, until: datetime) -> tuple[tuple[datetime | None, int], ...]:
        """Return the offsets, in seconds, by which the numbers of some time are found, and until when."""
        since, until = since.replace(microsecond=0), until.replace(microsecond=0)  # clocks change at whole seconds
        found: list[tuple[datetime | None, int]] = []
        moment, offset = since, self._offset(since, zone)
        while moment < until:
            following = moment + min(timedelta(days=1), until - moment)
            changed = self._offset(following, zone)
            if changed != offset:
                low, high = moment, following
                while high - low > _SECOND:
                    middle = low + (high - low) // _SECOND // 2 * _SECOND
                    low, high = (middle, high) if self._offset(middle, zone) == offset else (low, middle)
                found.append((high, offset))
            moment, offset = following, changed
        return (*found, (None, offset))

    def _offset(self, moment: datetime, zone: tzinfo) -> int:
        offset = _offset(in_zone(moment, zone))
        return offset if self is Span.DAY else offset % 3600


def _offset(local: datetime) -> int:
    return (local.utcoffset() or timedelta(0)) // _SECOND
