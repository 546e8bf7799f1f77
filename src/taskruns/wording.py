"""Facts as people read them: spans of time, moments, errors."""

from datetime import datetime, timedelta, tzinfo

from taskruns.times import in_zone

_MOST_HOURS = 48
"""From as many on they are told as days: of a day and a bit, people say the hours."""


def readable(span: timedelta) -> str:
    """Return a span as a few characters: ``0.250 s``, ``3m 05s``, ``26h 07m``, ``4d 01h``; a negative one is none."""
    seconds = max(span.total_seconds(), 0.0)
    if seconds < 59.95:  # noqa: PLR2004  (rounds to less than a minute)
        return f"{seconds:.3f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= _MOST_HOURS:
        return f"{hours // 24}d {hours % 24:02}h"
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {seconds:02}s"


_UNITS = (("s", 1, 60), ("m", 60, 60), ("h", 3600, _MOST_HOURS), ("d", 86400, 1000))
"""Each with its seconds, and with how many of it are told in the next, larger one."""


def compact(span: timedelta) -> str:
    """Return a span in one unit, rounded down: ``12s``, ``3m``, ``26h``, ``5d``, ``3y``; a negative one is none."""
    seconds = max(0, span // timedelta(seconds=1))
    for unit, size, most in _UNITS:
        if seconds < most * size:
            return f"{seconds // size}{unit}"
    return f"{seconds // (365 * 86400)}y"


def local(moment: datetime, zone: tzinfo, precision: str = "seconds") -> str:
    """Return a moment by the clock of a zone, such as ``2026-11-24 02:15:41``; precisions are isoformat()'s."""
    return in_zone(moment, zone).replace(tzinfo=None).isoformat(" ", precision)


def last_line(error: str | None) -> str:
    """Return the last line of an error, which says most: of a traceback, of what a command printed."""
    lines = [line for line in (error or "").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
