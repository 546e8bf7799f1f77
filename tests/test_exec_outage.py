"""`taskruns exec` while its database cannot be used: the command runs, its output and its status are its own."""

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from commands import Home
from servers import Databases, available, free_port
from sqlalchemy import make_url

from taskruns import TaskRun, TaskRunHistory

SECRET = "sekret"
DELAY = 6.0
"""Seconds that a database may hold a command up in all: five, and one for a machine that is busy."""

LOUD = ("sh", "-c", "echo out; echo err >&2; exit 3")
WARNING = "taskruns: this run "


@pytest.fixture
def home(tmp_path: Path) -> Home:
    (tmp_path / "home").mkdir()
    return Home(tmp_path / "home")


@contextmanager
def file_system(place: Path, options: str) -> Iterator[Path]:
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(place: Path) -> None:
    """Fill a file system to its last byte, since SQLite is content with a few."""
    for size in (65536, 4096, 1):
        with suppress(OSError), (place / f"filling{size}").open("wb", buffering=0) as filling:
            while True:
                filling.write(b"x" * size)


@contextmanager
def locked(path: Path, seconds: float | None = None) -> Iterator[None]:
    """Hold the writer's lock of an SQLite database, for so long or to the end."""
    ready, end = threading.Event(), threading.Event()

    def hold() -> None:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        ready.set()
        end.wait(seconds)
        connection.execute("ROLLBACK")
        connection.close()

    holder = threading.Thread(target=hold)
    holder.start()
    assert ready.wait(10)
    try:
        yield
    finally:
        end.set()
        holder.join()


class Outages:
    """Each method is a database that cannot be used, and gives what names it."""

    def __init__(self, home: Home, place: Path, databases: Databases) -> None:
        self._home = home
        self._place = place
        self._databases = databases

    def _sqlite(self) -> Path:
        path = self._place / "runs.db"
        with TaskRunHistory.connect(f"sqlite:///{path}") as history:
            history.upgrade()
        return path

    @contextmanager
    def place_below_a_file(self) -> Iterator[str]:
        (self._place / "file").touch()
        yield str(self._place / "file" / "runs.db")

    @contextmanager
    def place_where_nothing_can_be_made(self) -> Iterator[str]:
        yield "/proc/nope/runs.db"

    @contextmanager
    def directory(self) -> Iterator[str]:
        yield str(self._place)

    @contextmanager
    def read_only_file_system(self) -> Iterator[str]:
        with file_system(self._place / "disk", "ro") as disk:
            yield str(disk / "runs.db")

    @contextmanager
    def file_system_that_became_read_only(self) -> Iterator[str]:
        with file_system(self._place / "disk", "size=1m") as disk:
            shutil.copy(self._sqlite(), disk / "runs.db")
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            yield str(disk / "runs.db")

    @contextmanager
    def full_disk(self) -> Iterator[str]:
        with file_system(self._place / "disk", "size=256k") as disk:
            shutil.copy(self._sqlite(), disk / "runs.db")
            fill(disk)
            yield str(disk / "runs.db")

    @contextmanager
    def full_disk_without_a_database(self) -> Iterator[str]:
        with file_system(self._place / "disk", "size=64k") as disk:
            fill(disk)
            yield str(disk / "taskruns" / "runs.db")

    @contextmanager
    def corrupt_file(self) -> Iterator[str]:
        path = self._place / "corrupt.db"
        path.write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 40)
        yield str(path)
        assert path.read_bytes() == b"SQLite format 3\0" + bytes(range(256)) * 40

    @contextmanager
    def file_of_something_else(self) -> Iterator[str]:
        path = self._place / "letter.txt"
        path.write_text("Dear Sir or Madam, " * 100)
        yield str(path)
        assert path.read_text() == "Dear Sir or Madam, " * 100

    @contextmanager
    def tables_of_another_major_version(self) -> Iterator[str]:
        path = self._sqlite()
        connection = sqlite3.connect(path)
        with connection:
            connection.execute("UPDATE taskruns_version SET version_num = '2_0001'")
        connection.close()
        yield str(path)

    @contextmanager
    def file_that_stays_locked(self) -> Iterator[str]:
        path = self._sqlite()
        with locked(path):
            yield str(path)

    @contextmanager
    def server_that_is_down(self) -> Iterator[str]:
        yield f"postgresql://u:{SECRET}@127.0.0.1:{free_port()}/x"

    @contextmanager
    def mariadb_that_is_down(self) -> Iterator[str]:
        yield f"mariadb://u:{SECRET}@127.0.0.1:{free_port()}/x"

    @contextmanager
    def _silence(self, scheme: str) -> Iterator[str]:
        with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
            yield f"{scheme}://u:{SECRET}@127.0.0.1:{silent.getsockname()[1]}/x"

    def server_that_never_answers(self) -> AbstractContextManager[str]:
        return self._silence("postgresql")

    def mariadb_that_never_answers(self) -> AbstractContextManager[str]:
        return self._silence("mariadb")

    @contextmanager
    def host_that_does_not_resolve(self) -> Iterator[str]:
        yield f"postgresql://u:{SECRET}@no-such-host.invalid/x"

    @contextmanager
    def server_without_tables(self) -> Iterator[str]:
        yield self._databases.empty(available("postgresql", self._databases))

    @contextmanager
    def server_without_the_database(self) -> Iterator[str]:
        server = self._databases.server(available("mariadb", self._databases)).url
        yield server.set(database="taskruns_test_no_such_database").render_as_string(hide_password=False)

    @contextmanager
    def wrong_password(self) -> Iterator[str]:
        server = self._databases.server(available("mariadb", self._databases)).url
        yield server.set(password=SECRET).render_as_string(hide_password=False)

    @contextmanager
    def url_that_is_none(self) -> Iterator[str]:
        yield f"postgresql://u:{SECRET}@host:port/x"

    @contextmanager
    def database_that_is_not_supported(self) -> Iterator[str]:
        yield f"oracle://u:{SECRET}@host/x"

    @contextmanager
    def option_that_the_driver_lacks(self) -> Iterator[str]:
        yield f"mariadb://u:{SECRET}@127.0.0.1/x?bogus=1"

    @contextmanager
    def broken_configuration(self) -> Iterator[str]:
        path = self._home.path / ".config" / "taskruns" / "config.toml"
        path.parent.mkdir(parents=True)
        path.write_text(f"db = postgresql://u:{SECRET}@host/x\n")
        yield ""

    @contextmanager
    def configuration_whose_secret_is_missing(self) -> Iterator[str]:
        path = self._home.path / ".config" / "taskruns" / "config.toml"
        path.parent.mkdir(parents=True)
        path.write_text('db_file = "/no/such/file"\n')
        yield ""


