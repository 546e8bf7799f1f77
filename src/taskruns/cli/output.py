"""How runs are shown: tables for people, JSON lines for programs."""

import json
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, tzinfo
from typing import Any, Literal

import click
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from taskruns.filters import RunFilter
from taskruns.model import TaskPhase, TaskRun
from taskruns.times import in_zone
from taskruns.wording import last_line, local, readable

STYLES = {
    TaskPhase.RUNNING: "cyan",
    TaskPhase.SUCCEEDED: "green",
    TaskPhase.FAILED: "red",
    TaskPhase.TIMEOUT: "magenta",
    TaskPhase.CANCELED: "yellow",
    TaskPhase.EXHAUSTED: "bold red",
}

Column = tuple[str, str]
"""A heading and the name of what stands below it."""

_TASK: Column = ("TASK", "task")
_ERROR: Column = ("ERROR", "error")
_COLUMNS: Sequence[Column] = (
    ("ATTEMPT", "attempt"),
    ("PHASE", "phase"),
    ("STARTED", "started"),
    ("DURATION", "duration"),
    ("EXIT", "exit"),
    ("SOURCE", "source"),
    _ERROR,
)
_ENDED: Column = ("ENDED", "ended")

_NUMBERS = frozenset({"ATTEMPT", "#", "DURATION", "EXIT", "ACTIVE", "LAST SEEN", "RATE", "MEDIAN", "RUNS"}) | {
    *("AGO", "SUCCESS", "PROBLEM", "PROBLEMS", "P50", "P95")
}
_ERROR_ROOM = 60
"""Cells of a terminal that an error has at least, unless it is shorter; else it stands below its run."""
_TASK_ROOM = 40
"""The most cells of a terminal, or three in ten of a wide one, that task ids have; longer ones are folded."""
_NEWEST_RIGHT = "RECENT"
"""The column that is aligned to the right and loses its beginning."""
_GIVING_WAY = (
    *(("ERROR", _ERROR_ROOM), ("SOURCE", 16), ("TASK", 32), ("SUPERVISOR", 10), ("SOURCE", 10)),
    *(("TASK", 24), ("RECENT", 12), ("TASK", 20), ("TASK", 12), ("SOURCE", 6)),
)
"""The columns that become narrower where there is little room, in this order, to so many cells; no other does."""

_FEWEST = 2
"""Columns that are shown however narrow the terminal is."""

_GAP = 2
"""Cells between two columns, where there is room."""

_NARROW = 100
"""Columns of a terminal below which tables are written closer."""


def columns_of(wanted: RunFilter) -> Sequence[Column]:
    """Return the columns of a list of runs: those of problems of several tasks have their ends, by which they come."""
    if wanted.task_id is not None:
        return _COLUMNS
    columns = [_ENDED if column[1] == "started" and wanted.only_problems else column for column in _COLUMNS]
    if wanted.active:
        columns = [column for column in columns if column[1] not in ("exit", "error")]
    return (_TASK, *columns)


def is_narrow() -> bool:
    """Whether the output is a terminal with little room."""
    return sys.stdout.isatty() and Console().width < _NARROW


