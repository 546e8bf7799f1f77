"""``taskruns tasks``."""

import shlex
from collections.abc import Iterator
from itertools import islice

import click

from taskruns.cli import complain
from taskruns.cli.discovery import database, db_option
from taskruns.cli.output import columns_of, print_json, print_table, printable
from taskruns.cli.queries import ROWS, json_option, limit_option
from taskruns.cli.task_id import TaskId
from taskruns.filters import RunFilter
from taskruns.history import TaskRunHistory
from taskruns.model import TaskRun
from taskruns.reader import PAGE


@click.command("tasks")
@limit_option
@click.option("--after", type=TaskId(), help="Go on after this task.")
@json_option
@db_option
def tasks_command(limit: int | None, after: str | None, as_json: bool) -> None:
    """List every task with its latest run, in the order of the task ids."""
    with database().reading() as history:
        most = limit or (None if as_json else ROWS)
        tasks = _iter_tasks(history, after)
        if as_json:
            for run in islice(tasks, most):
                print_json(run.to_wire())
            return
        shown = list(islice(tasks, most))
        print_table(shown, columns_of(RunFilter()))
        if next(tasks, None) is not None:
            complain(f"there are more: --after {shlex.quote(printable(shown[-1].task_id))}")


def _iter_tasks(history: TaskRunHistory, after: str | None) -> Iterator[TaskRun]:
    while page := history.tasks(limit=PAGE, after=after):
        yield from page
        after = page[-1].task_id
