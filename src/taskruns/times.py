"""Moments: aware, in UTC, as text and as numbers."""

import re
from datetime import UTC, datetime, timedelta, tzinfo


def in_utc(value: datetime, what: str) -> datetime:
    """Return an aware time in UTC; a naive one is refused, since nobody knows which moment it means."""
    if not isinstance(value, datetime):
        raise TypeError(f"{what} is a datetime, not {type(value).__name__}")
    if value.tzinfo is UTC:
        return value
    if value.utcoffset() is None:
        raise ValueError(f"{what} must be an aware datetime, such as datetime.now(timezone.utc), not {value!r}")
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"{what} is out of range: {value!r}") from None


def in_zone(moment: datetime, zone: tzinfo) -> datetime:
    """Return a moment by the clock of a zone, or as it is where that would be before the year 1 or after 9999."""
    try:
        return moment.astimezone(zone)
    except OverflowError:
        return moment


def rfc3339(value: datetime) -> str:
    """Return an aware time as RFC 3339 in UTC, always with six fraction digits and ``Z``."""
    return value.astimezone(UTC).isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)")
_FIRST_CREDIBLE_MS = 100_000_000_000
"""1973 as milliseconds, the year 5138 as seconds: a smaller integer was meant as seconds."""


def parse_time(value: str | int, what: str = "a time") -> datetime:
    """Return the moment that RFC 3339 text or integer Unix milliseconds name. Both exist in the wild."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < _FIRST_CREDIBLE_MS:
            raise ValueError(f"{what} must be in milliseconds since 1970; {value} can only be seconds")
        try:
            return datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=value)
        except OverflowError:
            raise ValueError(f"{what} is out of range: {value}") from None
    if not isinstance(value, str):
        raise TypeError(f"{what} is RFC 3339 text or integer Unix milliseconds, not {value!r}")
    if not _RFC3339.fullmatch(value):
        raise ValueError(f"{what} is not an RFC 3339 time with its offset, such as 2026-11-24T15:04:05Z: {value!r}")
    try:
        moment = datetime.fromisoformat(value.upper())
        return moment if moment.tzinfo is UTC else in_utc(moment, what)
    except ValueError as error:
        raise ValueError(f"{what} is not a time: {value!r} ({error})") from None


_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?|\.\d+)(ms|[smhdw]?)", re.ASCII)
_CENTURY = timedelta(days=36500)


def parse_duration(text: str) -> timedelta:
    """Return the time that text like ``30s``, ``1.5m``, ``2h``, ``1d`` or ``2w`` names; ``30`` are seconds."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a duration, such as 30s, 1.5m, 2h, 1d or 2w")
    seconds = float(match[1]) * _UNITS[match[2]]
    if seconds > _CENTURY.total_seconds():
        raise ValueError(f"{text!r} is longer than a century")
    return timedelta(seconds=seconds)
