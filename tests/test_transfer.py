"""`taskruns export` and `taskruns import`: what goes out comes in again, equal, and what cannot is told and kept."""

import csv
import errno
import io
import json
import os
import pty
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from commands import Home, Shell
from hypothesis import given, strategies as st
from servers import KINDS, Databases, available

from taskruns import TaskPhase, TaskRun, TaskRunHistory, bulk
from taskruns.cli import loading, transfer
from taskruns.model import MAX_ATTEMPT, MAX_TOLD_ATTEMPT, clean_error

FROM = datetime(2026, 3, 1, 2, 15, 0, 123456, tzinfo=UTC)
ERRORS = [
    r"\N",
    "\\",
    "a\tb\nc\rd\\n",
    "\\.",
    "quo\"ted, 'too'",
    "é 漢 \U0001f600",
    "\x01\x1f\x7f\x85\u2028",
    " padded ",
]


def runs_of(task: str, count: int = 5) -> list[TaskRun]:
    return [
        TaskRun(
            task,
            attempt,
            TaskPhase.SUCCEEDED,
            FROM + timedelta(minutes=attempt),
            FROM + timedelta(minutes=attempt, milliseconds=1500),
            exit_code=0,
            source="there",
        )
        for attempt in range(1, count + 1)
    ]


def every_kind() -> list[TaskRun]:
    """Runs that differ in every field."""
    first = runs_of("job", 1)[0]
    failed = replace(first, task_id="errors", phase=TaskPhase.FAILED, exit_code=None)
    return [
        first,
        TaskRun.starting("job", 2, started_at=FROM),
        replace(first, attempt=3, recovered=True, start_inferred=True, source=None, exit_code=-(2**31)),
        replace(first, attempt=MAX_TOLD_ATTEMPT, submission="a,b", source_attempt=MAX_ATTEMPT),
        replace(first, task_id="\\N", source='"', submission="\\t", source_attempt=0),
        replace(first, task_id="tâche, 漢", finished_at=datetime.max.replace(tzinfo=UTC)),
        *(replace(failed, attempt=number, error=error) for number, error in enumerate(ERRORS, 1)),
        *(
            replace(failed, task_id="phases", attempt=number, phase=phase)
            for number, phase in enumerate([TaskPhase.TIMEOUT, TaskPhase.CANCELED, TaskPhase.EXHAUSTED], 1)
        ),
    ]


def stored(url: str) -> list[TaskRun]:
    with TaskRunHistory.connect(url) as history:
        return list(history.all_runs())


def store(url: str, runs: list[TaskRun]) -> None:
    with TaskRunHistory.connect(url) as history:
        history.prepare()
        assert history.add_runs(runs).added == len(runs)


def wire_lines(runs: list[TaskRun]) -> str:
    return "".join(json.dumps(run.to_wire()) + "\n" for run in runs)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture
