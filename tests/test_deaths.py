"""Processes that record runs are killed, stopped, and watched from another host: what becomes of their runs."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from commands import Home
from sqlalchemy.exc import OperationalError
from watchers import (
    ELSEWHERE,
    FAR,
    HERE,
    Watcher,
    age,
    lose,
    process,
    sleeping,
    until,
)

from taskruns import TaskRunHistory
from taskruns.liveness import Process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes cannot be told apart")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def test_exec_closes_what_the_dead_of_its_host_have_left_and_leaves_no_row(home: Home, database: str) -> None:
    lose(database, "lost")
    number = lose(database, "of another host", by=ELSEWHERE, silent=FAR)
    # It does so beside its command, which must not be over at once.
    gone = f"until {home.program} --db '{database}' show lost 1 --json | grep -q recovered; do sleep 0.05; done"
    done = home.taskruns("--db", database, "exec", "job", "--", "sh", "-c", gone)
    assert (done.returncode, done.stderr) == (0, "")
    with TaskRunHistory.connect(database) as history:
        assert [(run.task_id, run.phase, run.recovered) for run in history.tasks()] == [
            ("job", "succeeded", False),
            ("lost", "failed", True),
            ("of another host", "running", False),
        ]
        assert [found.id for found in history.supervisors()] == [number]


def test_exec_is_a_supervisor_while_its_command_runs(home: Home, database: str) -> None:
    with home.start("--db", database, "exec", "job", "--", "sh", "-c", "echo up; read x", **PIPES) as wrapper:
        assert wrapper.stdout is not None
        assert wrapper.stdout.readline() == "up\n"
        with TaskRunHistory.connect(database) as history:
            (found,) = history.supervisors()
            assert (found.process, found.active_runs) == (process(wrapper.pid), 1)
            assert history.recover(stale_after=0.0) == []
            wrapper.communicate("\n", timeout=60)
            assert history.supervisors() == []
            assert [run.phase for run in history.iter_runs("job")] == ["succeeded"]


PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}


def test_retries_of_exec_leave_no_row(home: Home, database: str) -> None:
    done = home.taskruns("--db", database, "exec", "job", "--retries", "2", "--backoff", "0.01s", "--", "false")
    assert done.returncode == 1
    with TaskRunHistory.connect(database) as history:
        assert [run.phase for run in history.iter_runs("job")] == ["exhausted", "failed", "failed"]
        assert history.supervisors() == []


def test_no_overlap_minds_the_living_and_not_the_dead(home: Home, database: str) -> None:
    arguments = ("--db", database, "exec", "job", "--no-overlap", "--conflict-exit-code", "9", "--")
    with home.start(*arguments, "sh", "-c", "echo up; read x", **PIPES) as wrapper:
        assert wrapper.stdout is not None
        assert wrapper.stdout.readline() == "up\n"
        done = home.taskruns(*arguments, "true")
        assert (done.returncode, "is running already: attempt 1" in done.stderr) == (9, True)
        wrapper.kill()
        wrapper.communicate(timeout=60)
    assert home.taskruns(*arguments, "true").returncode == 0
    with TaskRunHistory.connect(database) as history:
        ends = [(run.phase, run.recovered) for run in history.iter_runs("job")]
    assert ends == [("succeeded", False), ("failed", True)]


def test_no_overlap_minds_another_host_until_it_is_silent(home: Home, database: str) -> None:
    number = lose(database, "job", by=ELSEWHERE, silent=30)
    arguments = ("--db", database, "exec", "job", "--no-overlap", "--conflict-exit-code", "9", "--", "true")
    assert home.taskruns(*arguments).returncode == 9
    age(database, 90, id=number)
    assert home.taskruns(*arguments).returncode == 0


@contextmanager
def seen_from_elsewhere() -> Iterator[None]:
    """Pass for another host."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Process, "here", classmethod(lambda _cls: replace(ELSEWHERE, pid=os.getpid())))
        yield


