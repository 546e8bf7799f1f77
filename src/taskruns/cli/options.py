"""The options and arguments that commands share, and what they mean together."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, tzinfo
from typing import Any

import click

from taskruns.cli.numbers import Whole
from taskruns.cli.task_id import TaskId
from taskruns.filters import ANY_TIME
from taskruns.globs import Glob, is_glob
from taskruns.model import PROBLEMS, TaskPhase, checked_phase
from taskruns.windows import Window, parse_moment, parse_window, parse_zone

ROWS = 50
"""Rows of a table, unless told otherwise. JSON has no such limit."""


class TaskPattern(TaskId):
    """The id of a task, or a pattern of them."""

    name = "task|glob"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002  (the names are click's)
        """Return what help calls it, as an argument too."""
        return "TASK|GLOB"

    def convert(self, value: object, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """Return the text."""
        text = str(value)
        try:
            literal = Glob(text).literal if is_glob(text) else text
        except ValueError as error:
            self.fail(str(error), parameter, context)
        if literal is not None:
            super().convert(literal, parameter, context)
        return text


def task_and_glob(text: str | None) -> tuple[str | None, str | None]:
    """Return the task, or else the pattern, that a filter is given."""
    return (None, text) if text is not None and is_glob(text) else (text, None)


def _phases(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> list[TaskPhase]:
    try:
        named = [[name.strip() for name in value.split(",") if name.strip()] or [value] for value in values]
        return [checked_phase(name) for names in named for name in names]
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _zone(_context: click.Context, _parameter: click.Parameter, value: str) -> tzinfo:
    try:
        return parse_zone(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


_PHASES = [phase for phase in TaskPhase if phase is not TaskPhase.PENDING]
"""Those that a run can have."""

task_argument = click.argument("task", type=TaskPattern(), required=False)
phase_option = click.option(
    "--phase",
    "phases",
    multiple=True,
    metavar="PHASES",
    callback=_phases,
    help=f"Only these, separated by commas: {', '.join(_PHASES)}. For all that went wrong use --problems.",
)
problems_option = click.option("--problems", is_flag=True, help="Only failed, timeout and exhausted.")
tz_option = click.option(
    "--tz",
    "zone",
    metavar="ZONE",
    default="UTC",
    callback=_zone,
    help="The time zone of what is given and shown, such as Europe/Berlin; UTC unless given.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, a line for each.")
json_object_option = click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
limit_option = click.option("--limit", type=Whole(1), help=f"Print so many; of a table {ROWS}, of JSON all.")


def phases_of(phases: list[TaskPhase], *, problems: bool) -> list[TaskPhase] | None:
    """Return the phases that the two options mean together."""
    return [*phases, *PROBLEMS] if problems else phases or None


def window_of(since: str | None, started: str | None, zone: tzinfo) -> Window:
    """Return the window in which runs started, by one option or the other.

    Raises:
        UsageError: both are given, or a text is no time.
    """
    if since is not None and started is not None:
        raise click.UsageError("--since and --started exclude each other: --started A..B has both ends")
    if since is None:
        return window_within("--started", started, zone)
    if ".." in since:
        raise click.UsageError(f"--since is one time; a window is --started {since}")
    with _of_option("--since"):
        return Window(parse_moment(since, now=datetime.now(UTC), zone=zone))


def window_within(option: str, text: str | None, zone: tzinfo) -> Window:
    """Return the window that an option names.

    Raises:
        UsageError: the text is none.
    """
    with _of_option(option):
        return ANY_TIME if text is None else parse_window(text, now=datetime.now(UTC), zone=zone)


@contextmanager
def _of_option(option: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=f"'{option}'") from None
