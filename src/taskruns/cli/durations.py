"""Spans of time, as people write them."""

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


class DurationWithUnit(Duration):
    """The same, but for a bare number: where hours and days are meant, it would hardly mean seconds."""

    def convert(self, value: object, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """Return the seconds."""
        text = str(value).strip()
        if text.replace(".", "", 1).isdecimal():
            self.fail(f"{text} of what? such as {text}h", parameter, context)
        return super().convert(value, parameter, context)


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
