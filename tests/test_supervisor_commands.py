"""`taskruns supervisors` and `taskruns recover`: what they print, and their status."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from commands import Home, Shell
from watchers import (
    ELSEWHERE,
    GONE,
    HERE,
    add_runs,
    known,
    lose,
    stored,
)

from taskruns import TaskRun, TaskRunHistory
from taskruns.times import rfc3339

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes cannot be told apart")


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(Home(tmp_path), monkeypatch, capsys)


@pytest.fixture
def own_database(tmp_path: Path) -> str:
    """The URL of the default database."""
    home = Home(tmp_path)
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
