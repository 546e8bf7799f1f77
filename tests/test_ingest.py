"""`taskruns ingest` as its user meets it: files, pipes, signals, bad lines, bad databases and kills."""

import contextlib
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

import pytest
from commands import Home, Shell
from servers import Databases, available, wait_for
from sqlalchemy import create_engine, make_url
from test_retries import cut

from taskruns import TaskRun, TaskRunHistory

FROM = datetime(2026, 3, 1, 2, tzinfo=UTC)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture
def shell(home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Shell]:
    handled = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield Shell(home, monkeypatch, capsys)
    for number, handler in handled.items():
        signal.signal(number, handler)


def start(seconds: float, task: str = "job", attempt: Any = 1, **more: Any) -> dict[str, Any]:
    at = (FROM + timedelta(seconds=seconds)).isoformat()
    return {"kind": "TaskStarting", "task": task, "attempt": attempt, "at": at, **more}


def stop(seconds: float, task: str = "job", attempt: Any = 1, **more: Any) -> dict[str, Any]:
    return start(seconds, task, attempt, **{"kind": "TaskStopped", **more})


def encoded(*events: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)


def many(count: int, tasks: int = 7) -> list[dict[str, Any]]:
    """Return the events of runs that start and end in turn; every fifth fails, every eleventh end is lost."""
    told: list[dict[str, Any]] = []
    number = 0
    while len(told) < count:
        task, attempt = f"task {number % tasks}", number // tasks + 1
        told.append(start(number, task, attempt))
        if number % 11:
            kind = "TaskStopped" if number % 5 else "TaskFailed"
            told.append(stop(number + 0.5, task, attempt, kind=kind, reason=f"reason {number}"))
        number += 1
    return told[:count]


def all_runs(database: str) -> list[TaskRun]:
    with TaskRunHistory.connect(database, read_only=True) as history:
        return sorted(history.all_runs(), key=lambda run: (run.task_id, run.attempt))


def facts(database: str, task: str = "job") -> list[tuple[int, str]]:
    return [(run.attempt, run.phase.value) for run in all_runs(database) if run.task_id == task]


class Ingest:
    """A running `taskruns ingest` that reads from a pipe."""

    def __init__(self, home: Home, database: str, *arguments: str, **options: Any) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        self.process = home.start("ingest", "--db", database, *arguments, **pipes)
        self.input: IO[bytes] = self._pipe(self.process.stdin)

    @staticmethod
    def _pipe(pipe: Any) -> IO[bytes]:
        assert pipe is not None
        return pipe  # type: ignore[no-any-return]  # a pipe was asked for

    def tell(self, *events: dict[str, Any]) -> None:
        self.input.write(encoded(*events))
        self.input.flush()

    def acknowledged(self) -> Any:
        """Wait for one acknowledgement."""
        return json.loads(self._pipe(self.process.stdout).readline())["ack"]

    def complaint(self) -> str:
        """Wait for one line on standard error."""
        return str(self._pipe(self.process.stderr).readline().decode())

    def unread(self) -> bytes:
        """Return what it has printed since."""
        return self._pipe(self.process.stdout).read()

    def wait(self) -> tuple[int, str]:
        """Wait for its end; return its status and what it complained of. What it prints must be little, or read."""
        self.input.close()
        errors = self._pipe(self.process.stderr).read().decode()
        return self.process.wait(60), errors

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        errors = self._pipe(self.process.stderr).read().decode()  # while the pipe stays open
        return self.process.wait(60), errors

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@pytest.fixture
def ingest(home: Home) -> Iterator[Callable[..., Ingest]]:
    running: list[Ingest] = []

    def begin(database: str, *arguments: str, **options: Any) -> Ingest:
        running.append(Ingest(home, database, *arguments, **options))
        return running[-1]

    yield begin
    for one in running:
        one.kill()


