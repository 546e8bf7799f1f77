"""How fast `taskruns import` is, against the database's own bulk path in the driver: python benchmarks/bench_import.py.

Both fill a table of their own with the same runs, in turn, a round after the other. The raw path inserts values that
are ready: one transaction of executemany in sqlite3 (WAL, synchronous=FULL) and in PyMySQL, COPY by psycopg's
write_row. Ours is the whole process, from the start of the interpreter: it reads JSON lines, checks and stores them.
"""

import argparse
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pymysql
from sqlalchemy import create_engine, make_url, text

from taskruns import TaskPhase, TaskRun, TaskRunHistory
from taskruns.schema import task_runs

SERVERS = {
    "postgresql": os.environ.get("TASKRUNS_TEST_POSTGRES", "postgresql://postgres@127.0.0.1:5432/postgres"),
    "mariadb": os.environ.get("TASKRUNS_TEST_MARIADB", "mariadb://root@127.0.0.1:3306/mysql"),
}
NAME = "taskruns_bench_import"
COLUMNS = [column.name for column in task_runs.columns][:-1]
TASKS = 1000
START = datetime(2026, 1, 1, tzinfo=UTC)


def runs(rows: int) -> Iterator[TaskRun]:
    """Yield the runs of many tasks over the same weeks, in the order of the key: not that of the indexes on times."""
    of_each = -(-rows // TASKS)
    for number in range(rows):
        task, attempt = divmod(number, of_each)
        started_at = START + timedelta(minutes=5 * attempt, microseconds=task * 7_919)
        failed = number % 10 == 0
        yield TaskRun(
            f"import:shop-{task:04}",
            attempt + 1,
            TaskPhase.FAILED if failed else TaskPhase.SUCCEEDED,
            started_at,
            started_at + timedelta(milliseconds=1500 + number % 977),
            error="ConnectionError: the shop did not answer\n  after 3 tries" if failed else None,
            exit_code=int(failed),
            source="worker-1",
        )


def values(run: TaskRun, moment: Callable[[datetime], Any]) -> tuple[Any, ...]:
    """Return what a driver gets."""
    assert run.finished_at is not None
    return (
        *(run.task_id, run.attempt, run.phase.value, moment(run.started_at), moment(run.finished_at), run.error),
        *(run.exit_code, run.recovered, run.start_inferred, run.source, run.submission, run.source_attempt),
    )


def raw_sqlite(url: str, rows: int) -> float:
    """Return the seconds of one transaction of executemany."""
    ready = [values(run, lambda moment: moment.isoformat(" ", "microseconds")[:-6]) for run in runs(rows)]
    with closing(sqlite3.connect(str(make_url(url).database), isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        marks = ", ".join("?" * len(COLUMNS))
        begun = time.perf_counter()
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(f"INSERT INTO task_runs ({', '.join(COLUMNS)}) VALUES ({marks})", ready)
        connection.execute("COMMIT")
        return time.perf_counter() - begun


def raw_postgresql(url: str, rows: int) -> float:
    """Return the seconds of one COPY."""
    ready = [values(run, lambda moment: moment) for run in runs(rows)]
    with psycopg.connect(
        make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    ) as connection:
        begun = time.perf_counter()
        with connection.cursor().copy(f"COPY task_runs ({', '.join(COLUMNS)}) FROM STDIN") as copy:
            for row in ready:
                copy.write_row(row)
        connection.commit()
        return time.perf_counter() - begun


def raw_mariadb(url: str, rows: int) -> float:
    """Return the seconds of one transaction of executemany."""
    ready = [values(run, lambda moment: moment.replace(tzinfo=None)) for run in runs(rows)]
    server = make_url(url)
    connection = pymysql.connect(
        host=server.host,
        port=server.port or 3306,
        user=server.username,
        password=server.password or "",
        database=server.database,
        charset="utf8mb4",
    )
    with closing(connection):
        marks = ", ".join(["%s"] * len(COLUMNS))
        begun = time.perf_counter()
        connection.cursor().executemany(f"INSERT INTO task_runs ({', '.join(COLUMNS)}) VALUES ({marks})", ready)
        connection.commit()
        return time.perf_counter() - begun


RAW = {"sqlite": raw_sqlite, "postgresql": raw_postgresql, "mariadb": raw_mariadb}


def ours(url: str, lines: Path) -> tuple[float, float]:
    """Return the seconds of `taskruns import`, and the most memory its processes had together, in MB."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "taskruns", "--db", url, "import", str(lines)])
    most = 0.0
    while process.poll() is None:
        most = max(most, memory(process.pid))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.perf_counter() - begun, most


def memory(pid: int) -> float:
    """Return the memory of a process and its children in MB, what they share counted once; 0 except on Linux."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    own = int(rollup.partition("Pss:")[2].split()[0]) / 1024
    return own + sum(memory(int(child)) for child in children)


def emptied(kind: str, folder: Path) -> str:
    """Return the URL of a database with empty tables."""
    if kind == "sqlite":
        for name in ("runs.db", "runs.db-wal", "runs.db-shm"):
            (folder / name).unlink(missing_ok=True)
        url = f"sqlite:///{folder}/runs.db"
    else:
        server = make_url(SERVERS[kind])
        with TaskRunHistory.connect(server) as history:
            admin = history._engine.url  # with its driver
        engine = create_engine(admin, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS {NAME}"))
            connection.execute(text(f"CREATE DATABASE {NAME}"))
        engine.dispose()
        url = server.set(database=NAME).render_as_string(hide_password=False)
    with TaskRunHistory.connect(url) as history:
        history.upgrade()
    return url


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("kinds", nargs="*", default=["sqlite", "postgresql", "mariadb"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = folder / "runs.jsonl"
        with lines.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(run.to_wire()) + "\n" for run in runs(options.rows))
        for kind in options.kinds:
            ratios = []
            for _ in range(options.rounds):
                raw = RAW[kind](emptied(kind, folder), options.rows)
                seconds, most = ours(emptied(kind, folder), lines)
                ratios.append(raw / seconds)
                rates = f"{options.rows / raw:,.0f}/s raw, {options.rows / seconds:,.0f}/s taskruns import"
                print(f"{kind}: {rates}, ratio {ratios[-1]:.2f}, {most:.0f} MB", flush=True)
            low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
            print(f"{kind}: ratio min {low:.2f}, median {middle:.2f}, max {high:.2f}")


if __name__ == "__main__":
    main()
