"""`taskruns watch`, beside commands that record."""

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

import pytest
from commands import Home, Shell
from rich.console import Console

from taskruns import TaskPhase, TaskRun, TaskRunHistory
from taskruns.cli.watch import _Lines

WITHIN = 2.0


class Watching:
    """A process that watches, and what it says."""

    def __init__(self, home: Home, *arguments: str) -> None:
        self.process = home.start("watch", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._reading = Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))

    def line(self, seconds: float = WITHIN) -> str:
        return self._lines.get(timeout=seconds)

    def says_no_more(self) -> bool:
        try:
            return self._lines.get(timeout=0.3) == ""
        except Empty:
            return True

    def complaint(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.readline()

    def stop(self, number: signal.Signals = signal.SIGINT) -> tuple[int, str]:
        self.process.send_signal(number)
        self._reading.join()
        with self.process as process:
            assert process.stderr is not None
            return process.wait(10), process.stderr.read().strip()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture
def shell(home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(home, monkeypatch, capsys)


@pytest.fixture
def history(sqlite: str) -> Iterator[TaskRunHistory]:
    """A history with an active run, so that a watch has something to say as soon as it is ready."""
    with TaskRunHistory.connect(sqlite, source="here") as found:
        found.open_run("first")
        yield found


def watching(home: Home, database: str, *arguments: str) -> Watching:
    found = Watching(home, "--db", database, "--interval", "0.1", *arguments)
    assert "first" in found.line(10)
    return found


def test_command_is_seen_to_start_and_to_end(home: Home, sqlite: str, history: TaskRunHistory) -> None:
    with_default_interval = Watching(home, "--db", sqlite)
    assert re.fullmatch(r"\S+Z  running    first 1 +\d.* s +here", with_default_interval.line(10))
    home.taskruns("exec", "--db", sqlite, "job", "--", "sh", "-c", "echo one >&2; echo disk full >&2; exit 3")
    started, ended = with_default_interval.line(), with_default_interval.line()
    when = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    assert re.fullmatch(rf"{when}  started    job 1 +\S+", started)
    assert re.fullmatch(rf"{when}  failed     job 1  +0\.\d+ s  exit 3    \S+ +disk full", ended)
    assert with_default_interval.stop() == (130, "")


def test_long_lines_are_whole_in_a_pipe(home: Home, sqlite: str, history: TaskRunHistory) -> None:
    watch = watching(home, sqlite)
    task, error = "long " * 20 + "task", "long " * 50 + "error"
    history.close_run(task, history.open_run(task).attempt, TaskPhase.FAILED, error=error)
    assert f"{task} 1 " in watch.line()
    assert watch.line().endswith(error)
    watch.stop()


def test_on_a_terminal_an_error_without_room_stands_below() -> None:
    lines, shown = _Lines(UTC), StringIO()
    lines._terminal = Console(file=shown, width=64, soft_wrap=True)
    start = datetime(2026, 11, 24, 2, 15, tzinfo=UTC)
    for error in ("disk full", "disk full " * 9):
        lines.print(TaskRun("backup", 7, TaskPhase.FAILED, start, start + timedelta(seconds=9), error))
    assert shown.getvalue().splitlines() == [
        "2026-11-24 (UTC)",
        "02:15:09  failed     backup 7     9.0 s              disk full",
        "02:15:09  failed     backup 7     9.0 s",
        "          disk full disk full disk full disk full disk full dis…",
    ]


def test_json_is_a_run_a_line(home: Home, sqlite: str, history: TaskRunHistory) -> None:
    watch = Watching(home, "--db", sqlite, "--interval", "0.1", "--json")
    assert json.loads(watch.line(10))["phase"] == "running"
    run = history.close_run("first", 1, TaskPhase.SUCCEEDED, exit_code=0)
    assert json.loads(watch.line()) == run.to_wire()
    watch.stop()


def test_only_problems_of_a_pattern(home: Home, sqlite: str) -> None:
    with TaskRunHistory.connect(sqlite) as history:
        history.open_run("b1")
        history.open_run("b ready")
        watch = Watching(home, "--db", sqlite, "--interval", "0.1", "b*", "--problems", "--tz", "Europe/Berlin")
        while watch.says_no_more():  # it has not begun yet
            history.close_run("b ready", history.open_run("b ready").attempt, TaskPhase.FAILED)
        for task in ("a", "b1", "b2", "b3"):
            attempt = 1 if task == "b1" else history.open_run(task).attempt
            phase = TaskPhase.SUCCEEDED if task == "b2" else TaskPhase.TIMEOUT
            history.close_run(task, attempt, phase)
        lines: list[str] = []
        while len(lines) < 2:
            lines += [line for line in [watch.line()] if "ready" not in line]
        assert [line.split()[1:4] for line in lines] == [["timeout", "b1", "1"], ["timeout", "b3", "1"]]
        assert all(re.match(r"\S+\+0[12]:00  ", line) for line in lines)
        assert watch.says_no_more()
    watch.stop()


def test_task_without_a_run_may_come(home: Home, sqlite: str) -> None:
    watch = Watching(home, "--db", sqlite, "new")
    assert watch.says_no_more()
    home.taskruns("exec", "--db", sqlite, "new", "--", "true")
    assert "new 1" in watch.line(10)
    watch.stop()


def test_inferred_end_says_so(home: Home, sqlite: str, history: TaskRunHistory) -> None:
    watch = watching(home, sqlite)
    process = home.start("exec", "--db", sqlite, "job", "--", "sleep", "30")
    assert "started" in watch.line(10)
    process.kill()
    process.wait()
    home.taskruns("recover", "--db", sqlite)
    assert "failed (inferred)  job 1" in watch.line()
    watch.stop()


def test_reader_that_goes_away_ends_it_at_once(home: Home, sqlite: str, history: TaskRunHistory) -> None:
    with home.start("watch", "--db", sqlite, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "first" in process.stdout.readline()
        process.stdout.close()
        assert process.wait(WITHIN) == 141
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--interval", "0.05"], "0.05 is not in the range x>=0.1"),
        (["--tz", "Mars"], "there is no time zone 'Mars'"),
        (["--phase", "lost"], "no such phase: 'lost'"),
        (["job", "job"], "unexpected extra argument"),
    ],
)
def test_wrong_use_is_one_line(shell: Shell, sqlite: str, arguments: list[str], complaint: str) -> None:
    answer = shell("watch", "--db", sqlite, *arguments)
    assert (answer.status, answer.out) == (2, "")
    assert complaint in answer.err
    assert answer.err.count("\n") == 1


def test_missing_database_is_one_line(shell: Shell, tmp_path: Path) -> None:
    answer = shell("watch", "--db", f"{tmp_path}/none.db")
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith("taskruns: no such database")
