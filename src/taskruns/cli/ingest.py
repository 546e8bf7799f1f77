"""``taskruns ingest``."""

import codecs
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import click

from taskruns.cli import complain
from taskruns.cli.discovery import database, db_option
from taskruns.cli.lines import MAX_LINE, Rejects, refuse_same_file
from taskruns.cli.sink import Sink
from taskruns.events import Event
from taskruns.model import checked_name
from taskruns.timeline import Effect

_CHUNK = 64 * 1024
"""Bytes that are read at once."""

_CHUNKS = 64
"""Chunks that are read ahead of what is written."""

_LINES, _BYTES = 4000, 4 * 1024 * 1024
"""Most lines, and roughly most bytes, that become one transaction."""

_TICK = 0.5
"""Seconds between two looks at a database that cannot be used, while the input pauses."""

_SIGNALS = [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]

_MEANINGS = {
    Effect.OPENED: "opened a run",
    Effect.CLOSED: "closed one",
    Effect.AMENDED: "made one more exact",
    Effect.REPEATED: "said what was known",
    Effect.CONTRADICTED: "contradicted the end of a run",
    Effect.PRUNED: "were older than the oldest run that is kept",
    Effect.UNMATCHED: "named no attempt and met no run",
    Effect.NONE: "concern no run",
    Effect.UNKNOWN: "are of an unknown kind",
}


_decode = json.JSONDecoder().raw_decode  # json.loads takes twice as long


class _Input:
    """Reads lines in a thread of its own, so that a pause is seen, and a signal heard, at once."""

    def __init__(self, path: str) -> None:
        if path == "-" and sys.stdin is None:  # closed, by `<&-`
            raise click.ClickException("standard input is closed")
        self._path = path
        # Lines; a piece of a line that is too long, and whether it is the last one; an error; the end.
        self._queue: SimpleQueue[bytes | tuple[bytes, bool] | BaseException | None] = SimpleQueue()
        self._room = threading.Semaphore(_CHUNKS)
        self._has_more = False
        self._is_stopped = False
        self.tick: float | None = None
        """Seconds after which a pause is told again."""
        threading.Thread(target=self._read, daemon=True).start()

    def heed_signals(self) -> None:
        """Stop at a signal to stop, unless it is ignored, as nohup has it."""
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._stop)

    def _stop(self, *_: object) -> None:
        """Take no more than what has been read by now. A signal handler: it takes no lock."""
        if not self._is_stopped:
            self._is_stopped = True
            self._queue.put(None)

    def _read(self) -> None:
        try:
            file = sys.stdin.fileno() if self._path == "-" else os.open(self._path, os.O_RDONLY)
            is_long, data = False, b""
            while chunk := os.read(file, _CHUNK):
                data += chunk
                if is_long:
                    piece, newline, data = data.partition(b"\n")
                    is_long = not newline
                    self._put((piece, not is_long))
                lines, newline, data = data.rpartition(b"\n")
                if newline:
                    self._put(lines)
                if len(data) > MAX_LINE:
                    self._put((data, False))
                    is_long, data = True, b""
            if is_long:
                self._put((b"", True))
            elif data:
                self._put(data)  # what no line end follows is a line at the end of the input
        except OSError as error:
            self._queue.put(click.ClickException(f"{self._path} cannot be read: {error.strerror}"))
        self._queue.put(None)

    def _put(self, item: bytes | tuple[bytes, bool]) -> None:
        self._room.acquire()
        self._queue.put(item)

    def rest(self) -> Iterator[bytes]:
        """Yield what follows of the line that was yielded last, where it is too long to be read as one."""
        while self._has_more:
            item = self._queue.get()
            if isinstance(item, BaseException):
                raise item
            if not isinstance(item, tuple):
                return  # stopped on the way
            self._room.release()
            self._has_more = not item[1]
            yield item[0]

    def __iter__(self) -> Iterator[bytes | None]:
        """Yield the lines, and None where the input pauses."""
        while True:
            try:
                item = self._queue.get_nowait()
            except Empty:
                yield None
                try:
                    item = self._queue.get(timeout=self.tick)
                except Empty:
                    continue
            if item is None:
                break
            if isinstance(item, BaseException):
                yield None  # what was read before the error is good
                raise item
            self._room.release()
            if isinstance(item, tuple):
                self._has_more = not item[1]
                yield item[0]
                if self._has_more:
                    return
            else:
                yield from item.split(b"\n")


