"""``taskruns exec``."""

import math
import os
import sys
from contextlib import suppress

import click

from taskruns.cli import EXEC_USAGE, complain
from taskruns.cli.discovery import Database, db_option
from taskruns.cli.durations import Duration, DurationRange
from taskruns.cli.numbers import Whole
from taskruns.cli.task_id import TaskId
from taskruns.history import TaskRunHistory
from taskruns.retrying import OnRetry

_HEARTBEAT = 30.0
"""Seconds between two signs of life: most commands need none."""


class _Command(click.Command):
    """Takes options before and after TASK, and leaves those of the command to the command, also without a ``--``."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        context.allow_interspersed_args = False
        options, rest = self._split(context, arguments)
        task, command = rest[:1], rest[1:]
        if options[-1:] != ["--"]:
            more, command = self._split(context, command)
            options = [*options, *more]
        options = [option for option in options if option != "--"]
        return super().parse_args(context, [*options, "--", *task, *command])

    def _split(self, context: click.Context, arguments: list[str]) -> tuple[list[str], list[str]]:
        options: list[click.Parameter] = [
            parameter for parameter in self.get_params(context) if isinstance(parameter, click.Option)
        ]
        _, rest, _ = click.Command(None, params=options).make_parser(context).parse_args(list(arguments))
        return arguments[: len(arguments) - len(rest)], rest


@click.command(
    "exec",
    cls=_Command,
    short_help="Run a command and record every attempt of it.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("task", type=TaskId())
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
@click.option("--timeout", type=Duration(), help="Stop the command after this time, such as 30s, 5m or 2h; 0 is never.")
@click.option(
    "--kill-after",
    type=Duration(),
    default="10s",
    show_default=True,
    help="How long after the SIGTERM of a timeout SIGKILL follows.",
)
@click.option("--retries", type=Whole(0, 1000000), default=0, show_default=True, help="Try again so often.")
@click.option(
    "--backoff",
    type=DurationRange(),
    default="1s..60s",
    show_default=True,
    help="How long to wait before the first retry, doubled for each that follows, and the most that it may become.",
)
@click.option("--no-overlap", is_flag=True, help="Start nothing while the task has an active run.")
@click.option(
    "--conflict-exit-code",
    type=Whole(0, 255),
    default=1,
    show_default=True,
    help="The exit status when --no-overlap starts nothing.",
)
@click.option(
    "--error",
    type=click.Choice(["tail", "none"]),
    default="tail",
    show_default=True,
    help="Keep the end of standard error as the error of a failed run, or leave standard error to the command.",
)
@click.option("--quiet", "-q", is_flag=True, help="Say nothing beside what the command says.")
@db_option
def exec_command(
    task: str,
    command: tuple[str, ...],
    timeout: float | None,
    kill_after: float,
    retries: int,
    backoff: tuple[float, float],
    no_overlap: bool,
    conflict_exit_code: int,
    error: str,
    quiet: bool,
) -> int:
    """Run a command and record every attempt of it as a run of TASK.

    Everything after `--` is the command, run without a shell. Its input, output and exit status are its own: 128+N for
    signal N, 124 after a timeout, 126 if it cannot be run, 127 if it is not found. It runs as well when the database
    cannot be reached.
    """
    if sys.platform == "win32":
        complain("exec needs Linux or macOS")
        return EXEC_USAGE
    from taskruns import exec as execution, process  # noqa: PLC0415  (not on Windows)

    process.open_standard_streams()
    plan = execution.Plan(
        task_id=task,
        command=command,
        timeout=timeout or None,
        kill_after=kill_after,
        retries=retries,
        backoff=backoff,
        no_overlap=no_overlap,
        conflict_exit_code=conflict_exit_code,
        keep_stderr=error == "tail",
    )
    option = click.get_current_context().find_root().obj

    def say(line: str) -> None:
        with suppress(OSError):  # a reader that has gone, a full disk: nothing to the command
            complain(line)

    def connect(note: OnRetry) -> TaskRunHistory:
        found = Database.find(option)
        return TaskRunHistory.connect(
            found.url, retry_for=math.inf, on_retry=note, heartbeat=_HEARTBEAT, retention=found.retention
        )

    status = execution.execute(plan, connect, None if quiet else say)
    # A database call that hangs in its thread must not keep the process.
    os._exit(status)
