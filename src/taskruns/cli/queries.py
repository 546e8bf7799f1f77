"""``taskruns runs``, ``show``, ``last`` and ``active``."""

import shlex
from datetime import tzinfo

import click

from taskruns.cli import complain
from taskruns.cli.discovery import database, db_option
from taskruns.cli.filters import filter_options
from taskruns.cli.numbers import Whole
from taskruns.cli.options import (
    ROWS,
    json_object_option,
    json_option,
    limit_option,
    phase_option,
    phases_of,
    problems_option,
    task_and_glob,
    task_argument,
    tz_option,
)
from taskruns.cli.output import columns_of, print_json, print_run, print_table, printable
from taskruns.cli.task_id import TaskId
from taskruns.cli.unknown import is_unknown, nothing, unknown
from taskruns.filters import RunFilter, RunOrder
from taskruns.model import MAX_ATTEMPT, TaskPhase, TaskRun
from taskruns.reader import PAGE, Reader

_task = click.argument("task", type=TaskId())


@click.command("runs", short_help="List runs, the newest first.")
@task_argument
@filter_options
@click.option("--oldest-first", is_flag=True, help="Oldest first instead of newest first.")
@click.option("--longest-first", is_flag=True, help="By duration: of a task, or in a window.")
@click.option("--count", "only_count", is_flag=True, help="Only print how many there are.")
@limit_option
@click.option("--after", metavar="CURSOR", help="Go on where an earlier page ended.")
@json_option
@db_option
def runs_command(
    wanted: RunFilter,
    zone: tzinfo,
    oldest_first: bool,
    longest_first: bool,
    only_count: bool,
    limit: int | None,
    after: str | None,
    as_json: bool,
) -> int:
    """List runs: of TASK, of the tasks that match GLOB, or of all tasks.

    GLOB is a pattern such as 'backup-*'; [*] is a star.

    Newest first: of one task by attempt, of several by their start, and with --problems by their end.
    """
    if oldest_first and longest_first:
        raise click.UsageError("--oldest-first and --longest-first exclude each other")
    order = RunOrder.OLDEST if oldest_first else RunOrder.LONGEST if longest_first else RunOrder.NEWEST
    if only_count and (oldest_first or longest_first or limit is not None or after is not None):
        raise click.UsageError("--count counts all: it goes with no order, --limit or --after")
    with database().reading() as history:
        if only_count:
            count = history.count_runs(wanted)
            if count == 0 and is_unknown(history, wanted):
                return unknown(str(wanted.task_id))
            print_json({"runs": count}) if as_json else click.echo(str(count))
            return 0
        return _list(history, wanted, order, zone, limit=limit, after=after, as_json=as_json)


def _list(
    history: Reader,
    wanted: RunFilter,
    order: RunOrder,
    zone: tzinfo,
    *,
    limit: int | None,
    after: str | None,
    as_json: bool,
) -> int:
    left = limit or (None if as_json else ROWS)
    shown: list[TaskRun] = []
    is_any = False
    while left is None or left > 0:
        try:
            page = history.runs(wanted, order=order, limit=PAGE if left is None else min(PAGE, left), after=after)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        is_any = is_any or bool(page.runs)
        if as_json:
            for run in page.runs:
                print_json(run.to_wire())
        else:
            shown += page.runs
        after = page.next_cursor
        left = None if left is None else left - len(page.runs)
        if after is None:
            break
    if not is_any and is_unknown(history, wanted):
        return unknown(str(wanted.task_id))
    if not is_any:
        nothing("no runs match")
    if not as_json:
        print_table(shown, columns_of(wanted), zone)
    if after is not None:
        complain(f"there are more: --after {shlex.quote(printable(after))}")
    return 0


@click.command("show", short_help="Show all that is known of one run of a task.")
@_task
@click.argument("attempt", type=Whole(1, MAX_ATTEMPT), required=False)
@tz_option
@json_object_option
@db_option
def show_command(task: str, attempt: int | None, zone: tzinfo, as_json: bool) -> int:
    """Show all that is known of a run of TASK: of its latest, or of ATTEMPT."""
    with database().reading() as history:
        run = history.last_run(task) if attempt is None else history.get_run(task, attempt)
        if run is None:
            if attempt is None or history.last_run(task) is None:
                return unknown(task, takes_one="show")
            complain(f"{printable(task)} has no attempt {attempt}")
            return 1
        _print_one(run, zone, as_json=as_json)
        return 0


@click.command("last", short_help="Show the latest run of a task.")
@_task
@phase_option
@problems_option
@tz_option
@json_object_option
@db_option
def last_command(task: str, phases: list[TaskPhase], problems: bool, zone: tzinfo, as_json: bool) -> int:
    """Show the latest run of TASK, or its latest in one of some phases."""
    with database().reading() as history:
        wanted = phases_of(phases, problems=problems)
        run = history.last_run(task, phases=wanted)
        if run is not None:
            _print_one(run, zone, as_json=as_json)
        elif history.last_run(task) is None:
            return unknown(task, takes_one="last")
        else:
            named = [phase for phase in TaskPhase if phase in (wanted or [])]
            nothing(f"no {' or '.join(named)} run of {task}")
        return 0


@click.command("active", short_help="List the active runs.")
@task_argument
@limit_option
@tz_option
@json_option
@db_option
def active_command(task: str | None, limit: int | None, zone: tzinfo, as_json: bool) -> int:
    """List the active runs, in the order they started: of TASK, of the tasks that match GLOB, or of all tasks.

    GLOB is a pattern such as 'backup-*'; [*] is a star.
    """
    wanted = RunFilter(*task_and_glob(task), active=True)
    with database().reading() as history:
        active = history.active_runs(wanted)
        if not active and is_unknown(history, wanted):
            return unknown(str(wanted.task_id))
    if not active:
        nothing("no runs match")
    most = limit or (None if as_json else ROWS)
    if as_json:
        for run in active[:most]:
            print_json(run.to_wire())
        return 0
    print_table(active[:most], columns_of(RunFilter(active=True)), zone)
    if most is not None and len(active) > most:
        complain(f"there are {len(active) - most} more: --limit {len(active)}")
    return 0


def _print_one(run: TaskRun, zone: tzinfo, *, as_json: bool) -> None:
    if as_json:
        print_json(run.to_wire())
    else:
        print_run(run, zone)
