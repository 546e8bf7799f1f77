"""The reading commands: what they print, where, and their status."""

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from commands import Home, Shell

from taskruns import TaskPhase, TaskRun, TaskRunHistory

FROM = datetime(2026, 3, 1, 2, 15, tzinfo=UTC)
PHASES = ("failed", "succeeded", "timeout", "canceled", "exhausted")


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(Home(tmp_path), monkeypatch, capsys)


def record(url: str, task: str, phases: tuple[str, ...] = PHASES) -> list[TaskRun]:
    """Record runs of a task, a minute apart; oldest first. Active ones start together: a later one would end them."""
    recorded = []
    with TaskRunHistory.connect(url, source="host") as history:
        for number, phase in enumerate(phases):
            started_at = FROM + timedelta(minutes=0 if phase == "running" else number)
            run = history.open_run(task, started_at=started_at)
            if phase != "running":
                run = history.close_run(
                    task,
                    run.attempt,
                    TaskPhase(phase),
                    error=None if phase == "succeeded" else f"first line\nwhat went wrong {number}",
                    exit_code=0 if phase == "succeeded" else number + 1,
                    finished_at=started_at + timedelta(seconds=1.5),
                )
            recorded.append(run)
    return recorded


def parsed(lines: str) -> list[TaskRun]:
    return [TaskRun.from_wire(json.loads(line)) for line in lines.splitlines()]


def test_runs_is_a_table_newest_first(shell: Shell, database: str) -> None:
    record(database, "job", ("succeeded", "failed"))
    answer = shell("runs", "job", "--db", database)
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.splitlines() == [
        "ATTEMPT  PHASE      STARTED (UTC)        DURATION  EXIT  SOURCE  ERROR",
        "2        failed     2026-03-01 02:16:00  1.5 s     2     host    what went wrong 1",
        "1        succeeded  2026-03-01 02:15:00  1.5 s     0     host",
    ]


def test_json_is_what_was_recorded(shell: Shell, database: str) -> None:
    runs = record(database, "job", (*PHASES, "running"))
    answer = shell("--db", database, "runs", "job", "--json")
    assert (answer.status, answer.err) == (0, "")
    assert parsed(answer.out) == runs[::-1]
    newest = json.loads(answer.out.splitlines()[1])
    assert newest == {
        "taskId": "job",
        "attempt": 5,
        "phase": "exhausted",
        "startedAt": "2026-03-01T02:19:00.000000Z",
        "finishedAt": "2026-03-01T02:19:01.500000Z",
        "error": "first line\nwhat went wrong 4",
        "exitCode": 5,
        "source": "host",
        "durationMs": 1500,
    }


@pytest.mark.parametrize(
    ("options", "attempts"),
    [
        (("--phase", "failed"), [1]),
        (("--phase", "failed,succeeded"), [2, 1]),
        (("--phase", "failed", "--phase", " succeeded , canceled "), [4, 2, 1]),
        (("--problems",), [5, 3, 1]),
        (("--problems", "--phase", "succeeded"), [5, 3, 2, 1]),
        (("--phase", "running"), []),
        (("--phase", "pending"), []),
        (("--limit", "2"), [5, 4]),
        (("--limit", "1", "--problems"), [5]),
        (("--limit", "5"), [5, 4, 3, 2, 1]),
    ],
)
def test_runs_are_chosen(shell: Shell, database: str, options: tuple[str, ...], attempts: list[int]) -> None:
    record(database, "job")
    record(database, "jobs", ("failed",))
    answer = shell("runs", "job", "--json", "--db", database, *options)
    assert answer.status == 0
    assert [run.attempt for run in parsed(answer.out)] == attempts
    assert ("there are more: --after" in answer.err) == ("--limit" in options and "5" not in options)


def test_pages_neither_repeat_nor_skip(shell: Shell, database: str) -> None:
    record(database, "job", ("succeeded", "failed") * 4)
    seen: list[int] = []
    more: tuple[str, ...] = ()
    while True:
        answer = shell("runs", "job", "--json", "--limit", "3", "--db", database, *more)
        assert answer.status == 0
        seen += [run.attempt for run in parsed(answer.out)]
        if not answer.err:
            break
        record(database, "job", ("running",))  # what is written meanwhile is newer than all that follows
        before, _, cursor = answer.err.strip().rpartition(" ")
        assert before == "taskruns: there are more: --after"
        more = ("--after", cursor)
    assert seen == [8, 7, 6, 5, 4, 3, 2, 1]


def test_tasks_lists_each_with_its_latest_run(shell: Shell, database: str) -> None:
    for task in ("b", "a", "C", "ä", "a b"):
        runs = record(database, task, ("failed", "succeeded"))
    assert runs[-1].attempt == 2
    answer = shell("tasks", "--json", "--db", database)
    assert answer.status == 0
    assert [(run.task_id, run.attempt) for run in parsed(answer.out)] == [(t, 2) for t in ("C", "a", "a b", "b", "ä")]
    table = shell("tasks", "--limit", "2", "--db", database)
    assert [line.split()[:3] for line in table.out.splitlines()] == [
        ["TASK", "PHASE", "LAST"],
        ["C", "succeeded", "2026-03-01"],
        ["a", "succeeded", "2026-03-01"],
    ]
    assert table.err == "taskruns: there are more: --after a\n"
    rest = shell("tasks", "--json", "--after", "a", "--db", database)
    assert [run.task_id for run in parsed(rest.out)] == ["a b", "b", "ä"]