def holds_unicode() -> bool:
    """Whether the output can hold every character."""
    return (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")


def print_json(wire: Mapping[str, Any]) -> None:
    """Print an object as a line of JSON."""
    # What cannot hold every character gets them escaped; the object is the same.
    click.echo(json.dumps(wire, ensure_ascii=not holds_unicode()))


def print_table(runs: Iterable[TaskRun], columns: Sequence[Column], zone: tzinfo = UTC) -> None:
    """Print runs as a table, with times of a zone; not on a terminal, as plain text without colour or cuts.

    On a narrow terminal errors stand below their runs, as they do where one would be cut.
    """
    runs, zone_called = list(runs), zone_name(zone)
    if is_narrow():
        if _TASK in columns:
            columns = [("#", name) if name == "attempt" else (heading, name) for heading, name in columns]
        zone_called = zone_called.rpartition("/")[2]
    headings = [f"{heading} ({zone_called})" if name in ("started", "ended") else heading for heading, name in columns]
    rows, notes = [_cells(run, columns, zone) for run in runs], []
    if rows and _ERROR in columns and (is_narrow() or _lacks_room(headings, rows)):
        place = columns.index(_ERROR)
        headings.pop(place)
        notes = [row.pop(place).plain for row in rows]
    print_rows(headings, rows, notes)


def _lacks_room(headings: Sequence[str], rows: Sequence[Sequence[Text]]) -> bool:
    """Whether a terminal has no room for the errors, or enough of them, beside the other columns."""
    if not sys.stdout.isatty():
        return False
    room = Console().width
    widths = dict(zip(headings, _natural(headings, rows, room), strict=True))
    left = room - _GAP * (len(widths) - 1) - sum(widths.values()) + widths["ERROR"]
    return left < min(widths["ERROR"], _ERROR_ROOM)


def print_rows(headings: Sequence[str], rows: Sequence[Sequence[Text]], notes: Sequence[str] = ()) -> None:
    """Print a table of anything, likewise; on a terminal, a note below each row that has one."""
    if not rows:
        return
    if not sys.stdout.isatty():
        _print_plain([headings, *[[cell.plain for cell in row] for row in rows]])
        return
    console = Console(highlight=False)
    gap = 1 if is_narrow() else _GAP
    widths = _fitting(headings, rows, console.width, gap)
    headings = headings[: len(widths)]
    table = _table(headings, widths, gap)
    table.add_row(*(Text(heading, style="bold") for heading in headings))
    for place, row in enumerate(rows):
        table.add_row(*map(_cut, row, headings, widths))  # as many as there are headings left
        if notes and notes[place]:
            console.print(table)
            console.print(Text(f"  {notes[place]}", style="dim"), no_wrap=True, overflow=_overflow())
            table = _table(headings, widths, gap)
    if table.row_count:
        console.print(table)


def _fitting(headings: Sequence[str], rows: Sequence[Sequence[Text]], room: int, gap: int) -> list[int]:
    """Return the widths of the columns so that they fit: of the first ones, where there is no room for all."""
    widths = _natural(headings, rows, room)
    room -= gap * (len(headings) - 1)
    for heading, least in _GIVING_WAY:
        if heading in headings:
            place = headings.index(heading)
            spare = max(0, widths[place] - max(least, cell_len(heading)))
            widths[place] -= min(spare, max(0, sum(widths) - room))
    while len(widths) > _FEWEST and sum(widths) > room:
        widths.pop()
        room += gap
    return widths


def _natural(headings: Sequence[str], rows: Sequence[Sequence[Text]], room: int) -> list[int]:
    """Return the widths of the columns where there is room for all of them, on a terminal of so many."""
    columns = zip(headings, zip(*rows, strict=True), strict=True)
    widths = [(heading, max(cell_len(heading), *(cell.cell_len for cell in cells))) for heading, cells in columns]
    most = max(_TASK_ROOM, 3 * room // 10)
    return [min(width, most) if heading == "TASK" else width for heading, width in widths]


def _cut(cell: Text, heading: str, width: int) -> Text:
    return cell[-width:] if heading == _NEWEST_RIGHT else cell


def _table(headings: Sequence[str], widths: Sequence[int], gap: int) -> Table:
    table = Table.grid(padding=(0, gap, 0, 0), pad_edge=False)
    for heading, width in zip(headings, widths, strict=True):
        justify: Literal["left", "right"] = "right" if heading in (*_NUMBERS, _NEWEST_RIGHT) else "left"
        table.add_column(justify=justify, width=width, overflow="fold")
    return table


def zone_name(zone: tzinfo) -> str:
    """Return what a time zone is called in a heading."""
    return "UTC" if zone is UTC else str(zone)


def print_run(run: TaskRun, zone: tzinfo = UTC) -> None:
    """Print all that is known of a run."""
    name_of_zone, inferred = f" {zone_name(zone)}", " (inferred, not observed)"
    finished = "" if run.finished_at is None else local(run.finished_at, zone, "milliseconds")
    facts = [
        ("task", printable(run.task_id)),
        ("attempt", str(run.attempt)),
        ("phase", run.phase + inferred * run.recovered),
        ("started", local(run.started_at, zone, "milliseconds") + name_of_zone + inferred * run.start_inferred),
        ("finished", finished and finished + name_of_zone),
        ("duration", _duration(run)),
        ("exit code", "" if run.exit_code is None else str(run.exit_code)),
        ("source", printable(run.source or "")),
        ("submission", printable(run.submission or "")),
        ("try", "" if run.source_attempt is None else str(run.source_attempt)),
    ]
    console = Console(highlight=False, soft_wrap=True)
    for name, value in facts:
        if value:
            style = STYLES[run.phase] if name == "phase" else ""
            console.print(Text(f"{name:<11}", style="bold") + Text(value, style=style))
    if run.error is not None:
        console.print(Text("error", style="bold"))
        for line in run.error.splitlines():
            console.print(Text(f"  {printable(line)}"))


def printable(text: str) -> str:
    """Return text without the characters by which it could command a terminal, and those of the output's encoding."""
    harmless = "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") else character
        for character in text.replace("\t", "    ")
    )
    if holds_unicode():
        return harmless
    encoding = sys.stdout.encoding or "ascii"  # escaped here, so that widths are those of what is printed
    return harmless.encode(encoding, "backslashreplace").decode(encoding)


def _cells(run: TaskRun, columns: Sequence[Column], zone: tzinfo) -> list[Text]:
    narrow = is_narrow()
    moment = short_moment if narrow else local
    values = {
        "task": printable(run.task_id),
        "attempt": str(run.attempt),
        "phase": run.phase + (("?" if narrow else " (inferred)") if run.recovered else ""),
        "started": moment(run.started_at, zone),
        "ended": "" if run.finished_at is None else moment(run.finished_at, zone),
        "duration": _duration(run).removesuffix(" so far" if narrow else ""),
        "exit": "" if run.exit_code is None else str(run.exit_code),
        "source": printable(run.source or ""),
        "error": summary_of(run.error),
    }
    cut = ("error", "source") if narrow else ("error",)
    return [
        Text(
            values[name],
            style=STYLES[run.phase] if name == "phase" else "",
            no_wrap=name in cut,
            overflow=_overflow() if name in cut else "fold",
        )
        for _, name in columns
    ]


def _overflow() -> Literal["ellipsis", "crop"]:
    return "ellipsis" if holds_unicode() else "crop"


def summary_of(error: str | None) -> str:
    """Return the last line of an error, without what could command a terminal."""
    return printable(last_line(error))


def percent(some: int, of: int) -> str:
    """Return a part in per cent: only none are 0 %, and only all are 100 %."""
    rounded = round(1000 * some / of)
    return f"{(min(max(rounded, 1), 999) if 0 < some < of else rounded) / 10:.1f} %"


def short_moment(moment: datetime, zone: tzinfo) -> str:
    """Return a time in few characters: without the year if it is this year's, else without the seconds."""
    is_of_this_year = in_zone(moment, zone).year == datetime.now(zone).year
    return local(moment, zone)[5:] if is_of_this_year else local(moment, zone, "minutes")


def _duration(run: TaskRun) -> str:
    if run.duration is not None:
        return readable(run.duration)
    return f"{readable(datetime.now(UTC) - run.started_at)} so far"


def _print_plain(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())