def written(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def test_file_is_recorded(shell: Shell, database: str, tmp_path: Path) -> None:
    path = written(tmp_path / "events", encoded(start(0), stop(1, exitCode=0), start(2, attempt=2)))
    answer = shell("ingest", "--db", database, path)
    assert (answer.status, answer.out) == (0, "")
    assert facts(database) == [(1, "succeeded"), (2, "running")]
    [first, _] = all_runs(database)
    assert first.source == socket.gethostname()
    again = all_runs(database)
    assert shell("ingest", "--db", database, path).status == 0
    assert all_runs(database) == again


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.rstrip(b"\n"),
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: b"\n \n\r\n" + text.replace(b"\n", b"\n\n\t\n"),
    ],
    ids=["no final newline", "CRLF", "BOM", "blank lines"],
)
def test_lines_may_be_written_in_any_way(
    shell: Shell, sqlite: str, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    path = written(tmp_path / "events", change(encoded(start(0), stop(1))))
    answer = shell("ingest", "--db", sqlite, path)
    assert answer.status == 0, answer.err
    assert facts(sqlite) == [(1, "succeeded")]


@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf"])
def test_nothing_is_fine(shell: Shell, sqlite: str, tmp_path: Path, content: bytes) -> None:
    assert shell("ingest", "--db", sqlite, written(tmp_path / "events", content)).status == 0
    assert all_runs(sqlite) == []


def test_sqlite_database_is_made(shell: Shell, home: Home, tmp_path: Path) -> None:
    assert shell("ingest", written(tmp_path / "events", encoded(start(0)))).status == 0
    assert facts(home.database) == [(1, "running")]


def test_event_without_time_happened_now(shell: Shell, sqlite: str, tmp_path: Path) -> None:
    event = {"kind": "AttemptStarting", "taskId": "job", "attempt": 1}
    before = datetime.now(UTC)
    assert shell("ingest", "--db", sqlite, written(tmp_path / "events", encoded(event))).status == 0
    [run] = all_runs(sqlite)
    assert before <= run.started_at <= datetime.now(UTC)


def bad(**changes: Any) -> bytes:
    return encoded(stop(5, "bad") | changes)


LACKING = {key: value for key, value in stop(5).items() if key != "task"}
BAD_LINES = {
    "no JSON": b"nonsense\n",
    "half a line": b'{"kind": "TaskStarting"\n',
    "two objects": encoded(start(5, "bad"))[:-1] + encoded(start(6, "bad")),
    "list": b"[]\n",
    "string": b'"TaskStarting"\n',
    "null": b"null\n",
    "number": b"17\n",
    "empty object": b"{}\n",
    "no task": encoded(LACKING),
    "empty task": bad(task=""),
    "number as task": bad(task=5),
    "space around task": bad(task=" bad"),
    "long task": bad(task="b" * 256),
    "NUL in task": bad(task="b\0d"),
    "lone surrogate in task": bad(task="b\ud800d"),
    "kind a number": bad(kind=1),
    "attempt 0": bad(attempt=0),
    "attempt -1": bad(attempt=-1),
    "attempt past 2**31": bad(attempt=2**31 + 1),
    "attempt a string": bad(attempt="1"),
    "attempt true": bad(attempt=True),
    "attempt 1.5": bad(attempt=1.5),
    "attempt huge": bad(attempt=10**400),
    "attempt of 5000 digits": bad(attempt=1).replace(b'"attempt": 1', b'"attempt": ' + b"9" * 5000),
    "naive at": bad(at="2026-03-01T02:00:00"),
    "nonsense at": bad(at="yesterday"),
    "at in seconds": bad(at=1772330400),
    "at an object": bad(at={}),
    "at true": bad(at=True),
    "at NaN": bad(at=float("nan")),
    "at infinite": bad(at=float("inf")),
    "at past all years": bad(at=10**18),
    "exit code past i32": bad(exitCode=2**31),
    "exit code below i32": bad(exitCode=-(2**31) - 1),
    "exit code a string": bad(exitCode="1"),
    "exit code 1.5": bad(exitCode=1.5),
    "duration negative": bad(durationMs=-1),
    "duration a string": bad(durationMs="long"),
    "duration NaN": bad(durationMs=float("nan")),
    "duration beyond time": bad(durationMs=10**300),
    "timeout a string": bad(kind="TimeoutHit", timeoutMs="long"),
    "id an object": bad(id={}),
    "id long": bad(id="i" * 256),
    "seq an object": bad(seq={}),
    "deep": b"[" * 200_000 + b"\n",
    "deep inside": bad(more=0).replace(b'"more": 0', b'"more": ' + b"[" * 200_000 + b"]" * 200_000),
    "no UTF-8": bad(reason="?").replace(b"?", b"\xff\xfe"),
    "Latin-1": bad(task="?").replace(b"?", b"\xe9"),
    "UTF-16": json.dumps(start(5, "bad")).encode("utf-16") + b"\n",
}


def test_bad_lines_are_reported_and_kept_and_stop_nothing(shell: Shell, database: str, tmp_path: Path) -> None:
    content, numbers = encoded(start(0)), {}
    for number, (name, line) in enumerate(BAD_LINES.items()):
        numbers[2 * number + 2] = name
        content += line + encoded(start(number + 1, "good", number + 1))
    rejects = tmp_path / "rejects"
    answer = shell("ingest", "--db", database, "--rejects", str(rejects), written(tmp_path / "events", content))
    assert answer.status == 1
    assert "Traceback" not in answer.err
    told = {int(line.split()[2].rstrip(":")) for line in answer.err.splitlines() if line.startswith("taskruns: line ")}
    assert {numbers[number] for number in numbers.keys() - told} == set()
    assert rejects.read_bytes() == b"".join(BAD_LINES.values())
    assert all(len(line) < 1000 for line in answer.err.splitlines())
    assert {run.task_id for run in all_runs(database)} == {"job", "good"}
    assert len(all_runs(database)) == len(BAD_LINES) + 1


def test_texts_that_a_database_cannot_hold_are_changed_not_rejected(
    shell: Shell, database: str, tmp_path: Path
) -> None:
    reasons = ["a\0b", "a\ud800b", "x" * 1_000_000, "see postgresql://me:secret@host/db", "  ", "🙂"]
    events = []
    for number, reason in enumerate(reasons, 1):
        events += [start(number, attempt=number), stop(number + 0.5, attempt=number, kind="TaskFailed", reason=reason)]
    answer = shell("ingest", "--db", database, written(tmp_path / "events", encoded(*events)))
    assert answer.status == 0, answer.err
    errors = [run.error or "" for run in all_runs(database)]
    assert [run.phase.value for run in all_runs(database)] == ["failed"] * len(reasons)
    assert "\0" not in errors[0]
    assert errors[1].encode()
    assert 60_000 < len(errors[2]) < 70_000
    assert "secret" not in errors[3]
    assert errors[5] == "🙂"


def test_line_longer_than_any_event_is_rejected_as_it_is(shell: Shell, sqlite: str, tmp_path: Path) -> None:
    long = bad(reason="x" * 17 * 1024 * 1024)
    rejects = tmp_path / "rejects"
    path = written(tmp_path / "events", encoded(start(0)) + long + encoded(stop(1)))
    answer = shell("ingest", "--db", sqlite, "--rejects", str(rejects), path)
    assert answer.status == 1
    assert facts(sqlite) == [(1, "succeeded")]
    assert "line 2: " in answer.err
    assert rejects.read_bytes() == long


def test_blank_line_of_any_length_stops_nothing(shell: Shell, sqlite: str, tmp_path: Path) -> None:
    path = written(tmp_path / "events", encoded(start(0)) + b" " * 17 * 1024 * 1024 + b"\n" + encoded(stop(1)))
    assert shell("ingest", "--db", sqlite, path).status == 1
    assert facts(sqlite) == [(1, "succeeded")]


def test_rejects_are_not_kept_in_the_file_that_is_read(shell: Shell, sqlite: str, tmp_path: Path) -> None:
    path = written(tmp_path / "events", b"nonsense\n")
    for command in ("ingest", "import"):
        answer = shell(command, "--db", sqlite, "--rejects", path, path)
        assert (answer.status, len(answer.err.splitlines())) == (2, 1)
    assert Path(path).read_bytes() == b"nonsense\n"


def test_rejected_line_is_acknowledged_by_its_sequence(shell: Shell, sqlite: str, tmp_path: Path) -> None:
    wrong = encoded(start(0) | {"attempt": 0, "seq": 7001})
    path = written(tmp_path / "events", b"\n" + wrong + encoded(start(1) | {"seq": 7002}))
    assert shell("ingest", "--db", sqlite, "--ack", path).out == '{"ack": 7001}\n{"ack": 7002}\n'


def test_ignored_signal_stays_ignored(ingest: Callable[..., Ingest], sqlite: str) -> None:
    running = ingest(sqlite, "--ack", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    running.tell(start(0))
    assert running.acknowledged() == 1
    running.process.send_signal(signal.SIGHUP)
    running.tell(stop(1))
    assert running.acknowledged() == 2


def test_rejects_are_added_to_the_file(shell: Shell, sqlite: str, tmp_path: Path) -> None:
    rejects = tmp_path / "rejects"
    rejects.write_bytes(b"earlier, without an end")
    path = written(tmp_path / "events", b"nonsense\r\n{}")
    assert shell("ingest", "--db", sqlite, "--rejects", str(rejects), path).status == 1
    assert rejects.read_bytes() == b"earlier, without an end\nnonsense\r\n{}\n"


def test_numbers_up_to_2_to_the_31_are_told(shell: Shell, database: str, tmp_path: Path) -> None:
    path = written(tmp_path / "events", encoded(start(0, attempt=2**31), stop(1, attempt=2**31, exitCode=-(2**31))))
    assert shell("ingest", "--db", database, path).status == 0
    assert facts(database) == [(2**31, "succeeded")]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--source", ""), "source"),
        (("--source", " a"), "source"),
        (("--source", "s" * 256), "source"),
        (("--rejects", "/nowhere/at/all"), "/nowhere/at/all"),
        (("--rejects", "/"), "directory"),
        (("missing",), "missing"),
        (("/",), "directory"),
        (("--db", "nonsense://x"), "nonsense"),
        (("--db", "sqlite:////dev/null/runs.db"), ""),
    ],
)
def test_what_cannot_be_used_is_told_at_once(
    shell: Shell, tmp_path: Path, arguments: tuple[str, ...], what: str
) -> None:
    path = written(tmp_path / "events", encoded(start(0)))
    database = () if "--db" in arguments else ("--db", f"sqlite:///{tmp_path}/runs.db")
    answer = shell("ingest", *database, *arguments, *(() if arguments[0] in {"missing", "/"} else (path,)))
    assert answer.status == 2
    assert what in answer.err
    assert "Traceback" not in answer.err
    errors = [line for line in answer.err.splitlines() if not line.lower().startswith(("usage:", "try "))]
    assert len([line for line in errors if line.strip()]) == 1


