"""The database that nobody has named or looks after: what comes into it, with no configuration, stays within bounds."""

import json
import os
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import IO

import pytest
from commands import Home
from sqlalchemy import make_url

from taskruns import TaskRunHistory
from taskruns.bulk import Row
from taskruns.times import rfc3339

pytestmark = pytest.mark.soak

SPAN = timedelta(days=730)
EVENTS, EXECS = 1_000_000, 10_000
"""Runs that are told as events, and made by commands."""
AT_ONCE = 8
OLD = 15_000
"""Runs that are there before the commands."""


class Default:
    """The default database of a home, as others see it from outside."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self.url = home.database
        self.path = Path(str(make_url(home.database).database))

    def count(self, condition: str, table: str = "task_runs") -> int:
        with closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)) as connection:
            return int(connection.execute(f"SELECT count(*) FROM {table} WHERE {condition}").fetchone()[0])

    @property
    def size(self) -> int:
        """The KiB of the file."""
        return self.path.stat().st_size >> 10

    def bounds(self) -> tuple[int, int]:
        """Return how many runs the policy keeps, and how many others there are."""
        answer = self._home.taskruns("prune", "--dry-run", "--json", timeout=600)
        assert answer.returncode == 0, answer.stderr
        due = int(json.loads(answer.stdout)["runs"])
        return self.count("true") - due, due

    def is_bounded(self) -> bool:
        kept, due = self.bounds()
        return due <= 0.25 * kept + 2000  # a quarter, as documented, and what the next turns would have deleted


@pytest.fixture
def home(tmp_path: Path) -> Home:
    found = Home(tmp_path)
    found.environment["TASKRUNS_STATE_DIR"] = str(tmp_path / "state")
    return found


def moment(number: int, count: int) -> datetime:
    return datetime.now(UTC) - SPAN * (1 - number / count)


def tell(count: int, tasks: int, file: IO[bytes]) -> None:
    """Tell of runs in the order of their times, start and end; every seventh has failed."""
    with file:
        for number in range(count):
            start = moment(number, count)
            task, kind = f"task {number % tasks}", "AttemptFailed" if number % 7 == 0 else "AttemptSucceeded"
            file.write(
                b'{"kind":"AttemptStarting","task":"%b","at":"%b"}\n{"kind":"%b","task":"%b","at":"%b"}\n'
                % tuple(
                    text.encode()
                    for text in (task, rfc3339(start), kind, task, rfc3339(start + timedelta(milliseconds=20)))
                )
            )


@pytest.mark.parametrize("tasks", [50, EVENTS], ids=["50 tasks", "unique ids"])
def test_events_of_two_years(home: Home, tasks: int, capsys: pytest.CaptureFixture[str]) -> None:
    default = Default(home)
    began = time.monotonic()
    process = home.start("ingest", "--ack", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    threading.Thread(target=tell, args=(EVENTS, tasks, process.stdin), daemon=True).start()
    seen = []
    with process.stdout as acknowledgements:
        for number, _ in enumerate(acknowledgements, 1):
            if number % (EVENTS // 10) == 0 and number < 2 * EVENTS:
                seen.append((default.count("true"), default.size))
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    memory = usage.ru_maxrss >> 10
    seconds = time.monotonic() - began
    kept, due = default.bounds()
    with capsys.disabled():
        print(
            f"\n{EVENTS} runs of {tasks} tasks by events in {seconds:.0f} s, memory {memory} MiB: the policy keeps"
            f" {kept}, there were {due} more; runs and KiB at each twentieth {seen}, in the end {default.size} KiB"
        )
    assert default.is_bounded()
    assert memory < 150
    old = [size for _, size in seen[2:9]]  # what came until then is all of idle tasks: as much goes as comes
    assert max(old) <= 1.1 * min(old) + 1000


def old_rows(tasks: int) -> Iterator[Row]:
    """Runs of the two years before; the numbers of each task begin elsewhere, so that their turns are spread."""
    for number in range(OLD):
        start = moment(number, OLD + OLD // 70)
        phase = "failed" if number % 7 == 0 else "succeeded"
        times = rfc3339(start), rfc3339(start + timedelta(seconds=1))
        key = f"task {number % tasks}", number // tasks + 1 + number % tasks % 32
        yield (*key, phase, *times, None, None, False, False, "here", None, None)


@pytest.mark.parametrize("tasks", [50, OLD], ids=["50 tasks", "unique ids"])
def test_commands_upon_two_years(home: Home, tasks: int, capsys: pytest.CaptureFixture[str]) -> None:
    default = Default(home)
    with TaskRunHistory.connect(default.url) as history:
        history.prepare()
        history.add_rows(list(old_rows(tasks)))
    before, sizes, seconds = default.bounds(), [default.size], []

    def execute(number: int) -> None:
        task = f"task {number % tasks}" if tasks < OLD else f"new task {number}"
        began = time.monotonic()
        answer = home.taskruns("exec", task, "--", "true")
        seconds.append(time.monotonic() - began)
        assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for tenth in range(10):
            list(pool.map(execute, range(EXECS * tenth // 10, EXECS * (tenth + 1) // 10)))
            sizes.append(default.size)
    kept, due = default.bounds()
    with capsys.disabled():
        print(
            f"\n{EXECS} commands of {tasks} tasks, {median(seconds):.2f} s each, upon {sum(before)} runs of which"
            f" {before[1]} were due: the policy keeps {kept}, there were {due} more; KiB after each tenth {sizes}"
        )
    assert default.is_bounded()
    assert default.count("true", "supervisors") == default.count("finished_at IS NULL") == 0
    recent = rfc3339(datetime.now(UTC) - timedelta(days=1))
    assert default.count(f"started_at > '{recent.replace('T', ' ')}'") == EXECS
    assert max(sizes[5:]) <= 1.1 * sizes[4] + EXECS  # KiB: the new runs take some hundred bytes each
