"""Servers go down, locks stay, disks are full: jobs do not notice, and what was acknowledged is there."""

import itertools
import json
import logging
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import Home
from histories import Histories
from servers import OWN, MissingServerError, OwnServer, missing, wait_for
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError
from test_exec_outage import DELAY, file_system, fill, seconds_of
from test_ingest import Ingest, all_runs, clean_pass, encoded, home, ingest, many, shown, start, stop
from test_retries import cut, servers_history
from test_watch import Watching

from taskruns import TaskPhase, TaskRun, TaskRunHistory, spool

__all__ = ["home", "ingest", "servers_history"]  # fixtures

PREFIX = "taskruns: "


@pytest.fixture(scope="module")
def servers() -> Iterator[Callable[[str], OwnServer]]:
    """Servers that a test may stop, as nobody else uses them."""
    with ExitStack() as stack:
        started: dict[str, OwnServer] = {}

        def of_kind(kind: str) -> OwnServer:
            if kind not in started:
                started[kind] = stack.enter_context(OWN[kind]())
            return started[kind]

        yield of_kind


@pytest.fixture(params=OWN)
def server(request: pytest.FixtureRequest, servers: Callable[[str], OwnServer]) -> OwnServer:
    try:
        return servers(request.param)
    except MissingServerError as error:
        missing(str(error))


_numbers = itertools.count(1)


@pytest.fixture
def own_database(server: OwnServer) -> str:
    """The URL of a database with empty tables on a server that may be stopped."""
    name = f"outages_{next(_numbers)}"
    engine = create_engine(server.url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    url = server.url.set(database=name).render_as_string(hide_password=False)
    with TaskRunHistory.connect(url) as history:
        history.upgrade()
    return url


def nothing_is_kept() -> bool:
    return not any(path.suffix != ".lock" for path in spool.directory().glob("*"))


@dataclass(frozen=True)
class Job:
    """What a command under `exec` did, and what its caller saw of it."""

    name: str
    task: str
    status: int
    began: float
    ended: float
    done: "subprocess.CompletedProcess[str]"
    seconds: float
    """How long its caller waited."""

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.done.stderr.splitlines() if line.startswith(PREFIX)]

    def check(self) -> None:
        """Check that its caller saw what it does."""
        assert (self.done.returncode, self.done.stdout) == (self.status, f"out {self.name}\n")
        others = [line for line in self.done.stderr.splitlines() if not line.startswith(PREFIX)]
        assert others == [f"err {self.name}"]


_SCRIPT = """
import pathlib, sys, time
name, status, times = sys.argv[1:]
began = time.time()
print("out", name)
print("err", name, file=sys.stderr)
time.sleep(0.1)
pathlib.Path(times).write_text(f"{began} {time.time()}")
sys.exit(int(status))
"""


def job(home: Home, database: str, name: str, task: str, status: int) -> Job:
    times = home.path / name
    command = (sys.executable, "-S", "-c", _SCRIPT, name, str(status), str(times))
    began = time.monotonic()
    done = home.taskruns("exec", "--db", database, task, "--", *command)
    seconds = time.monotonic() - began
    ran_from, ran_until = map(float, times.read_text().split())
    return Job(name, task, status, ran_from, ran_until, done, seconds)


def test_watch_outlives_an_outage_and_repeats_nothing(server: OwnServer, own_database: str, home: Home) -> None:
    with TaskRunHistory.connect(own_database) as history:
        history.open_run("before")
        watch = Watching(home, "--db", own_database, "--interval", "0.1")
        assert "before 1" in watch.line(20)
        with server.down():
            assert "; waiting for it" in watch.complaint()
        assert watch.complaint() == f"{PREFIX}the database can be used again\n"
        history.close_run("before", 1, TaskPhase.SUCCEEDED)
        assert re.search("succeeded +before 1", watch.line())
        assert watch.says_no_more()
        assert watch.stop() == (130, "")


