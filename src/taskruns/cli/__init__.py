"""The command line. Each command's module is imported when the command is used."""

import errno
import gc
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import click

_COMMANDS = {
    "exec": "exec",
    "runs": "queries",
    "active": "queries",
    "last": "queries",
    "show": "queries",
    "tasks": "tasks",
    "check": "check",
    "stats": "stats",
    "watch": "watch",
    "export": "transfer",
    "import": "transfer",
    "ingest": "ingest",
    "replay": "replay",
    "supervisors": "supervisors",
    "recover": "supervisors",
    "prune": "retention",
    "forget": "retention",
    "db": "db",
    "doctor": "doctor",
    "completion": "completion",
}

EXEC_USAGE = 125
"""Wrong usage under ``exec``, whose other statuses are the command's: the convention of timeout(1)."""

_FULL = (errno.ENOSPC, errno.EFBIG, errno.EIO)
"""What is wrong where a write fails. Files that a command writes are named by the error, or by the command."""


class _Commands(click.Group):
    def list_commands(self, _context: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        is_collecting = gc.isenabled()
        gc.disable()  # what is imported stays: to look through it again and again takes longer than to record a run
        try:
            module = import_module(f"taskruns.cli.{_COMMANDS[name]}")
        finally:
            gc.freeze()
            if is_collecting:
                gc.enable()
        command = getattr(module, f"{name}_command")
        assert isinstance(command, click.Command)  # noqa: S101  (for mypy)
        return command

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = arguments[0]
        if name not in _COMMANDS and not name.startswith("-") and not context.resilient_parsing:
            meant = " or ".join(map(repr, get_close_matches(name, _COMMANDS)))
            context.fail(f"No such command {name!r}.{meant and f' Did you mean {meant}?'}")
        return super().resolve_command(context, arguments)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except click.UsageError as error:
            name = context.invoked_subcommand
            command = None if name is None else self.get_command(context, name)
            if error.ctx is None and command is not None:  # the parser of options does not say whose they are
                error.ctx = click.Context(command, parent=context, info_name=name)
            raise


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--db", metavar="URL", help="The database; else TASKRUNS_DB, a configuration file, or a file of your own."
)
@click.version_option(package_name="taskruns", prog_name="taskruns")
@click.pass_context
def cli(context: click.Context, db: str | None) -> None:
    """The flight recorder for tasks: keeps every attempt of every task."""
    context.obj = db


def main() -> None:
    """Run the command line and exit with its status."""
    if sys.stdout is None:  # closed, by `>&-`
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  (to the end of the process)
        os.set_inheritable(sys.stdout.fileno(), True)
    # What a pool says of a connection that was lost is told by the error itself, if it matters.
    logging.getLogger("sqlalchemy").addHandler(logging.NullHandler())
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what the user's encoding lacks must not end a list
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status: 1 says no, 2 says that it could not be done."""
    try:
        status = cli.main(list(arguments), prog_name="taskruns", standalone_mode=False)
        sys.stdout.flush()
    except click.UsageError as error:
        return _misused(error)
    except click.ClickException as error:
        complain(error.format_message())
        return 2
    except (click.Abort, KeyboardInterrupt):
        return 130
    except (BrokenPipeError, SystemExit):  # the latter is what click makes of the former
        _give_up_output()
        return 141
    except Exception as error:
        line = advice(error)
        if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
            _give_up_output()
            line = f"standard output cannot be written: {error.strerror}"
        if line is None:
            raise
        complain(line)
        return 2
    return int(status or 0)


def _give_up_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would fail again


def _misused(error: click.UsageError) -> int:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return 2
    path = error.ctx.command_path if error.ctx is not None else "taskruns"
    complain(f"{error.format_message()} (see `{path} --help`)")
    return EXEC_USAGE if path.split()[1:2] == ["exec"] else 2


def complain(line: str) -> None:
    """Say something to the user that is not the result."""
    with suppress(OSError):  # nobody listens, which is nothing to the result
        click.echo(f"taskruns: {line}", err=True)


def advice(error: Exception) -> str | None:
    """Return the line that tells what is wrong; None if it is a fault of this program."""
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415  (known by now, if it is such an error)

    from taskruns.errors import TaskRunsError  # noqa: PLC0415  (as above)
    from taskruns.retrying import cause_of  # noqa: PLC0415  (as above)

    if isinstance(error, SQLAlchemyError):
        return f"the database cannot be used: {cause_of(error)}"
    if isinstance(error, TaskRunsError | ModuleNotFoundError | OSError):
        return str(error)
    return None
