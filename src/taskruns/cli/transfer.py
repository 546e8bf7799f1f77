"""``taskruns export`` and ``taskruns import``."""

import json
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, tzinfo
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import click

from taskruns.bulk import Row
from taskruns.cli import complain
from taskruns.cli.discovery import database, db_option
from taskruns.cli.filters import filter_options
from taskruns.cli.lines import MAX_LINE, Rejects, refuse_same_file
from taskruns.cli.loading import Chunk, Loaded, load_all
from taskruns.cli.options import TaskPattern
from taskruns.cli.output import printable
from taskruns.cli.progress import Bar, progress
from taskruns.filters import RunFilter, RunOrder
from taskruns.history import TaskRunHistory
from taskruns.model import TaskPhase, TaskRun
from taskruns.retention import Retention
from taskruns.times import parse_time

_AT_ONCE = 500
"""Runs that are written at a time."""

_CHUNK = 5_000
"""Runs that are added by one transaction, unless they are long."""

_SQLITE_CHUNK = 25_000
"""The same for SQLite, where each transaction writes the pages of its indexes anew."""

_CHUNK_BYTES = 8 * 1024 * 1024

_CACHE_SIZE = "64"
"""MiB of an SQLite database that are kept in memory: the order of the runs is not that of every index."""

_CSV = (
    "taskId",
    "attempt",
    "phase",
    "startedAt",
    "finishedAt",
    "durationMs",
    "error",
    "exitCode",
    "recovered",
    "startInferred",
    "source",
    "submission",
    "sourceAttempt",
)


@click.command("export", short_help="Write runs as JSON lines, or as CSV.")
@click.option("--csv", "as_csv", is_flag=True, help="Write CSV with a header instead.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Where to; else to standard output.")
@click.option("--task", type=TaskPattern(), help="Only the runs of this task, or of these.")
@filter_options
@db_option
def export_command(wanted: RunFilter, zone: tzinfo, as_csv: bool, output: Path | None) -> int:  # noqa: ARG001  (shown is UTC)
    """Write runs as JSON lines, all of them unless told otherwise.

    They come in the order of task and attempt; with a filter of anything but one task, in the order they started.
    `taskruns import` reads them. A FILE is complete or not there at all. GLOB is a pattern such as 'backup-*'; [*] is a
    star.
    """
    line_of: Callable[[TaskRun], str] = _csv_line if as_csv else _json_line
    on_terminal = output is None and sys.stdout.isatty()
    with database().reading() as history:
        is_plain = wanted == RunFilter(wanted.task_id)
        runs = history.all_runs(wanted.task_id) if is_plain else history.iter_runs(wanted, order=RunOrder.OLDEST)
        first = list(islice(runs, 1))
        if wanted.task_id is not None and not first and history.last_run(wanted.task_id) is None:
            complain(f"no run of {printable(wanted.task_id)}")
            return 1
        with _target(output) as file, progress(hidden=on_terminal) as bar:
            if as_csv:
                file.write(f"{','.join(_CSV)}\n".encode())
            portion = first + list(islice(runs, _AT_ONCE - 1))
            while portion:
                file.write("".join(map(line_of, portion)).encode())
                bar.advance(len(portion))
                portion = list(islice(runs, _AT_ONCE))
            file.flush()
    return 0


@contextmanager
def _target(path: Path | None) -> Iterator[BinaryIO]:
    """Give the file to write to; one with a name gets it when it is complete."""
    if path is None or str(path) == "-":
        yield sys.stdout.buffer
        return
    path = path.resolve()  # so that a link stays one
    if path.is_dir():
        raise click.ClickException(f"--output: {path} is a directory")
    if not path.parent.is_dir():
        raise click.ClickException(f"--output: there is no directory {path.parent}")
    if path.exists() and not path.is_file():
        with path.open("wb") as device:
            yield device
        return
    with ExitStack() as undo, _blamed(path):
        number, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        undo.callback(Path(name).unlink, missing_ok=True)
        with os.fdopen(number, "wb") as file:
            yield file
            file.flush()
            os.fsync(number)
        Path(name).replace(path)


@contextmanager
def _blamed(path: Path) -> Iterator[None]:
    """Say which file could not be written."""
    try:
        yield
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written: {error.strerror or error}") from None


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _json_line(run: TaskRun) -> str:
    return _encode(run.to_wire()) + "\n"


def _csv_line(run: TaskRun) -> str:
    wire = {"recovered": False, "startInferred": False} | run.to_wire()
    return ",".join([_csv_value(wire.get(key)) for key in _CSV]) + "\n"


def _csv_value(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    # Not by the csv module, which before Python 3.13 leaves a lone carriage return bare.
    return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in ',"\r\n') else text


