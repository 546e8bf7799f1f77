"""The time axis of plots."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import count
from math import ceil

from taskruns.stats import Span

_YEAR_1 = datetime.min  # noqa: DTZ901  (a clock's time)
_WIDEST = 8
"""The most cells that a column has."""
_WEEK = timedelta(weeks=1)
_YEAR = timedelta(days=365)
"""A longer axis has dates with their years."""


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
        has_years = self.columns * self.step > _YEAR
        apart = 13 if has_years else 8  # cells from one time to the next
        if self.step < _WEEK:
            steps = (step // self.step for step in _steps(Span.HOUR))
            every, skipped = next(step for step in steps if step * self.cells >= apart), -self.first
        else:
            every, skipped = ceil(apart / self.cells), 0
        marks, labels = ["─"] * (self.columns * self.cells), ""
        for column in range(skipped % every, self.columns, every):
            start = _YEAR_1 + (self.first + column) * self.step
            at = column * self.cells
            label = f"{start:%H:%M}" if start.hour else f"{start.day} {start:%b}" + f" {start.year}" * has_years
            if at + len(label) <= len(marks):
                marks[at] = "┬"
                labels = labels.ljust(at) + label
        return "".join(marks), labels


def _steps(by: Span) -> Iterator[timedelta]:
    if by is Span.HOUR:
        yield from (timedelta(hours=hours) for hours in (1, 2, 3, 6, 12))
    yield timedelta(days=1)
    yield from (timedelta(weeks=2**doubled) for doubled in count())


def _clock(moment: datetime) -> timedelta:
    return moment.replace(tzinfo=None) - _YEAR_1