def test_stopped_process_that_goes_on_tells_the_real_outcome(database: str) -> None:
    with (
        seen_from_elsewhere(),
        Watcher("open", database, 0.3) as watcher,
        TaskRunHistory.connect(database, lock_timeout=0.5, retry_for=0) as history,
    ):
        assert watcher.line() == "open"

        def is_stopped_between_beats() -> bool:
            watcher.process.send_signal(signal.SIGSTOP)
            try:
                with history.begin():
                    pass
            except OperationalError:  # it holds a lock
                watcher.process.send_signal(signal.SIGCONT)
                return False
            return True

        until(is_stopped_between_beats, "it is stopped and holds no lock")
        until(lambda: history.recover(stale_after=1.0), "its run is recovered")
        assert [(run.phase, run.recovered) for run in history.iter_runs("job")] == [("failed", True)]
        watcher.process.send_signal(signal.SIGCONT)
        assert watcher.rest() == ["closed"]
        (run,) = history.iter_runs("job")
    assert (run.phase, run.error, run.recovered) == ("succeeded", None, False)


def test_living_process_of_another_host_keeps_its_run_by_its_heartbeat(database: str) -> None:
    with (
        seen_from_elsewhere(),
        Watcher("open", database, 0.1) as watcher,
        TaskRunHistory.connect(database) as history,
    ):
        assert watcher.line() == "open"
        (first,) = history.supervisors()
        until(lambda: history.supervisors()[0].heartbeat_at > first.heartbeat_at + timedelta(seconds=1), "it beats")
        assert history.recover(stale_after=20.0) == []
        assert watcher.rest() == ["closed"]


def is_permitted(*command: str) -> bool:
    unshare = shutil.which("unshare")
    return (
        unshare is not None
        and not subprocess.run([unshare, *command, "true"], capture_output=True, check=False).returncode
    )


