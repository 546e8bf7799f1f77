"""Statistics over time as plots of characters. Imported only where they are shown, as it needs the extra ``plot``."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import floor, log10

from plotille import Canvas
from rich.text import Text

from taskruns.cli.axes import TimeAxis
from taskruns.cli.output import STYLES
from taskruns.model import PROBLEMS, TaskPhase
from taskruns.stats import RunStats, Span, StatsPart
from taskruns.windows import Window

_DURATION_LINES, _OUTCOME_LINES = 8, 12
_MARGIN = 9
"""Cells that are left of the columns."""

_TICKS = {
    0.001: "1 ms", 0.01: "10 ms", 0.1: "100 ms", 1: "1 s", 10: "10 s", 60: "1 min",
    600: "10 min", 3600: "1 h", 36000: "10 h", 345600: "4 d", 3456000: "40 d",
}  # fmt: skip
"""Durations that are named, in seconds."""

_BLOCKS = {
    TaskPhase.EXHAUSTED: "╳",  # noqa: RUF001  (it fills the cell, as X does not)
    TaskPhase.FAILED: "▒",
    TaskPhase.TIMEOUT: "╱",  # noqa: RUF001  (likewise)
    TaskPhase.CANCELED: "░",
    TaskPhase.SUCCEEDED: "█",
    TaskPhase.RUNNING: "▚",
}
"""What the cells of a bar are, from below, the worst first; they differ by more than their colour."""
_P50, _P95 = "⠒⠒", "+"


@dataclass(frozen=True, slots=True)
class _Column:
    """What a column shows. Durations are logarithms of seconds; None if no run has ended."""

    by_phase: Mapping[TaskPhase, int]
    p50: float | None
    p95: float | None

    @classmethod
    def of(cls, some: Sequence[RunStats]) -> "_Column":
        """Return what some parts show together: the median of their medians, and the highest of their p95."""
        by_phase: Counter[TaskPhase] = Counter()
        for stats in some:
            by_phase.update(stats.by_phase)
        known = sorted((stats.duration for stats in some if stats.duration), key=lambda duration: duration.p50)
        if not known:
            return cls(by_phase, None, None)
        return cls(by_phase, _log(known[(len(known) - 1) // 2].p50), _log(max(duration.p95 for duration in known)))


def _log(span: timedelta) -> float:
    return log10(max(span.total_seconds(), 0.001))


def plots_of(parts: Sequence[StatsPart], by: Span, window: Window, width: int) -> Text:
    """Return plots of durations and outcomes by time, at most so wide; there must be a part."""
    zone = parts[0].start.tzinfo
    first, last = parts[0].start, parts[-1].start
    if window.since is not None:
        first = min(first, window.since.astimezone(zone))
        until = datetime.now(UTC) if window.until is None else window.until - timedelta(microseconds=1)
        last = max(last, min(until, datetime.now(UTC)).astimezone(zone))
    axis = TimeAxis.of(first, last, by, max(width - _MARGIN - 1, 1))
    found: dict[int, list[RunStats]] = defaultdict(list)
    for part in parts:
        found[axis.place(part.start)].append(part.stats)
    columns = {place: _Column.of(some) for place, some in found.items()}
    return Text("\n\n").join([_durations(columns, axis, by, width), _outcomes(columns, axis, width)])


def _durations(columns: Mapping[int, _Column], axis: TimeAxis, by: Span, width: int) -> Text:
    is_exact = axis.step == timedelta(seconds=by.seconds)
    names = ("p50", "p95") if is_exact else (f"median p50 of a {by}", "highest p95")
    title = _title("durations", [Text(f"{_P50} {names[0]}", "green"), Text(f"{_P95} {names[1]}", "yellow")], width)
    spans = [span for column in columns.values() for span in (column.p50, column.p95) if span is not None]
    low = min(spans, default=0) - 0.2
    high = max(max(spans, default=0), low + 1.4) + 0.1

    def line_of(span: float) -> int:
        return floor((span - low) / (high - low) * _DURATION_LINES)

    canvas = _canvas(axis, _DURATION_LINES, low, high)
    previous = None
    for place in range(axis.columns):
        column, x = columns.get(place), place * axis.cells + (axis.cells - 1) // 2
        if column is None or column.p50 is None or column.p95 is None:
            previous = None
            continue
        canvas.line(*(previous or (x, column.p50)), x, column.p50, color="green")
        if axis.cells > 1 or line_of(column.p50) != line_of(column.p95):  # else it would hide the line
            canvas.point(x, column.p95, color="yellow", marker=_P95)
        previous = (x, column.p50)
    lines = {line_of(log10(span)): name for span, name in _TICKS.items()}
    return _framed(title, canvas, lines, axis)


def _outcomes(columns: Mapping[int, _Column], axis: TimeAxis, width: int) -> Text:
    phases = [phase for phase in _BLOCKS if any(phase in column.by_phase for column in columns.values())]
    title = _title("outcomes", [Text(f"{_BLOCKS[phase]} {phase}", STYLES[phase]) for phase in phases], width)
    most = max(sum(column.by_phase.values()) for column in columns.values())
    lines = _OUTCOME_LINES + 1  # one for air below the legend, which has blocks too
    canvas = _canvas(axis, lines, 0, lines)
    gap = int(axis.cells > 2)  # noqa: PLR2004  (where there is room)
    for place, column in columns.items():
        for y, phase in enumerate(bar_of(column.by_phase, most)):
            for x in range(place * axis.cells, (place + 1) * axis.cells - gap):
                canvas.point(x, y, color=_colour(phase), marker=_BLOCKS[phase])
    return _framed(title, canvas, {-1: "0", _OUTCOME_LINES - 1: str(most)}, axis)


def bar_of(by_phase: Mapping[TaskPhase, int], most: int) -> list[TaskPhase]:
    """Return the cells of a bar from below, where the highest bar is of so many runs.

    The height is that of all runs together, of which the problems have their share, and at least a cell. Where there
    are fewer cells than phases, the worst have them.
    """
    phases = [phase for phase in _BLOCKS if by_phase.get(phase)]
    height = max(round(sum(by_phase.values()) * _OUTCOME_LINES / most), 1)
    kinds = [[phase for phase in phases if (phase in PROBLEMS) is is_problem] for is_problem in (True, False)]
    shares = _shared([sum(by_phase[phase] for phase in kind) for kind in kinds], height)
    bar: list[TaskPhase] = []
    for kind, share in zip(kinds, shares, strict=True):
        for phase, cells in zip(kind, _shared([by_phase[phase] for phase in kind], share), strict=True):
            bar += [phase] * cells
    return bar


def _shared(runs: Sequence[int], cells: int) -> list[int]:
    """Return how many cells each has by largest remainder; one that is too small for a cell has it of the largest.

    Where there are too few cells, the first have them.
    """
    present = [index for index, count in enumerate(runs) if count]
    if cells <= len(present):
        return [int(index in present[:cells]) for index in range(len(runs))]
    total = sum(runs)
    shares = [count * cells // total for count in runs]
    by_remainder = sorted(present, key=lambda index: runs[index] * cells % total, reverse=True)
    for index in by_remainder[: cells - sum(shares)]:
        shares[index] += 1
    for index in present:
        if shares[index] == 0:
            shares[shares.index(max(shares))] -= 1
            shares[index] = 1
    return shares


def _colour(phase: TaskPhase) -> str:
    return STYLES[phase].replace("bold ", "bright_")


def _canvas(axis: TimeAxis, lines: int, low: float, high: float) -> Canvas:
    width = axis.columns * axis.cells
    return Canvas(width, lines, xmin=0, xmax=width, ymin=low, ymax=high)


def _title(name: str, legend: Sequence[Text], width: int) -> Text:
    """Return a title and what is plotted below it, in lines that end between two of these."""
    lines = [Text(name, "bold")]
    for item in legend:
        if lines[-1].cell_len + 2 + item.cell_len > width:
            lines.append(Text(" " * len(name)))
        lines[-1] = Text.assemble(lines[-1], "  ", item)
    return Text("\n").join(lines)


def _framed(title: Text, canvas: Canvas, ticks: Mapping[int, str], axis: TimeAxis) -> Text:
    drawn = canvas.plot(linesep="\n").replace("\u2800", " ").split("\n")  # an empty cell is a blank braille pattern
    lines = [title]
    for y, line in zip(range(len(drawn) - 1, -1, -1), drawn, strict=True):
        mark = "┤" if y in ticks else "│"
        lines.append(Text.assemble((f"{ticks.get(y, ''):>{_MARGIN - 2}} {mark}", "dim"), Text.from_ansi(line)))
        lines[-1].rstrip()
    marks, times = axis.drawn()
    lines.append(Text(f"{ticks.get(-1, ''):>{_MARGIN - 2}} └{marks}", style="dim"))
    lines.append(Text(f"{'':{_MARGIN}}{times}", style="dim"))
    return Text("\n").join(lines)