def test_active_lists_what_runs_oldest_first(shell: Shell, database: str) -> None:
    record(database, "b", ("succeeded", "running", "running"))
    record(database, "a", ("running",))
    answer = shell("active", "--json", "--db", database)
    assert answer.status == 0
    assert [(run.task_id, run.attempt) for run in parsed(answer.out)] == [("a", 1), ("b", 2), ("b", 3)]
    table = shell("active", "--limit", "1", "--db", database)
    assert table.out.splitlines()[0].split() == ["TASK", "ATTEMPT", "PHASE", "STARTED", "(UTC)", "DURATION", "SOURCE"]
    assert table.out.splitlines()[1].endswith("so far  host")
    assert table.err == "taskruns: there are 2 more: --limit 3\n"


def test_show_tells_all_that_is_known(shell: Shell, database: str) -> None:
    record(database, "job", ("succeeded", "failed"))
    answer = shell("show", "job", "--db", database)
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.splitlines() == [
        "task       job",
        "attempt    2",
        "phase      failed",
        "started    2026-03-01 02:16:00.000 UTC",
        "finished   2026-03-01 02:16:01.500 UTC",
        "duration   1.5 s",
        "exit code  2",
        "source     host",
        "error",
        "  first line",
        "  what went wrong 1",
    ]
    first = shell("show", "job", "1", "--json", "--db", database)
    assert [run.attempt for run in parsed(first.out)] == [1]


@pytest.mark.parametrize(
    ("options", "attempt"),
    [((), 5), (("--phase", "succeeded"), 2), (("--problems",), 5), (("--phase", "failed,timeout"), 3)],
)
def test_last_shows_the_latest_of_some_phases(
    shell: Shell, database: str, options: tuple[str, ...], attempt: int
) -> None:
    record(database, "job")
    answer = shell("last", "job", "--json", "--db", database, *options)
    assert (answer.status, answer.err) == (0, "")
    assert [run.attempt for run in parsed(answer.out)] == [attempt]
    assert f"attempt    {attempt}\n" in shell("last", "job", "--db", database, *options).out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("runs", "other"), "no run of other"),
        (("runs", "other", "--json"), "no run of other"),
        (("runs", "other", "--problems"), "no run of other"),
        (("runs", "Job"), "no run of Job"),
        (("runs", "jo%"), "no run of jo%"),
        (("show", "other"), "no run of other"),
        (("show", "job", "9"), "job has no attempt 9"),
        (("show", "jo*"), "no run of jo*: `show` takes one task, not a pattern"),
        (("last", "jo*"), "no run of jo*: `last` takes one task, not a pattern"),
        (("show", "other", "9"), "no run of other"),
        (("last", "other"), "no run of other"),
        (("last", "other", "--phase", "failed"), "no run of other"),
    ],
)
def test_task_without_a_run_is_one_line_and_1(
    shell: Shell, database: str, arguments: tuple[str, ...], message: str
) -> None:
    record(database, "job", ("succeeded",))
    answer = shell(*arguments, "--db", database)
    assert (answer.status, answer.out, answer.err) == (1, "", f"taskruns: {message}\n")


@pytest.mark.parametrize(
    "arguments",
    [("runs", "job", "--problems"), ("runs", "job", "--phase", "running", "--json"), ("last", "job", "--problems")],
)
def test_nothing_among_what_was_asked_for_is_empty_and_0(shell: Shell, sqlite: str, arguments: tuple[str, ...]) -> None:
    record(sqlite, "job", ("succeeded",))
    answer = shell(*arguments, "--db", sqlite)
    assert (answer.status, answer.out, answer.err) == (0, "", "")


@pytest.mark.parametrize("arguments", [("tasks",), ("active",), ("tasks", "--json"), ("active", "--json")])
def test_lists_of_an_empty_database_are_empty_and_0(shell: Shell, database: str, arguments: tuple[str, ...]) -> None:
    answer = shell(*arguments, "--db", database)
    assert (answer.status, answer.out, answer.err) == (0, "", "")


def test_a_table_has_fifty_rows_and_json_all(shell: Shell, sqlite: str) -> None:
    record(sqlite, "job", ("running",) * 51)
    for number in range(51):
        record(sqlite, f"task {number:02}", ("succeeded",))
    table, lines = shell("runs", "job", "--db", sqlite), shell("runs", "job", "--json", "--db", sqlite)
    assert (len(table.out.splitlines()), len(lines.out.splitlines())) == (1 + 50, 51)
    assert table.err.startswith("taskruns: there are more: --after ")
    assert lines.err == ""
    cursor = table.err.split()[-1]
    rest = shell("runs", "job", "--after", cursor, "--db", sqlite)
    assert [line.split()[0] for line in rest.out.splitlines()] == ["ATTEMPT", "1"]
    for command, count in (("tasks", 52), ("active", 51)):
        table, lines = shell(command, "--db", sqlite), shell(command, "--json", "--db", sqlite)
        assert (len(table.out.splitlines()), len(lines.out.splitlines())) == (1 + 50, count)
        assert "more" in table.err
        assert lines.err == ""


