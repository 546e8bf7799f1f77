"""``taskruns runs``, ``show``, ``last``, ``tasks`` and ``active``."""

import shlex
from collections.abc import Iterator
from itertools import islice

import click

from taskruns.cli import complain
from taskruns.cli.discovery import database, db_option
from taskruns.cli.output import RUN_COLUMNS, TASK_COLUMNS, print_json, print_run, print_table, printable
from taskruns.cli.task_id import TaskId
from taskruns.history import TaskRunHistory
from taskruns.model import MAX_ATTEMPT, PROBLEMS, TaskPhase, TaskRun, checked_phase
from taskruns.reader import PAGE
from taskruns.reading import RunPage

ROWS = 50
"""Rows of a table, unless told otherwise. JSON has no such limit."""


def _phases(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> list[TaskPhase]:
    try:
        return [checked_phase(name.strip()) for value in values for name in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


_task = click.argument("task", type=TaskId())
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, a line for each run.")
_limit = click.option("--limit", type=click.IntRange(1), help=f"Print so many; of a table {ROWS}, of JSON all.")
_phase = click.option(
    "--phase",
    "phases",
    multiple=True,
    metavar="PHASES",
    callback=_phases,
    help=f"Only these, separated by commas: {', '.join(TaskPhase)}. What needs a look is --problems.",
)
_problems = click.option("--problems", is_flag=True, help="Only failed, timeout and exhausted.")


@click.command("runs")
@_task
@_phase
@_problems
@_limit
@click.option("--after", metavar="CURSOR", help="Go on where an earlier page ended.")
@_json
@db_option
def runs_command(
    task: str,
    phases: list[TaskPhase],
    problems: bool,
    limit: int | None,
    after: str | None,
    as_json: bool,
) -> int:
    """List the runs of TASK, newest first."""
    most = limit or (None if as_json else ROWS)
    with database().reading() as history:
        shown: list[TaskRun] = []
        for page in _pages(history, task, _wanted(phases, problems=problems), most, after):
            shown += page.runs
            if as_json:
                for run in page.runs:
                    print_json(run)
                del shown[1:]  # enough to know that there was one
        if not shown and history.last_run(task) is None:
            return _unknown(task)
        if not as_json:
            print_table(shown, RUN_COLUMNS)
        if page.next_cursor is not None:
            complain(f"there are more: --after {page.next_cursor}")
    return 0


@click.command("show")
@_task
@click.argument("attempt", type=click.IntRange(1, MAX_ATTEMPT), required=False)
@_json
@db_option
def show_command(task: str, attempt: int | None, as_json: bool) -> int:
    """Show all that is known of a run of TASK: of its latest, or of ATTEMPT."""
    with database().reading() as history:
        run = history.last_run(task) if attempt is None else history.get_run(task, attempt)
        if run is None:
            return _unknown(task if attempt is None or history.last_run(task) is None else f"{task} {attempt}")
        _print_one(run, as_json=as_json)
        return 0


@click.command("last")
@_task
@_phase
@_problems
@_json
@db_option
def last_command(task: str, phases: list[TaskPhase], problems: bool, as_json: bool) -> int:
    """Show the latest run of TASK, or its latest in one of some phases."""
    with database().reading() as history:
        run = history.last_run(task, phases=_wanted(phases, problems=problems))
        if run is not None:
            _print_one(run, as_json=as_json)
        elif history.last_run(task) is None:
            return _unknown(task)
        return 0


@click.command("tasks")
@_limit
@click.option("--after", type=TaskId(), help="Go on after this task.")
@_json
@db_option
def tasks_command(limit: int | None, after: str | None, as_json: bool) -> None:
    """List every task with its latest run, in the order of the task ids."""
    with database().reading() as history:
        most = limit or (None if as_json else ROWS)
        tasks = _iter_tasks(history, after)
        if as_json:
            for run in islice(tasks, most):
                print_json(run)
            return
        shown = list(islice(tasks, most))
        print_table(shown, TASK_COLUMNS)
        if next(tasks, None) is not None:
            complain(f"there are more: --after {shlex.quote(printable(shown[-1].task_id))}")


@click.command("active")
@_limit
@_json
@db_option
def active_command(limit: int | None, as_json: bool) -> None:
    """List the active runs of all tasks, in the order they started."""
    with database().reading() as history:
        active = history.active_runs()
    most = limit or (None if as_json else ROWS)
    if as_json:
        for run in active[:most]:
            print_json(run)
        return
    print_table(active[:most], [column for column in TASK_COLUMNS if column[1] not in ("exit", "error")])
    if most is not None and len(active) > most:
        complain(f"there are {len(active) - most} more: --limit {len(active)}")


def _pages(
    history: TaskRunHistory, task: str, phases: list[TaskPhase] | None, most: int | None, after: str | None
) -> Iterator[RunPage]:
    """Yield the pages of a list that ends after ``most`` runs."""
    left = most
    while left is None or left > 0:
        try:
            page = history.runs(task, phases=phases, limit=PAGE if left is None else min(PAGE, left), after=after)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        yield page
        after = page.next_cursor
        left = None if left is None else left - len(page.runs)
        if after is None:
            return


def _iter_tasks(history: TaskRunHistory, after: str | None) -> Iterator[TaskRun]:
    while page := history.tasks(limit=PAGE, after=after):
        yield from page
        after = page[-1].task_id


def _wanted(phases: list[TaskPhase], *, problems: bool) -> list[TaskPhase] | None:
    if problems:
        return [*phases, *sorted(PROBLEMS)]
    return phases or None


def _print_one(run: TaskRun, *, as_json: bool) -> None:
    if as_json:
        print_json(run)
    else:
        print_run(run)


def _unknown(what: str) -> int:
    complain(f"no run of {printable(what)}")
    return 1
