"""What is said of a task, or a run, that there is none of."""

import sys

from taskruns.cli import complain
from taskruns.cli.output import printable
from taskruns.filters import RunFilter
from taskruns.globs import is_glob
from taskruns.reader import Reader


def is_unknown(history: Reader, wanted: RunFilter) -> bool:
    """Whether it is a task that was asked for, and it has no run at all."""
    return wanted.task_id is not None and history.last_run(wanted.task_id) is None


def unknown(task: str, *, takes_one: str = "") -> int:
    """Say that a task has no run, also to whom a command that takes one task gave a pattern; return the exit status."""
    advice = f": `{takes_one}` takes one task, not a pattern" if takes_one and is_glob(task) else ""
    complain(f"no run of {printable(task)}{advice}")
    return 1


def nothing(line: str) -> None:
    """Say that nothing was found, which is no error, to whoever looks at an empty terminal."""
    if sys.stdout.isatty():
        complain(printable(line))
