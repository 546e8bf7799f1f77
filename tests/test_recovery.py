"""Active runs whose process is gone are closed, all others never: judged by process and by heartbeat."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from commands import Home, Shell
from sqlalchemy import update
from sqlalchemy.exc import OperationalError
from watchers import ELSEWHERE, Watcher, add_runs, age, known, register, register_all, stored, until, write

from taskruns import TaskPhase, TaskRun, TaskRunHistory, engine, liveness, recovery
from taskruns.liveness import Process
from taskruns.schema import task_runs
from taskruns.times import rfc3339

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes cannot be told apart")

HERE = Process.here()
GONE = replace(HERE, pid=2**22, started=1)
"""A process of this host that has ended: Linux gives no such number."""

FAR = 10**6
"""Seconds after which every supervisor is stale."""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture
def shell(home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(home, monkeypatch, capsys)


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


def test_ended_processes_of_this_host_are_gone_and_others_are_judged_by_their_silence(
    history: TaskRunHistory, database: str
) -> None:
    with sleeping() as living, sleeping(stopped=True) as stopped, zombie() as ended:
        cases: dict[str, tuple[Process, float, bool]] = {
            "gone": (GONE, 0, True),
            "a zombie": (ended, 0, True),
            "its number is another process's now": (replace(living, started=(living.started or 0) - 1), 0, True),
            "this process": (HERE, FAR, False),
            "living": (living, FAR, False),
            "stopped": (stopped, FAR, False),
            "living, with another name of the host": (replace(living, host="renamed"), FAR, False),
            "gone, with another name of the host": (replace(GONE, host="renamed"), 0, True),
        }
        strangers: dict[str, dict[str, Any]] = {
            "another boot": {"boot_id": ELSEWHERE.boot_id},
            "another container": {"pid_namespace": 1},
            "another host": {"boot_id": ELSEWHERE.boot_id, "pid_namespace": 1, "host": "elsewhere"},
            "no boot id": {"boot_id": None},
            "no namespace": {"pid_namespace": None},
            "neither": {"boot_id": None, "pid_namespace": None, "started": None},
            "no start": {"started": None},
        }
        for name, place in strangers.items():
            for number, one in (("gone", GONE), ("living", living)):
                cases[f"{name}, {number}, heard of"] = replace(one, **place), 30, False
                cases[f"{name}, {number}, silent"] = replace(one, **place), 90, True
        register_all(database, [(one, silent, [name]) for name, (one, silent, _) in cases.items()])
        expected = {name for name, (_, _, is_dead) in cases.items() if is_dead}
        assert {run.task_id for run in history.recover(dry_run=True)} == expected
        assert {run.task_id for run in history.recover()} == expected
    assert {run.task_id for run in history.active_runs()} == cases.keys() - expected
    assert {run.task_id for run in history.tasks() if run.recovered} == expected


@pytest.mark.parametrize(("stale_after", "expected"), [(None, set()), (1000.0, set()), (1.0, {"job"}), (0.0, {"job"})])
def test_limit_of_silence_is_the_callers(
    history: TaskRunHistory, database: str, stale_after: float | None, expected: set[str]
) -> None:
    lose(database, "job", by=ELSEWHERE, silent=500)
    assert {run.task_id for run in history.recover(stale_after=stale_after)} == expected


def test_process_that_cannot_be_seen_is_judged_by_its_silence(
    history: TaskRunHistory, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(database, "hidden, heard of", by=replace(HERE, started=1), silent=30)
    lose(database, "hidden, silent", by=replace(HERE, started=1), silent=90)
    monkeypatch.setattr(liveness, "_state", lambda _pid: None)
    assert [run.task_id for run in history.recover()] == ["hidden, silent"]


def test_living_supervisor_that_was_idle_for_long_is_not_dead(history: TaskRunHistory, database: str) -> None:
    run = history.open_run("job")
    age(database, FAR, id=run.supervisor_id)
    assert history.recover() == []
    assert history.active_runs() == [run]


def test_what_is_known_of_a_recovered_run(history: TaskRunHistory, database: str) -> None:
    number = register(database, replace(GONE, host="web-1"), silent=100)
    add_runs(database, number, "started before", ago=1000)
    add_runs(database, number, "started after", ago=50)
    (supervisor,) = history.supervisors()
    last_seen = supervisor.heartbeat_at
    before = {run.task_id: run for run in history.active_runs()}
    closed = history.recover()
    error = f"run outcome not observed (supervisor web-1:{GONE.pid} last seen {rfc3339(last_seen)})"
    lost: dict[str, Any] = {"phase": TaskPhase.FAILED, "error": error, "recovered": True}
    assert closed == [
        replace(before["started after"], **lost, finished_at=before["started after"].started_at),
        replace(before["started before"], **lost, finished_at=last_seen),
    ]
    assert closed == history.tasks()


def test_finished_runs_are_never_touched(history: TaskRunHistory, database: str) -> None:
    number = lose(database, "lost")
    add_runs(database, number, "finished", attempts=range(1, 6))
    for attempt, phase in enumerate(list(TaskPhase)[2:], 1):
        history.close_run("finished", attempt, phase, exit_code=3)
    before = list(history.iter_runs("finished"))
    assert len(before) == 5
    assert [run.task_id for run in history.recover(stale_after=0.0, unsupervised_after=0.0)] == ["lost"]
    assert list(history.iter_runs("finished")) == before


def test_runs_without_a_supervisor_are_closed_by_age_only(history: TaskRunHistory, database: str) -> None:
    add_runs(database, None, "by nobody", ago=100)
    add_runs(database, 987654321, "by somebody unknown", ago=100)
    add_runs(database, None, "young", ago=30)
    add_runs(database, register(database, HERE), "watched", ago=100)
    before = {run.task_id: run for run in history.active_runs()}
    assert history.recover(stale_after=0.0) == []
    closed = history.recover(unsupervised_after=60.0)
    assert closed == [
        replace(
            before[task],
            phase=TaskPhase.FAILED,
            error="run outcome not observed (no supervisor)",
            finished_at=before[task].started_at,
            recovered=True,
        )
        for task in ("by nobody", "by somebody unknown")
    ]
    assert {run.task_id for run in history.active_runs()} == {"young", "watched"}


def test_dry_run_changes_nothing(history: TaskRunHistory, database: str) -> None:
    lose(database, "a", "b")
    lose(database, by=ELSEWHERE, silent=FAR)
    add_runs(database, None, "c")
    before = stored(database)
    would_be = history.recover(unsupervised_after=1.0, dry_run=True)
    assert [run.task_id for run in would_be] == ["a", "b", "c"]
    assert stored(database) == before
    assert history.recover(unsupervised_after=1.0) == would_be
    assert stored(database) != before
    assert history.recover(unsupervised_after=1.0) == []


def test_rows_of_the_dead_are_removed_and_of_the_living_kept(history: TaskRunHistory, database: str) -> None:
    kept = {register(database, HERE, silent=FAR), register(database, ELSEWHERE, silent=1)}
    lose(database, "job")
    lose(database)
    lose(database, by=ELSEWHERE, silent=FAR)
    history.recover()
    assert {found.id for found in history.supervisors()} == kept
    assert history.active_runs() == []


def test_many_are_recovered_at_once(history: TaskRunHistory, database: str) -> None:
    runs = [
        TaskRun.starting(f"job {number:04}", 1, started_at=datetime(2026, 1, 1, tzinfo=UTC)) for number in range(1200)
    ]
    history.add_runs(runs)
    write(database, update(task_runs).values(supervisor_id=lose(database)))
    assert [run.task_id for run in history.recover()] == [run.task_id for run in runs]
    assert (history.active_runs(), history.supervisors()) == ([], [])


def test_recovery_in_a_transaction_is_undone_with_it(history: TaskRunHistory, database: str) -> None:
    lose(database, "job")
    with suppress(ZeroDivisionError), history.begin() as runs:
        assert [run.task_id for run in runs.recover()] == ["job"]
        assert runs.active_runs() == []
        raise ZeroDivisionError
    assert [run.task_id for run in history.active_runs()] == ["job"]
    with history.begin() as runs:
        runs.recover()
    assert history.active_runs() == []


@contextmanager
def found_but_not_closed(url: str) -> Iterator[Callable[[], list[TaskRun]]]:
    """Find what is lost, seen from here; what is yielded closes it."""
    own = engine.create(url)
    with own.connect() as connection:
        losses = recovery.find_losses(connection, HERE, unsupervised_after=60.0)
        connection.commit()
        assert losses.runs

        def close() -> list[TaskRun]:
            with engine.transaction(connection):
                return recovery.close(connection, losses.runs)

        yield close
    own.dispose()


@pytest.mark.parametrize("supervised", [True, False])
def test_run_that_ends_meanwhile_is_left_alone(history: TaskRunHistory, database: str, supervised: bool) -> None:
    if supervised:
        lose(database, "job")
    else:
        add_runs(database, None, "job")
    with found_but_not_closed(database) as close:
        run = history.close_run("job", 1, TaskPhase.SUCCEEDED)
        assert close() == []
    assert history.get_run("job", 1) == run


def test_run_whose_supervisor_beats_meanwhile_is_left_alone(history: TaskRunHistory, database: str) -> None:
    number = lose(database, "job", by=ELSEWHERE, silent=FAR)
    with found_but_not_closed(database) as close:
        age(database, 0, id=number)
        assert close() == []
    assert [run.task_id for run in history.active_runs()] == ["job"]


def test_real_outcome_replaces_the_inferred_one(history: TaskRunHistory, database: str) -> None:
    lose(database, "job")
    (lost,) = history.recover()
    real = history.close_run("job", 1, TaskPhase.SUCCEEDED, exit_code=0)
    assert (real.phase, real.error, real.exit_code, real.recovered) == ("succeeded", None, 0, False)
    assert real.finished_at is not None
    assert lost.finished_at is not None
    assert real.finished_at > lost.finished_at
    assert history.get_run("job", 1) == real
    assert history.recover() == []


def test_two_that_recover_share_the_runs(database: str) -> None:
    lose(database, *(f"job {number:02}" for number in range(40)))
    together = threading.Barrier(2)
    closed: list[str] = []

    def recover() -> None:
        with TaskRunHistory.connect(database) as history:
            history.check_version()
            together.wait(30)
            closed.extend(run.task_id for run in history.recover())

    threads = [threading.Thread(target=recover) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(closed) == [f"job {number:02}" for number in range(40)]


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.soak)])
def test_real_close_wins_every_race_against_recovery(database: str, count: int) -> None:
    together = threading.Barrier(2)
    recovered: list[int] = []
    failures: list[BaseException] = []
    number = lose(database)
    add_runs(database, number, "job", attempts=range(1, count + 1))

    def recover() -> None:
        with TaskRunHistory.connect(database) as history, history._engine.connect() as connection:
            for attempt in range(1, count + 1):
                run = history.get_run("job", attempt)
                assert run is not None
                supervisor = next(found for found in history.supervisors() if found.id == number)
                why = f"supervisor {supervisor} last seen {rfc3339(supervisor.heartbeat_at)}"
                loss = recovery.Loss(recovery._ended(run, supervisor.heartbeat_at, why), supervisor)
                together.wait(60)
                with engine.transaction(connection):
                    recovered.extend(run.attempt for run in recovery.close(connection, [loss]))
                together.wait(60)

    def close() -> None:
        with TaskRunHistory.connect(database) as history:
            history.check_version()
            for attempt in range(1, count + 1):
                together.wait(60)
                closed = history.close_run("job", attempt, TaskPhase.SUCCEEDED, exit_code=0)
                assert (closed.phase, closed.recovered) == ("succeeded", False)
                together.wait(60)

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  (told below)
            failures.append(error)
            together.abort()

    threads = [threading.Thread(target=guarded, args=(work,)) for work in (recover, close)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert failures == []
    with TaskRunHistory.connect(database) as history:
        ends = {(run.phase, run.error, run.exit_code, run.recovered) for run in history.iter_runs("job")}
    print(f"{count} races: recovery came first in {len(recovered)}")
    assert ends == {("succeeded", None, 0, False)}


def test_new_supervisor_closes_what_the_dead_of_its_host_have_left(history: TaskRunHistory, database: str) -> None:
    number = lose(database, "job", "lost")
    lose(database, "of another host", by=ELSEWHERE, silent=FAR)
    run = history.open_run("job")
    assert run.attempt == 2
    assert {run.task_id for run in history.tasks() if run.recovered} == {"lost"}
    assert [found.recovered for found in history.iter_runs("job")] == [False, True]
    assert {run.task_id for run in history.active_runs()} == {"job", "of another host"}
    assert number not in {found.id for found in history.supervisors()}
    assert len(history.supervisors()) == 2


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
        return Watcher("record", self._database).process

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

    def kill(self, *, what: str) -> None:
        """Start some, and kill them after a while, as ``kill -9`` does."""
        started = [self.ingest()] if what == "ingest" else [self.record()] if what == "record" else [self.exec()]
        if what == "all":
            started += [self.record(), self.ingest()]
        time.sleep(self._chance.uniform(0.2, 1.2))
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


@pytest.mark.parametrize("count", [5, pytest.param(100, marks=pytest.mark.soak)])
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
            victims.kill(what=("exec", "child", "record", "ingest", "all")[number % 5])
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


@pytest.mark.soak
@pytest.mark.parametrize("shift", [3600, -3600])
def test_no_living_run_is_recovered_whatever_the_clocks_say(database: str, shift: int) -> None:
    with Watcher("recover", database, 2.0, shift) as judge:
        shifts = [0, 3600, -3600, 0]
        living = [Watcher("live", database, number, 5, 4, shifts[number % 4]) for number in range(16)]
        for watcher in living:
            assert watcher.rest() == []
        times, *closed = judge.rest()[0].split()
    print(f"clock shifted by {shift} s: judged {times} times, {len(closed)} runs of the living recovered {closed}")
    with TaskRunHistory.connect(database) as history:
        ends = {(run.phase, run.recovered) for run in history.all_runs()}
        count = sum(1 for _ in history.all_runs())
    assert closed == []
    assert (count, ends) == (32, {("succeeded", False)})


@pytest.fixture
def own_database(home: Home) -> str:
    """The URL of the default database."""
    with TaskRunHistory.connect(home.database) as history:
        history.upgrade()
    return home.database


def test_supervisors_lists_who_is_alive_idle_and_stale(shell: Shell, database: str) -> None:
    lose(database, "job", "another", by=replace(HERE, host="web-1"), silent=7000)
    lose(database, by=replace(ELSEWHERE, host="web-2"), silent=5000)
    lose(database, "lost", by=replace(ELSEWHERE, host="web-3"), silent=90)
    answer = shell("--db", database, "supervisors")
    assert (answer.status, answer.err) == (0, "")
    lines = [re.sub(r"  +", "|", line).split("|") for line in answer.out.splitlines()]
    assert lines[0] == ["SUPERVISOR", "SOURCE", "STATE", "ACTIVE", "LAST SEEN", "SINCE (UTC)"]
    assert [line[:4] for line in lines[1:]] == [
        [f"web-1:{HERE.pid}", "there", "alive", "2"],
        ["web-2:1", "there", "idle", "0"],
        ["web-3:1", "there", "stale", "1"],
    ]
    assert re.fullmatch(r"1h 5\dm ago", lines[1][4])
    answer = shell("--db", database, "supervisors", "--stale-after", "2m")
    assert "stale" not in answer.out


def test_supervisors_as_json(shell: Shell, database: str) -> None:
    number = lose(database, "job", by=replace(ELSEWHERE, host="web-3"), silent=90)
    lose(database, "another")
    answer = shell("--db", database, "supervisors", "--json")
    first, second = map(json.loads, answer.out.splitlines())
    (found,) = (found for found in known(database, "there") if found.id == number)
    silence = first.pop("silenceMs")
    assert isinstance(silence, int)
    assert 90_000 <= silence < 150_000
    assert first == {
        "id": number,
        "source": "there",
        "host": "web-3",
        "pid": 1,
        "state": "stale",
        "activeRuns": 1,
        "startedAt": rfc3339(found.started_at),
        "heartbeatAt": rfc3339(found.heartbeat_at),
    }
    assert (second["state"], second["pid"]) == ("stale", GONE.pid)


def test_nobody_is_listed_as_nobody(shell: Shell, own_database: str) -> None:
    assert shell("supervisors", "--json").out == ""
    answer = shell("supervisors")
    assert (answer.status, answer.out.splitlines()[1:]) == (0, [])


def test_recover_shows_what_it_closes(shell: Shell, database: str) -> None:
    lose(database, "a", "b")
    add_runs(database, None, "by nobody")
    before = stored(database)
    answer = shell("--db", database, "recover", "--dry-run")
    assert (answer.status, answer.err) == (0, "taskruns: 2 runs would be closed\n")
    assert [line.split()[:3] for line in answer.out.splitlines()[1:]] == [["a", "1", "failed"], ["b", "1", "failed"]]
    assert stored(database) == before
    again = shell("--db", database, "recover")
    assert (again.status, again.err, again.out) == (0, "taskruns: 2 runs closed\n", answer.out)
    last = shell("--db", database, "recover", "--unsupervised", "5m")
    assert (last.status, last.err) == (0, "taskruns: 1 run closed\n")
    with TaskRunHistory.connect(database) as history:
        assert history.active_runs() == []


def test_recover_as_json(shell: Shell, database: str) -> None:
    lose(database, "job", by=ELSEWHERE, silent=90)
    assert shell("--db", database, "recover", "--json", "--stale-after", "2m").out == ""
    would_be = shell("--db", database, "recover", "--json", "--dry-run")
    answer = shell("--db", database, "recover", "--json")
    assert (answer.status, answer.err, answer.out) == (0, "", would_be.out)
    with TaskRunHistory.connect(database) as history:
        assert TaskRun.from_wire(json.loads(answer.out)) == replace(history.tasks()[0], supervisor_id=None)


@pytest.mark.parametrize("command", ["recover", "supervisors"])
def test_missing_database_is_not_made(shell: Shell, tmp_path: Path, command: str) -> None:
    path = tmp_path / "no.db"
    answer = shell("--db", str(path), command)
    assert (answer.status, answer.out) == (2, "")
    assert answer.err == f"taskruns: no such database: {path} (named by --db)\n"
    assert not path.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("recover", "--stale-after", "soon"),
        ("recover", "--stale-after", "-1s"),
        ("recover", "--unsupervised", "x"),
        ("recover", "job"),
        ("supervisors", "--stale-after", ""),
        ("supervisors", "job"),
    ],
)
def test_wrong_usage_is_told(shell: Shell, own_database: str, arguments: tuple[str, ...]) -> None:
    answer = shell(*arguments)
    assert (answer.status, answer.out) == (2, "")
    assert "Traceback" not in answer.err


def test_host_is_named_as_the_system_names_it() -> None:
    assert HERE.host == socket.gethostname()