@pytest.mark.skipif(not is_permitted("--mount"), reason="needs root")
def test_host_with_another_boot_judges_by_the_heartbeat(home: Home, database: str, tmp_path: Path) -> None:
    boot_id = tmp_path / "boot_id"
    boot_id.write_text(f"{ELSEWHERE.boot_id}\n")
    lose(database, "gone, heard of", silent=30)
    lose(database, "gone, silent", silent=90)
    lose(database, "living, silent", by=HERE, silent=90)
    script = f'mount --bind {boot_id} /proc/sys/kernel/random/boot_id && exec "$0" "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, home.program, "--db", database, "recover", "--json"]
    done = subprocess.run(command, env=home.environment, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    closed = {json.loads(line)["taskId"] for line in done.stdout.splitlines()}
    assert closed == {"gone, silent", "living, silent"}
    assert home.taskruns("--db", database, "recover").returncode == 0
    with TaskRunHistory.connect(database) as history:
        assert history.active_runs() == []


@pytest.mark.skipif(not is_permitted("--pid", "--fork", "--mount-proc"), reason="needs root")
def test_another_container_judges_by_the_heartbeat(home: Home, database: str) -> None:
    with sleeping() as living:
        lose(database, "living", by=living, silent=30)
        lose(database, "gone", silent=30)
        lose(database, "silent", silent=90)
        command = ["unshare", "--pid", "--fork", "--mount-proc", home.program, "--db", database, "recover", "--json"]
        done = subprocess.run(command, env=home.environment, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert [json.loads(line)["taskId"] for line in done.stdout.splitlines()] == ["silent"]


EVENT = {"kind": "TaskStarting", "at": "2026-11-24T12:00:00Z", "attempt": 1}


class Victims:
    """Processes that record runs, to be killed."""

    def __init__(self, home: Home, database: str, chance: random.Random) -> None:
        self._home, self._database, self._chance = home, database, chance
        self._commands: list[int] = []

    def exec(self) -> "subprocess.Popen[Any]":
        seconds = f"{self._chance.uniform(0, 0.5):.3f}"
        return self._home.start("--db", self._database, "exec", "-q", "executed", "--", "sleep", seconds)

    def record(self) -> "subprocess.Popen[Any]":
        return Watcher(self._chance.choice(["record", "record together"]), self._database).process

    def ingest(self) -> "subprocess.Popen[Any]":
        quiet = {"stdin": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        ingest = self._home.start("--db", self._database, "ingest", **quiet)
        assert ingest.stdin is not None
        for number in range(30):
            at = (datetime.now(UTC) + timedelta(milliseconds=number)).isoformat()
            told = EVENT | {"task": f"told {number % 3}", "at": at, "attempt": number + 1}
            ingest.stdin.write(f"{json.dumps(told)}\n")
        ingest.stdin.flush()
        return ingest

    def kill(self, *, what: str, is_up: Callable[[], bool] | None) -> None:
        """Start some, and kill them after a while, as ``kill -9`` does; ``is_up`` is waited for before."""
        started = [self.ingest()] if what == "ingest" else [self.record()] if what == "record" else [self.exec()]
        if what == "all":
            started += [self.record(), self.ingest()]
        if is_up is not None:
            until(is_up, "a run is recorded")
        time.sleep(self._chance.uniform(0, 1) if is_up is None else self._chance.uniform(0, 0.3))
        if what in ("child", "all"):
            for child in self._children(started[0].pid):
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        if what != "child":
            for victim in started:
                victim.kill()
        for victim in started:
            victim.wait(60)
            for pipe in (victim.stdin, victim.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()

    @staticmethod
    def _children(pid: int) -> list[int]:
        try:
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except FileNotFoundError:
            return []


@pytest.mark.parametrize("count", [4, pytest.param(100, marks=pytest.mark.soak)])
def test_no_kill_leaves_an_active_run_and_no_living_run_is_closed(home: Home, database: str, count: int) -> None:
    chance = random.Random()
    victims = Victims(home, database, chance)
    recovered = 0
    with (
        Watcher("open", database, 5) as witness,
        TaskRunHistory.connect(database) as history,
    ):
        assert witness.line() == "open"
        for number in range(count):
            before = len(list(history.all_runs()))
            victims.kill(
                what=("exec", "child", "record", "ingest", "all")[number % 5],
                is_up=None if number % 3 == 0 else lambda: len(list(history.all_runs())) > before,  # noqa: B023  (used up at once)
            )
            finished = {(run.task_id, run.attempt): run for run in history.all_runs() if not run.is_active}
            closed = history.recover()
            recovered += len(closed)
            assert [run.task_id for run in history.active_runs()] == ["job"]
            for run in closed:
                assert (run.phase, run.recovered) == ("failed", True)
                assert run.finished_at is not None
                assert re.fullmatch(r"run outcome not observed \(supervisor .*:\d+ last seen .*Z\)", run.error or "")
                assert (run.task_id, run.attempt) not in finished
            now = {(run.task_id, run.attempt): run for run in history.all_runs()}
            assert {key: now[key] for key in finished} == finished
        assert [found.process.pid for found in history.supervisors()] == [witness.pid]
        assert witness.rest() == ["closed"]
        runs = list(history.all_runs())
        ends = [(run.phase, run.recovered) for run in runs if run.task_id == "job"]
    lost = sum(run.recovered for run in runs)
    print(
        f"{count} kills: {len(runs)} runs, {recovered} closed by recover, {lost - recovered} by those that came later"
    )
    assert ends == [("succeeded", False)]


SMALL, LARGE = (2, 0.2, 0.2, 60.0), (16, 5, 4, 2.0)
"""Processes, the seconds of a run, those between two runs, and the limit of silence."""


@pytest.mark.parametrize(
    ("count", "seconds", "idle", "limit", "shift"),
    [
        pytest.param(*SMALL, 3600, id="small"),
        pytest.param(*SMALL, -3600, id="small, late", marks=pytest.mark.soak),
        pytest.param(*LARGE, 3600, id="large", marks=pytest.mark.soak),
        pytest.param(*LARGE, -3600, id="large, late", marks=pytest.mark.soak),
    ],
)
def test_no_living_run_is_recovered_whatever_the_clocks_say(
    database: str, count: int, seconds: float, idle: float, limit: float, shift: int
) -> None:
    shifts = [0, 3600, -3600, 0]
    with Watcher("recover", database, limit, shift) as judge:
        living = [Watcher("live", database, number, seconds, idle, shifts[number % 4]) for number in range(count)]
        assert [watcher.rest() for watcher in living] == [[]] * count
        times, *closed = judge.rest()[0].split()
    print(f"clock shifted by {shift} s: judged {times} times, {len(closed)} runs of the living recovered {closed}")
    with TaskRunHistory.connect(database) as history:
        ends = [(run.phase, run.recovered) for run in history.all_runs()]
    assert closed == []
    assert ends == [("succeeded", False)] * 2 * count
