"""Histories of many runs for bench_queries.py: as dense in time whatever their size, the same each time they are made.

A run starts each 0.7776 s, so that 10,000,000 are 90 days, up to :data:`NOW`; the tasks take turns. Of the runs 5 % are
problems, and 100 are active. A few tasks have a shape of their own:

* ``paged``: 150 runs, spread over the whole time.
* ``fifty``: 50 runs that have all ended, spread likewise.
* ``flaky``, of ten million runs: 100,000 of its own up to a day ago, whose newest 90,000 have failed.
"""

import io
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from heapq import merge
from itertools import islice
from operator import itemgetter
from pathlib import Path

import psycopg
from sqlalchemy import URL

from taskruns import TaskRunHistory

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
COLUMNS = "task_id, attempt, phase, started_at, finished_at, error, source, recovered, start_inferred"

Row = tuple[str, int, str, str, str | None, str | None, str, bool, bool]

_STEP = 777_600  # microseconds
_BASE = datetime(1970, 1, 1)  # noqa: DTZ001  (stored times have no zone)
_END = (NOW.replace(tzinfo=None) - _BASE) // timedelta(microseconds=1)
_DAY = 24 * 3600 * 1_000_000
_ENDS = ("failed", "ConnectionError: the shop did not answer"), ("timeout", "timed out"), ("exhausted", "gave up")
_SOURCES = [f"web-{number}" for number in range(1, 9)]


@dataclass(frozen=True)
class Shape:
    """How many runs how many tasks have."""

    tasks: int
    of_each: int

    @property
    def runs(self) -> int:
        """The runs in all, without those of the special tasks."""
        return self.tasks * self.of_each

    @property
    def name(self) -> str:
        """What its databases are called."""
        return f"taskruns_bench_{self.tasks}x{self.of_each}"

    @property
    def is_large(self) -> bool:
        """Whether it has the task ``flaky``."""
        return self.runs >= 1_000_000


def task(number: int) -> str:
    """Return a task id, of 20 characters, in the order of the numbers."""
    return f"shop:import-{number:08}"


def _row(number: int, task_id: str, attempt: int, start: int, phase: str | None = None) -> Row:
    """Return a run that is told by its number; ``start`` in microseconds."""
    chance = number * 0x9E3779B1 & 0xFFFFFFFF
    chance = (chance ^ chance >> 15) * 0x2C1B3C6D & 0xFFFFFFFF
    chance ^= chance >> 13
    source = _SOURCES[chance & 7]
    started_at = (_BASE + timedelta(microseconds=start)).isoformat(" ", "microseconds")
    if phase == "running":
        return task_id, attempt, phase, started_at, None, None, source, False, False
    duration = int(10_000 + 299_990_000 * (chance / 0x100000000) ** 4)
    if start + duration > _END:
        duration = duration * (_END - start) // 300_000_000
    finished_at = (_BASE + timedelta(microseconds=start + duration)).isoformat(" ", "microseconds")
    error = None
    outcome = (chance >> 3) % 1000
    if phase == "failed" or (phase is None and outcome < 50):
        phase, error = _ENDS[0 if phase or outcome < 40 else 1 if outcome < 45 else 2]
    return task_id, attempt, phase or "succeeded", started_at, finished_at, error, source, False, False


