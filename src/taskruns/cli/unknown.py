"""What is said of a task, or a run, that there is none of."""

from taskruns.cli import complain
from taskruns.cli.output import printable
from taskruns.filters import RunFilter
from taskruns.reader import Reader


def is_unknown(history: Reader, wanted: RunFilter) -> bool:
    """Whether it is a task that was asked for, and it has no run at all."""
    return wanted.task_id is not None and history.last_run(wanted.task_id) is None


def unknown(what: str) -> int:
    """Say that there is no such run, and return the exit status."""
    complain(f"no run of {printable(what)}")
    return 1
