"""Supervisors as the database has them and as SQL makes them, and processes that watch over runs.

``python watchers.py ROLE URL …`` is such a process: it answers a line for each step, and waits for one.
"""

import itertools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from subprocess import PIPE, Popen
from typing import Any, Self

from sqlalchemy import insert, select, update

from taskruns import TaskPhase, TaskRunHistory, engine, model, recording, statements
from taskruns.liveness import Process, Supervisor
from taskruns.schema import supervisors, task_runs

_numbers = itertools.count(1)


def until(condition: Callable[[], Any], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def database_time(url: str) -> datetime:
    own = engine.create(url)
    with own.connect() as connection:
        now: datetime = connection.execute(select(statements.now(own.dialect.name))).scalar_one()
    own.dispose()
    return now


def write(url: str, *written: Any) -> None:
    """Execute statements, each in a transaction of its own."""
    own = engine.create(url)
    with own.connect() as connection:
        for statement in written:
            connection.execute(statement)
            connection.commit()
    own.dispose()


def known(url: str, source: str) -> list[Supervisor]:
    """Return the supervisors with this name."""
    with TaskRunHistory.connect(url) as history:
        return [found for found in history.supervisors() if found.source == source]


def age(url: str, seconds: float, **which: Any) -> None:
    """Have supervisors been silent for so long."""
    last_beat = database_time(url) - timedelta(seconds=seconds)
    write(url, update(supervisors).filter_by(**which).values(started_at=last_beat, heartbeat_at=last_beat))


def register(url: str, process: Process, *, silent: float = 0.0, source: str = "there") -> int:
    """Register a supervisor that was seen last so many seconds ago, and return its number."""
    number = next(_numbers)
    last_beat = database_time(url) - timedelta(seconds=silent)
    place = {
        "host": process.host,
        "boot_id": process.boot_id,
        "pid_namespace": process.pid_namespace,
        "pid": process.pid,
        "process_started": process.started,
    }
    row = {"id": number, "source": source, "started_at": last_beat, "heartbeat_at": last_beat} | place
    write(url, insert(supervisors).values(row))
    return number


def add_run(url: str, supervisor: int | None, task: str, *, attempt: int = 1, ago: float = 1000.0) -> None:
    """Add an active run that started so many seconds ago, by the database's clock."""
    started_at = database_time(url) - timedelta(seconds=ago)
    row = {"task_id": task, "attempt": attempt, "phase": TaskPhase.RUNNING, "started_at": started_at}
    write(url, insert(task_runs).values(row | {"supervisor_id": supervisor, "recovered": False}))


def stored(url: str) -> list[tuple[Any, ...]]:
    """Return all rows of both tables."""
    own = engine.create(url)
    with own.connect() as connection:
        runs = connection.execute(select(task_runs).order_by(task_runs.c.task_id, task_runs.c.attempt))
        found = [tuple(row) for row in runs]
        found += [tuple(row) for row in connection.execute(select(supervisors).order_by(supervisors.c.id))]
    own.dispose()
    return found


ELSEWHERE = Process("elsewhere", "a4b1c1a6-0000-4000-8000-0123456789ab", 1, 1, 1)
"""A process of another host."""


def be(process: Process) -> None:
    """Pass for another process, from here on."""
    Process.here = classmethod(lambda _cls: process)  # type: ignore[method-assign,assignment]


def shift_clock(seconds: float) -> None:
    """Have the clock of this process be wrong, from here on."""
    right = datetime

    class Kind(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, right)

    class Wrong(right, metaclass=Kind):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return right.now(tz) + timedelta(seconds=seconds)

    for module in (model, recording):
        module.datetime = Wrong  # type: ignore[misc,assignment]
    right_time = time.time
    time.time = lambda: right_time() + seconds
    assert abs((model.TaskRun.starting("job", 1).started_at - right.now(UTC)).total_seconds() - seconds) < 60


class Watcher:
    """Such a process, seen from the test."""

    def __init__(self, role: str, url: str, *arguments: object) -> None:
        command = [sys.executable, __file__, role, url, *map(str, arguments)]
        self.process = Popen(command, stdin=PIPE, stdout=PIPE, text=True)

    @property
    def pid(self) -> int:
        return self.process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def rest(self) -> list[str]:
        """Let it go on, and return its last answers."""
        output, _ = self.process.communicate("\n", timeout=120)
        assert self.process.returncode == 0
        return output.splitlines()


def say(*values: object) -> None:
    print(*values, flush=True)


def opening(url: str, heartbeat: str) -> None:
    """Open a run; when told, close it."""
    with TaskRunHistory.connect(url, heartbeat=float(heartbeat)) as history:
        run = history.open_run("job")
        say("open")
        sys.stdin.readline()
        history.close_run("job", run.attempt, TaskPhase.SUCCEEDED)
        say("closed")


def recording_runs(url: str) -> None:
    """Record short runs, one after the other, until killed."""
    with TaskRunHistory.connect(url) as history:
        while True:
            with history.record("recorded"):
                time.sleep(0.05)


def living(url: str, number: str, seconds: str, idle: str, shift: str) -> None:
    """Record two runs of so many seconds, and be idle between them."""
    shift_clock(float(shift))
    with TaskRunHistory.connect(url, heartbeat=0.5, source=f"living {number}") as history:
        for attempt in (1, 2):
            run = history.open_run(f"job {number}")
            time.sleep(float(seconds))
            history.close_run(run.task_id, run.attempt, TaskPhase.SUCCEEDED, exit_code=attempt)
            if attempt == 1:
                time.sleep(float(idle))


def recovering(url: str, limit: str, shift: str) -> None:
    """Judge from another host, without a pause, until told to stop; say how often, and what was recovered."""
    shift_clock(float(shift))
    be(replace(ELSEWHERE, pid=os.getpid()))
    os.set_blocking(0, False)
    times, closed = 0, []
    with TaskRunHistory.connect(url) as history:
        while _is_silent():
            closed += [f"{run.task_id}:{run.attempt}" for run in history.recover(stale_after=float(limit))]
            times += 1
            time.sleep(0.02)
    say(times, *closed)


def _is_silent() -> bool:
    try:
        os.read(0, 1)
    except BlockingIOError:
        return True
    return False


ROLES: dict[str, Callable[..., None]] = {
    "open": opening,
    "record": recording_runs,
    "live": living,
    "recover": recovering,
}

if __name__ == "__main__":
    ROLES[sys.argv[1]](*sys.argv[2:])
