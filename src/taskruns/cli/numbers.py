"""Numbers, as people write them."""

from typing import Any

import click


class Whole(click.IntRange):
    """A whole number, within bounds."""

    name = "n"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """Return the number."""
        return super().convert(_read(self, int, value, "a whole number", parameter, context), parameter, context)


class Seconds(click.FloatRange):
    """A number of seconds, within bounds."""

    name = "seconds"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """Return the number."""
        return super().convert(_read(self, float, value, "a number of seconds", parameter, context), parameter, context)


def _read(
    kind: click.ParamType[Any],
    number: type[int] | type[float],
    value: Any,
    what: str,
    parameter: click.Parameter | None,
    context: click.Context | None,
) -> Any:
    try:
        return number(value)
    except ValueError:
        kind.fail(f"{str(value)!r} is not {what}", parameter, context)
