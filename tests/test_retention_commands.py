"""`taskruns prune` and `forget`, and the policy that the default database keeps up by itself."""

import json
import os
import pty
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from commands import Home, Shell
from test_retention import FAILED, SECRET, active, ended, events, keys

from taskruns import TaskRun, TaskRunHistory
from taskruns.cli.discovery import Database
from taskruns.retention import EMBEDDED


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture
def shell(home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(home, monkeypatch, capsys)


def store(url: str, *runs: TaskRun) -> None:
    with TaskRunHistory.connect(url) as history:
        history.prepare()
        history.add_runs(runs)


def stored(url: str) -> list[tuple[str, int]]:
    with TaskRunHistory.connect(url) as history:
        return keys(history.all_runs())


def test_prune_command(shell: Shell, database: str) -> None:
    store(database, *(ended(task, n, 100) for task in ("a", "b") for n in range(1, 14)))
    prune = ("prune", "--db", database)
    answer = shell(*prune, "--dry-run")
    assert (answer.status, answer.out, answer.err) == (0, "6 runs would be deleted\n", "")
    assert shell(*prune, "--succeeded", "101d", "--json").out == '{"runs": 0}\n'
    assert shell(*prune, "--succeeded", "never", "--keep", "1").out == "0 runs deleted\n"
    assert shell(*prune, "--keep", "12", "--task", "a*").out == "1 run deleted\n"
    assert shell(*prune, "--json", "--compact").out == '{"runs": 5}\n'
    assert shell(*prune, "--forget-idle", "99d", "--task", "b", "--dry-run", "--json").out == '{"runs": 10}\n'
    assert stored(database) == [(task, n) for task in ("a", "b") for n in range(4, 14)]


def test_prune_takes_what_is_configured(shell: Shell, home: Home, monkeypatch: pytest.MonkeyPatch, sqlite: str) -> None:
    runs = [ended("t", n, 500) for n in range(1, 21)]
    store(sqlite, *runs)
    assert shell("prune", "--dry-run", "--db", sqlite).out == "10 runs would be deleted\n"
    configured(home, 'retention = "keep=15 forget-idle=never"\n')
    assert shell("prune", "--dry-run", "--db", sqlite).out == "5 runs would be deleted\n"
    monkeypatch.setenv("TASKRUNS_RETENTION", "off")
    assert shell("prune", "--dry-run", "--db", sqlite).out == "10 runs would be deleted\n"
    store(home.database, *runs)
    assert shell("prune", "--dry-run").out == "20 runs would be deleted\n"
    assert shell("prune", "--dry-run", "--forget-idle", "never").out == "10 runs would be deleted\n"


def test_prune_makes_no_database(shell: Shell, tmp_path: Path) -> None:
    answer = shell("prune", "--db", str(tmp_path / "no.db"))
    assert (answer.status, answer.out) == (2, "")
    assert answer.err == f"taskruns: no such database: {tmp_path}/no.db (named by --db)\n"
    (tmp_path / "empty.db").touch()
    answer = shell("prune", "--db", str(tmp_path / "empty.db"))
    assert (answer.status, answer.out) == (2, "")
    assert "no taskruns tables" in answer.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--succeeded", "soon"), "succeeded: 'soon' is not a duration"), (("--keep", "never"), "keep is a number")],
)
def test_prune_refuses_other_ages(shell: Shell, sqlite: str, arguments: tuple[str, ...], said: str) -> None:
    answer = shell("prune", "--db", sqlite, *arguments)
    assert (answer.status, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert said in answer.err


def test_forget_command(shell: Shell, database: str) -> None:
    store(database, *(ended("t", n, 1, FAILED, SECRET) for n in (1, 2, 3)), active("t", 4), ended("u", 1, 1))
    forget = ("forget", "--db", database)
    answer = shell(*forget, "t", "--error-only")
    assert (answer.status, answer.out, answer.err) == (0, "3 errors removed\n", "")
    assert shell(*forget, "t", "1", "--error-only").out == "0 errors removed\n"
    assert shell(*forget, "t", "2").out == "1 run deleted\n"
    answer = shell(*forget, "t", "2")
    assert (answer.status, answer.out, answer.err) == (1, "", "taskruns: no run of t 2\n")
    answer = shell(*forget, "v", "2")
    assert (answer.status, answer.out, answer.err) == (1, "", "taskruns: no run of v\n")
    answer = shell(*forget, "t")
    left = "taskruns: not deleted, since active: 1 run of t\n"
    assert (answer.status, answer.out, answer.err) == (1, "2 runs deleted\n", left)
    answer = shell(*forget, "t", "4")
    assert (answer.status, answer.out, answer.err) == (1, "0 runs deleted\n", left)
    assert shell(*forget, "u").status == 0
    assert stored(database) == [("t", 4)]


def configured(home: Home, text: str) -> Path:
    path = home.path / ".config" / "taskruns" / "config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_only_the_default_file_has_a_policy(
    shell: Shell, home: Home, monkeypatch: pytest.MonkeyPatch, sqlite: str
) -> None:
    assert Database.find(None).retention == EMBEDDED
    system = home.path / "etc" / "taskruns.toml"
    system.parent.mkdir()
    system.write_text('retention = "keep=3"\n')
    assert Database.find(None).retention == replace(EMBEDDED, keep=3)
    configured(home, 'retention = "keep=4"\n')
    assert Database.find(None).retention == replace(EMBEDDED, keep=4)
    monkeypatch.setenv("TASKRUNS_RETENTION", "keep=5")
    assert Database.find(None).retention == replace(EMBEDDED, keep=5)
    monkeypatch.setenv("TASKRUNS_RETENTION", "off")
    assert Database.find(None).retention is None
    monkeypatch.setenv("TASKRUNS_RETENTION", "")
    assert Database.find(None).retention == replace(EMBEDDED, keep=4)
    assert Database.find(sqlite).retention is None
    monkeypatch.setenv("TASKRUNS_DB", sqlite)
    assert Database.find(None).retention is None
    monkeypatch.delenv("TASKRUNS_DB")
    configured(home, f'db = "{sqlite}"\nretention = "keep=4"\n')
    assert Database.find(None).retention is None


