"""``taskruns stats``."""

import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from importlib.util import find_spec
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from taskruns.cli.discovery import database, db_option
from taskruns.cli.filters import filter_options
from taskruns.cli.options import json_object_option, task_argument
from taskruns.cli.output import STYLES, holds_unicode, percent, print_json, print_rows, printable, zone_name
from taskruns.cli.unknown import is_unknown, unknown
from taskruns.filters import ANY_TIME, RunFilter
from taskruns.model import TaskPhase
from taskruns.stats import RunStats, Span, StatsPart
from taskruns.times import rfc3339
from taskruns.windows import Window
from taskruns.wording import local, readable

_BY_HOUR = timedelta(days=3)
"""The longest time that is plotted by the hour, unless told otherwise."""

_PLOTTED = 200_000
"""The most runs that are plotted unless told by what: it takes as long again as the rest."""


def _span(_context: click.Context, _parameter: click.Parameter, value: str | None) -> Span | None:
    return None if value is None else Span(value)


@click.command("stats", short_help="Count runs, and tell how long they took.")
@task_argument
@filter_options
@click.option(
    "--by", type=click.Choice([span.value for span in Span]), callback=_span, help="Those of each day, or hour, too."
)
@json_object_option
@db_option
def stats_command(wanted: RunFilter, zone: tzinfo, by: Span | None, as_json: bool) -> int:
    """Tell how many runs there were, how they ended and how long they took.

    Those of TASK, of the tasks that match GLOB, or of all tasks. GLOB is a pattern such as 'backup-*'; [*] is a star. A
    terminal shows plots of them over time too, if taskruns[plot] is installed.
    """
    can_plot = not as_json and sys.stdout.isatty() and holds_unicode()
    is_plotted = can_plot and find_spec("plotille") is not None
    with database().reading() as history:
        stats = history.stats(wanted, by=by, zone=zone)
        if stats.runs == 0 and is_unknown(history, wanted):
            return unknown(str(wanted.task_id))
        span, parts = by, stats.parts
        if is_plotted and by is None and stats.runs <= _PLOTTED:
            span = _fitting(wanted.started)
            parts = history.stats(wanted, by=span, zone=zone).parts
            if span is Span.DAY and _is_short(parts):
                span = Span.HOUR
                parts = history.stats(wanted, by=span, zone=zone).parts
    if as_json:
        print_json(_wire(wanted, stats, by))
        return 0
    _print_facts(wanted, stats, zone)
    if by is not None and stats.parts:
        click.echo()
        _print_parts(stats.parts, by, zone)
    if can_plot and (len(parts) > 1 or (stats.runs and not is_plotted)):
        _print_plots(parts, span if is_plotted else None, wanted.started)
    return 0


def _print_plots(parts: Sequence[StatsPart], by: Span | None, window: Window) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print()
    if by is None:
        console.print(Text("plots over time: pip install 'taskruns[plot]'", style="dim"))
        return
    from taskruns.cli.plots import plots_of  # noqa: PLC0415  (it needs the extra)

    console.print(plots_of(parts, by, window, console.width))


def _fitting(window: Window) -> Span:
    """Return by what the runs of a window are plotted."""
    if window.since is None:
        return Span.DAY
    until = datetime.now(UTC) if window.until is None else window.until
    return Span.HOUR if until - window.since <= _BY_HOUR else Span.DAY


def _is_short(parts: Sequence[StatsPart]) -> bool:
    """Whether the runs of some days are better plotted by the hour."""
    return bool(parts) and parts[-1].start - parts[0].start < _BY_HOUR


def _wire(wanted: RunFilter, stats: RunStats, by: Span | None) -> dict[str, Any]:
    about = {"taskId": wanted.task_id, "taskGlob": wanted.task_glob}
    wire: dict[str, Any] = {name: text for name, text in about.items() if text is not None}
    for name, window in _windows(wanted):
        ends = {"since": window.since, "until": window.until}
        wire[name] = {end: rfc3339(moment) for end, moment in ends.items() if moment is not None}
    wire |= stats.to_wire()
    if by is not None:
        wire[f"by{by.capitalize()}"] = [
            {"start": part.start.isoformat().replace("+00:00", "Z")} | part.stats.to_wire() for part in stats.parts
        ]
    return wire


def _windows(wanted: RunFilter) -> list[tuple[str, Window]]:
    both = (("started", wanted.started), ("finished", wanted.finished))
    return [(name, window) for name, window in both if window != ANY_TIME]


def _print_facts(wanted: RunFilter, stats: RunStats, zone: tzinfo) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for name, value in _facts(wanted, stats, zone):
        line = Text.assemble((f"{name:<14}", "bold"), value)
        line.rstrip()
        console.print(line)


def _facts(wanted: RunFilter, stats: RunStats, zone: tzinfo) -> Iterator[tuple[str, Text]]:
    which = wanted.task_id or wanted.task_glob
    yield "task" if wanted.task_id else "tasks", Text(printable(which) if which else "all")
    for name, window in _windows(wanted):
        yield name, Text(f"{_window(window, zone)} {zone_name(zone)}")
    width = len(str(stats.runs))
    yield "runs", Text(str(stats.runs))
    for phase in TaskPhase:
        if runs := stats.by_phase.get(phase):
            yield f"  {phase}", Text(f"{runs:>{width}}  {percent(runs, stats.runs):>7}", style=STYLES[phase])
    succeeded = stats.by_phase.get(TaskPhase.SUCCEEDED, 0)
    if stats.success_rate is not None:
        attempts = stats.attempts_per_success
        per_success = "" if attempts is None else f", {attempts:.2f} attempts for each success"
        yield "success rate", Text(percent(succeeded, succeeded + stats.problems) + per_success)
    if stats.duration is not None:
        for title, names in (("duration", ("min", "p50", "mean")), ("", ("p95", "p99", "max"))):
            spans = [f"{name:<4} {readable(getattr(stats.duration, name)):<10}" for name in names]
            yield title, Text("".join(spans))
    for title, moment in (("last success", stats.last_success_at), ("last problem", stats.last_problem_at)):
        if moment is not None:
            ago = readable(datetime.now(UTC) - moment)
            yield title, Text(f"{local(moment, zone)} {zone_name(zone)}, {ago} ago")


def _window(window: Window, zone: tzinfo) -> str:
    since, until = (moment and local(moment, zone) for moment in (window.since, window.until))
    if since and until:
        return f"{since} until {until}"
    return f"since {since}" if since else f"until {until}"


def _print_parts(parts: Sequence[StatsPart], by: Span, zone: tzinfo) -> None:
    headings = (f"{by.upper()} ({zone_name(zone)})", "RUNS", "PROBLEMS", "SUCCESS", "P50", "P95")
    print_rows(headings, [_cells(part, by, zone) for part in parts])


def _cells(part: StatsPart, by: Span, zone: tzinfo) -> list[Text]:
    stats, start = part.stats, local(part.start, zone)
    succeeded = stats.by_phase.get(TaskPhase.SUCCEEDED, 0)
    return [
        Text(start[:10] if by is Span.DAY else start[:16]),
        Text(str(stats.runs)),
        Text(str(stats.problems), style=STYLES[TaskPhase.FAILED] if stats.problems else "dim"),
        Text("" if stats.success_rate is None else percent(succeeded, succeeded + stats.problems)),
        Text("" if stats.duration is None else readable(stats.duration.p50)),
        Text("" if stats.duration is None else readable(stats.duration.p95)),
    ]
