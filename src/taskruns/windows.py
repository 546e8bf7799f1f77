"""Windows of time, as people write them: ``7d``, ``yesterday``, ``2026-11-01..2026-11-08``, ``02:00..03:00``."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from taskruns.times import in_utc, parse_duration

_DATE = r"\d{4}-\d\d-\d\d"
_CLOCK = r"(?:[01]\d|2[0-3]):[0-5]\d(?::[0-5]\d(?:\.\d{1,6})?)?"
_OFFSET = r"(?:[Zz]|[+-]\d\d:?\d\d)?"
_TIME = re.compile(
    r"(?P<now>now)|(?P<age>[\d.]+(?:ms|[smhdw]))"
    rf"|(?P<day>today|yesterday|{_DATE})|(?P<clock>{_CLOCK})|(?P<datetime>{_DATE}[Tt ]{_CLOCK}{_OFFSET})",
    re.ASCII,
)
_ONE_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Window:
    """A span of time, in UTC.

    Raises:
        ValueError: it ends before it begins, or a time is naive.
    """

    since: datetime | None = None
    """The first moment in it; None if it has no beginning."""
    until: datetime | None = None
    """The first moment after it; None if it has no end."""

    def __post_init__(self) -> None:
        for name in ("since", "until"):
            moment = getattr(self, name)
            if moment is not None:
                object.__setattr__(self, name, in_utc(moment, name))
        if self.since is not None and self.until is not None and self.until < self.since:
            raise ValueError(f"the window from {self.since} until {self.until} ends before it begins")

    def contains(self, moment: datetime) -> bool:
        """Whether an aware time is in it."""
        return (self.since is None or self.since <= moment) and (self.until is None or moment < self.until)


def parse_window(text: str, *, now: datetime, zone: tzinfo = UTC) -> Window:
    """Return the window that a text names.

    A day such as ``2026-11-01``, ``today`` or ``yesterday`` is that day, and any other time of :func:`parse_moment` is
    the window from then on. ``A..B``, ``A..`` and ``..B`` go from one time until another; a day on the right belongs to
    it. A time of day on the right of another one, or of a date with one, is the first such time after it:
    ``23:00..01:00`` are two hours.

    Raises:
        ValueError: the text names no window, ``now`` is naive, or a time is out of range.
    """
    left, dots, right = (part.strip() for part in text.partition(".."))
    if not (left or right):
        raise _not_a_time(text)
    since, until = _read(left, now, zone) if left else (None, None)
    if dots:
        until = None
    if right:
        has_clock = bool(left) and _form(left) in ("clock", "datetime")
        begin, end = _read(right, now, zone, after=since if has_clock else None)
        until = end or begin
    if since is not None and until is not None and until < since:
        raise ValueError(f"{text!r} ends before it begins")
    return Window(since, until)


def parse_moment(text: str, *, now: datetime, zone: tzinfo = UTC) -> datetime:
    """Return the moment that a text names, in UTC.

    It is ``now``, a duration such as ``90m`` or ``7d`` for that long ago, a day for its beginning, a date with a time
    such as ``2026-11-01T02:00``, or a time of day such as ``02:00`` for the last time that it was. These are the times
    of ``zone`` unless an offset is given; a time that its clocks skip is taken for as long after the last one before.

    Raises:
        ValueError: the text names no moment, ``now`` is naive, or the moment is out of range.
    """
    return _read(text.strip(), now, zone)[0]


def parse_zone(name: str) -> tzinfo:
    """Return the time zone of a name such as ``Europe/Berlin``; ``UTC`` needs no database of them.

    Raises:
        ValueError: there is none.
    """
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):  # the latter two for a directory and the like
        advice = "take a name such as Europe/Berlin" if available_timezones() else "none is known: pip install tzdata"
        raise ValueError(f"there is no time zone {name!r}; {advice}") from None


def _read(text: str, now: datetime, zone: tzinfo, *, after: datetime | None = None) -> tuple[datetime, datetime | None]:
    """Return when a time begins, and ends if it is a day; a time of day is the first one after a moment, if given."""
    now = in_utc(now, "now")
    form = _form(text)
    try:
        match form:
            case "now":
                return now, None
            case "age":
                return now - parse_duration(text), None
            case "day":
                return _day(text, now.astimezone(zone).date(), zone)
            case "clock":
                return _occurrence(time.fromisoformat(text), now, zone, after), None
            case _:
                moment = _iso(text)
                return moment.replace(tzinfo=moment.tzinfo or zone).astimezone(UTC), None
    except OverflowError:
        raise ValueError(f"{text!r} is out of range") from None


def _form(text: str) -> str | None:
    match = _TIME.fullmatch(text)
    if match is None:
        raise _not_a_time(text)
    return match.lastgroup


def _day(text: str, today: date, zone: tzinfo) -> tuple[datetime, datetime]:
    match text:
        case "today":
            day = today
        case "yesterday":
            day = today - _ONE_DAY
        case _:
            day = _iso(text).date()
    begin, end = (datetime.combine(each, time(), zone).astimezone(UTC) for each in (day, day + _ONE_DAY))
    return begin, end


def _iso(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text.upper())
    except ValueError:  # a 30th of February
        raise _not_a_time(text) from None


def _occurrence(clock: time, now: datetime, zone: tzinfo, after: datetime | None) -> datetime:
    """Return when it was a time of day last, or is first after a moment."""
    if after is None:
        return max(moment for moment in _occurrences(clock, now, zone) if moment <= now)
    return min(moment for moment in _occurrences(clock, after, zone) if moment > after)


def _occurrences(clock: time, about: datetime, zone: tzinfo) -> Iterator[datetime]:
    """Yield when it is a time of day, some days before a moment and after it; twice where clocks go back."""
    day = about.astimezone(zone).date()
    for days in range(-2, 3):
        first, second = (
            datetime.combine(day + days * _ONE_DAY, clock.replace(fold=fold), zone).astimezone(UTC) for fold in (0, 1)
        )
        yield first
        if second > first:  # it is before where clocks skip this time
            yield second


def _not_a_time(text: str) -> ValueError:
    return ValueError(f"{text!r} is not a time, such as 7d, today, 2026-11-01 or 2026-11-01T02:00")