def shell(home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(home, monkeypatch, capsys)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "runs.jsonl"


@pytest.mark.parametrize("target", KINDS)
def test_runs_are_equal_in_another_database(
    shell: Shell, database: str, target: str, databases: Databases, file: Path
) -> None:
    runs = every_kind()
    store(database, runs)
    assert shell("export", "--db", database, "--output", str(file)).status == 0
    exported = stored(database)
    assert exported == sorted(runs, key=lambda run: (run.task_id, run.attempt))
    other = databases.migrated(available(target, databases))  # on a server the same one, which is emptied by that
    answer = shell("import", "--db", other, str(file))
    assert (answer.status, answer.out, answer.err) == (0, "", f"taskruns: {len(runs)} runs added\n")
    assert stored(other) == exported


def test_export_is_in_order_and_readable(shell: Shell, database: str) -> None:
    store(database, [*runs_of("b", 2), *runs_of("a", 2)])
    answer = shell("export", "--db", database)
    assert (answer.status, answer.err) == (0, "")
    wires = [json.loads(line) for line in answer.out.splitlines()]
    assert [(wire["taskId"], wire["attempt"]) for wire in wires] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert wires[0] == runs_of("a")[0].to_wire()


def test_export_of_one_task(shell: Shell, database: str) -> None:
    store(database, [*runs_of("b", 2), *runs_of("a", 2)])
    answer = shell("export", "--db", database, "--task", "a")
    assert answer.out == shell("export", "--db", database).out[: len(answer.out)]
    assert answer.out.count("\n") == 2
    answer = shell("export", "--db", database, "--task", "c")
    assert (answer.status, answer.out, answer.err) == (1, "", "taskruns: no run of c\n")


def test_csv_has_every_field(shell: Shell, sqlite: str) -> None:
    runs = [run for run in every_kind() if run.error is None or "\x85" not in run.error]
    store(sqlite, runs)
    answer = shell("export", "--csv", "--db", sqlite)
    assert "\r\n" not in answer.out
    header, *rows = csv.reader(io.StringIO(answer.out, newline=""), strict=True)
    assert header[:7] == ["taskId", "attempt", "phase", "startedAt", "finishedAt", "durationMs", "error"]
    assert header[7:] == ["exitCode", "recovered", "startInferred", "source", "submission", "sourceAttempt"]
    assert len(rows) == len(runs)
    for row, run in zip(rows, stored(sqlite), strict=True):
        wire = {"recovered": False, "startInferred": False} | run.to_wire()
        texts = {True: "true", False: "false"}
        expected = [wire.get(key) for key in header]
        assert row == ["" if v is None else texts[v] if isinstance(v, bool) else str(v) for v in expected]


def test_csv_of_nothing_has_a_header(shell: Shell, sqlite: str) -> None:
    assert shell("export", "--csv", "--db", sqlite).out.startswith("taskId,attempt,phase,")
    assert shell("export", "--db", sqlite).out == ""


def test_output_is_private_and_replaces_what_was_there(shell: Shell, sqlite: str, tmp_path: Path, file: Path) -> None:
    store(sqlite, runs_of("a"))
    file.write_text("old")
    file.chmod(0o644)
    link = tmp_path / "link"
    link.symlink_to(file)
    answer = shell("export", "--db", sqlite, "--output", str(link))
    assert (answer.status, answer.out, answer.err) == (0, "", "")
    assert link.is_symlink()
    assert file.read_text() == wire_lines(runs_of("a")).replace(": ", ":").replace(", ", ",")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir() if ".part" in path.name] == []


def test_output_that_cannot_be_completed_leaves_the_old(
    shell: Shell, sqlite: str, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(sqlite, runs_of("a"))
    file.write_text("old")

    def fail(_run: TaskRun) -> str:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(transfer, "_json_line", fail)
    answer = shell("export", "--db", sqlite, "--output", str(file))
    assert (answer.status, answer.err) == (2, f"taskruns: {file} cannot be written: no space left\n")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if ".part" in path.name] == []


def test_output_may_be_a_device(home: Home, sqlite: str) -> None:
    store(sqlite, runs_of("a", 1))
    assert home.taskruns("export", "--db", sqlite, "--output", "/dev/null").returncode == 0
    assert Path("/dev/null").is_char_device()
    assert home.taskruns("export", "--db", sqlite, "--output", "-").stdout.count("\n") == 1


def test_export_ends_quietly_when_nobody_reads(home: Home, sqlite: str) -> None:
    store(sqlite, runs_of("a", 2000))
    command = f"{home.program} export --db {sqlite} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=home.environment, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[1] == "141"


def test_import_of_the_same_file_again_adds_nothing(shell: Shell, database: str, file: Path) -> None:
    file.write_text(wire_lines(runs_of("a")))
    assert shell("import", "--db", database, str(file)).err == "taskruns: 5 runs added\n"
    answer = shell("import", "--db", database, str(file))
    assert (answer.status, answer.err) == (0, "taskruns: 0 runs added, 5 were there already\n")
    assert stored(database) == runs_of("a")