def test_closed_standard_input_is_told(home: Home) -> None:
    done = home.taskruns("ingest", stdin=None, preexec_fn=lambda: os.close(0))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_file_that_is_no_database_is_told(shell: Shell, tmp_path: Path) -> None:
    path = written(tmp_path / "events", encoded(start(0)))
    text = written(tmp_path / "text", b"this is no database, but a text of some length\n" * 50)
    answer = shell("ingest", "--db", f"sqlite:///{text}", path)
    assert (answer.status, len(answer.err.splitlines())) == (2, 1)


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_server_without_tables_is_upgraded_by_its_owner(
    shell: Shell, databases: Databases, tmp_path: Path, kind: str
) -> None:
    empty = databases.empty(available(kind, databases))
    answer = shell("ingest", "--db", empty, written(tmp_path / "events", encoded(start(0))))
    assert answer.status == 2
    assert "taskruns db upgrade" in answer.err
    assert len(answer.err.splitlines()) == 1


def test_acknowledgements_are_the_sequence_or_the_line(shell: Shell, sqlite: str, tmp_path: Path) -> None:
    events = [start(0, seq=17), stop(1), start(2, attempt=2, seq="x1"), {"kind": "SubscriberOverflow", "seq": 0}]
    path = written(tmp_path / "events", encoded(*events) + b"\nnonsense\n" + encoded(stop(3, attempt=2)))
    answer = shell("ingest", "--ack", "--db", sqlite, path)
    assert answer.status == 1
    assert [json.loads(line) for line in answer.out.splitlines()] == [
        {"ack": 17},
        {"ack": 2},
        {"ack": "x1"},
        {"ack": 0},
        {"ack": 6},
        {"ack": 7},
    ]


