"""``taskruns tasks``."""

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import islice

import click
from rich.text import Text

from taskruns.cli import complain
from taskruns.cli.discovery import database, db_option
from taskruns.cli.durations import DurationWithUnit
from taskruns.cli.options import (
    ROWS,
    json_option,
    limit_option,
    phase_option,
    phases_of,
    problems_option,
    task_and_glob,
    task_argument,
    tz_option,
    window_of,
)
from taskruns.cli.output import STYLES, percent, print_json, print_rows, printable, zone_name
from taskruns.cli.task_id import TaskId
from taskruns.cli.unknown import is_unknown, nothing, unknown
from taskruns.filters import RunFilter
from taskruns.model import TaskPhase, TaskRun
from taskruns.summaries import TaskSummary
from taskruns.wording import compact, local, readable

_PAGE = 100
"""Tasks that are looked at together."""

_MARKS = {
    TaskPhase.SUCCEEDED: ".",
    TaskPhase.FAILED: "F",
    TaskPhase.TIMEOUT: "T",
    TaskPhase.EXHAUSTED: "X",
    TaskPhase.CANCELED: "c",
    TaskPhase.RUNNING: ">",
}


@click.command("tasks", short_help="List tasks and how they are doing.")
@task_argument
@phase_option
@problems_option
@click.option("--stale", type=DurationWithUnit(), help="Only if no success ended for so long: 2d, 26h.")
@click.option(
    "--since", metavar="TIME", help="Rate and median of the runs that started since: today, 30d; 7d unless given."
)
@click.option("--started", metavar="WINDOW", help="Or within: yesterday, 2026-11-01..2026-11-08.")
@limit_option
@click.option("--after", type=TaskId(), help="Go on after this task.")
@tz_option
@json_option
@db_option
def tasks_command(
    task: str | None,
    phases: list[TaskPhase],
    problems: bool,
    stale: float | None,
    since: str | None,
    started: str | None,
    limit: int | None,
    after: str | None,
    zone: tzinfo,
    as_json: bool,
) -> int:
    """List tasks and how they are doing, in the order of their ids: TASK, those that match GLOB, or all.

    GLOB is a pattern such as 'backup-*'; [*] is a star.

    --phase and --problems are about the last run. RECENT are the outcomes of up to 20 runs, the newest on the right:
    . succeeded, F failed, T timeout, X exhausted, c canceled, > running.
    """
    window = window_of("7d" if since is started is None else since, started, zone)
    most = limit or (None if as_json else ROWS)
    with database().reading() as history:

        def page(size: int, place: str | None) -> Sequence[TaskSummary]:
            return history.summaries(
                task,
                phases=phases_of(phases, problems=problems),
                stale_after=None if stale is None else timedelta(seconds=stale),
                window=window,
                limit=size,
                after=place,
            )

        found = _paged(page, after, None if most is None else most + 1)
        if as_json:
            is_any = False
            for summary in islice(found, most):
                is_any = True
                print_json(summary.to_wire())
        else:
            shown = list(islice(found, most))
            is_any = bool(shown)
            _print(shown, zone)
            if next(found, None) is not None:
                complain(f"there are more: --after {shlex.quote(printable(shown[-1].task_id))}")
        wanted = RunFilter(*task_and_glob(task))
        if is_any:
            return 0
        if is_unknown(history, wanted):
            return unknown(str(wanted.task_id))
        nothing("no tasks match" if task is None else f"no task matches {task}")
        return 0


def _paged(
    page: Callable[[int, str | None], Sequence[TaskSummary]], after: str | None, most: int | None
) -> Iterator[TaskSummary]:
    while most is None or most > 0:
        size = _PAGE if most is None else min(_PAGE, most)
        found = page(size, after)
        yield from found
        if len(found) < size:
            return
        after = found[-1].task_id
        most = None if most is None else most - size


def _print(summaries: Sequence[TaskSummary], zone: tzinfo) -> None:
    now = datetime.now(UTC)
    if sys.stdout.isatty():
        headings = ["TASK", "PHASE", "AGO", "SUCCESS", "PROBLEM", "RECENT", "RATE", "MEDIAN"]
    else:
        name = zone_name(zone)
        times = [f"{what} ({name})" for what in ("LAST", "SUCCESS", "PROBLEM")]
        headings = ["TASK", "PHASE", *times, "RECENT", "RATE", "MEDIAN"]

    def when(run: TaskRun | None, style: str) -> Text:
        if run is None:
            return Text("never", style=style)
        moment = run.finished_at or run.started_at
        return Text(compact(now - moment) if sys.stdout.isatty() else local(moment, zone))

    print_rows(headings, [_row(summary, when) for summary in summaries])


def _row(summary: TaskSummary, when: Callable[[TaskRun | None, str], Text]) -> list[Text]:
    run, stats = summary.last_run, summary.stats
    succeeded = stats.by_phase.get(TaskPhase.SUCCEEDED, 0)
    recent = Text(no_wrap=True)
    for phase in reversed(summary.outcomes):
        recent.append(_MARKS[phase], style=STYLES[phase])
    return [
        Text(printable(summary.task_id)),
        Text(run.phase, style=STYLES[run.phase]),
        when(run, ""),
        when(summary.last_success, "red"),
        when(summary.last_problem, "dim"),
        recent,
        Text("" if stats.success_rate is None else percent(succeeded, succeeded + stats.problems)),
        Text("" if stats.duration is None else readable(stats.duration.p50)),
    ]
