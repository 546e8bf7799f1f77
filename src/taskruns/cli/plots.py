"""Statistics over time as plots of characters. Imported only where they are shown, as it needs the extra ``plot``."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import log10

from plotille import Canvas
from rich.text import Text

from taskruns.cli.axes import TimeAxis
from taskruns.cli.output import STYLES
from taskruns.model import PROBLEMS, TaskPhase
from taskruns.stats import RunStats, Span, StatsPart
from taskruns.windows import Window

_DURATION_LINES, _OUTCOME_LINES = 8, 6
_MARGIN = 9
"""Cells that are left of the columns."""

_TICKS = {
    0.001: "1 ms", 0.01: "10 ms", 0.1: "100 ms", 1: "1 s", 10: "10 s", 60: "1 min",
    600: "10 min", 3600: "1 h", 36000: "10 h", 345600: "4 d", 3456000: "40 d",
}  # fmt: skip
"""Durations that are named, in seconds."""

_STACK = (
    *(TaskPhase.FAILED, TaskPhase.TIMEOUT, TaskPhase.EXHAUSTED, TaskPhase.CANCELED),
    *(TaskPhase.SUCCEEDED, TaskPhase.RUNNING),
)
_EIGHTHS = "▁▂▃▄▅▆▇█"


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
    return Text("\n\n").join([_durations(columns, axis, by), _outcomes(columns, axis)])


def _durations(columns: Mapping[int, _Column], axis: TimeAxis, by: Span) -> Text:
    is_exact = axis.step == timedelta(seconds=by.seconds)
    names = ("p50 (line)", "p95 (points)") if is_exact else (f"median p50 of a {by} (line)", "highest p95 (points)")
    title = Text("  ").join([Text("durations", "bold"), Text(names[0], "green"), Text(names[1], "yellow")])
    spans = [span for column in columns.values() for span in (column.p50, column.p95) if span is not None]
    low = min(spans, default=0) - 0.2
    high = max(max(spans, default=0), low + 1.4) + 0.1
    canvas = _canvas(axis, _DURATION_LINES, low, high)
    previous = None
    for place in range(axis.columns):
        column, x = columns.get(place), place * axis.cells + (axis.cells - 1) // 2
        if column is None or column.p50 is None or column.p95 is None:
            previous = None
            continue
        canvas.point(x, column.p95, color="yellow")
        canvas.line(*(previous or (x, column.p50)), x, column.p50, color="green")  # later: a cell has one colour
        previous = (x, column.p50)
    lines = {int((log10(span) - low) / (high - low) * _DURATION_LINES): name for span, name in _TICKS.items()}
    return _framed(title, canvas, lines, axis)


def _outcomes(columns: Mapping[int, _Column], axis: TimeAxis) -> Text:
    phases = [phase for phase in _STACK if any(phase in column.by_phase for column in columns.values())]
    named = [Text(f"{_block(phase)} {phase}", STYLES[phase]) for phase in phases]
    title = Text("  ").join([Text("outcomes", "bold"), *named])
    most = max(sum(column.by_phase.values()) for column in columns.values())
    canvas = _canvas(axis, _OUTCOME_LINES, 0, _OUTCOME_LINES)
    gap = int(axis.cells > 2)  # noqa: PLR2004  (where there is room)
    for place, column in columns.items():
        cells = _bar(column.by_phase, (_OUTCOME_LINES - 0.25) / most)[:_OUTCOME_LINES]
        for y, (phase, block) in enumerate(cells):
            for x in range(place * axis.cells, (place + 1) * axis.cells - gap):
                canvas.point(x, y, color=_colour(phase), marker=block)
    return _framed(title, canvas, {0: "0", _OUTCOME_LINES - 1: str(most)}, axis)


def _bar(by_phase: Mapping[TaskPhase, int], scale: float) -> list[tuple[TaskPhase, str]]:
    """Return the cells of a bar from below; no outcome is too small to be seen."""
    cells: list[tuple[TaskPhase, str]] = []
    runs = 0
    for phase in (phase for phase in _STACK if by_phase.get(phase)):
        runs += by_phase[phase]
        whole, eighths = divmod(max(round(runs * scale * 8), len(cells) * 8 + 1), 8)
        is_last = runs == sum(by_phase.values())
        if not is_last or _block(phase) != _EIGHTHS[-1]:  # only the end of a bar may be a part of a cell
            whole, eighths = max(round(runs * scale), len(cells) + 1), 0
        cells += [(phase, _block(phase))] * (whole - len(cells))
        cells += [(phase, _EIGHTHS[eighths - 1])] * bool(eighths)
    return cells


def _block(phase: TaskPhase) -> str:
    if phase in PROBLEMS:  # they differ by more than their colour
        return "▒"
    return "░" if phase is TaskPhase.CANCELED else "█"


def _colour(phase: TaskPhase) -> str:
    return STYLES[phase].replace("bold ", "bright_")


def _canvas(axis: TimeAxis, lines: int, low: float, high: float) -> Canvas:
    width = axis.columns * axis.cells
    return Canvas(width, lines, xmin=0, xmax=width, ymin=low, ymax=high)


def _framed(title: Text, canvas: Canvas, ticks: Mapping[int, str], axis: TimeAxis) -> Text:
    drawn = canvas.plot(linesep="\n").replace("\u2800", " ").split("\n")  # an empty cell is a blank braille pattern
    lines = [title]
    for y, line in zip(range(len(drawn) - 1, -1, -1), drawn, strict=True):
        mark = "┤" if y in ticks else "│"
        lines.append(Text.assemble((f"{ticks.get(y, ''):>{_MARGIN - 2}} {mark}", "dim"), Text.from_ansi(line)))
        lines[-1].rstrip()
    marks, times = axis.drawn()
    lines += [Text(f"{'└':>{_MARGIN}}{marks}", style="dim"), Text(f"{'':{_MARGIN}}{times}", style="dim")]
    return Text("\n").join(lines)
