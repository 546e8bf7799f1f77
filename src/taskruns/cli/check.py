"""``taskruns check``."""

import sys
from collections.abc import Callable, Iterator
from datetime import timedelta, tzinfo

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from taskruns.checks import TaskCheck
from taskruns.cli import complain
from taskruns.cli.discovery import database, db_option
from taskruns.cli.durations import DurationWithUnit
from taskruns.cli.numbers import Whole
from taskruns.cli.options import TaskPattern, json_option, tz_option
from taskruns.cli.output import print_json, printable
from taskruns.reader import PAGE, Reader

_WORDS = {True: ("ok", "green"), False: ("not well", "red")}


@click.command("check", short_help="Tell whether tasks are well, and why not.")
@click.argument("task", type=TaskPattern())
@click.option("--succeeded-within", type=DurationWithUnit(), help="A success of it ended within: 26h, 2d.")
@click.option("--max-problems", type=Whole(0), help="At most N problems since its last success.")
@click.option("--max-running", type=DurationWithUnit(), help="None of its runs is active for longer: 3h.")
@click.option("--quiet", "-q", is_flag=True, help="Print only those that are not well, as cron likes it.")
@tz_option
@json_option
@db_option
def check_command(
    task: str,
    succeeded_within: float | None,
    max_problems: int | None,
    max_running: float | None,
    quiet: bool,
    zone: tzinfo,
    as_json: bool,
) -> int:
    """Tell whether TASK is well, or each task that matches GLOB, and why not, in a line for each.

    A task is well if it keeps to all that is given; if nothing is, if its latest run that has ended is no problem.
    What was never seen is not well. The exit status is 0 if all are well, 1 if not, and 2 if it cannot be told.

    GLOB is a pattern such as 'backup-*'; [*] is a star.
    """
    tell = (lambda found: print_json(found.to_wire())) if as_json else _teller()
    count = 0
    is_well = True
    with database().reading() as history:
        for found in _checks(history, task, _span(succeeded_within), max_problems, _span(max_running), zone):
            count += 1
            is_well = is_well and found.is_well
            if not (quiet and found.is_well):
                tell(found)
    if count == 0:
        complain(f"no task matches {printable(task)}")
    return 0 if is_well and count else 1


def _span(seconds: float | None) -> timedelta | None:
    return None if seconds is None else timedelta(seconds=seconds)


def _checks(
    history: Reader,
    task: str,
    succeeded_within: timedelta | None,
    max_problems: int | None,
    max_running: timedelta | None,
    zone: tzinfo,
) -> Iterator[TaskCheck]:
    after = None
    while found := history.check(
        task,
        succeeded_within=succeeded_within,
        max_problems=max_problems,
        max_running=max_running,
        zone=zone,
        limit=PAGE,
        after=after,
    ):
        yield from found
        if len(found) < PAGE:
            return
        after = found[-1].task_id


def _teller() -> Callable[[TaskCheck], None]:
    """Return what prints a check: in colour on a terminal, and quicker elsewhere."""
    if not sys.stdout.isatty():
        return lambda found: click.echo(f"{_WORDS[found.is_well][0]:<8}  {_told(found)}")
    console = Console(highlight=False)

    def tell(found: TaskCheck) -> None:
        line = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        line.add_column(width=8)
        line.add_column(overflow="fold")
        line.add_row(Text(*_WORDS[found.is_well]), Text(_told(found)))
        console.print(line)

    return tell


def _told(found: TaskCheck) -> str:
    reasons = "; ".join(map(printable, found.reasons))
    return printable(found.task_id) + (f": {reasons}" if reasons else "")