def test_what_is_not_the_same_is_rejected_and_kept_as_it_is(
    shell: Shell, database: str, tmp_path: Path, file: Path
) -> None:
    runs = runs_of("a")
    store(database, runs[:2])
    other = json.dumps(replace(runs[1], exit_code=5).to_wire() | {"unknown": "kept"}) + "   "
    lines = ["\n", wire_lines(runs[:1]), f"{other}\r\n", wire_lines(runs[2:]), " \t\n", "nonsense"]
    file.write_bytes("".join(lines).encode())
    rejects = tmp_path / "rejects"
    answer = shell("import", "--db", database, "--rejects", str(rejects), str(file))
    assert answer.status == 1
    assert answer.err.splitlines() == [
        "taskruns: line 3: attempt 2 of task 'a' exists already, and is not the same",
        "taskruns: line 8: not JSON: Expecting value at character 1",
        "taskruns: 3 runs added, 1 was there already, 2 lines rejected",
    ]
    assert rejects.read_bytes().decode() == f"{other}\r\nnonsense\n"
    assert stat.S_IMODE(rejects.stat().st_mode) == 0o600
    assert stored(database) == runs


def test_rejects_are_added_to_a_file(shell: Shell, sqlite: str, tmp_path: Path, file: Path) -> None:
    rejects = tmp_path / "rejects"
    rejects.write_text("torn")
    file.write_text("[]\n")
    assert shell("import", "--db", sqlite, "--rejects", str(rejects), str(file)).status == 1
    assert shell("import", "--db", sqlite, "--rejects", str(rejects), str(file)).status == 1
    assert rejects.read_text() == "torn\n[]\n[]\n"


GOOD = runs_of("good", 1)[0].to_wire()
DEEP = 200_000


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON: Expecting property name enclosed in double quotes at character "),
        (b"\xff{}", "not UTF-8: invalid start byte at byte 1"),
        ("{}".encode("utf-16"), "not UTF-8: invalid start byte at byte 1"),
        (b"\0", "not JSON: Expecting value at character 1"),
        (b"1", "a run is a JSON object, not 1"),
        (b"null", "a run is a JSON object, not None"),
        (b"{}", "the run lacks taskId, attempt, phase, startedAt"),
        (json.dumps(GOOD).encode() + b"{}", "not JSON: Extra data at character "),
        (b"[" * DEEP + b"]" * DEEP, "not JSON: nested too deeply"),
        (b'{"a":' * DEEP + b"1" + b"}" * DEEP, "not JSON: nested too deeply"),
        (json.dumps(GOOD | {"x": float("nan")}).encode(), "not JSON: NaN"),
        (json.dumps(GOOD | {"x": float("-inf")}).encode(), "not JSON: -Infinity"),
        (json.dumps(GOOD | {"attempt": 10**30}).encode(), "attempt must be 1 to 4294967295, not 1000"),
        (b'{"attempt": ' + b"9" * 100_000 + b"}", "Exceeds the limit"),
        (json.dumps(GOOD | {"attempt": 2**31 + 1}).encode(), "attempt must be at most 2147483648, not 2147483649"),
        (json.dumps(GOOD | {"attempt": 1.0}).encode(), "attempt is a whole number, not float"),
        (json.dumps(GOOD | {"attempt": 1e400}).encode(), "not JSON: Infinity"),
        (json.dumps(GOOD | {"phase": "pending"}).encode(), "a run is running or has ended, it is never pending"),
        (json.dumps(GOOD | {"phase": []}).encode(), "no such phase: []"),
        (json.dumps(GOOD | {"startedAt": "yesterday"}).encode(), "startedAt is not an RFC 3339 time"),
        (json.dumps(GOOD | {"startedAt": 10**400}).encode(), "startedAt is out of range"),
        (json.dumps(GOOD | {"startedAt": 17}).encode(), "startedAt must be in milliseconds"),
        (json.dumps(GOOD | {"finishedAt": "2020-01-01T00:00:00Z"}).encode(), "finished_at is before started_at"),
        (json.dumps(GOOD | {"error": "x"}).encode(), "a succeeded run has no error"),
        (json.dumps(GOOD | {"exitCode": 2**31}).encode(), "exit_code must be"),
        (json.dumps(GOOD | {"taskId": "x" * 256}).encode(), "a task id has 1 to 255 characters"),
        (json.dumps(GOOD | {"taskId": "\ud800"}).encode(), "a task id has no control characters and is valid Unicode"),
        (json.dumps(GOOD | {"taskId": "\x1b[31m"}).encode(), "a task id has no control characters"),
        (json.dumps(GOOD | {"source": 5}).encode(), "a source is a string, not int"),
        (json.dumps(GOOD | {"recovered": "yes"}).encode(), "recovered must be true or false"),
        (json.dumps({"taskId": "\u202e", "startedAt": "\x1b"}).encode(), "the run lacks attempt, phase"),
    ],
)
def test_lines_that_are_no_run(shell: Shell, sqlite: str, file: Path, line: bytes, reason: str) -> None:
    file.write_bytes(line.replace(b"1e400", b"1e999") + b"\n" + json.dumps(GOOD).encode())
    answer = shell("import", "--db", sqlite, str(file))
    assert answer.status == 1
    complaint, *others = answer.err.splitlines()
    assert complaint.startswith(f"taskruns: line 1: {reason}")
    assert len(complaint) < 400
    assert complaint.isprintable()
    assert others == ["taskruns: 1 run added, 1 line rejected"]