@pytest.mark.parametrize(
    ("setting", "said"),
    [('"soon"', "not 'soon'"), ("30", 'retention = "succeeded=30d, keep=5"'), ('["keep=1"]', "it is a text")],
)
def test_a_policy_that_cannot_be_used_is_told(shell: Shell, home: Home, setting: str, said: str) -> None:
    path = configured(home, f"retention = {setting}\n")
    answer = shell("tasks")
    assert (answer.status, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert answer.err.startswith(f"taskruns: {path}: retention: ")
    assert said in answer.err


def test_a_command_runs_whatever_the_policy_says(home: Home) -> None:
    home.environment["TASKRUNS_RETENTION"] = "soon"
    done = home.taskruns("exec", "job", "--", "echo", "hello")
    assert (done.returncode, done.stdout) == (0, "hello\n")
    assert "TASKRUNS_RETENTION: retention: " in done.stderr


def test_ingest_keeps_the_default_database_in_bounds(home: Home) -> None:
    store(home.database, *(ended("job", n, 500) for n in range(1, 100)))
    done = home.taskruns("ingest", input="".join(json.dumps(event) + "\n" for event in events("job", 100)))
    assert done.returncode == 0
    assert len(stored(home.database)) == 100


def wire_lines(*runs: TaskRun) -> str:
    return "".join(json.dumps(run.to_wire()) + "\n" for run in runs)


def test_import_of_what_would_be_deleted_stops(shell: Shell, home: Home, tmp_path: Path, sqlite: str) -> None:
    file = tmp_path / "runs.jsonl"
    file.write_text(wire_lines(ended("young", 1, 80), ended("others", 1, 300, FAILED), ended("old", 7, 100)))
    answer = shell("import", str(file))
    assert (answer.status, answer.out) == (2, "")
    first, second = answer.err.splitlines()
    assert first == "taskruns: 0 runs added"
    assert second.startswith("taskruns: attempt 7 of old ended at ")
    assert second.endswith("(--yes adds them all the same)")
    assert stored(home.database) == []
    assert shell("import", "--yes", str(file)).err == "taskruns: 3 runs added\n"
    assert shell("import", "--db", sqlite, str(file)).err == "taskruns: 3 runs added\n"


def test_import_says_what_was_added_before(
    shell: Shell, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskruns.cli.transfer._SQLITE_CHUNK", 2)
    file = tmp_path / "runs.jsonl"
    file.write_text(wire_lines(*(ended("young", n, 80) for n in range(1, 4)), ended("old", 7, 100)))
    assert shell("import", str(file)).err.startswith("taskruns: 2 runs added\n")
    monkeypatch.setenv("TASKRUNS_RETENTION", "succeeded=101d")
    assert shell("import", str(file)).err == "taskruns: 2 runs added, 2 were there already\n"


@pytest.mark.parametrize(("answer", "status", "count"), [("y", 0, 1), ("n", 130, 0)])
def test_import_asks_a_person(home: Home, tmp_path: Path, answer: str, status: int, count: int) -> None:
    file = tmp_path / "runs.jsonl"
    file.write_text(wire_lines(ended("old", 7, 100)))
    ours, theirs = pty.openpty()
    process = home.start("import", str(file), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    while b"all the same?" not in said:
        said += os.read(ours, 1024)
    os.write(ours, f"{answer}\n".encode())
    with suppress(OSError):  # the end of a terminal
        while piece := os.read(ours, 1024):
            said += piece
    os.close(ours)
    assert process.wait(30) == status
    assert b"attempt 7 of old ended at" in said
    assert len(stored(home.database)) == count
