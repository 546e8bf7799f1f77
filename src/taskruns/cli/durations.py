"""Spans of time, as people write and read them."""

from datetime import timedelta
from typing import Any

import click

from taskruns.times import parse_duration


class Duration(click.ParamType[Any]):
    """Seconds, written as timeout(1) and sleep(1) take them: ``30``, ``30s``, ``1.5m``, ``2h``, ``1d``; or ``2w``."""

    name = "duration"

    def convert(self, value: object, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """Return the seconds."""
        if isinstance(value, int | float):
            return float(value)
        try:
            return parse_duration(str(value)).total_seconds()
        except ValueError as error:
            self.fail(str(error), parameter, context)


class DurationRange(Duration):
    """The least and the most seconds, written like ``1s..60s``; a single duration is both."""

    name = "duration..duration"

    def convert(self, value: object, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """Return both in seconds."""
        if isinstance(value, tuple):
            return value
        low, separator, high = str(value).partition("..")
        least = super().convert(low, parameter, context)
        most = super().convert(high, parameter, context) if separator else least
        if least > most:
            self.fail(f"{value!r} ends before it begins", parameter, context)
        return least, most


def readable(span: timedelta) -> str:
    """Return a span as a few characters: ``0.25 s``, ``3m 05s``, ``2h 07m``, ``4d 01h``."""
    seconds = span.total_seconds()
    if seconds < 59.95:  # noqa: PLR2004  (rounds to less than a minute)
        return f"{seconds:.3f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}h"
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {seconds:02}s"


_UNITS = (("s", 1, 60), ("m", 60, 60), ("h", 3600, 48), ("d", 86400, 1000))
"""Each with its seconds, and with how many of it are told in the next, larger one."""


def compact(span: timedelta) -> str:
    """Return a span in one unit, rounded down: ``12s``, ``3m``, ``26h``, ``5d``, ``3y``; what is negative is ``0s``."""
    seconds = max(0, span // timedelta(seconds=1))
    for unit, size, most in _UNITS:
        if seconds < most * size:
            return f"{seconds // size}{unit}"
    return f"{seconds // (365 * 86400)}y"