def test_long_lines(shell: Shell, sqlite: str, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "MAX_LINE", 2**20)
    runs = runs_of("a", 3)
    long = json.dumps(runs[0].to_wire() | {"more": "x" * 900_000})
    too_long = "x" * 2_500_000
    file.write_text(f"{long}\n{too_long}\n{wire_lines(runs[1:2])}{too_long}\n{wire_lines(runs[2:])}{too_long}")
    rejects = tmp_path / "rejects"
    answer = shell("import", "--db", sqlite, str(file), "--rejects", str(rejects))
    assert answer.err.splitlines() == [
        "taskruns: line 2: longer than 1 MiB",
        "taskruns: line 4: longer than 1 MiB",
        "taskruns: line 6: longer than 1 MiB",
        "taskruns: 3 runs added, 3 lines rejected",
    ]
    assert rejects.read_text() == f"{too_long}\n" * 3
    assert stored(sqlite) == runs


def test_import_makes_an_sqlite_database_and_reads_standard_input(home: Home) -> None:
    done = home.taskruns("import", "--yes", "-", input=wire_lines(runs_of("a")))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "taskruns: 5 runs added\n")
    assert stored(home.database) == runs_of("a")


def test_import_does_not_make_tables_on_a_server(shell: Shell, databases: Databases, file: Path) -> None:
    file.write_text(wire_lines(runs_of("a")))
    answer = shell("import", "--db", databases.empty(available("postgresql", databases)), str(file))
    assert answer.status == 2
    assert answer.err.count("\n") == 1
    assert "run `taskruns db upgrade`" in answer.err