def _turns(shape: Shape, number: int, turn: int) -> Row:
    is_active = turn == shape.of_each - 1 and number % (shape.tasks // 100) == 0
    place = turn * shape.tasks + number
    start = _END - (shape.runs - place) * _STEP
    return _row(place, task(number), turn + 1, start, "running" if is_active else None)


def _special(shape: Shape, task_id: str, count: int, until: int = _END, failed: int = 0) -> Iterator[Row]:
    """Yield a task's runs, spread in time, never at the same moment as another run."""
    first = _END - shape.runs * _STEP
    for place in range(count):
        turn = int((place + 0.5) * (until - first) / count / _STEP)
        start = first + turn * _STEP + _STEP // 3 + ord(task_id[1])
        phase = None if not failed else "succeeded" if place < count - failed else "failed"
        yield _row(shape.runs + place, task_id, place + 1, start, phase)


def _specials(shape: Shape) -> list[Iterator[Row]]:
    """Return the special tasks in the order of their ids, which is before the others'."""
    found = [_special(shape, "fifty", 50)]
    if shape.is_large:
        found.append(_special(shape, "flaky", 100_000, until=_END - _DAY, failed=90_000))
    return [*found, _special(shape, "paged", 150)]


def by_key(shape: Shape) -> Iterator[Row]:
    """Yield all runs in the order of the primary key."""
    for runs in _specials(shape):
        yield from runs
    for number in range(shape.tasks):
        for turn in range(shape.of_each):
            yield _turns(shape, number, turn)


def by_start(shape: Shape) -> Iterable[Row]:
    """Return all runs in the order they started, in which a live table fills."""
    turns = (_turns(shape, number, turn) for turn in range(shape.of_each) for number in range(shape.tasks))
    specials = sorted((row for runs in _specials(shape) for row in runs), key=itemgetter(3))
    return merge(specials, turns, key=itemgetter(3))


def sqlite_file(shape: Shape, folder: Path) -> str:
    """Return the URL of a file with these runs, which is made if it is missing."""
    path = folder / f"{shape.name}.db"
    if not path.exists():
        part = path.with_suffix(".part")
        for leftover in folder.glob(f"{part.name}*"):
            leftover.unlink()
        _upgraded(f"sqlite:///{part}")
        with closing(sqlite3.connect(part, isolation_level=None)) as connection:
            _fill_sqlite(connection, shape)
        part.rename(path)
    return _upgraded(f"sqlite:///{path}")


def _upgraded(url: str) -> str:
    """Bring its tables up to date, also those of a history that was made before a migration came."""
    with TaskRunHistory.connect(url) as history:
        history.upgrade()
    return url


def _fill_sqlite(connection: sqlite3.Connection, shape: Shape) -> None:
    connection.execute("PRAGMA journal_mode = DELETE")
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA cache_size = -262144")
    made = "FROM sqlite_master WHERE type = 'index' AND tbl_name = 'task_runs' AND sql IS NOT NULL"
    indexes = connection.execute(f"SELECT name, sql {made}").fetchall()
    for name, _ in indexes:
        connection.execute(f"DROP INDEX {name}")
    connection.execute("BEGIN")
    marks = ", ".join("?" * len(COLUMNS.split()))
    connection.executemany(f"INSERT INTO task_runs ({COLUMNS}) VALUES ({marks})", by_key(shape))
    connection.execute("COMMIT")
    for _, definition in indexes:
        connection.execute(definition)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def postgresql_database(shape: Shape, server: URL) -> str:
    """Return the URL of a database with these runs, which is made if it is missing."""
    url = server.set(drivername="postgresql", database=shape.name).render_as_string(hide_password=False)
    admin = server.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(admin, autocommit=True) as connection:
        known = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [shape.name]).fetchone()
        if known is None:
            part = f"{shape.name}_part"
            connection.execute(f'DROP DATABASE IF EXISTS "{part}"')
            connection.execute(f'CREATE DATABASE "{part}"')
            filling = server.set(drivername="postgresql", database=part).render_as_string(hide_password=False)
            with psycopg.connect(_upgraded(filling), autocommit=True) as filled:
                _fill_postgresql(filled, shape)
            connection.execute(f'ALTER DATABASE "{part}" RENAME TO "{shape.name}"')
    return _upgraded(url)


def _fill_postgresql(connection: psycopg.Connection, shape: Shape) -> None:
    for setting in ("TimeZone = 'UTC'", "maintenance_work_mem = '512MB'", "max_parallel_maintenance_workers = 0"):
        connection.execute(f"SET {setting}")
    key = connection.execute("SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'pk_task_runs'")
    primary_key = key.fetchone()
    indexes = connection.execute(
        "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'task_runs' AND indexname <> 'pk_task_runs'"
    ).fetchall()
    assert primary_key is not None
    for name, _ in indexes:
        connection.execute(f"DROP INDEX {name}")
    connection.execute("ALTER TABLE task_runs DROP CONSTRAINT pk_task_runs")
    with connection.cursor().copy(f"COPY task_runs ({COLUMNS}) FROM STDIN") as copy:
        rows = iter(by_start(shape))
        while block := _block(islice(rows, 10_000)):
            copy.write(block)
    connection.execute(f"ALTER TABLE task_runs ADD CONSTRAINT pk_task_runs {primary_key[0]}")
    for _, definition in indexes:
        connection.execute(definition)
    connection.execute("VACUUM ANALYZE")
    connection.execute("CHECKPOINT")


def _block(rows: Iterable[Row]) -> bytes:
    text = io.StringIO()
    for task_id, attempt, phase, started_at, finished_at, error, source, _, _ in rows:
        end, why = finished_at or r"\N", error or r"\N"
        text.write(f"{task_id}\t{attempt}\t{phase}\t{started_at}\t{end}\t{why}\t{source}\tf\tf\n")
    return text.getvalue().encode()
