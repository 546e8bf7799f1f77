"""`taskruns runs`, and `export`: every filter, as it is typed."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from commands import Home, Shell

from taskruns import TaskPhase, TaskRun, TaskRunHistory

NOW = datetime.now(UTC).replace(microsecond=0)
DAY, HOUR, MINUTE = timedelta(days=1), timedelta(hours=1), timedelta(minutes=1)
NIGHT = datetime(2026, 3, 1, 2, 30, tzinfo=UTC)


def ended(task: str, attempt: int, phase: str, start: datetime, took: timedelta, **values: object) -> TaskRun:
    return TaskRun(task, attempt, TaskPhase(phase), start, start + took, **values)  # type: ignore[arg-type]  # as given


RUNS = [
    ended("backup-eu", 1, "succeeded", NIGHT, 2 * MINUTE, exit_code=0, source="web-1"),
    ended("backup-eu", 2, "failed", NIGHT + DAY, HOUR, error="disk full", exit_code=3, source="web-2"),
    ended("backup-us", 1, "timeout", NIGHT + 2 * DAY, 3 * HOUR, error="Disk Full", exit_code=124, submission="s1"),
    ended("a*b", 1, "canceled", NIGHT + 3 * DAY, MINUTE),
    ended("a*b", 2, "failed", NOW - 2 * HOUR, MINUTE, recovered=True, error="run outcome not observed"),
    TaskRun("axb", 1, TaskPhase.RUNNING, NOW - HOUR, source="web-1"),
]


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(Home(tmp_path), monkeypatch, capsys)


@pytest.fixture
def filled(sqlite: str) -> str:
    with TaskRunHistory.connect(sqlite) as history:
        history.add_runs(RUNS)
    return sqlite


CHOSEN = [
    ("", "axb1 a*b2 a*b1 backup-us1 backup-eu2 backup-eu1"),
    ("--oldest-first", "backup-eu1 backup-eu2 backup-us1 a*b1 a*b2 axb1"),
    ("backup-eu --oldest-first", "backup-eu1 backup-eu2"),
    ("--started 2026-03-01.. --longest-first", "backup-us1 backup-eu2 backup-eu1 a*b2 a*b1"),
    ("backup-eu --longest-first --limit 1", "backup-eu2"),
    ("backup-*", "backup-us1 backup-eu2 backup-eu1"),
    ("a[*]b", "a*b2 a*b1"),
    ("a?b", "axb1 a*b2 a*b1"),
    ("--phase timeout,canceled", "a*b1 backup-us1"),
    ("--problems", "a*b2 backup-us1 backup-eu2"),
    ("--problems --oldest-first", "backup-eu2 backup-us1 a*b2"),
    ("--started 2026-03-01", "backup-eu1"),
    ("--started 2026-03-01..2026-03-02", "backup-eu2 backup-eu1"),
    ("--started 2026-03-02T02:30..2026-03-03T02:30", "backup-eu2"),
    ("--started 2026-03-01T21:30..2026-03-01T22:00 --tz America/New_York", "backup-eu2"),
    ("--finished 2026-03-03", "backup-us1"),
    ("--finished ..2026-03-02T03:30", "backup-eu1"),
    ("--since 1d", "axb1 a*b2"),
    ("--since 2026-03-03", "axb1 a*b2 a*b1 backup-us1"),
    ("--min-duration 1h", "backup-us1 backup-eu2"),
    ("--max-duration 60", "a*b2 a*b1"),
    ("--exit-code 124", "backup-us1"),
    ("--source web-1", "axb1 backup-eu1"),
    ("--submission s1", "backup-us1"),
    ("--recovered", "a*b2"),
    ("--observed --problems", "backup-us1 backup-eu2"),
    ("--active", "axb1"),
    ("--ended --since 1d", "a*b2"),
    ("--error full --since 2026-01-01", "backup-eu2"),
    ("--phase failed --finished 2026-03-02 --source web-2 --min-duration 30m", "backup-eu2"),
]


@pytest.mark.parametrize(("typed", "runs"), CHOSEN)
def test_runs_are_listed_and_counted_by(shell: Shell, filled: str, typed: str, runs: str) -> None:
    answer = shell("runs", *typed.split(), "--json", "--db", filled)
    assert (answer.status, answer.err.replace("there are more", "")[:10]) in [(0, ""), (0, "taskruns: ")]
    found = [json.loads(line) for line in answer.out.splitlines()]
    assert " ".join(f"{run['taskId']}{run['attempt']}" for run in found) == runs
    if not {"--limit", "--oldest-first", "--longest-first"} & set(typed.split()):
        assert shell("runs", *typed.split(), "--count", "--db", filled).out == f"{len(runs.split())}\n"


EXPORTED = ["--problems", "--since 2026-03-03", "--task backup-*", "--task a*b", "--exit-code 3"]


@pytest.mark.parametrize("typed", EXPORTED)
def test_export_takes_the_same(shell: Shell, filled: str, typed: str) -> None:
    same = typed.replace("--task ", "").split()
    listed = shell("runs", *same, "--oldest-first", "--json", "--db", filled).out.splitlines()
    target = Path(filled.removeprefix("sqlite:///")).with_suffix(".jsonl")
    assert shell("export", *typed.split(), "--output", str(target), "--db", filled).status == 0
    assert list(map(json.loads, target.read_text().splitlines())) == list(map(json.loads, listed))


@pytest.mark.parametrize("order", ["", "--oldest-first", "--problems", "--longest-first --since 2026-01-01"])
def test_pages_follow_each_other(shell: Shell, filled: str, order: str) -> None:
    whole = shell("runs", *order.split(), "--json", "--db", filled).out.splitlines()
    found, after = [], list[str]()
    while True:
        answer = shell("runs", *order.split(), "--json", "--limit", "1", *after, "--db", filled)
        found += answer.out.splitlines()
        if not answer.err:
            break
        after = ["--after", answer.err.split("--after ")[1].strip().strip("'")]
    assert found == whole


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--oldest-first --longest-first", "exclude each other"),
        ("--longest-first", "the longest runs are found of one task or in a window of time"),
        ("--since 1d --started today", "--since and --started exclude each other"),
        ("--since 1d..2d", "--since is one time"),
        ("--started 2026-03-02..2026-03-01", "ends before it begins"),
        ("--since lastweek", "'lastweek' is not a time"),
        ("--since 2026-02-30", "2026-02-30"),
        ("--tz Europe/Berlinn", "there is no time zone 'Europe/Berlinn'"),
        ("--error full", "window"),
        ("--min-duration soon", "'soon' is not a duration"),
        ("--phase lost", "lost"),
        ("--after 5", "not a cursor"),
        ("--limit 0", "0"),
    ],
)
def test_what_cannot_be_asked_is_one_line_and_2(shell: Shell, filled: str, typed: str, message: str) -> None:
    answer = shell("runs", *typed.split(), "--db", filled)
    assert (answer.status, answer.out) == (2, "")
    assert message in answer.err
    assert len(answer.err.splitlines()) == 1


def test_times_are_shown_in_the_zone(shell: Shell, filled: str) -> None:
    answer = shell("runs", "backup-eu", "--tz", "Asia/Kolkata", "--limit", "1", "--db", filled)
    assert "STARTED (Asia/Kolkata)" in answer.out
    assert "2026-03-02 08:00:00" in answer.out


def test_problems_of_several_tasks_show_their_ends(shell: Shell, filled: str) -> None:
    lines = shell("runs", "--problems", "--started", "..2026-03-03", "--db", filled).out.splitlines()
    assert lines[0].split()[:4] == ["TASK", "ATTEMPT", "PHASE", "ENDED"]
    assert "2026-03-03 05:30:00" in lines[1]
