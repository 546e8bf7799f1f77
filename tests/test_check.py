"""`taskruns check` and `history.check()`: whether tasks are well, and why not."""

import json
import os
import re
import signal
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from commands import Answer, Home, Shell
from sqlalchemy import NullPool, create_engine
from test_output import HOSTILE, on_terminal

from taskruns import TaskCheck, TaskPhase, TaskRun, TaskRunHistory, reading
from taskruns.checks import Rules, check
from taskruns.prepared import runs_of_rows
from taskruns.url import parse_url

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
PHASES = {
    ".": TaskPhase.SUCCEEDED,
    "F": TaskPhase.FAILED,
    "T": TaskPhase.TIMEOUT,
    "X": TaskPhase.EXHAUSTED,
    "c": TaskPhase.CANCELED,
    ">": TaskPhase.RUNNING,
}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture
def shell(home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(home, monkeypatch, capsys)


def run(
    task: str, attempt: int, mark: str, hours: int, error: str | None = None, *, now: datetime | None = None
) -> TaskRun:
    """Return a run of ten minutes that started some hours and ten minutes ago."""
    phase, started_at = PHASES[mark], (now or datetime.now(UTC)) - hours * HOUR - 10 * MINUTE
    finished_at = None if phase is TaskPhase.RUNNING else started_at + 10 * MINUTE
    return TaskRun(task, attempt, phase, started_at, finished_at, error)


def made(history: TaskRunHistory, now: datetime | None = None, **tasks: str) -> None:
    """Store a run for each mark, the newest ended an hour ago and the others an hour before each other."""
    for task, marks in tasks.items():
        history.add_runs([run(task, place + 1, mark, len(marks) - place, now=now) for place, mark in enumerate(marks)])


@pytest.mark.parametrize(
    ("marks", "rules", "reasons"),
    [
        # Without rules: the latest run that has ended is no problem.
        (".", {}, []),
        ("F.", {}, []),
        (".Fc", {}, []),
        (">", {}, []),
        (".F", {}, ["failed 1h 00m ago (2026-11-24 11:00:00), attempt 2"]),
        (".T>", {}, ["timed out 2h 00m ago (2026-11-24 10:00:00), attempt 2"]),
        # The last success.
        (".FF", {"succeeded_within": 3 * HOUR}, []),
        (".FFF", {"succeeded_within": 3 * HOUR}, ["no success for 4h 00m (last 2026-11-24 08:00:00)"]),
        ("." + "c" * 27, {"succeeded_within": 26 * HOUR}, ["no success for 28h 00m (last 2026-11-23 08:00:00)"]),
        ("." + "c" * 49, {"succeeded_within": 26 * HOUR}, ["no success for 2d 02h (last 2026-11-22 10:00:00)"]),
        ("F>", {"succeeded_within": HOUR}, ["never succeeded"]),
        # Problems since the last success.
        ("F.FF", {"max_problems": 2}, []),
        ("FF.FTcX>", {"max_problems": 2}, ["3 problems in a row, more than 2"]),
        (".F", {"max_problems": 0}, ["1 problem in a row, more than 0"]),
        ("cc>", {"max_problems": 0}, []),
        ("F" * 120, {"max_problems": 3}, ["100 or more problems in a row, more than 3"]),
        ("F" * 120, {"max_problems": 119}, ["120 problems in a row, more than 119"]),
        ("F" * 120, {"max_problems": 120}, []),
        ("F" * 120, {"max_problems": 10**30}, []),
        # How long it is running.
        (".>", {"max_running": 70 * MINUTE}, []),
        (">>.", {"max_running": 2 * HOUR}, ["running for 3h 10m since 2026-11-24 08:50:00, attempt 1"]),
        # All that is given has to hold, and nothing else.
        ("FF", {"max_running": HOUR}, []),
        (
            "F>F",
            {"succeeded_within": HOUR, "max_problems": 1, "max_running": HOUR},
            [
                "never succeeded",
                "2 problems in a row, more than 1",
                "running for 2h 10m since 2026-11-24 09:50:00, attempt 2",
            ],
        ),
    ],
)
def test_a_task_is_well_if_it_keeps_to_the_rules(
    sqlite: str, marks: str, rules: dict[str, Any], reasons: list[str]
) -> None:
    with TaskRunHistory.connect(sqlite) as history:
        made(history, now=NOON, job=marks, other="FFF>")
        last_run = history.last_run("job")
    with create_engine(parse_url(sqlite), poolclass=NullPool).connect() as connection:
        found = check(connection, "job", Rules(**rules, now=NOON), limit=1, after=None)
    assert found == [TaskCheck("job", last_run, tuple(reasons))]
    assert found[0].is_well == (not reasons)


def test_every_database_says_the_same(history: TaskRunHistory) -> None:
    made(history, a=".", b=".FF", c="F>", d=">>.", e="c")
    found = history.check("?", succeeded_within=150 * MINUTE, max_problems=1, max_running=150 * MINUTE)
    assert {check.task_id: [re.sub(" for .*", "", reason) for reason in check.reasons] for check in found} == {
        "a": [],
        "b": ["no success", "2 problems in a row, more than 1"],
        "c": ["never succeeded"],
        "d": ["running"],
        "e": ["never succeeded"],
    }
    assert [check.is_well for check in history.check("?")] == [True, False, False, True, True]


def test_pages_follow_each_other(history: TaskRunHistory) -> None:
    made(history, a=".", b="F", c=".", d=".")
    assert [check.task_id for check in history.check("*", limit=3)] == ["a", "b", "c"]
    assert [check.task_id for check in history.check("*", limit=3, after="c")] == ["d"]
    assert history.check("*", after="d") == []
    assert history.check("a", after="a") == history.check("nothing", after="other") == []


def test_success_of_an_earlier_attempt_that_ended_later_counts(history: TaskRunHistory) -> None:
    history.add_runs([run("job", 1, ".", 1), run("job", 2, ".", 9), run("job", 3, "F", 8)])
    (found,) = history.check("job", succeeded_within=2 * HOUR)
    assert found.is_well
    assert history.summaries(stale_after=2 * HOUR) == []
    assert [summary.task_id for summary in history.summaries(stale_after=HOUR / 2)] == ["job"]
    (found,) = history.check("job", succeeded_within=HOUR / 2)
    assert [reason.partition(" (")[0] for reason in found.reasons] == ["no success for 1h 00m"]


def test_runs_that_are_overdue_are_read_once(history: TaskRunHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    made(history, None, **{f"t{number:02}": ">." for number in range(20)})
    read = 0

    def counted(rows: Sequence[Sequence[Any]]) -> list[TaskRun]:
        nonlocal read
        read += len(rows)
        return runs_of_rows(rows)

    monkeypatch.setattr(reading, "runs_of_rows", counted)
    after, overdue = None, 0
    while found := history.check("*", max_running=HOUR, limit=2, after=after):
        after, overdue = found[-1].task_id, overdue + sum(not check.is_well for check in found)
    assert (overdue, read) == (20, 40)  # each task's latest run, and the one that is overdue


def test_what_was_never_seen_is_not_well(history: TaskRunHistory) -> None:
    (found,) = history.check("job[*]")
    assert (found.task_id, found.last_run, found.reasons, found.is_well) == ("job*", None, ("never seen",), False)
    assert found.to_wire() == {"taskId": "job*", "ok": False, "reasons": ["never seen"]}
    assert history.check("job*") == []


def test_last_line_of_an_error_is_told(history: TaskRunHistory) -> None:
    history.add_runs([run("a", 1, "F", 1, "first\nlast\n"), run("b", 1, "F", 1, "x" * 300)])
    short, long = history.check("?")
    assert short.reasons[0].endswith(", attempt 1: last")
    assert long.reasons[0].endswith(f": {'x' * 200}…")


def test_times_are_of_the_zone(sqlite: str) -> None:
    with TaskRunHistory.connect(sqlite) as history:
        made(history, job=".F")
        (found,) = history.check("job", zone=timezone(timedelta(hours=2)))
    assert found.last_run is not None
    assert found.last_run.finished_at is not None
    assert f"({found.last_run.finished_at + 2 * HOUR:%Y-%m-%d %H:%M:%S})" in found.reasons[0]


@pytest.mark.parametrize(
    ("rules", "error"),
    [
        ({"max_problems": -1}, ValueError),
        ({"max_problems": 1.5}, TypeError),
        ({"succeeded_within": -HOUR}, ValueError),
        ({"max_running": 3600}, TypeError),
        ({"limit": 0}, ValueError),
    ],
)
def test_rules_that_make_no_sense_are_refused(sqlite: str, rules: dict[str, int], error: type[Exception]) -> None:
    with TaskRunHistory.connect(sqlite) as history, pytest.raises(error):
        history.check("job", **rules)  # type: ignore[arg-type]  # that is the point


def test_longest_of_times_are_no_rule(sqlite: str) -> None:
    with TaskRunHistory.connect(sqlite) as history:
        made(history, job=".>")
        assert history.check("job", succeeded_within=timedelta.max, max_running=timedelta.max)[0].is_well
        assert history.summaries(stale_after=timedelta.max) == []


def checked(shell: Shell, url: str, *arguments: str, **tasks: str) -> Answer:
    with TaskRunHistory.connect(url) as history:
        made(history, None, **tasks)
    return shell("check", *arguments, "--db", url)


def test_one_line_a_task_and_the_status_says_it(shell: Shell, sqlite: str) -> None:
    answer = checked(shell, sqlite, "*", "--max-problems", "1", a=".", b="FF")
    assert (answer.status, answer.err) == (1, "")
    assert answer.out == "ok        a\nnot well  b: 2 problems in a row, more than 1\n"
    assert shell("check", "a", "--db", sqlite) == Answer(0, "ok        a\n", "")
    assert shell("check", "?", "--max-problems", "2", "--max-running", "3h", "--db", sqlite).status == 0
    assert shell("check", "a", "--succeeded-within", "50m", "--db", sqlite).status == 1
    assert shell("check", "a", "--succeeded-within", "1.5h", "--db", sqlite).status == 0


def test_quiet_tells_only_what_is_not_well(shell: Shell, sqlite: str) -> None:
    answer = checked(shell, sqlite, "*", "-q", "--max-problems", "1", a=".", b="FF")
    assert answer == Answer(1, "not well  b: 2 problems in a row, more than 1\n", "")
    assert shell("check", "a", "-q", "--db", sqlite) == Answer(0, "", "")


def test_nothing_to_be_well_is_not_well(shell: Shell, sqlite: str) -> None:
    assert checked(shell, sqlite, "job") == Answer(1, "not well  job: never seen\n", "")
    assert shell("check", "jo*", "--db", sqlite) == Answer(1, "", "taskruns: no task matches jo*\n")
    assert shell("check", "jo*", "-q", "--json", "--db", sqlite).status == 1


@pytest.mark.parametrize("url", ["none.db", "postgresql://127.0.0.1:1/none"])
def test_what_cannot_be_told_is_2(shell: Shell, url: str) -> None:
    answer = shell("check", "job", "-q", "--db", url)
    assert (answer.status, answer.out, len(answer.err.splitlines())) == (2, "", 1)


def test_json_is_an_object_a_task(shell: Shell, sqlite: str) -> None:
    answer = checked(shell, sqlite, "*", "--json", a=".", b=".T")
    assert answer.status == 1
    well, unwell = map(json.loads, answer.out.splitlines())
    assert (well["taskId"], well["ok"], well["reasons"]) == ("a", True, [])
    assert (unwell["taskId"], unwell["ok"], len(unwell["reasons"])) == ("b", False, 1)
    assert unwell["lastRun"]["phase"] == "timeout"


def test_more_than_a_page_is_checked(shell: Shell, sqlite: str) -> None:
    tasks = {f"t{number:04}": "." for number in range(1000)}
    answer = checked(shell, sqlite, "t*", **tasks, t1000="F")
    lines = answer.out.splitlines()
    assert (answer.status, len(lines)) == (1, 1001)
    assert [line[:8] for line in lines[-2:]] == ["ok      ", "not well"]


def test_hostile_text_does_no_harm(shell: Shell, home: Home, sqlite: str) -> None:
    with TaskRunHistory.connect(sqlite) as history:
        history.add_runs([run("[bold]x[/]", 1, "F", 1, HOSTILE), run("ok", 1, ".", 1)])
    piped = shell("check", "*", "--db", sqlite).out
    assert not set("\x1b\x07\x9b\r\b\u202e\u2028\ufeff") & set(piped)
    assert "[bold]x[/]" in piped
    shown = on_terminal(home, "check", "ok", "--db", sqlite)
    assert "\x1b[32mok" in shown


def test_run_whose_process_was_killed_is_not_well(home: Home, shell: Shell) -> None:
    process = home.start("exec", "job", "--", "sleep", "60", start_new_session=True)
    while not (Path(home.database.removeprefix("sqlite:///")).exists() and home.taskruns("active", "job").stdout):
        assert process.poll() is None
    assert shell("check", "job").status == 0
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    answer = shell("check", "job")
    assert answer.status == 1
    assert re.fullmatch(r"not well  job: its process is gone, attempt 1, running since [-\d]+ [\d:]+\n", answer.out)
    assert shell("check", "job", "--max-problems", "0").status == 1
    assert shell("check", "job", "--max-problems", "1").status == 0
    home.taskruns("recover", check=True)
    assert "failed" in shell("check", "job").out