def test_pause_writes_and_what_is_acknowledged_is_there(ingest: Callable[..., Ingest], database: str) -> None:
    running = ingest(database, "--ack", "--source", "pipe")
    for number in range(1, 4):
        running.tell(start(number, attempt=number))
        assert running.acknowledged() == 2 * number - 1
        assert facts(database)[-1] == (number, "running")
        running.tell(stop(number + 0.5, attempt=number))
        assert running.acknowledged() == 2 * number
        assert facts(database)[-1] == (number, "succeeded")
    assert running.wait()[0] == 0


def test_run_is_seen_while_the_pipe_stays_open_and_half_a_line_waits(
    ingest: Callable[..., Ingest], sqlite: str
) -> None:
    running = ingest(sqlite)
    text = encoded(start(0), stop(1))
    running.input.write(text[:-20])
    running.input.flush()
    wait_for(lambda: facts(sqlite) == [(1, "running")], "the run is not seen")
    running.input.write(text[-20:])
    running.input.flush()
    wait_for(lambda: facts(sqlite) == [(1, "succeeded")], "the end is not seen")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 1), (signal.SIGINT, 0), (signal.SIGHUP, 0)])
def test_signal_ends_it_with_everything_written(
    ingest: Callable[..., Ingest], sqlite: str, number: signal.Signals, status: int
) -> None:
    running = ingest(sqlite, "--ack")
    running.input.write(encoded(start(0)) + b"nonsense\n" * status)
    running.input.flush()
    assert running.acknowledged() == 1
    running.tell(*many(2000))
    assert running.acknowledged() == 2
    ended, errors = running.end(number)
    assert ended == status
    assert "Traceback" not in errors
    assert facts(sqlite) == [(1, "running")]