def test_what_cannot_be_opened(shell: Shell, home: Home, sqlite: str, tmp_path: Path, file: Path) -> None:
    file.write_text(wire_lines(runs_of("a")))
    missing = tmp_path / "missing"
    for arguments, complaint in [
        (("import", str(missing)), f"{missing}: No such file or directory"),
        (("import", str(tmp_path)), f"{tmp_path}: Is a directory"),
        (("import", str(file), "--rejects", str(tmp_path)), "Is a directory"),
        (("export", "--output", str(tmp_path)), f"--output: {tmp_path} is a directory"),
        (("export", "--output", str(missing / "file")), f"--output: there is no directory {missing}"),
        (("export", "--task", " "), "white space"),
        (("import",), "Missing argument"),
    ]:
        answer = shell(*arguments, "--db", sqlite)
        assert answer.status == 2, arguments
        assert complaint in answer.err
        assert answer.err.count("\n") == 1
    assert not missing.exists()
    answer = shell("export", "--db", str(missing))
    assert (answer.status, answer.err) == (2, f"taskruns: no such database: {missing} (named by --db)\n")
    closed = f"{home.program} import - --db {sqlite} <&-"
    done = subprocess.run(["sh", "-c", closed], capture_output=True, text=True, env=home.environment, check=False)
    assert (done.returncode, done.stderr) == (2, "taskruns: standard input is closed\n")
    assert stored(sqlite) == []