ALIKE = ("mariadb_that_is_down", "mariadb_that_never_answers", "host_that_does_not_resolve")
"""What takes its full time and is much like another one."""

OUTAGES = [
    pytest.param(name, marks=pytest.mark.soak) if name in ALIKE else name
    for name in vars(Outages)
    if not name.startswith("_")
]


@pytest.fixture
def outages(home: Home, tmp_path: Path, databases: Databases) -> Outages:
    return Outages(home, tmp_path, databases)


def seconds_of(home: Home, *arguments: str) -> float:
    began = time.monotonic()
    home.taskruns(*arguments)
    return time.monotonic() - began


@pytest.mark.parametrize("name", OUTAGES)
def test_command_runs_all_the_same(home: Home, outages: Outages, name: str) -> None:
    usual = seconds_of(home, "exec", "--db", f"{home.path}/usual.db", "job", "--", *LOUD)
    outage: Callable[[], AbstractContextManager[str]] = getattr(outages, name)
    with outage() as database:
        named = ("--db", database) if database else ()
        began = time.monotonic()
        # At the same time, since most of it is waiting.
        tries = ("--retries", "2", "--backoff", "0.05s")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        plain = home.start("exec", *named, "job", "--", *LOUD, **pipes)
        quiet = home.start("exec", *named, "-q", "job", *tries, "--", *LOUD, **pipes)
        with quiet, plain:
            out, err = plain.communicate(timeout=60)
            quiet_out, quiet_err = quiet.communicate(timeout=60)
        seconds = time.monotonic() - began
    assert (plain.returncode, out) == (3, "out\n")
    (warning,) = [line for line in err.splitlines() if line != "err"]
    assert err.splitlines().count("err") == 1
    assert warning.startswith(WARNING)
    assert len(warning) > len(WARNING)
    assert SECRET not in warning
    assert (quiet.returncode, quiet_out, quiet_err) == (3, "out\n" * 3, "err\n" * 3)
    assert seconds - 2 * usual < DELAY