def test_json_streams_more_than_a_page(shell: Shell, sqlite: str) -> None:
    with TaskRunHistory.connect(sqlite) as history, history.begin() as runs:
        for _ in range(1203):
            runs.open_run("job")
    answer = shell("runs", "job", "--json", "--db", sqlite)
    assert [run.attempt for run in parsed(answer.out)] == list(range(1203, 0, -1))
    limited = shell("runs", "job", "--json", "--limit", "1001", "--db", sqlite)
    assert [run.attempt for run in parsed(limited.out)] == list(range(1203, 202, -1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing command"),
        (("no-such-command",), "No such command 'no-such-command'"),
        (("chekc",), "Did you mean 'check'?"),
        (("show",), "Missing argument 'TASK'"),
        (("runs", "a", "b"), "unexpected extra argument (b)"),
        (("runs", "job", "--no-such-option"), "No such option"),
        (("runs", "job", "--phase", "done"), "done"),
        (("runs", "job", "--phase", ""), "--phase"),
        (("runs", "job", "--phase", ","), "--phase"),
        (("runs", "job", "--limit", "0"), "--limit"),
        (("runs", "job", "--limit", "-1"), "--limit"),
        (("runs", "job", "--limit", "many"), "Invalid value for '--limit': 'many' is not a whole number"),
        (("runs", "job", "--exit-code", "9" * 20), "Invalid value for '--exit-code'"),
        (("runs", "job", "--error", "disk"), "give --since, --started or --finished"),
        (("runs", "job", "--min-duration", "2h", "--max-duration", "1h"), "no run takes at least 2:00:00"),
        (("runs", "--count", "--limit", "5"), "--count"),
        (("runs", "--count", "--after", "5"), "--count"),
        (("runs", "--count", "--oldest-first"), "--count"),
        (("runs", "--since", "soon"), "Invalid value for '--since': 'soon' is not a time"),
        (("runs", "--started", "soon"), "Invalid value for '--started': 'soon' is not a window of time"),
        (("runs", "--finished", "soon"), "Invalid value for '--finished': 'soon' is not a window of time"),
        (("watch", "--interval", "x"), "'x' is not a number of seconds"),
        (("runs", "job", "--after", "nonsense"), "cursor"),
        (("show", "job", "0"), "ATTEMPT"),
        (("show", "job", "4294967296"), "ATTEMPT"),
        (("show", "job", "last"), "'last' is not a whole number"),
        (("tasks", "job", "a"), "unexpected extra argument (a)"),
        (("tasks", "--since", "7d", "--started", "2d"), "exclude"),
        (("tasks", "--since", "soon"), "soon"),
        (("tasks", "--stale", "often"), "often"),
        (("tasks", "--stale", "26"), "26 of what? such as 26h"),
        (("check",), "Missing argument 'TASK|GLOB'"),
        (("check", "job", "--succeeded-within"), "requires an argument. (see `taskruns check --help`)"),
        (("check", "job", "--succeeded-within", "26"), "26 of what? such as 26h"),
        (("check", "job", "--max-running", "1.5"), "1.5 of what? such as 1.5h"),
        (("check", "job", "--max-problems", "-1"), "--max-problems"),
        (("check", "job", "--succeeded-within", "daily"), "daily"),
        (("tasks", "--limit", "0"), "--limit"),
        (("db", "no-such"), "No such command 'no-such'"),
        (("completion", "tcsh"), "tcsh"),
    ],
)
def test_wrong_usage_is_one_line_and_2(shell: Shell, sqlite: str, arguments: tuple[str, ...], message: str) -> None:
    record(sqlite, "job", ("succeeded",))
    answer = shell("--db", sqlite, *arguments)
    assert (answer.status, answer.out) == (2, "")
    assert message in answer.err
    assert answer.err.startswith("taskruns: ")
    assert len(answer.err.splitlines()) == 1
    assert "--help" in answer.err


@pytest.mark.parametrize("task", ["", " job", "job ", "a\tb", "a\nb", "a\0b", "x" * 256, "a\udcff"])
@pytest.mark.parametrize("command", ["runs", "show", "last"])
def test_what_cannot_be_a_task_id_is_said_in_one_line(shell: Shell, sqlite: str, command: str, task: str) -> None:
    answer = shell(command, "--db", sqlite, "--", task)
    assert (answer.status, answer.out) == (2, "")
    assert re.match(r"taskruns: Invalid value for '\[?TASK(\|GLOB)?\]?': a task id has ", answer.err)
    assert (len(answer.err.splitlines()), "\t" in answer.err) == (1, False)
    assert shell("tasks", "--after", task, "--db", sqlite).status == 2
