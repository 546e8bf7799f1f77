"""Windows of time, as people write them: ``7d``, ``yesterday``, ``2026-11-01..2026-11-08``, ``02:00..03:00``."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
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
    it. A time of day on the right is the first such time after what is on the left: ``23:00..01:00`` are two hours, and
    ``yesterday..02:00`` are the first two of yesterday. Where clocks go back such a window has both of the times that
    are there twice; ``02:00..03:00`` is empty in a night that skips it.

    Raises:
        ValueError: the text names no window, ``now`` is naive, or a time is out of range.
    """
    left, dots, right = (part.strip() for part in text.partition(".."))
    if not (left or right) or not all(_TIME.fullmatch(part) for part in (left, right) if part):
        raise _not_a_window(text)
    with _in_range(text):
        if left and right and _form(right) == "clock":
            return _until_clock(_named(left, now, zone), time.fromisoformat(right), zone)
        since, until = _read(left, now, zone) if left else (None, None)
        if dots:
            until = None
        if right:
            begin, end = _read(right, now, zone)
            until = end or begin
            if since is not None and begin < since and until <= since:
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
    with _in_range(text.strip()):
        return _utc(_named(text.strip(), now, zone), zone)


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


@contextmanager
def _in_range(text: str) -> Iterator[None]:
    try:
        yield
    except OverflowError:
        raise ValueError(f"{text!r} is out of range") from None


def _read(text: str, now: datetime, zone: tzinfo) -> tuple[datetime, datetime | None]:
    """Return when a time begins, and ends if it is a day."""
    begin = _named(text, now, zone)
    end = begin + _ONE_DAY if _form(text) == "day" else None
    return _utc(begin, zone), None if end is None else _utc(end, zone)


def _named(text: str, now: datetime, zone: tzinfo) -> datetime:
    """Return the time that a text names, a day's midnight; it is naive if it is one by the clock of the zone."""
    now = in_utc(now, "now")
    match _form(text):
        case "now":
            return now
        case "age":
            return now - parse_duration(text)
        case "day":
            return datetime.combine(_day(text, now.astimezone(zone).date()), time())
        case "clock":
            past = (each for each in _occurrences(time.fromisoformat(text), now, zone) if _utc(each, zone) <= now)
            return max(past, key=lambda each: _utc(each, zone))
        case _:
            return _iso(text)


def _form(text: str) -> str | None:
    match = _TIME.fullmatch(text)
    if match is None:
        raise _not_a_time(text)
    return match.lastgroup


def _day(text: str, today: date) -> date:
    match text:
        case "today":
            return today
        case "yesterday":
            return today - _ONE_DAY
        case _:
            return _iso(text).date()


def _iso(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text.upper())
    except ValueError:  # a 30th of February
        raise _not_a_time(text) from None


def _utc(named: datetime, zone: tzinfo) -> datetime:
    return named.replace(tzinfo=named.tzinfo or zone).astimezone(UTC)


def _until_clock(begin: datetime, clock: time, zone: tzinfo) -> Window:
    """Return the window from a time until the first time of day after it: the first by the clock if that named it."""
    if begin.tzinfo is not None:
        since = _utc(begin, zone)
        moments = (_utc(each, zone) for each in _occurrences(clock, since, zone))
        return Window(since, min(moment for moment in moments if moment > since))
    begin, end = begin.replace(fold=0), datetime.combine(begin.date(), clock)
    if end <= begin:
        end += _ONE_DAY
    since, *until = (_utc(each, zone) for each in (begin, end, end.replace(fold=1)))
    is_skipped = since.astimezone(zone).replace(tzinfo=None) != begin
    # Where clocks skip a time as well, its fold is before that: nothing is left of the window.
    return Window(since, max(since, until[1] if is_skipped else max(until)))


def _occurrences(clock: time, about: datetime, zone: tzinfo) -> Iterator[datetime]:
    """Yield when clocks show a time of day, some days before a moment and after it; twice where they go back."""
    day = about.astimezone(zone).date()
    for days in range(-2, 3):
        first = datetime.combine(day + days * _ONE_DAY, clock)
        second = first.replace(fold=1)
        yield first
        if _utc(second, zone) > _utc(first, zone):  # it is before where clocks skip this time
            yield second


def _not_a_time(text: str) -> ValueError:
    return ValueError(f"{text!r} is not a time, such as 7d, today, 2026-11-01 or 2026-11-01T02:00")


def _not_a_window(text: str) -> ValueError:
    return ValueError(f"{text!r} is not a window of time, such as 7d, yesterday, 2026-11-01..2026-11-08 or 2h..1h")
