"""The options of a filter: what says which runs are asked for."""

from collections.abc import Callable
from datetime import timedelta, tzinfo
from functools import wraps
from typing import Any, TypeVar

import click

from taskruns.cli.durations import Duration
from taskruns.cli.numbers import Whole
from taskruns.cli.options import (
    phase_option,
    phases_of,
    problems_option,
    task_and_glob,
    tz_option,
    window_of,
    window_within,
)
from taskruns.filters import RunFilter
from taskruns.model import TaskPhase

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    phase_option,
    problems_option,
    click.option("--since", metavar="TIME", help="Started since: 7d, today, 02:00, 2026-11-01, 2026-11-01T02:00."),
    click.option("--started", metavar="WINDOW", help="Started within: 7d, 2h..1h, yesterday, 2026-11-01..2026-11-08."),
    click.option("--finished", metavar="WINDOW", help="Ended within, likewise."),
    click.option("--min-duration", type=Duration(), help="Took at least so long: 30s, 5m, 2h."),
    click.option("--max-duration", type=Duration(), help="Took at most so long."),
    click.option("--exit-code", type=Whole(-(2**31), 2**31 - 1), metavar="N", help="Ended with this exit code."),
    click.option("--source", metavar="NAME", help="From this host, or stream."),
    click.option("--submission", metavar="ID", help="The attempts of this submission."),
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
        if others["error"] and since is started is finished is None:
            raise click.UsageError("--error is looked for in a window of time: give --since, --started or --finished")
        names = ("exit_code", "source", "submission", "error", "recovered", "active")
        try:
            wanted = RunFilter(
                *task_and_glob(task),
                phases=phases_of(phases, problems=problems),
                started=window_of(since, started, zone),
                finished=window_within("--finished", finished, zone),
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
