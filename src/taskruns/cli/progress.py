"""A progress bar on a terminal, for what may take long."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Bar:
    """A bar that counts runs; nothing at all where nobody watches."""

    def __init__(self, progress: Any = None, task: Any = None) -> None:
        self._progress = progress
        self._task = task
        self._runs = 0

    def advance(self, runs: int, size: int = 0) -> None:
        """Tell how many more runs are done, and how many bytes."""
        self._runs += runs
        if self._progress is not None:
            self._progress.update(self._task, advance=size, runs=self._runs)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the terminal to somebody else."""
        if self._progress is not None:
            self._progress.stop()
        yield
        if self._progress is not None:
            self._progress.start()


@contextmanager
def progress(total: int | None = None, *, hidden: bool = False) -> Iterator[Bar]:
    """Show a bar on a terminal, to the end of ``total`` bytes if that is known."""
    if hidden or sys.stderr is None or not sys.stderr.isatty():
        yield Bar()
        return
    from rich.console import Console  # noqa: PLC0415  (only for a person who watches)
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn  # noqa: PLC0415  (as above)

    rest = [] if total is None else [TimeRemainingColumn()]
    shown = TextColumn("{task.fields[runs]} runs")
    with Progress(BarColumn(), shown, TimeElapsedColumn(), *rest, console=Console(stderr=True)) as drawn:
        yield Bar(drawn, drawn.add_task("", total=total, runs=0))
