"""The options that say which runs are asked for."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo
from functools import wraps
from typing import Any, TypeVar

import click

from taskruns.cli.durations import Duration
from taskruns.cli.task_id import TaskId
from taskruns.filters import ANY_TIME, RunFilter
from taskruns.globs import Glob, is_glob
from taskruns.model import PROBLEMS, TaskPhase, checked_phase
from taskruns.windows import Window, parse_moment, parse_window, parse_zone

F = TypeVar("F", bound=Callable[..., Any])


class TaskPattern(TaskId):
    """The id of a task, or a pattern of them."""

    name = "task|glob"

    def convert(self, value: object, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """Return the text."""
        text = str(value)
        try:
            literal = Glob(text).literal if is_glob(text) else text
        except ValueError as error:
            self.fail(str(error), parameter, context)
        return text if literal is None else super().convert(literal, parameter, context)


def task_and_glob(text: str | None) -> tuple[str | None, str | None]:
    """Return the task, or else the pattern, that a filter is given."""
    return (None, text) if text is not None and is_glob(text) else (text, None)


def _phases(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> list[TaskPhase]:
    try:
        return [checked_phase(name.strip()) for value in values for name in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _zone(_context: click.Context, _parameter: click.Parameter, value: str) -> tzinfo:
    try:
        return parse_zone(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


task_argument = click.argument("task", type=TaskPattern(), required=False)
phase_option = click.option(
    "--phase",
    "phases",
    multiple=True,
    metavar="PHASES",
    callback=_phases,
    help=f"Only these, separated by commas: {', '.join(TaskPhase)}. What needs a look is --problems.",
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
since_option = click.option(
    "--since", metavar="TIME", help="Started since: 7d, today, 2026-11-01, 02:00, 2026-11-01T02:00."
)

_OPTIONS = (
    phase_option,
    problems_option,
    since_option,
    click.option("--started", metavar="WINDOW", help="Started within: 7d, 2h..1h, yesterday, 2026-11-01..2026-11-08."),
    click.option("--finished", metavar="WINDOW", help="Ended within."),
    click.option("--min-duration", type=Duration(), help="Took at least so long: 30s, 5m, 2h."),
    click.option("--max-duration", type=Duration(), help="Took at most so long."),
    click.option("--exit-code", type=int, help="Ended with this exit code."),
    click.option("--source", help="From this host, or stream."),
    click.option("--submission", help="The attempts of this submission."),
    click.option("--error", metavar="TEXT", help="With this text in the error, in a window of time."),
    click.option("--recovered/--observed", default=None, help="Whose outcome was inferred, or observed."),
    click.option("--active/--ended", default=None, help="In progress, or not any more."),
    tz_option,
)


def filter_options(command: F) -> F:
    """Let a command take what says which runs are asked for: it gets ``wanted``, a filter, and ``zone``."""

    @wraps(command)
    def filtered(
        *,
        task: str | None,
        phases: list[TaskPhase],
        problems: bool,
        since: str | None,
        started: str | None,
        finished: str | None,
        min_duration: float | None,
        max_duration: float | None,
        zone: tzinfo,
        **others: Any,
    ) -> Any:
        names = ("exit_code", "source", "submission", "error", "recovered", "active")
        try:
            wanted = RunFilter(
                *task_and_glob(task),
                phases=phases_of(phases, problems=problems),
                started=window_of(since, started, zone),
                finished=ANY_TIME if finished is None else parse_window(finished, now=datetime.now(UTC), zone=zone),
                min_duration=None if min_duration is None else timedelta(seconds=min_duration),
                max_duration=None if max_duration is None else timedelta(seconds=max_duration),
                **{name: others.pop(name) for name in names},
            )
            for window in (wanted.started, wanted.finished):  # they may be shown
                _ = [moment.astimezone(zone) for moment in (window.since, window.until) if moment is not None]
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        except OverflowError:
            raise click.UsageError(f"a time is out of range in {zone}") from None
        return command(wanted=wanted, zone=zone, **others)

    for option in reversed(_OPTIONS):
        option(filtered)
    return filtered  # type: ignore[return-value]  # click calls it by name


def phases_of(phases: list[TaskPhase], *, problems: bool) -> list[TaskPhase] | None:
    """Return the phases that the two options mean together."""
    return [*phases, *PROBLEMS] if problems else phases or None


def window_of(since: str | None, started: str | None, zone: tzinfo) -> Window:
    """Return the window in which runs started, by one option or the other.

    Raises:
        UsageError: both are given.
        ValueError: a text is no time.
    """
    if since is not None and started is not None:
        raise click.UsageError("--since and --started exclude each other: --started A..B has both ends")
    now = datetime.now(UTC)
    if since is not None:
        if ".." in since:
            raise click.UsageError(f"--since is one time; a window is --started {since}")
        return Window(parse_moment(since, now=now, zone=zone))
    return ANY_TIME if started is None else parse_window(started, now=now, zone=zone)