def test_command_is_not_held_up_for_long_before_it_starts(home: Home, outages: Outages) -> None:
    usual = seconds_of(home, "exec", "--db", f"{home.path}/usual.db", "job", "--", "true")
    with outages.server_that_never_answers() as database:
        began = time.time()
        done = home.taskruns("exec", "--db", database, "job", "--", "date", "+%s.%N")
    assert float(done.stdout) - began - usual < 3


@pytest.mark.parametrize("bad", ["oracle://host/x", "/proc/nope/runs.db"])
def test_warning_that_cannot_be_written_hinders_nothing(home: Home, bad: str) -> None:
    command = ("--", "sh", "-c", "echo $TASKRUNS_TRY; exit 3")
    with Path("/dev/full").open("w") as full:
        tries = ("--retries", "1", "--backoff", "0s")
        done = home.taskruns("exec", "--db", bad, "job", *tries, *command, stdout=subprocess.PIPE, stderr=full)
    assert (done.returncode, done.stdout) == (3, "1\n2\n")


def test_child_is_not_told_of_an_attempt_that_is_not_recorded(home: Home) -> None:
    home.environment["TASKRUNS_ATTEMPT"] = "7"  # as under another exec
    script = "echo $TASKRUNS_TASK ${TASKRUNS_ATTEMPT-none} $TASKRUNS_TRY"
    done = home.taskruns("exec", "-q", "--db", "/proc/nope/x.db", "job", "--", "sh", "-c", script)
    assert done.stdout == "job none 1\n"


def test_stop_while_the_database_is_waited_for(home: Home, outages: Outages, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    with outages.server_that_never_answers() as database:
        wrapper = home.start("exec", "-q", "--db", database, "job", "--", "touch", str(ran))
        wait_for_handler(wrapper.pid)
        began = time.monotonic()
        wrapper.terminate()
        assert wrapper.wait(30) == 143
        assert time.monotonic() - began < DELAY
    assert not ran.exists()


def wait_for_handler(pid: int) -> None:
    """Wait until the process minds SIGTERM."""
    deadline = time.monotonic() + 20
    while not int(Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0], 16) & 1 << 14:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def check_times(run: TaskRun, printed: str, seconds: float) -> None:
    """Check that a run began when its command said so, and lasted as long as that took."""
    began = datetime.fromtimestamp(float(printed), UTC)
    assert -0.1 < (began - run.started_at).total_seconds() < 0.5
    assert run.duration is not None
    assert seconds <= run.duration.total_seconds() < seconds + 0.5


def timed(seconds: float) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", f"import time; print(time.time()); time.sleep({seconds})")


@pytest.mark.parametrize("overlap", [(), ("--no-overlap",)])
def test_short_lock_is_waited_for_and_is_no_part_of_the_run(home: Home, overlap: tuple[str, ...]) -> None:
    home.taskruns("exec", "other", "--", "true")
    with locked(Path(make_url(home.database).database or ""), 1.7):
        done = home.taskruns("exec", "job", *overlap, "--", *timed(0.3))
    assert (done.returncode, done.stderr) == (0, "")
    (run,) = home.runs("job")
    check_times(run, done.stdout, 0.3)
    assert run.phase == "succeeded"


def test_lock_at_the_start_that_ends_while_the_command_runs(home: Home) -> None:
    home.taskruns("exec", "other", "--", "true")
    with locked(Path(make_url(home.database).database or ""), 4):
        done = home.taskruns("exec", "job", "--", *timed(2.5))
    assert (done.returncode, done.stderr) == (0, "")
    (run,) = home.runs("job")
    check_times(run, done.stdout, 2.5)


@pytest.mark.soak  # on a crowded machine it is waited for longer
def test_lock_at_the_start_leaves_it_open_whether_the_task_is_active_and_that_is_said(home: Home) -> None:
    home.taskruns("exec", "other", "--", "true")
    with locked(Path(make_url(home.database).database or ""), 5):
        done = home.taskruns("exec", "job", "--no-overlap", "--", *timed(3))
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 1
    assert "whether job is running already is not known" in done.stderr
    (run,) = home.runs("job")
    check_times(run, done.stdout, 3)


