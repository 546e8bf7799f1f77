"""`taskruns tasks`: each task at a glance, in a pipe and on terminals."""

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from commands import Home, Shell
from test_output import on_terminal

from taskruns import TaskPhase, TaskRun, TaskRunHistory, Window, reading
from taskruns.stats import stats_of

NOW = datetime.now(UTC).replace(microsecond=0)
MARKS = {"succeeded": ".", "failed": "F", "timeout": "T", "exhausted": "X", "canceled": "c", "running": ">"}
PHASES = {mark: TaskPhase(phase) for phase, mark in MARKS.items()}
HOUR = timedelta(hours=1)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture
def shell(home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(home, monkeypatch, capsys)


def made(url: str, **tasks: str) -> None:
    """Store a run of 30 s for each mark, the newest little more than an hour old and the others an hour apart."""
    with TaskRunHistory.connect(url) as history:
        for task, marks in tasks.items():
            history.add_runs([run(task, number, mark, len(marks) - number) for number, mark in enumerate(marks)])


def start(hours: int) -> datetime:
    return NOW - hours * HOUR - timedelta(minutes=10)


def run(task: str, number: int, mark: str, hours: int) -> TaskRun:
    phase, started_at = PHASES[mark], start(hours)
    finished_at = None if phase is TaskPhase.RUNNING else started_at + timedelta(seconds=30)
    return TaskRun(task, number + 1, phase, started_at, finished_at)


def shown(text: str) -> list[list[str]]:
    """The cells of a table in a pipe, without its headings; no cell of these tests is empty."""
    return [re.split(r"  +", line) for line in text.splitlines()[1:]]


def moment(hours: int) -> str:
    return f"{start(hours) + timedelta(seconds=30):%Y-%m-%d %H:%M:%S}"


def test_table_in_a_pipe_has_times_and_every_outcome(shell: Shell, database: str) -> None:
    made(database, good="." * 30, bad="FTX", mixed=".Fc>", weekly="..")
    answer = shell("tasks", "--db", database)
    assert (answer.status, answer.err) == (0, "")
    assert re.split(r"  +", answer.out.splitlines()[0]) == [
        *("TASK", "PHASE", "LAST (UTC)", "SUCCESS (UTC)", "PROBLEM (UTC)", "RECENT", "RATE", "MEDIAN"),
    ]
    started = f"{start(1):%Y-%m-%d %H:%M:%S}"
    assert shown(answer.out) == [
        ["bad", "exhausted", moment(1), "never", moment(1), "FTX", "0.0 %", "30.0 s"],
        ["good", "succeeded", moment(1), moment(1), "never", "." * 20, "100.0 %", "30.0 s"],
        ["mixed", "running", started, moment(4), moment(3), ".Fc>", "50.0 %", "30.0 s"],
        ["weekly", "succeeded", moment(1), moment(1), "never", "..", "100.0 %", "30.0 s"],
    ]


def test_json_is_the_summary(shell: Shell, database: str) -> None:
    made(database, job=".F>", other=".")
    answer = shell("tasks", "job", "--json", "--db", database)
    assert answer.status == 0
    with TaskRunHistory.connect(database) as history:
        (summary,) = history.summaries("job")
    assert [json.loads(line) for line in answer.out.splitlines()] == [summary.to_wire()]


def test_filters_choose_tasks(shell: Shell, database: str) -> None:
    made(database, a=".", ab=".F", b="..T", c="." + "F" * 60, d=">", **{"a*": "."})

    def listed(*arguments: str) -> list[str]:
        answer = shell("tasks", *arguments, "--json", "--db", database)
        assert (answer.status, answer.err) == (0, "")
        return [json.loads(line)["taskId"] for line in answer.out.splitlines()]

    assert listed() == ["a", "a*", "ab", "b", "c", "d"]
    assert listed("a*") == ["a", "a*", "ab"]
    assert listed("a[*]") == ["a*"]
    assert listed("a") == ["a"]
    assert shell("runs", "a[*]", "--count", "--db", database).out == "1\n"
    assert listed("--problems") == ["ab", "b", "c"]
    assert listed("--phase", "timeout,running") == ["b", "d"]
    assert listed("--stale", "2d") == ["c", "d"]
    assert listed("--stale", "2d", "--problems") == ["c"]
    assert listed("a*", "--after", "a") == ["a*", "ab"]
    assert listed("a", "--after", "a") == []
    assert listed("--limit", "2") == ["a", "a*"]


def test_one_task_among_many_is_found_by_few_questions(sqlite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made(sqlite, **{f"t{number:02}": "." for number in range(50)}, u="F")
    asked, tasks = 0, reading.tasks

    def counted(*arguments: Any, **options: Any) -> list[TaskRun]:
        nonlocal asked
        asked += 1
        return tasks(*arguments, **options)

    monkeypatch.setattr(reading, "tasks", counted)
    with TaskRunHistory.connect(sqlite) as history:
        (found,) = history.summaries(phases=TaskPhase.FAILED, limit=1)
        (checked,) = history.check("*u", limit=1)
    assert (found.task_id, checked.task_id, asked) == ("u", "u", 2)


def test_statistics_are_of_the_window(shell: Shell, database: str) -> None:
    made(database, job="F" * 300 + "." * 100)

    def rate(*arguments: str) -> list[str]:
        return shown(shell("tasks", *arguments, "--db", database).out)[0][6:]

    assert rate() == ["59.9 %", "30.0 s"]  # 167 runs in seven days
    assert rate("--since", "99h") == ["100.0 %", "30.0 s"]
    assert rate("--started", "400d..5d") == ["0.0 %", "30.0 s"]
    assert rate("--started", "400d..399d") == []


def test_unknown_task_is_one_line_and_1_and_a_pattern_without_tasks_is_empty(shell: Shell, sqlite: str) -> None:
    made(sqlite, job=".")
    answer = shell("tasks", "jo", "--db", sqlite)
    assert (answer.status, answer.out, answer.err) == (1, "", "taskruns: no run of jo\n")
    for arguments in (("jo?*x",), ("job", "--problems"), ("job", "--after", "job")):
        answer = shell("tasks", *arguments, "--db", sqlite)
        assert (answer.status, answer.out, answer.err) == (0, "", "")


def test_zone_is_that_of_the_times(shell: Shell, sqlite: str) -> None:
    made(sqlite, job=".")
    answer = shell("tasks", "--tz", "Asia/Kolkata", "--db", sqlite)
    assert "LAST (Asia/Kolkata)" in answer.out
    local = start(1) + timedelta(seconds=30, hours=5, minutes=30)
    assert f"{local:%Y-%m-%d %H:%M:%S}" in answer.out


def test_pages_follow_each_other(shell: Shell, sqlite: str) -> None:
    made(sqlite, **{f"task {number:03}": "." for number in range(230)})
    seen: list[str] = []
    more: tuple[str, ...] = ()
    while True:
        answer = shell("tasks", *more, "--limit", "110", "--db", sqlite)
        seen += [row[0] for row in shown(answer.out)]
        if not answer.err:
            break
        assert re.fullmatch(r"taskruns: there are more: --after 'task \d\d\d'\n", answer.err)
        more = ("--after", seen[-1])
    assert seen == [f"task {number:03}" for number in range(230)]
    assert len(shell("tasks", "--json", "--db", sqlite).out.splitlines()) == 230


def test_terminal_shows_ages_and_the_newest_outcomes_that_fit(home: Home, sqlite: str) -> None:
    name = "import:customers/eu-central-1/warehouse-synchronisation"
    made(sqlite, **{name: "F" * 10 + "." * 8 + "X>", "never": "FF"})
    wide, narrow = (on_terminal(home, "tasks", "--db", sqlite, columns=columns, NO_COLOR="1") for columns in (200, 80))
    wide, narrow = (re.sub(r"\x1b\[[\d;]*m", "", text) for text in (wide, narrow))
    assert wide.splitlines()[1].split() == [
        name,
        "running",
        "1h",
        "3h",
        "2h",
        "F" * 10 + "." * 8 + "X>",
        "42.1",
        "%",
        "30.0",
        "s",
    ]
    assert wide.splitlines()[2].split()[:5] == ["never", "failed", "1h", "never", "1h"]
    assert max(map(len, narrow.splitlines())) <= 80
    first, *rest = narrow.splitlines()[1:]
    assert re.search(r" F+\.{8}X> ", first)
    assert name == first.split()[0] + "".join(line.strip() for line in rest[:-1])


@pytest.mark.parametrize("since", [None, 3, 40, 400])
@pytest.mark.parametrize("many", [5, 50, 5000])
def test_statistics_are_the_same_however_they_are_found(
    sqlite: str, monkeypatch: pytest.MonkeyPatch, since: int | None, many: int
) -> None:
    marks = {"a": "." * 90 + "FT.", "b": "F" * 30 + ">", "c": ".X" * 20}
    made(sqlite, **marks)
    monkeypatch.setattr(reading, "MANY", many)
    monkeypatch.setattr(reading, "FEW", many)
    window = Window() if since is None else Window(NOW - since * HOUR)
    with TaskRunHistory.connect(sqlite) as history:
        found = {summary.task_id: summary.stats for summary in history.summaries(window=window)}
        expected = {
            task: stats_of(
                [
                    (run.phase, run.started_at, run.finished_at)
                    for run in history.iter_runs(task)
                    if window.contains(run.started_at)
                ]
            )
            for task in marks
        }
    assert {task: stats.to_wire() for task, stats in found.items()} == {
        task: stats.to_wire() for task, stats in expected.items()
    }