def test_listener_that_goes_away_stops_nothing(ingest: Callable[..., Ingest], sqlite: str) -> None:
    reader, writer = os.pipe()
    running = ingest(sqlite, "--ack", stdout=writer)
    os.close(writer)
    os.close(reader)
    running.tell(start(0))
    wait_for(lambda: facts(sqlite) == [(1, "running")], "the run is not seen")
    running.tell(stop(1))
    status, errors = running.wait()
    assert status == 0
    assert facts(sqlite) == [(1, "succeeded")]
    assert "Traceback" not in errors


def test_two_streams_share_a_task(home: Home, database: str, tmp_path: Path) -> None:
    running = []
    for name in ("a", "b"):
        events = []
        for number in range(150):
            events += [start(number, attempt=number + 1), stop(number + 0.5, attempt=number + 1)]
        path = written(tmp_path / name, encoded(*events))
        running.append(home.start("ingest", "--db", database, "--source", name, path, stderr=subprocess.PIPE))
    for process in running:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    runs = all_runs(database)
    assert [run.attempt for run in runs] == list(range(1, 301))
    for name in ("a", "b"):
        own = [run for run in runs if run.source == name]
        assert [run.source_attempt for run in own] == list(range(1, 151))
        assert {run.phase.value for run in own} == {"succeeded"}