def test_place_that_appears_while_the_command_runs(home: Home, tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.touch()
    script = (
        f"rm {place}; mkdir {place}; exec {sys.executable} -S -c 'import time; print(time.time()); time.sleep(0.5)'"
    )
    done = home.taskruns("exec", "--db", f"{place}/runs.db", "job", "--", "sh", "-c", script)
    assert done.returncode == 0
    (run,) = home.runs("job", f"sqlite:///{place}/runs.db")
    check_times(run, done.stdout, 0.5)


class Gate:
    """A way to a server, closed at first."""

    def __init__(self, host: str, port: int) -> None:
        self._server = (host, port)
        self.port = free_port()
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def close(self) -> None:
        for socket_ in [*self._open, *([self._listener] if self._listener is not None else [])]:
            with suppress(OSError):
                socket_.shutdown(socket.SHUT_RDWR)
            socket_.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._server)
            self._open += [client, server]
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._carry, args=(source, target), daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@pytest.fixture
def gate(postgresql: str) -> Iterator[Gate]:
    url = make_url(postgresql)
    gate = Gate(url.host or "127.0.0.1", url.port or 5432)
    yield gate
    gate.close()


def test_server_that_comes_up_while_the_command_runs(home: Home, postgresql: str, gate: Gate) -> None:
    through = make_url(postgresql).set(host="127.0.0.1", port=gate.port).render_as_string(hide_password=False)
    opening = threading.Timer(2.5, gate.open)
    opening.start()
    done = home.taskruns("exec", "--db", through, "job", "--", *timed(7))
    opening.join()
    assert (done.returncode, done.stderr) == (0, "")
    (run,) = home.runs("job", postgresql)
    check_times(run, done.stdout, 7)


def test_server_that_goes_away_while_the_command_runs(home: Home, postgresql: str, gate: Gate, tmp_path: Path) -> None:
    gate.open()
    through = make_url(postgresql).set(host="127.0.0.1", port=gate.port).render_as_string(hide_password=False)
    gone = tmp_path / "gone"
    script = f"echo started; until test -e {gone}; do sleep 0.05; done; exit 3"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with home.start("exec", "--db", through, "job", "--", "sh", "-c", script, **pipes) as wrapper:
        assert wrapper.stdout is not None
        assert wrapper.stdout.readline() == "started\n"
        assert [run.phase for run in home.runs("job", postgresql)] == ["running"]
        gate.close()
        gone.touch()
        began = time.monotonic()
        _, err = wrapper.communicate(timeout=60)
    assert wrapper.returncode == 3
    assert time.monotonic() - began < DELAY + 2 * os.getloadavg()[0]  # with many waiting it has more patience
    assert err.startswith(WARNING)
    assert len(err.splitlines()) == 1
    assert [run.phase for run in home.runs("job", postgresql)] == ["running"]
    gate.open()
    assert home.taskruns("exec", "--db", through, "other", "--", "true").stderr == ""
    (run,) = home.runs("job", postgresql)
    assert (run.phase, run.exit_code, run.recovered) == ("failed", 3, False)


def test_disk_that_fills_while_the_command_runs(home: Home, tmp_path: Path) -> None:
    with file_system(tmp_path / "disk", "size=512k") as disk:
        database = f"sqlite:///{disk}/runs.db"
        script = f"head -c 1000000 /dev/zero >{disk}/fill 2>/dev/null; exit 3"
        done = home.taskruns("exec", "--db", database, "job", "--", "sh", "-c", script)
        assert done.returncode == 3
        assert done.stderr.startswith(WARNING)
        assert "disk" in done.stderr  # is full, or has an error where the shared memory cannot grow
        assert len(done.stderr.splitlines()) == 1
        (disk / "fill").unlink()
        assert home.taskruns("exec", "--db", database, "job", "--", "true").stderr == ""
        lost, run = home.runs("job", database)
        assert (lost.phase, lost.exit_code, lost.recovered) == ("failed", 3, False)
        assert run.phase == "succeeded"