@click.command("ingest", short_help="Record the events of a supervisor.")
@click.argument("file", default="-", type=click.Path(allow_dash=True, exists=True, dir_okay=False))
@click.option("--source", metavar="NAME", help="The name of the stream.  [default: the name of the host]")
@click.option("--ack", is_flag=True, help='Print {"ack": SEQ}, or the number of the line, once it is on disk.')
@click.option("--rejects", type=click.Path(dir_okay=False, path_type=Path), help="Keep lines that are not valid there.")
@db_option
def ingest_command(file: str, source: str | None, ack: bool, rejects: Path | None) -> int:
    """Record the events of a supervisor: JSON lines from FILE, or from standard input.

    Each line is an object with `kind` (such as TaskStarting, AttemptFailed or TaskFinished), `task`, `attempt`, `at`
    and, of an end, `reason`, `exitCode` and `durationMs`. What has been read is written whenever the input pauses. A
    line that is not valid is reported and stops nothing. A file may be read again: what was recorded stays as it is.

    Two streams of one host need two names. The exit status is 0 at the end of the input or after SIGTERM; 1 if a
    line was rejected.
    """
    if source is not None:
        try:
            checked_name(source, "source")
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--source") from None
    refuse_same_file(file, rejects)
    chosen = database()
    with chosen.options_checked():
        sink = Sink(chosen.url, source, chosen.retention)
        lines = _Input(file)  # before the database is waited for: the supervisor does not wait
        lines.heed_signals()
        sink.open()
    with closing(sink), Rejects(rejects) as kept:
        ingestion = _Ingestion(sink, kept, is_acknowledged=ack)
        try:
            for line in lines:
                if line is not None:
                    ingestion.take(line, lines)
                if line is None or ingestion.is_full:
                    ingestion.write()
                    lines.tick = _TICK if sink.is_out else None
            ingestion.write()
        except OSError as error:
            if rejects is None:
                raise
            raise click.ClickException(f"{rejects} cannot be written: {error.strerror}") from None
        finally:
            ingestion.summarize()
    if sink.is_broken:
        return 2
    return 1 if kept.count else 0


class _Ingestion:
    """The lines that were read and not yet written, and what became of all."""

    def __init__(self, sink: Sink, rejects: Rejects, *, is_acknowledged: bool) -> None:
        self._sink = sink
        self._rejects = rejects
        self._is_acknowledged = is_acknowledged
        self._number = 0
        self._lines: list[tuple[int, bytes]] = []
        self._events: list[Event] = []
        self._bytes = 0
        self._done: list[int | str] = []  # to be acknowledged with the next write
        self._unknown_keys = 0

    @property
    def is_full(self) -> bool:
        """Whether it is time to write."""
        return len(self._done) >= _LINES or self._bytes >= _BYTES

    def take(self, line: bytes, lines: _Input) -> None:
        """Take a line that was read; of one that is too long, its beginning."""
        self._number += 1
        if self._number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip() and len(line) <= MAX_LINE:
            return
        wire: Any = None
        try:
            wire = _wire(line)
            event = Event.from_wire(wire)
        except (TypeError, ValueError) as error:
            self._rejects.reject(self._number, line, str(error), lines.rest())
            seq = wire.get("seq") if isinstance(wire, dict) else None
            self._done.append(seq if isinstance(seq, int | str) and not isinstance(seq, bool) else self._number)
            return
        self._events.append(event)
        self._lines.append((self._number, line))
        self._bytes += len(line)
        self._unknown_keys += event.unknown_keys
        self._done.append(self._number if event.seq is None else event.seq)

    def write(self) -> None:
        """Write what was taken, then acknowledge it."""
        effects: list[Effect] | None = None
        if self._events:
            effects = self._sink.write(self._events, lambda: [_wire(line) for _, line in self._lines])
        elif self._sink.is_out:
            self._sink.is_back()
        for (number, line), effect in zip(self._lines, effects or (), strict=False):
            if effect is Effect.FULL:
                self._rejects.reject(number, line, "the task has used up its attempt numbers")
        self._rejects.sync()
        if self._is_acknowledged and self._done and not self._sink.is_broken:
            try:
                click.echo("\n".join(json.dumps({"ack": done}) for done in self._done))
            except OSError as error:  # nobody listens any more; the history is kept all the same
                complain(f"no more is acknowledged: {error.strerror}")
                self._is_acknowledged = False
        self._lines, self._events, self._bytes, self._done = [], [], 0, []

    def summarize(self) -> None:
        """Say what became of the lines."""
        facts = [f"{count} {_MEANINGS[effect]}" for effect, count in self._sink.counts.items() if effect in _MEANINGS]
        if self._sink.kept:
            facts.append(f"{self._sink.kept} kept until the database could be used")
        if self._rejects.count:
            facts.append(f"{self._rejects.count} rejected")
        if self._unknown_keys:
            facts.append(f"{self._unknown_keys} unknown keys")
        complain(f"{self._number} line{'s'[: self._number != 1]}: {', '.join(facts) or 'no events'}")


def _wire(line: bytes) -> Any:
    if len(line) > MAX_LINE:
        raise ValueError(f"it is longer than {MAX_LINE} bytes")
    try:
        text = line.decode().strip()
        wire, end = _decode(text)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg} (column {error.colno})") from None
    if end != len(text):
        raise ValueError(f"it is not JSON: more follows (column {end + 1})")
    return wire