@click.command("import", short_help="Add runs that `taskruns export` wrote.")
@click.argument("file")
@click.option(
    "--rejects", type=click.Path(path_type=Path), metavar="FILE", help="Where to keep lines that are rejected."
)
@click.option("--yes", is_flag=True, help="Do not ask about runs that are old enough to be deleted again.")
@db_option
def import_command(file: str, rejects: Path | None, yes: bool) -> int:
    """Add the runs in FILE, or from standard input (-): JSON lines, as `taskruns export` writes them.

    A run that is there already is skipped; if it is not the same, or a line is no run, the line is rejected, and the
    exit status is 1. Of different lines for one run, one is kept. Stopped on its way, it may be started again.

    The default database deletes old runs by itself: at the first run that would be, it asks whether to go on.
    """
    refuse_same_file(file, rejects)
    found = database()
    url, most = found.url, _CHUNK
    if url.get_backend_name() == "sqlite":
        url, most = url.set(query={"cache_size": _CACHE_SIZE, **url.query}), _SQLITE_CHUNK
    with ExitStack() as opened:
        source = opened.enter_context(_source(file))
        with found.options_checked():
            history = opened.enter_context(TaskRunHistory.connect(url))
            history.prepare()
        if rejects is not None:
            opened.enter_context(_blamed(rejects))
        kept = opened.enter_context(Rejects(rejects))
        done = _Done(kept)
        opened.callback(done.report)
        status = os.fstat(source.fileno())
        bar = opened.enter_context(progress(status.st_size if stat.S_ISREG(status.st_mode) else None))
        check = None
        if found.retention is not None and not yes:
            check = _AgeCheck(found.retention, bar, can_ask=file != "-").check
        loading = opened.enter_context(closing(load_all(history, url, _chunks(source, most, kept), check)))
        for chunk, loaded in loading:
            done.take(chunk, loaded)
            bar.advance(len(chunk.lines), chunk.size)
    return 1 if kept.count else 0


@contextmanager
def _source(file: str) -> Iterator[BinaryIO]:
    if file == "-":
        if sys.stdin is None:
            raise click.ClickException("standard input is closed")
        yield sys.stdin.buffer
        return
    with ExitStack() as opened:
        try:
            source = opened.enter_context(Path(file).open("rb"))
        except OSError as error:
            raise click.ClickException(f"{file}: {error.strerror}") from None
        yield source


def _chunks(source: BinaryIO, most: int, rejects: Rejects) -> Iterator[Chunk]:
    """Yield the lines that are to be loaded."""
    lines: list[tuple[int, bytes]] = []
    number = size = 0
    while line := source.readline(MAX_LINE):
        number += 1
        size += len(line)
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            rejects.reject(number, line, f"longer than {MAX_LINE >> 20} MiB", _rest_of_line(source))
        elif not line.isspace():
            lines.append((number, line))
        if len(lines) == most or size > _CHUNK_BYTES:
            yield Chunk(lines, size)
            lines, size = [], 0
    yield Chunk(lines, size)


class _AgeCheck:
    """Stops at the first run that the policy of its new database would delete, and asks whether to go on."""

    def __init__(self, retention: Retention, bar: Bar, *, can_ask: bool) -> None:
        self._cutoffs = retention.cutoffs(datetime.now(UTC))
        self._bar = bar
        self._can_ask = can_ask and all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))
        self._is_over = False

    def check(self, rows: Sequence[Row]) -> None:
        """Look at rows that are about to be added.

        Raises:
            ClickException: there is such a run, and nobody to ask.
            Abort: the answer is no.
        """
        old = None if self._is_over else next(filter(self._is_old, rows), None)
        if old is None:
            return
        self._is_over = True
        said = (
            f"attempt {old[1]} of {printable(old[0])} ended at {old[4]}: the default database deletes runs of that age"
        )
        if not self._can_ask:
            raise click.ClickException(f"{said} (--yes adds them all the same)")
        with self._bar.aside():
            complain(said)
            click.confirm("Add such runs all the same?", abort=True, err=True)

    def _is_old(self, row: Row) -> bool:
        return row[4] is not None and self._cutoffs.is_old(TaskPhase(row[2]), parse_time(row[4]))


class _Done:
    """What became of the lines so far."""

    def __init__(self, rejects: Rejects) -> None:
        self._rejects = rejects
        self._added = self._equal = 0

    def take(self, chunk: Chunk, loaded: Loaded) -> None:
        """Count what was loaded, and reject what was not."""
        self._added += loaded.added
        self._equal += loaded.equal
        for place, reason in loaded.rejected:
            self._rejects.reject(*chunk.lines[place], reason)

    def report(self) -> None:
        """Say what became of the lines."""
        said = [f"{_counted(self._added, 'run')} added"]
        if self._equal:
            said.append(f"{self._equal} {'was' if self._equal == 1 else 'were'} there already")
        if self._rejects.count:
            said.append(f"{_counted(self._rejects.count, 'line')} rejected")
        complain(", ".join(said))


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _rest_of_line(source: BinaryIO) -> Iterator[bytes]:
    while piece := source.readline(MAX_LINE):
        yield piece
        if piece.endswith(b"\n"):
            return
