"""How runs are shown: tables for people, JSON lines for programs."""

import json
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

import click
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from taskruns.cli.durations import readable
from taskruns.model import TaskPhase, TaskRun

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

RUN_COLUMNS: Sequence[Column] = (
    ("ATTEMPT", "attempt"),
    ("PHASE", "phase"),
    ("STARTED (UTC)", "started"),
    ("DURATION", "duration"),
    ("EXIT", "exit"),
    ("SOURCE", "source"),
    ("ERROR", "error"),
)
TASK_COLUMNS: Sequence[Column] = (("TASK", "task"), *RUN_COLUMNS)

_NUMBERS = frozenset({"ATTEMPT", "DURATION", "EXIT", "ACTIVE", "LAST SEEN"})
_FOLDED = frozenset({"TASK", "SOURCE", "SUPERVISOR"})


def print_json(run: TaskRun) -> None:
    """Print a run as a line of JSON."""
    # What cannot hold every character gets them escaped; the object is the same.
    ascii_only = not (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    click.echo(json.dumps(run.to_wire(), ensure_ascii=ascii_only))


def print_table(runs: Iterable[TaskRun], columns: Sequence[Column]) -> None:
    """Print runs as a table; where the output is not a terminal, as plain text without colour or cuts."""
    print_rows([heading for heading, _ in columns], [_cells(run, columns) for run in runs])


def print_rows(headings: Sequence[str], rows: Sequence[Sequence[Text]]) -> None:
    """Print a table of anything, likewise."""
    if not rows:
        return
    if not sys.stdout.isatty():
        _print_plain([headings, *[[cell.plain for cell in row] for row in rows]])
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(
            heading,
            justify="right" if heading in _NUMBERS else "left",
            overflow="ellipsis" if heading == "ERROR" else "fold",
            no_wrap=heading not in _FOLDED,
            max_width=60 if heading == "TASK" else None,
        )
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


def print_run(run: TaskRun) -> None:
    """Print all that is known of a run."""
    finished = "" if run.finished_at is None else _moment(run.finished_at, "milliseconds")
    facts = [
        ("task", printable(run.task_id)),
        ("attempt", str(run.attempt)),
        ("phase", run.phase + (" (inferred, not observed)" if run.recovered else "")),
        (
            "started",
            f"{_moment(run.started_at, 'milliseconds')} UTC" + (" (inferred, not observed)" * run.start_inferred),
        ),
        ("finished", finished and f"{finished} UTC"),
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
    """Return text without the characters by which it could command a terminal."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") else character
        for character in text.replace("\t", "    ")
    )


def _cells(run: TaskRun, columns: Sequence[Column]) -> list[Text]:
    values = {
        "task": printable(run.task_id),
        "attempt": str(run.attempt),
        "phase": run.phase + (" (inferred)" if run.recovered else ""),
        "started": _moment(run.started_at, "seconds"),
        "duration": _duration(run),
        "exit": "" if run.exit_code is None else str(run.exit_code),
        "source": printable(run.source or ""),
        "error": summary(run.error),
    }
    return [Text(values[name], style=STYLES[run.phase] if name == "phase" else "") for _, name in columns]


def summary(error: str | None) -> str:
    """Return the last line of an error, which says most: of a traceback, of what a command printed."""
    lines = [line for line in (error or "").splitlines() if line.strip()]
    return printable(lines[-1].strip()) if lines else ""


def _moment(moment: datetime, precision: str) -> str:
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(" ", precision)


def _duration(run: TaskRun) -> str:
    if run.duration is not None:
        return readable(run.duration)
    return f"{readable(max(datetime.now(UTC) - run.started_at, timedelta()))} so far"


def _print_plain(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())
