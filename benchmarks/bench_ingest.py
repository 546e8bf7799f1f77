"""Events a second of ``taskruns ingest``, the whole process, against the raw driver in batches of the same size.

    python benchmarks/bench_ingest.py [--events 200000] [--repeats 3] [--postgresql URL] [--again]

The raw loop sends the statements that the events ask for, one INSERT a start and one UPDATE an end, by executemany in
transactions of 1,000 events; its events are parsed beforehand. ``--again`` ingests a stream that is recorded already.
"""

import argparse
import json
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, make_url, text

from taskruns import TaskRunHistory

BATCH = 1000
COLUMNS = "task_id, attempt, phase, started_at, source, source_attempt"


def stream(events: int, tasks: int = 50) -> Iterator[dict[str, Any]]:
    """Yield the events of tasks that run for about a second each, at the same time."""
    chance = random.Random(1)
    attempts = [0] * tasks
    first = datetime(2026, 1, 1, tzinfo=UTC)
    due = [(first + timedelta(milliseconds=10 * task), task, True) for task in range(tasks)]
    for seq in range(1, events + 1):
        at, task, is_start = heappop(due)
        attempts[task] += is_start
        event = {"task": f"task number {task}", "attempt": attempts[task], "at": f"{at:%FT%T.%fZ}", "seq": seq}
        if is_start:
            yield event | {"kind": "AttemptStarting"}
        elif chance.random() < 0.9:
            yield event | {"kind": "AttemptSucceeded", "durationMs": 1500}
        else:
            yield event | {"kind": "AttemptFailed", "durationMs": 1500, "reason": "connection refused", "exitCode": 1}
        heappush(due, (at + timedelta(seconds=1 + chance.random()), task, not is_start))


def operations(events: list[dict[str, Any]]) -> list[tuple[bool, tuple[Any, ...]]]:
    found: list[tuple[bool, tuple[Any, ...]]] = []
    for event in events:
        key = (event["task"], event["attempt"])
        at = event["at"].replace("T", " ").rstrip("Z")
        if event["kind"] == "AttemptStarting":
            found.append((True, (*key, "running", at, "s", event["attempt"])))
        else:
            phase = "succeeded" if event["kind"] == "AttemptSucceeded" else "failed"
            found.append((False, (phase, at, event.get("reason"), event.get("exitCode"), *key)))
    return found


def raw(connection: Any, mark: str, due: list[tuple[bool, tuple[Any, ...]]]) -> None:
    cursor = connection.cursor()
    insert = f"INSERT INTO task_runs ({COLUMNS}) VALUES ({', '.join([mark] * 6)})"
    update = (
        f"UPDATE task_runs SET phase = {mark}, finished_at = {mark}, error = {mark}, exit_code = {mark}"
        f" WHERE task_id = {mark} AND attempt = {mark} AND (finished_at IS NULL OR recovered)"
    )
    for first in range(0, len(due), BATCH):
        part = due[first : first + BATCH]
        cursor.execute("BEGIN")
        cursor.executemany(insert, [values for is_start, values in part if is_start])
        cursor.executemany(update, [values for is_start, values in part if not is_start])
        cursor.execute("COMMIT")


def raw_sqlite(url: str, due: list[tuple[bool, tuple[Any, ...]]]) -> None:
    connection = sqlite3.connect(make_url(url).database or "", isolation_level=None)
    connection.execute("PRAGMA synchronous = FULL")
    raw(connection, "?", due)


def raw_postgresql(url: str, due: list[tuple[bool, tuple[Any, ...]]]) -> None:
    import psycopg

    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        raw(connection, "%s", due)


# Not by getrusage, which begins with what the parent had when it forked.
INGEST = """
import re, sys
from taskruns.cli import run
assert run(sys.argv[1:]) == 0
print(re.search(r"VmHWM:\\s*([0-9]+) kB", open("/proc/self/status").read())[1])
"""
peaks: list[int] = []


def ingest(url: str, file: Path) -> None:
    command = [sys.executable, "-c", INGEST, "ingest", str(file), "--source", "s", "--db", url]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    peaks.append(int(done.stdout))


def empty(url: str) -> None:
    with TaskRunHistory.connect(url) as history:
        history.upgrade()
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM task_runs" if "sqlite" in url else "TRUNCATE task_runs"))
    engine.dispose()


def timed(action: Callable[..., None], *arguments: Any) -> float:
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--postgresql", help="the URL of a database that may be emptied")
    parser.add_argument("--again", action="store_true", help="time the ingestion of what is recorded already")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "events.jsonl"
        events = list(stream(options.events))
        file.write_text("".join(json.dumps(event) + "\n" for event in events))
        due = operations(events)
        del events
        cases: dict[str, tuple[Callable[..., None], str]] = {"SQLite": (raw_sqlite, f"sqlite:///{folder}/runs.db")}
        if options.postgresql:
            cases["PostgreSQL"] = (raw_postgresql, options.postgresql)
        for name, (raw_loop, url) in cases.items():
            ratios = []
            for _ in range(options.repeats):
                empty(url)
                raw_rate = len(due) / timed(raw_loop, url, due)
                empty(url)
                if options.again:
                    ingest(url, file)
                rate = len(due) / timed(ingest, url, file)
                ratios.append(rate / raw_rate)
                print(f"{name}: raw {raw_rate:,.0f}/s, ingest {rate:,.0f}/s, ratio {ratios[-1]:.2f}")
            print(f"{name}: ratio min {min(ratios):.2f}, median {statistics.median(ratios):.2f}, max {max(ratios):.2f}")
    print(f"peak memory of ingest: {max(peaks) / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
