"""Supervisors as the database has them and as SQL makes them, and processes that watch over runs.

``python watchers.py ROLE URL …`` is such a process: it answers a line for each step, and waits for one.
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Self

from sqlalchemy import Connection, insert, select, update

from taskruns import TaskPhase, TaskRunHistory, engine, liveness, model, recording, recovery, statements
from taskruns.liveness import Process, Supervisor
from taskruns.schema import supervisors, task_runs

_numbers = itertools.count(1)


def until(condition: Callable[[], Any], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


_engine = cache(engine.create)


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    """Connect to a database; each statement commits by itself."""
    with _engine(url).connect() as connection:
        connection.detach()  # closed in the end, not kept
        yield connection


def _now(connection: Connection) -> datetime:
    now: datetime = connection.execute(select(statements.clock(connection.dialect.name))).scalar_one()
    connection.commit()
    return now


def database_time(url: str) -> datetime:
    with connected(url) as connection:
        return _now(connection)


def write(url: str, statement: Any, rows: Sequence[dict[str, Any]] | None = None) -> None:
    with connected(url) as connection:
        connection.execute(statement, rows)


def known(url: str, source: str) -> list[Supervisor]:
    """Return the supervisors with this name."""
    with connected(url) as connection:
        return [found for found in recovery.supervisors(connection) if found.source == source]


def age(url: str, seconds: float, **which: Any) -> None:
    """Have supervisors been silent for so long."""
    with connected(url) as connection:
        last_beat = _now(connection) - timedelta(seconds=seconds)
        aged = update(supervisors).filter_by(**which)
        connection.execute(aged.values(started_at=last_beat, heartbeat_at=last_beat))


def register(url: str, process: Process, *tasks: str, silent: float = 0.0) -> int:
    """Register a supervisor that was seen last so many seconds ago, with active runs, and return its number."""
    return register_all(url, [(process, silent, tasks)])[0]


def register_all(url: str, told: Iterable[tuple[Process, float, Sequence[str]]]) -> list[int]:
    """Register supervisors: the process, the seconds since it was seen last, and the tasks that it runs."""
    with connected(url) as connection:
        now = _now(connection)
        ids, rows, runs = [], [], []
        for process, silent, tasks in told:
            ids.append(next(_numbers))
            last_beat = now - timedelta(seconds=silent)
            times = {"started_at": last_beat, "heartbeat_at": last_beat}
            place = {field.name: getattr(process, field.name) for field in fields(process)}
            place["process_started"] = place.pop("started")
            rows.append({"id": ids[-1], "source": "there"} | times | place)
            runs += [_run(ids[-1], task, 1, now - timedelta(seconds=1000)) for task in tasks]
        connection.execute(insert(supervisors), rows)
        if runs:
            connection.execute(insert(task_runs), runs)
    return ids


def _run(supervisor: int | None, task: str, attempt: int, started_at: datetime) -> dict[str, Any]:
    row = {"task_id": task, "attempt": attempt, "phase": TaskPhase.RUNNING, "started_at": started_at}
    return row | {"supervisor_id": supervisor, "recovered": False}


def add_runs(
    url: str, supervisor: int | None, task: str, *, attempts: Iterable[int] = (1,), ago: float = 1000.0
) -> None:
    """Add active runs that started so many seconds ago, by the database's clock."""
    with connected(url) as connection:
        started_at = _now(connection) - timedelta(seconds=ago)
        connection.execute(insert(task_runs), [_run(supervisor, task, attempt, started_at) for attempt in attempts])


def stored(url: str) -> list[tuple[Any, ...]]:
    """Return all rows of both tables."""
    with connected(url) as connection:
        runs = connection.execute(select(task_runs).order_by(task_runs.c.task_id, task_runs.c.attempt)).all()
        return [*map(tuple, runs), *map(tuple, connection.execute(select(supervisors).order_by(supervisors.c.id)))]


HERE = Process.here()

ELSEWHERE = Process("elsewhere", "a4b1c1a6-0000-4000-8000-0123456789ab", 1, 1, 1)
"""A process of another host."""

GONE = replace(HERE, pid=2**22, started=1)
"""A process of this host that has ended: Linux gives no such number."""

FAR = 10**6
"""Seconds after which every supervisor is stale."""


@contextmanager
def sleeping(*, stopped: bool = False) -> Iterator[Process]:
    """A process that lives, perhaps stopped."""
    sleeper = subprocess.Popen(["sleep", "600"])
    try:
        if stopped:
            sleeper.send_signal(signal.SIGSTOP)
            until(lambda: (liveness._state(sleeper.pid) or "?")[0] == "T", "it is stopped")
        yield process(sleeper.pid)
    finally:
        sleeper.kill()
        sleeper.wait()


@contextmanager
def zombie() -> Iterator[Process]:
    """A process that has ended and that its parent has not asked for yet."""
    ended = subprocess.Popen(["true"])
    until(lambda: (liveness._state(ended.pid) or "?")[0] == "Z", "it has ended")
    yield process(ended.pid)
    ended.wait()


def process(pid: int) -> Process:
    state = liveness._state(pid)
    assert state is not None
    return replace(HERE, pid=pid, started=state[1])


def lose(url: str, *tasks: str, by: Process = GONE, silent: float = 0.0) -> int:
    """Have a supervisor, which is gone unless told otherwise, leave active runs."""
    return register(url, by, *tasks, silent=silent)


def be(process: Process) -> None:
    """Pass for another process, from here on."""
    Process.here = classmethod(lambda _cls: process)  # type: ignore[method-assign,assignment]  # its purpose


def shift_clock(seconds: float) -> None:
    """Have the clock of this process be wrong, from here on."""

    class Kind(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, datetime)

    class Wrong(datetime, metaclass=Kind):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(seconds=seconds)

    for module in (model, recording):
        vars(module)["datetime"] = Wrong
    right_time = time.time
    time.time = lambda: right_time() + seconds
    assert abs((model.TaskRun.starting("job", 1).started_at - datetime.now(UTC)).total_seconds() - seconds) < 60


class Watcher:
    """Such a process, seen from the test."""

    def __init__(self, role: str, url: str, *arguments: object) -> None:
        command = [sys.executable, __file__, role, url, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

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


def recording_together(url: str) -> None:
    """Do so in many threads at once, with group commit."""

    def record(_: int) -> None:
        while True:
            with history.record("recorded"):
                time.sleep(0.05)

    with TaskRunHistory.connect(url, group_commit=True) as history, ThreadPoolExecutor(8) as pool:
        list(pool.map(record, range(8)))


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
    "record together": recording_together,
    "live": living,
    "recover": recovering,
}

if __name__ == "__main__":
    ROLES[sys.argv[1]](*sys.argv[2:])