def differences(runs: list[TaskRun], jobs: list[Job]) -> list[tuple[float, float]]:
    """Return how much later than its run each job began and ended, by its own clock, in seconds.

    A run that failed is known by its error; the others are taken in the order of their starts.
    """
    runs = sorted(runs, key=lambda run: (run.task_id, run.error or "", run.started_at))
    jobs = sorted(jobs, key=lambda job: (job.task, f"err {job.name}" if job.status else "", job.began))
    found = []
    for run, job in zip(runs, jobs, strict=True):
        assert (run.task_id, run.exit_code, run.recovered) == (job.task, job.status, False)
        assert (run.phase, run.error) == (("failed", f"err {job.name}") if job.status else ("succeeded", None))
        assert run.finished_at is not None
        found.append((job.began - run.started_at.timestamp(), job.ended - run.finished_at.timestamp()))
    return found


@pytest.mark.parametrize(
    ("server", "loops", "each", "down"),
    [
        ("postgresql", 3, 3, [3]),
        pytest.param("postgresql", 8, 25, [12, 12], marks=pytest.mark.soak),
        pytest.param("mariadb", 8, 25, [12, 12], marks=pytest.mark.soak),
    ],
    indirect=["server"],
)
def test_server_that_is_stopped_and_started_while_commands_run(
    server: OwnServer,
    own_database: str,
    home: Home,
    loops: int,
    each: int,
    down: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    jobs: list[Job] = []

    def work(loop: int) -> None:
        for number in range(each):
            task = "of all" if number % 2 else f"of {loop}"
            jobs.append(job(home, own_database, f"job-{loop}-{number}", task, 3 if number % 3 == 2 else 0))

    def wait_for_jobs(count: int) -> None:
        while len(jobs) < count and not all(future.done() for future in working):
            time.sleep(0.05)

    outages = []
    with ThreadPoolExecutor(loops) as pool:
        working = [pool.submit(work, loop) for loop in range(loops)]
        for number, count in enumerate(down):
            wait_for_jobs(len(jobs) + (loops * each - sum(down)) // (len(down) + 2))
            with server.down(killed=number % 2 == 1):
                began = time.monotonic()
                wait_for_jobs(len(jobs) + count)
                kept = sum(waiting.events for waiting in spool.waiting())
            outages.append((time.monotonic() - began, kept))
        for future in working:
            future.result()
    for done in jobs:
        done.check()
    assert any(kept for _, kept in outages)
    replayed = home.taskruns("replay", "--db", own_database)
    assert (replayed.returncode, replayed.stderr) == (0, "")
    assert nothing_is_kept()
    runs = all_runs(own_database)
    late = differences(runs, jobs)
    warned = [warning for done in jobs for warning in done.warnings]
    with capsys.disabled():
        print(
            f"\n{server.url.get_backend_name()}: {len(jobs)} jobs in {loops} loops, {len(down)} outages of "
            f"{', '.join(f'{seconds:.0f} s ({kept} events kept)' for seconds, kept in outages)}; {len(warned)} warnings"
            f"; longest wrapper {max(done.seconds for done in jobs):.1f} s; {len(runs)} runs, which begin "
            f"{min(began for began, _ in late):.3f} to {max(began for began, _ in late):.3f} s before their jobs and "
            f"end {-max(ended for _, ended in late):.3f} to {-min(ended for _, ended in late):.3f} s after them; "
            f"at last {replayed.stdout.strip()}"
        )
        for warning in sorted(set(warned)):
            print(f"  {warned.count(warning)} x {warning}")
    assert 0 < len(warned) <= 2 * len(down)  # wrappers that met its beginning at the same time
    # Runs of one task that began at once may be taken for each other, so an end may seem too early.
    assert all(-0.05 < began < 1 and abs(ended) < 1 for began, ended in late)


@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
def test_transaction_in_which_the_server_goes_down_is_undone_as_a_whole(
    server: OwnServer, own_database: str, histories: Histories, killed: bool
) -> None:
    history = histories.connect(own_database)
    history.open_run("job")

    def work() -> None:
        with history.begin(lock="job") as runs:
            runs.close_run("job", 1, TaskPhase.SUCCEEDED)
            runs.open_run("job")
            with server.down(killed=killed):
                pass
            runs.open_run("job")

    with pytest.raises(DBAPIError):
        work()
    assert [(run.attempt, run.phase) for run in history.iter_runs("job")] == [(1, "running")]
    assert history.close_run("job", 1, TaskPhase.FAILED).phase == "failed"
    with history.begin(lock="job") as runs:
        assert runs.open_run("job").attempt == 2


@pytest.mark.parametrize("server", ["postgresql", pytest.param("mariadb", marks=pytest.mark.soak)], indirect=True)
def test_acknowledged_events_outlive_the_server(
    server: OwnServer, own_database: str, ingest: Callable[..., Ingest]
) -> None:
    events = many(3000)
    running = ingest(own_database, "--ack")
    for first in range(0, 2500, 500):
        running.tell(*events[first : first + 500])
        assert running.acknowledged() > first  # it is in the middle of them
        with server.down(killed=first % 1000 == 0):
            pass
        while running.acknowledged() < first + 500:
            pass
    with server.down():
        running.tell(*events[2500:])
        while running.acknowledged() < len(events):
            pass
    status, _ = running.wait()
    assert status == 0
    with TaskRunHistory.connect(own_database) as history:
        history.replay()
    assert shown(all_runs(own_database)) == shown(clean_pass(events))


def test_connections_cut_at_any_moment_lose_and_double_nothing(
    servers_history: tuple[TaskRunHistory, Engine], home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    history, admin = servers_history
    database = admin.url.render_as_string(hide_password=False)
    is_over, cuts = threading.Event(), 0

    def cut_all() -> None:
        nonlocal cuts
        while not is_over.wait(0.05):
            with suppress(DBAPIError):  # one that has ended by itself meanwhile
                cuts += cut(admin)

    cutting = threading.Thread(target=cut_all)
    cutting.start()
    try:
        with home.start("exec", "--db", database, "-q", "of exec", "--", "sleep", "1") as wrapper:
            for _ in range(20):
                with history.record("recorded"):
                    time.sleep(0.02)
                with suppress(DBAPIError):
                    run = history.open_run("opened")
                    history.close_run("opened", run.attempt, TaskPhase.SUCCEEDED)
        assert wrapper.returncode == 0
    finally:
        is_over.set()
        cutting.join()
        admin.dispose()
    assert cuts > 0
    assert home.taskruns("replay", "--db", database).returncode == 0
    for task, count in {"recorded": 20, "opened": 20, "of exec": 1}.items():
        runs = history.runs(task, limit=100).runs
        assert [(run.attempt, run.phase, run.recovered) for run in runs[::-1]] == [
            (number, "succeeded", False) for number in range(1, count + 1)
        ]


@contextmanager
def locked(database: str) -> Iterator[None]:
    """Let nobody else write to the table, nor read it where that can be prevented."""
    url = make_url(database)
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    begin, end = {
        "sqlite": (["BEGIN EXCLUSIVE"], "ROLLBACK"),
        "postgresql": (["BEGIN", "LOCK TABLE task_runs IN ACCESS EXCLUSIVE MODE"], "ROLLBACK"),
        "mariadb": (["LOCK TABLES task_runs WRITE"], "UNLOCK TABLES"),
    }[url.get_backend_name()]
    with engine.connect() as connection:
        for statement in begin:
            connection.exec_driver_sql(statement)
        try:
            yield
        finally:
            connection.exec_driver_sql(end)
    engine.dispose()


def feed(running: Ingest, content: bytes) -> float:
    """Tell it all at once, and return the seconds of the longest wait until it has taken some."""
    longest = 0.0
    for first in range(0, len(content), 4096):
        began = time.monotonic()
        running.input.write(content[first : first + 4096])
        running.input.flush()
        longest = max(longest, time.monotonic() - began)
    return longest


@pytest.mark.parametrize(
    ("kind", "seconds", "count"),
    [
        ("postgresql", 0, 5000),
        *(pytest.param(kind, 0, 5000, marks=pytest.mark.soak) for kind in ("sqlite", "mariadb")),
        *(pytest.param(kind, 60, 100_000, marks=pytest.mark.soak) for kind in ("sqlite", "postgresql", "mariadb")),
    ],
    indirect=["kind"],
)
def test_lock_that_is_held_holds_up_nobody(
    database: str,
    home: Home,
    ingest: Callable[..., Ingest],
    seconds: float,
    count: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usual = seconds_of(home, "exec", "--db", f"{home.path}/usual.db", "job", "--", "true")
    events = many(count)
    running = ingest(database, stdout=None)
    with (
        TaskRunHistory.connect(database, lock_timeout=0.5, retry_for=1) as history,
        ThreadPoolExecutor(2) as pool,
    ):
        history.tasks()
        with locked(database):
            until = time.monotonic() + seconds
            feeding = pool.submit(feed, running, encoded(*events))
            called = time.time()
            executing = pool.submit(job, home, database, "held", "of exec", 3)
            began = time.monotonic()
            with history.record("recorded") as first:
                pass
            recorded = time.monotonic() - began
            with history.record("recorded"):
                pass
            again = time.monotonic() - began - recorded
            held = executing.result()
            fed = feeding.result()
            time.sleep(max(0.0, until - time.monotonic()))
        status, errors = running.wait()
    replayed = home.taskruns("replay", "--db", database, timeout=600)
    runs = all_runs(database)
    [(early, _)] = differences([run for run in runs if run.task_id == "of exec"], [held])
    with capsys.disabled():
        print(
            f"\n{make_url(database).get_backend_name()}, locked for {seconds:.0f} s: command started after "
            f"{held.began - called:.2f} s and its wrapper ended after {held.seconds:.2f} s (usual {usual:.2f} s), "
            f"its run begins {early:.2f} s before it; "
            f"record() took {recorded:.2f} s, then {again:.4f} s; ingest read {count} events, at most {fed:.2f} s "
            f"without; then {replayed.stdout.strip()}"
        )
    held.check()
    assert len(held.warnings) == 1
    assert -0.05 < early < 1 + usual  # on a crowded machine a command takes its time to begin
    assert held.began - called - 2 * usual < 3
    assert held.seconds - 2 * usual < DELAY
    assert recorded - usual < DELAY
    assert again < 1
    assert fed - usual < DELAY
    assert (status, replayed.returncode, replayed.stderr) == (0, 0, "")
    assert "events are kept in " in errors
    assert nothing_is_kept()
    assert [run.phase for run in runs if run.task_id == "recorded"] == ["succeeded"] * 2
    assert first.started_at in [run.started_at for run in runs]
    assert shown([run for run in runs if run.task_id.startswith("task ")]) == shown(clean_pass(events))


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"], indirect=True)
def test_table_that_is_locked_till_the_command_runs_is_no_part_of_the_run(home: Home, database: str) -> None:
    script = "import sys, time; print(time.time(), flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with ExitStack() as lock:
        lock.enter_context(locked(database))
        wrapper = home.start("exec", "--db", database, "job", "--", sys.executable, "-c", script, **pipes)
        assert wrapper.stdout is not None
        began = float(wrapper.stdout.readline())
    wait_for(lambda: bool(home.runs("job", database)), "its start is not written")
    assert wrapper.communicate(timeout=60) == ("", "")
    [run] = home.runs("job", database)
    assert (run.phase, run.recovered) == ("succeeded", False)
    assert -0.05 < began - run.started_at.timestamp() < 1


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return what the library has said since the last call."""
    caplog.set_level(logging.WARNING, "taskruns")

    def said() -> list[str]:
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    return said


class Filling:
    """A small disk that can be filled to its last byte, and emptied of that."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def fill(self) -> None:
        fill(self.place)

    def clear(self) -> None:
        for path in self.place.glob("filling*"):
            path.unlink()


def test_full_disks(  # every writer, through one history of two disks
    sqlite: str,
    home: Home,
    ingest: Callable[..., Ingest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    messages: Callable[[], list[str]],
) -> None:
    with file_system(tmp_path / "data", "size=1m") as data, file_system(tmp_path / "state", "size=1m") as state:
        shutil.copy(str(make_url(sqlite).database), data / "runs.db")
        database = f"sqlite:///{data}/runs.db"
        home.environment["TASKRUNS_STATE_DIR"] = str(state)
        monkeypatch.setenv("TASKRUNS_STATE_DIR", str(state))
        data_disk, state_disk = Filling(data), Filling(state)

        def write(name: str) -> tuple[list[str], list[str], list[str], list[int]]:
            """Have each of them record; return what they say, and what `ingest` acknowledges."""
            done = job(home, database, name, name, 3)
            done.check()
            with TaskRunHistory.connect(database) as history:
                with history.record(name):
                    pass
                history._outage._replay_at = float("inf")
            running = ingest(database, "--ack")
            with suppress(BrokenPipeError):
                running.tell(start(0, f"{name}, told"), stop(1, f"{name}, told"))
            running.input.close()
            acknowledged = [json.loads(line)["ack"] for line in running.unread().splitlines()]
            *complaints, _counts = running.wait()[1].splitlines()
            return done.warnings, messages(), complaints, acknowledged

        assert write("before") == ([], [], [], [1, 2])
        data_disk.fill()
        [warning], [message], [complaint], acknowledged = write("kept")
        assert warning.startswith(f"{PREFIX}this run is kept in {state}/")
        assert message.startswith(f"runs are kept in {state}/")
        assert complaint.startswith(f"{PREFIX}events are kept in {state}/")
        assert acknowledged == [1, 2]
        state_disk.fill()
        [warning], [message], [complaint], acknowledged = write("lost")
        assert warning.startswith(f"{PREFIX}this run will not be recorded")
        assert message.startswith("this run will not be recorded")
        assert complaint.startswith(f"{PREFIX}events are lost")
        assert all("No space left on device" in line for line in (warning, message, complaint))
        assert acknowledged == []
        state_disk.clear()
        data_disk.clear()
        assert write("after") == ([], [], [], [1, 2])
        replayed = home.taskruns("replay", "--db", database)
        assert (replayed.returncode, replayed.stderr) == (0, "")
        assert nothing_is_kept()
        found: dict[str, list[tuple[str, bool]]] = {name: [] for name in ("before", "kept", "after")}
        for run in all_runs(database):
            found[run.task_id.removesuffix(", told")].append((run.phase.value, run.recovered))
        for of_name in found.values():
            assert sorted(of_name) == [("failed", False), ("succeeded", False), ("succeeded", False)]


def test_killed_wrapper_of_an_outage_leaves_its_run(server: OwnServer, own_database: str, home: Home) -> None:
    script = "import sys, time; print(time.time(), flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with server.down():
        wrapper = home.start("exec", "-q", "--db", own_database, "job", "--", sys.executable, "-c", script, **pipes)
        with wrapper:
            assert wrapper.stdout is not None
            began = float(wrapper.stdout.readline())
            wrapper.kill()
    assert home.taskruns("replay", "--db", own_database).returncode == 0
    assert nothing_is_kept()
    [run] = home.runs("job", own_database)
    assert (run.phase, run.recovered) == ("failed", True)
    assert run.finished_at is not None
    assert -0.05 < began - run.started_at.timestamp() < 1