def test_a_small_chunk_at_a_time(shell: Shell, database: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_CHUNK", 3)
    monkeypatch.setattr(transfer, "_SQLITE_CHUNK", 3)
    monkeypatch.setattr(transfer, "_CHUNK_BYTES", 1000)
    runs = runs_of("a", 20)
    file.write_text(wire_lines(runs + runs[::-1]))
    assert shell("import", "--db", database, str(file)).err == "taskruns: 20 runs added, 20 were there already\n"
    assert stored(database) == runs


def on_a_terminal(home: Home, *arguments: str) -> str:
    """Return what the command prints on a terminal, where its standard error is."""
    master, slave = pty.openpty()
    process = home.start(*arguments, stderr=slave, stdout=subprocess.PIPE)
    os.close(slave)
    seen = b""
    try:
        while piece := os.read(master, 65536):
            seen += piece
    except OSError:  # how a terminal ends
        pass
    finally:
        os.close(master)
        process.communicate()
    assert process.returncode in (0, 1)
    return seen.decode()


def test_there_is_a_bar_on_a_terminal(home: Home, sqlite: str, tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    file.write_text("nonsense\n" + wire_lines(runs_of("a", 50)))
    seen = on_a_terminal(home, "import", str(file), "--db", sqlite)
    assert "50 runs" in seen
    assert "line 1: not JSON" in seen
    assert "taskruns: 50 runs added, 1 line rejected" in seen
    assert "50 runs" in on_a_terminal(home, "export", "--db", sqlite)


def test_killed_on_the_way_and_started_again(home: Home, database: str, tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    runs = runs_of("a", 30_000 if database.startswith("sqlite") else 9_000)  # more than one transaction
    file.write_text(wire_lines(runs))
    process = home.start("import", str(file), "--db", database, stderr=subprocess.DEVNULL)
    with TaskRunHistory.connect(database) as history:
        while history.last_run("a") is None:
            assert process.poll() is None
            time.sleep(0.01)
    process.kill()
    process.wait()
    done = home.taskruns("import", str(file), "--db", database)
    assert done.returncode == 0
    added, there = (int(word) for word in done.stderr.split() if word.isdecimal())
    assert added + there == len(runs)
    assert there > 0
    assert stored(database) == runs


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_stopped_on_the_way(home: Home, sqlite: str, number: int, status: int) -> None:
    process = home.start("import", "-", "--db", sqlite, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(wire_lines(runs_of("a", 30_000)).encode())  # type: ignore[arg-type]  # bytes
    process.stdin.flush()
    with TaskRunHistory.connect(sqlite) as history:
        while history.last_run("a") is None:
            time.sleep(0.01)
    process.send_signal(number)
    _, complaints = process.communicate()
    assert process.returncode == status
    assert b"Traceback" not in complaints  # type: ignore[operator]  # bytes
    assert len(stored(sqlite)) % transfer._SQLITE_CHUNK == 0


def test_processes_share_the_work(
    shell: Shell, database: str, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_CHUNK", 50)
    monkeypatch.setattr(transfer, "_SQLITE_CHUNK", 50)
    monkeypatch.setattr(loading, "_processes", lambda _url: 3)
    runs = runs_of("a", 1000)
    other = replace(runs[700], exit_code=3)
    file.write_text(wire_lines([*runs, other, *runs[::-1]]) + "nonsense")
    rejects = tmp_path / "rejects"
    answer = shell("import", "--db", database, str(file), "--rejects", str(rejects))
    assert answer.err.splitlines()[-1] == "taskruns: 1000 runs added, 1000 were there already, 2 lines rejected"
    assert sorted(answer.err.splitlines()[:-1]) == [
        "taskruns: line 1001: attempt 701 of task 'a' exists already, and is not the same",
        "taskruns: line 2002: not JSON: Expecting value at character 1",
    ]
    assert sorted(rejects.read_text().splitlines()) == sorted(["nonsense", wire_lines([other]).strip()])
    assert stored(database) == runs


def test_an_error_in_a_process_is_told_in_a_line(
    shell: Shell, databases: Databases, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_CHUNK", 50)
    monkeypatch.setattr(transfer, "_SQLITE_CHUNK", 50)
    monkeypatch.setattr(loading, "_processes", lambda _url: 2)
    url = databases.empty(available("postgresql", databases))
    with TaskRunHistory.connect(url) as history:
        history.upgrade()
        with history.begin() as repository:
            repository._connection.exec_driver_sql("ALTER TABLE task_runs ADD CHECK (attempt < 500)")
    file.write_text(wire_lines(runs_of("a", 1000)))
    answer = shell("import", "--db", url, str(file))
    assert answer.status == 2
    summary, complaint = answer.err.splitlines()
    assert summary.endswith("runs added")
    assert complaint.startswith("taskruns: the database cannot be used: ")


def test_a_process_that_dies_is_noticed(shell: Shell, sqlite: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_CHUNK", 50)
    monkeypatch.setattr(transfer, "_SQLITE_CHUNK", 50)
    monkeypatch.setattr(loading, "_processes", lambda _url: 2)
    monkeypatch.setattr(loading, "_work", os._exit)
    file.write_text(wire_lines(runs_of("a", 1000)))
    answer = shell("import", "--db", sqlite, str(file))
    assert answer.status == 2
    assert answer.err.splitlines()[-1] == "taskruns: a process that stores runs has ended unexpectedly"


names = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=30).filter(
    lambda t: t == t.strip()
)
times = st.datetimes(timezones=st.just(UTC))
numbers = st.integers(0, MAX_ATTEMPT)


@st.composite
def any_run(draw: Any) -> TaskRun:
    phase = draw(st.sampled_from([phase for phase in TaskPhase if phase is not TaskPhase.PENDING]))
    moments = sorted([draw(times), draw(times)])
    failed = phase not in (TaskPhase.RUNNING, TaskPhase.SUCCEEDED)
    return TaskRun(
        draw(names),
        draw(st.integers(1, MAX_TOLD_ATTEMPT)),
        phase,
        moments[0],
        None if phase is TaskPhase.RUNNING else moments[1],
        clean_error(draw(st.none() | st.text())) if failed else None,
        draw(st.none() | st.integers(-(2**31), 2**31 - 1)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.none() | names),
        draw(st.none() | names),
        draw(st.none() | numbers),
    )


@given(any_run())
def test_any_run_comes_back_from_its_line(run: TaskRun) -> None:
    line = transfer._json_line(run).encode()
    assert line.count(b"\n") == 1
    assert loading.row_of_line(line) == bulk.row_of(run)
    assert TaskRun.from_wire(json.loads(line)) == run


TIMES = ["2026-03-01T02:15:00Z", "2026-03-01T02:15:00.000001+01:00", "2026-03-01T02:15:00.123456Z", 1772331300000]
TIMES += ["2026-02-30T02:15:00.123456Z", "2026-03-01t02:15:00.123456z", "2026-03-01T25:15:00.123456Z"]
TIMES += ["9999-12-31T23:59:59.999999Z", "\uff12026-03-01T02:15:00.123456Z", "2026-W10-1T02:15:00.123456Z"]
VALUES: list[Any] = [None, True, False, 0, 1, -1, 2**31, 2**32, 1.0, [], {}, "", "a", " a", "é", "\ud800", "x" * 256]
PHASES = ["failed", "succeeded", "running", "pending", "Failed"]


@given(
    any_run(),
    st.dictionaries(
        st.sampled_from([*transfer._CSV, "unknown"]), st.sampled_from([*TIMES, *VALUES, *PHASES]), max_size=3
    ),
)
def test_the_quick_way_reads_what_the_plain_one_does(run: TaskRun, changes: dict[str, Any]) -> None:
    wire = run.to_wire() | changes

    def outcome(read: Callable[[dict[str, Any]], Any]) -> Any:
        try:
            return read(wire)
        except (ValueError, TypeError) as error:
            return type(error)

    quick, plain = outcome(bulk.row_from_wire), outcome(lambda wire: bulk.row_of(TaskRun.from_wire(wire)))
    assert quick == plain or (isinstance(quick, type) and isinstance(plain, type))  # of several faults either is told


@given(any_run())
def test_any_run_comes_back_from_its_csv(run: TaskRun) -> None:
    (row,) = csv.reader(io.StringIO(transfer._csv_line(run), newline=""), strict=True)
    assert len(row) == 13
    assert (row[0], row[1], row[6] or None) == (run.task_id, str(run.attempt), run.error)


def million() -> Iterator[TaskRun]:
    """Runs of a thousand tasks over the same days."""
    for number in range(1_000_000):
        task, attempt = divmod(number, 1000)
        started_at = FROM + timedelta(minutes=attempt, seconds=task / 17)
        failed = number % 10 == 0
        yield TaskRun(
            f"job {task:04}",
            attempt + 1,
            TaskPhase.FAILED if failed else TaskPhase.SUCCEEDED,
            started_at,
            started_at + timedelta(microseconds=number),
            error="went wrong\n\tat \\N" if failed else None,
            exit_code=int(failed),
            source="there",
        )


def memory(pid: int) -> float:
    """The memory of a process and its children in MB, what they share counted once."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        own = Path(f"/proc/{pid}/smaps_rollup").read_text().partition("Pss:")[2].split()[0]
    except OSError:
        return 0
    return int(own) / 1024 + sum(memory(int(child)) for child in children)


def measured(*arguments: str) -> str:
    """Run a command and return its seconds and the most memory it had, after a quarter of them and in all."""
    begun = time.monotonic()
    process = subprocess.Popen([Home.program, *arguments])
    seen = []
    while process.poll() is None:
        seen.append(memory(process.pid))
        time.sleep(0.1)
    assert process.returncode == 0
    early, most = max(seen[: len(seen) // 4]), max(seen)
    assert most < 300
    assert most < 1.5 * early
    return f"{time.monotonic() - begun:.1f} s, {early:.0f} MB in its first quarter, {most:.0f} MB at most"


@pytest.mark.soak
def test_a_million_runs_move_from_one_database_to_another(
    tmp_path: Path, databases: Databases, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first.jsonl"
    with first.open("w") as file:
        file.writelines(transfer._json_line(run) for run in million())
    for kind in KINDS:
        url = databases.migrated(available(kind, databases))
        again = tmp_path / f"{kind}.jsonl"
        imported = measured("import", "--db", url, str(first))
        exported = measured("export", "--db", url, "--output", str(again))
        with capsys.disabled():
            print(f"\n1,000,000 runs, {kind}: import {imported}; export {exported}")
        assert subprocess.run(["cmp", first, again], check=False).returncode == 0
        again.unlink()