def test_locked_database_is_waited_for(ingest: Callable[..., Ingest], sqlite: str) -> None:
    running = ingest(f"{sqlite}?timeout=0.2", "--ack")
    running.tell(start(0))
    assert running.acknowledged() == 1
    blocker = sqlite3.connect(str(make_url(sqlite).database), isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    running.tell(stop(1))
    time.sleep(1.5)
    running.tell(start(2, attempt=2))
    blocker.execute("COMMIT")
    blocker.close()
    assert [running.acknowledged(), running.acknowledged()] == [2, 3]
    status, errors = running.wait()
    assert status == 0
    assert errors.count("events are kept") <= 1
    assert facts(sqlite) == [(1, "succeeded"), (2, "running")]


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_cut_connection_loses_nothing(ingest: Callable[..., Ingest], databases: Databases, kind: str) -> None:
    database = databases.migrated(available(kind, databases))
    admin = create_engine(database, isolation_level="AUTOCOMMIT")
    running = ingest(database, "--ack")
    events = many(600)
    teller = threading.Thread(target=tell_in_pieces, args=(running, [encoded(event) for event in events], 1))
    teller.start()
    for number in range(1, len(events) + 1):
        assert running.acknowledged() == number
        if number % 200 == 0:
            cut(admin)
    teller.join()
    assert running.wait()[0] == 0
    admin.dispose()
    assert shown(all_runs(database)) == shown(clean_pass(events))


def shown(runs: list[TaskRun]) -> list[dict[str, Any]]:
    return [run.to_wire() for run in runs]


def clean_pass(events: list[dict[str, Any]]) -> list[TaskRun]:
    """Return the history that the events make, in a database that nobody disturbs."""
    from taskruns import EventRecorder

    with tempfile.TemporaryDirectory() as folder, TaskRunHistory.connect(f"sqlite:///{folder}/clean.db") as history:
        history.upgrade()
        EventRecorder(history).record_all(events)
        return list(history.all_runs())


def assert_recorded(runs: list[TaskRun], events: list[dict[str, Any]]) -> None:
    """Every event of these has left its trace."""
    found = {(run.task_id, run.attempt): run for run in runs}
    for event in events:
        run = found[event["task"], event["attempt"]]
        if event["kind"] != "TaskStarting":
            assert run.finished_at == datetime.fromisoformat(event["at"])


def test_killed_at_any_moment_and_begun_again_it_gives_the_same(ingest: Callable[..., Ingest], database: str) -> None:
    events = many(1000)
    lines = [encoded(event) for event in events]
    chance = random.Random(2)
    for _ in range(2 if database.startswith("sqlite") else 1):
        running = ingest(database, "--ack")
        threading.Thread(target=tell_in_pieces, args=(running, lines)).start()
        acknowledged = 0
        for _ in range(chance.randrange(1, len(lines))):
            acknowledged = running.acknowledged()
        running.process.kill()
        assert_recorded(all_runs(database), events[:acknowledged])
    running = ingest(database, stdout=subprocess.DEVNULL)
    running.input.write(b"".join(lines))
    assert running.wait()[0] == 0
    assert shown(all_runs(database)) == shown(clean_pass(events))


def tell_in_pieces(running: Ingest, lines: list[bytes], size: int = 50) -> None:
    try:
        for place in range(0, len(lines), size):
            running.input.write(b"".join(lines[place : place + size]))
            running.input.flush()
    except (BrokenPipeError, ValueError):
        pass  # it was killed


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_twenty_kills_in_100000_events(
    home: Home, databases: Databases, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    database = databases.migrated(available(kind, databases))
    events = many(100_000, tasks=50)
    path = written(tmp_path / "events", encoded(*events))
    clean = shown(clean_pass(events))
    chance = random.Random(20)
    seen, begun = [], time.monotonic()
    for _ in range(20):
        acks, errors = tmp_path / "acks", tmp_path / "errors"
        with acks.open("wb") as file, errors.open("wb") as complaints:
            process = home.start("ingest", "--ack", "--db", database, path, stdout=file, stderr=complaints)
        while not acks.stat().st_size:
            assert process.poll() is None, errors.read_text()
            time.sleep(0.01)
        time.sleep(chance.random() * 4)
        process.kill()
        process.wait()
        complete = [line for line in acks.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        seen.append(len(complete))
        assert_recorded(all_runs(database), events[: len(complete)])
    took = time.monotonic() - begun
    begun = time.monotonic()
    assert home.taskruns("ingest", "--db", database, path, timeout=600).returncode == 0
    with capsys.disabled():
        print(f"\n{kind}: 20 kills in {took:.0f} s, acknowledged {seen}; last pass {time.monotonic() - begun:.1f} s")
    assert shown(all_runs(database)) == clean
