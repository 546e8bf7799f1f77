"""``taskruns watch``."""

import select
import sys
import time
from datetime import UTC, datetime, tzinfo

import click
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from taskruns.cli import advice, complain
from taskruns.cli.discovery import database, db_option
from taskruns.cli.numbers import Seconds
from taskruns.cli.options import phase_option, phases_of, problems_option, task_and_glob, task_argument, tz_option
from taskruns.cli.output import STYLES, print_json, printable, summary_of
from taskruns.cli.unknown import is_unknown, nothing
from taskruns.filters import RunFilter
from taskruns.following import MIN_INTERVAL, Following
from taskruns.history import TaskRunHistory
from taskruns.model import TaskPhase, TaskRun
from taskruns.retrying import is_lost, is_refusal
from taskruns.times import in_zone
from taskruns.wording import readable

_WIDEST = 36
"""Cells that a column of names grows to; a longer name takes the room it needs."""


@click.command("watch", short_help="Print runs as they start and as they end.")
@task_argument
@phase_option
@problems_option
@click.option(
    "--interval",
    type=Seconds(MIN_INTERVAL),
    default=1.0,
    show_default=True,
    help="Look so often.",
)
@tz_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON, a line for each: the run as it is then.")
@db_option
def watch_command(
    task: str | None, phases: list[TaskPhase], problems: bool, interval: float, zone: tzinfo, as_json: bool
) -> None:
    """Print runs as they start and as they end: of TASK, of the tasks that match GLOB, or of all tasks.

    First come the runs that are active. GLOB is a pattern such as 'backup-*'; [*] is a star.
    """
    wanted = RunFilter(*task_and_glob(task), phases=phases_of(phases, problems=problems))
    following = Following(wanted, interval=interval)
    lines = _Lines(zone)
    with database().reading() as history:
        if is_unknown(history, wanted):
            nothing(f"no run of {wanted.task_id} yet")
        steps = _Steps(history, following)
        while True:
            for run in steps.take():
                if as_json:
                    print_json(run.to_wire())
                else:
                    lines.print(run)
            if not following.is_behind:
                lines.is_news = True
            _wait(following.pause)


class _Steps:
    """The steps of a following, which outlive outages of the database."""

    def __init__(self, history: TaskRunHistory, following: Following) -> None:
        self._history = history
        self._following = following
        self._is_out = False

    def take(self) -> list[TaskRun]:
        """Return what has happened; nothing where the database cannot be used at the moment."""
        try:
            runs = self._history.take_step(self._following)
        except Exception as error:
            if not (is_lost(error) or is_refusal(error)):
                raise
            if not self._is_out:
                complain(f"{advice(error)}; waiting for it")
            self._is_out = True
            return []
        if self._is_out:
            complain("the database can be used again")
        self._is_out = False
        return runs


class _Lines:
    """Prints events, each on a line; on a terminal an error that has no room there stands below."""

    def __init__(self, zone: tzinfo) -> None:
        self.is_news = False
        """Whether a start is news, or the run was found running at the beginning."""
        self._zone = zone
        self._terminal = Console(highlight=False, soft_wrap=True) if sys.stdout.isatty() else None
        self._day = ""
        self._widths = [0, 0]

    def print(self, run: TaskRun) -> None:
        """Print the start of a run that is active, or the end of another one."""
        moment = in_zone(run.finished_at or run.started_at, self._zone)
        line, error = Text("  ").join(self._cells(run)), summary_of(run.error)
        if self._terminal is None:
            time_of = moment.isoformat(timespec="seconds").replace("+00:00", "Z")
            click.echo(f"{time_of}  {line.plain}  {error}".rstrip())
            return
        day = f"{moment:%Y-%m-%d} ({moment:%Z})"
        if day != self._day:
            self._day = day
            self._terminal.print(Text(day, style="bold"))
        line = Text(f"{moment:%H:%M:%S}  ") + line
        width = self._terminal.width
        if error and cell_len(line.plain) + cell_len(error) + 2 <= width:
            line.append(f"  {error}")
            error = ""
        line.rstrip()
        self._terminal.print(line)
        if error:
            below = Text(" " * 10 + error)
            below.truncate(width, overflow="ellipsis")
            self._terminal.print(below)

    def _cells(self, run: TaskRun) -> list[Text]:
        what = f"{run.phase}{' (inferred)' * run.recovered}"
        duration = "" if run.duration is None else readable(run.duration)
        if run.is_active and self.is_news:
            what = "started"
        elif run.is_active:
            duration = readable(datetime.now(UTC) - run.started_at)
        task, source = self._padded(f"{printable(run.task_id)} {run.attempt}", printable(run.source or ""))
        code = "" if run.exit_code is None else f"exit {run.exit_code}"
        return [Text(f"{what:<9}", style=STYLES[run.phase]), *map(Text, (task, f"{duration:>8}", f"{code:<8}", source))]

    def _padded(self, *names: str) -> list[str]:
        """Return names as wide as the widest so far, within reason, so that most of them make columns."""
        lengths = [cell_len(name) for name in names]
        self._widths = [max(width, min(length, _WIDEST)) for width, length in zip(self._widths, lengths, strict=True)]
        return [name + " " * (width - length) for name, width, length in zip(names, self._widths, lengths, strict=True)]


def _wait(seconds: float) -> None:
    """Wait, unless whoever reads the output goes away meanwhile.

    Raises:
        BrokenPipeError: nobody reads it any more.
    """
    if not hasattr(select, "poll"):  # on Windows the next line that is printed will tell
        time.sleep(seconds)
        return
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if output.poll(1000 * seconds):
        raise BrokenPipeError
