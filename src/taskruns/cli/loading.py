"""Lines of runs on their way into a database: checked and stored a chunk at a time, in several processes if many."""

import json
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import get_context
from multiprocessing.connection import wait
from typing import Any

import click
from sqlalchemy import URL

from taskruns.bulk import Row, row_from_wire
from taskruns.cli import advice
from taskruns.history import TaskRunHistory
from taskruns.model import MAX_TOLD_ATTEMPT

MOST_PROCESSES = 4

_ALONE = 8
"""Chunks after which processes are worth their start."""

_ENDED = "a process that stores runs has ended unexpectedly"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some lines of a file."""

    lines: list[tuple[int, bytes]]
    """Each with its number."""
    size: int
    """Bytes that were read for them."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What became of a chunk."""

    added: int
    equal: int
    rejected: list[tuple[int, str]]
    """Which of its lines, counted from 0, and why."""


Check = Callable[[Sequence[Row]], None]
"""Looks at runs before they are stored, and raises what stops it."""


def load(history: TaskRunHistory, chunk: Chunk, check: Check | None = None) -> Loaded:
    """Store the runs of a chunk in one transaction."""
    rows: list[Row] = []
    places: list[int] = []
    rejected = []
    for place, (_, line) in enumerate(chunk.lines):
        try:
            row = row_of_line(line)
        except (ValueError, TypeError) as error:
            rejected.append((place, str(error)))
        except RecursionError:
            rejected.append((place, "not JSON: nested too deeply"))
        else:
            rows.append(row)
            places.append(place)
    if check is not None:
        check(rows)
    outcome = history.add_rows(rows)
    for number in outcome.conflicts:
        task_id, attempt = rows[number][:2]
        reason = f"attempt {attempt} of task {task_id!r} exists already, and is not the same"
        rejected.append((places[number], reason))
    return Loaded(outcome.added, outcome.equal, sorted(rejected))


def _refuse(constant: str) -> None:
    raise ValueError(f"not JSON: {constant}")


_decode = json.JSONDecoder(parse_constant=_refuse).decode


def row_of_line(line: bytes) -> Row:
    """Return the run that a line holds.

    Raises:
        ValueError: it is not JSON, or not that of a run.
        TypeError: a value has the wrong type.
        RecursionError: it is nested too deeply.
    """
    try:
        row = row_from_wire(_decode(line.decode()))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    attempt = row[1]
    if attempt > MAX_TOLD_ATTEMPT:
        raise ValueError(f"attempt must be at most {MAX_TOLD_ATTEMPT}, not {attempt}")
    return row


def load_all(
    history: TaskRunHistory, url: URL, chunks: Iterable[Chunk], check: Check | None = None
) -> Generator[tuple[Chunk, Loaded]]:
    """Store the runs of all chunks; yield each chunk when it is done, not always in their order.

    Many are shared out between processes: on one processor, reading a run takes longer than storing it. A ``check``
    keeps them in this one.

    Raises:
        ClickException: the database cannot be used.
    """
    chunks = iter(chunks)
    for chunk in islice(chunks, _ALONE):
        yield chunk, load(history, chunk, check)
    count = _processes(url) if check is None else 1
    first = list(islice(chunks, 1))
    if not first or count == 1:
        for chunk in chain(first, chunks):
            yield chunk, load(history, chunk, check)
        return
    context = get_context("spawn")  # a forked process would hold the connections of the others open
    with ExitStack() as workers:
        idle = [_start(context, workers, url) for _ in range(count)]
        busy: dict[Any, Chunk] = {}
        for chunk in chain(first, chunks):
            if not idle:
                for worker in wait(list(busy)):
                    yield busy.pop(worker), _answer(worker)
                    idle.append(worker)
            worker = idle.pop()
            _send(worker, chunk)
            busy[worker] = chunk
        while busy:
            for worker in wait(list(busy)):
                yield busy.pop(worker), _answer(worker)


def _processes(url: URL) -> int:
    if url.get_backend_name() == "sqlite":
        return 1  # it has one writer, which keeps in memory what another would have to read again
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_PROCESSES, processors)


def _start(context: Any, workers: ExitStack, url: URL) -> Any:
    """Start a process, which ends when ``workers`` is closed, and return the connection to it."""
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, url), daemon=True)
    process.start()
    theirs.close()
    workers.callback(process.join)
    workers.callback(process.terminate)
    return workers.enter_context(ours)


def _send(worker: Any, chunk: Chunk) -> None:
    try:
        worker.send(chunk)
    except OSError:
        raise click.ClickException(_ENDED) from None


def _answer(worker: Any) -> Loaded:
    try:
        answer = worker.recv()
    except (EOFError, OSError):
        raise click.ClickException(_ENDED) from None
    if isinstance(answer, Exception):
        raise answer
    assert isinstance(answer, Loaded)  # noqa: S101  (for mypy)
    return answer


def _work(connection: Any, url: URL) -> None:
    """Store chunks until the other end is closed, also by the end of its process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all, and the first process tells the others
    with TaskRunHistory.connect(url) as history:
        while True:
            try:
                chunk = connection.recv()
            except (EOFError, OSError):
                return
            answer: Loaded | Exception
            try:
                answer = load(history, chunk)
            except Exception as error:  # noqa: BLE001  (raised again at the other end)
                line = advice(error)
                answer = RuntimeError(traceback.format_exc()) if line is None else click.ClickException(line)
            try:
                connection.send(answer)
            except OSError:
                return
