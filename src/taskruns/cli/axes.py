"""The time axis of plots."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import count

from taskruns.stats import Span

_YEAR_1 = datetime.min  # noqa: DTZ901  (a clock's time)
_WIDEST = 8
"""The most cells that a column has."""
_LABEL = 8
"""The fewest cells from one time to the next."""


@dataclass(frozen=True, slots=True)
class TimeAxis:
    """The columns, which are the same in every plot, so that they stand below each other: equal times, empty or not."""

    step: timedelta
    first: int
    """The number of the first column, since the year 1, which began on a Monday; times are those of clocks."""
    columns: int
    cells: int
    """How wide a column is."""

    @classmethod
    def of(cls, first: datetime, last: datetime, by: Span, room: int) -> "TimeAxis":
        """Return the columns from one moment to another, of days or hours, or of more where there is little room."""
        for step in _steps(by):
            begin, end = (_clock(moment) // step for moment in (first, last))
            columns = end - begin + 1
            if columns <= room:
                break
        return cls(step, begin, columns, min(_WIDEST, room // columns))

    def place(self, moment: datetime) -> int:
        """Return the number of a moment's column."""
        return _clock(moment) // self.step - self.first

    def drawn(self) -> tuple[str, str]:
        """Return the lines below a plot: one with marks, and one with their times."""
        every = next(
            step for step in _steps(Span.HOUR) if step >= self.step and step // self.step * self.cells >= _LABEL
        )
        marks, labels = ["─"] * (self.columns * self.cells), ""
        for column in range(self.columns):
            start = _YEAR_1 + (self.first + column) * self.step
            at = column * self.cells
            if (start - _YEAR_1) % every == timedelta(0) and at + 6 <= len(marks):
                marks[at] = "┬"
                labels = labels.ljust(at) + (f"{start:%H:%M}" if start.hour else f"{start.day} {start:%b}")
        return "".join(marks), labels


def _steps(by: Span) -> Iterator[timedelta]:
    if by is Span.HOUR:
        yield from (timedelta(hours=hours) for hours in (1, 2, 3, 6, 12))
    yield timedelta(days=1)
    yield from (timedelta(weeks=2**doubled) for doubled in count())


def _clock(moment: datetime) -> timedelta:
    return moment.replace(tzinfo=None) - _YEAR_1
