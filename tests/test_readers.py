"""Reading commands create and change nothing, whoever reads, and leave no writer locked out."""

import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Answer, Home, Shell
from servers import missing
from sqlalchemy import URL

from taskruns import TaskRunHistory

READERS = [
    ("runs", "job"),
    ("show", "job"),
    ("last", "job"),
    ("tasks",),
    ("active",),
    ("db", "current"),
    ("db", "check"),
]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def shell(home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    home.path.mkdir()
    return Shell(home, monkeypatch, capsys)


def make(path: Path, task: str = "job") -> None:
    """Make a database with a run of a task."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TaskRunHistory.connect(URL.create("sqlite", database=str(path))) as history:
        history.upgrade()
        history.open_run(task)


def snapshot(directory: Path) -> dict[str, tuple[int, str]]:
    """Everything below a directory, with its mode and content."""
    return {
        str(path.relative_to(directory)): (
            path.lstat().st_mode,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(directory.rglob("*"))
    }


@pytest.mark.parametrize("command", READERS)
def test_missing_database_is_not_created(shell: Shell, home: Home, command: tuple[str, ...]) -> None:
    before = snapshot(home.path)
    answer = shell(*command)
    path = home.path / ".local/share/taskruns/taskruns.db"
    assert (answer.status, answer.out) == (2, "")
    advice = "the first `taskruns exec` makes it"
    assert answer.err == f"taskruns: no such database: {path} (named by the default); {advice}\n"
    assert snapshot(home.path) == before


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize(
    "content", ["directory", "of another program", "text", "empty file", "cut short", "fifo", "link to nothing"]
)
def test_what_is_no_history_is_said_in_one_line_and_stays_as_it_is(
    shell: Shell, tmp_path: Path, command: tuple[str, ...], content: str
) -> None:
    directory = tmp_path / "data"
    directory.mkdir()
    path = directory / "x.db"
    if content == "directory":
        path.mkdir()
    elif content == "of another program":
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE notes (text)")
        connection.close()
    elif content == "text":
        path.write_text("this is no database, but long enough to look like one\n" * 100)
    elif content == "cut short":
        make(path)
        path.write_bytes(path.read_bytes()[:5000])
    elif content == "fifo":
        os.mkfifo(path)
    elif content == "link to nothing":
        path.symlink_to(directory / "nothing")
    else:
        path.touch()
    before = snapshot(directory)
    answer = shell(*command, "--db", str(path))
    assert (answer.status in (1, 2), answer.out) == (True, "")
    assert answer.err.startswith("taskruns: ")
    assert len(answer.err.splitlines()) == 1
    assert "sqlalche.me" not in answer.err
    assert snapshot(directory) == before


@pytest.mark.parametrize("command", READERS)
def test_reading_leaves_a_database_that_nobody_has_open_as_it_is(
    shell: Shell, tmp_path: Path, command: tuple[str, ...]
) -> None:
    path = tmp_path / "data" / "x.db"
    make(path)
    before = snapshot(path.parent)
    assert set(before) == {"x.db"}
    answer = shell(*command, "--db", str(path))
    assert (answer.status, answer.err) == (0, "")
    assert snapshot(path.parent) == before


def test_reading_works_while_somebody_writes(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "data" / "x.db"
    make(path)
    with TaskRunHistory.connect(f"sqlite:///{path}") as writer, writer.begin() as runs:
        runs.open_run("uncommitted")
        answer = shell("tasks", "--json", "--db", str(path))
    assert answer.status == 0
    assert "uncommitted" not in answer.out
    assert '"job"' in answer.out


@pytest.fixture
def others() -> Iterator[Path]:
    """A directory that other users can reach."""
    if os.geteuid() != 0:
        missing("only root can be other users for a while")
    directory = Path(tempfile.mkdtemp(prefix="taskruns-others-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


OWNER, OTHER = 65533, 65534

AS_USER = """
import os, sys
from taskruns import TaskRunHistory
from taskruns.cli import run
def write(path):
    with TaskRunHistory.connect(f"sqlite:///{path}", retry_for=0) as history:
        history.upgrade()
        history.open_run("job")
write(sys.argv[2])
run(["--db", sys.argv[2], "active", "--limit", "1"])  # all modules are loaded, which the user may not be able to read
sys.stdout.flush()
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
sys.exit(write(sys.argv[4]) if sys.argv[3] == "write" else run(sys.argv[3:]))
"""


def as_user(user: int, tmp_path: Path, *arguments: str) -> Answer:
    """Write a run to a file, or call the command line, as some user without any right of root."""
    done = subprocess.run(
        [sys.executable, "-c", AS_USER, str(user), str(tmp_path / f"root-{time.monotonic_ns()}.db"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    _, _, out = done.stdout.partition("\n")[2].partition("\n")  # root's own table of one run
    return Answer(done.returncode, out, done.stderr)


@pytest.mark.parametrize("mode", [0o755, 0o1777])
@pytest.mark.parametrize("is_open", [False, True])
def test_another_user_reads_what_he_may_not_write(tmp_path: Path, others: Path, mode: int, is_open: bool) -> None:
    path = others / "x.db"
    make(path)
    path.chmod(0o644)
    others.chmod(mode)
    with TaskRunHistory.connect(f"sqlite:///{path}") as writer:
        if is_open:
            writer.open_run("fresh")
        before = snapshot(others)
        assert ("x.db-wal" in before) == is_open
        answer = as_user(OTHER, tmp_path, "tasks", "--json", "--db", str(path))
        assert (answer.status, answer.err) == (0, "")
        assert len(answer.out.splitlines()) == 1 + is_open
        assert {name: mode for name, (mode, _) in snapshot(others).items()} == {
            name: mode for name, (mode, _) in before.items()
        }


def test_owner_can_write_after_another_user_has_read(tmp_path: Path, others: Path) -> None:
    others.chmod(0o1777)
    path = others / "x.db"
    assert as_user(OWNER, tmp_path, "write", str(path)).status == 0
    path.chmod(0o644)
    assert as_user(OTHER, tmp_path, "tasks", "--db", str(path)).status == 0
    written = as_user(OWNER, tmp_path, "write", str(path))
    assert (written.status, written.err) == (0, "")
    assert [entry.name for entry in others.iterdir()] == ["x.db"]


def test_another_user_who_may_not_even_read_is_told_so(tmp_path: Path, others: Path) -> None:
    path = others / "x.db"
    make(path)
    path.chmod(0o600)
    answer = as_user(OTHER, tmp_path, "tasks", "--db", str(path))
    assert (answer.status, answer.out, len(answer.err.splitlines())) == (2, "", 1)
    assert "no such database" not in answer.err
    others.chmod(0o700)
    answer = as_user(OTHER, tmp_path, "tasks", "--db", str(path))
    assert (answer.status, answer.out, len(answer.err.splitlines())) == (2, "", 1)


def test_reader_without_the_right_to_write_sees_what_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data" / "x.db"
    make(path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # as on a mount that is read-only to this one
    with TaskRunHistory.connect(f"sqlite:///{path}", read_only=True) as reader:
        for number in (1, 2, 3):
            assert [run.attempt for run in reader.tasks()] == [number]
            with TaskRunHistory.connect(f"sqlite:///{path}") as writer:
                writer.open_run("job")


def test_reader_does_not_make_the_file_of_a_uri(shell: Shell, tmp_path: Path) -> None:
    answer = shell("tasks", "--db", f"sqlite:///file:{tmp_path}/x.db?uri=true")
    assert (answer.status, answer.out, len(answer.err.splitlines())) == (2, "", 1)
    assert not (tmp_path / "x.db").exists()
