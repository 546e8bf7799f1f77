"""How results look: on a terminal, in a pipe, in an old locale, with hostile text in them."""

import json
import os
import pty
import re
import select
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from commands import Home, Shell

from taskruns import TaskPhase, TaskRun, TaskRunHistory
from taskruns.cli.output import short_moment

HOSTILE = (
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b2J \r overwritten \b\b [bold]markup[/bold] [/] [link=x]y[/link] "
    ":smile: \u202eright to left\u202c \u2028 \ufeff 家族 👩‍👩‍👧‍👦 é\u0301 %s {x} \\ ' \""
)
COMMANDS = [("runs", "job"), ("show", "job"), ("last", "job"), ("tasks",), ("active",)]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture
def shell(home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(home, monkeypatch, capsys)


def failed(url: str, error: str, task: str = "job", source: str = "host") -> None:
    with TaskRunHistory.connect(url, source=source) as history:
        history.upgrade()
        run = history.open_run(task)
        history.close_run(task, run.attempt, TaskPhase.FAILED, error=error, exit_code=3)


def on_terminal(home: Home, *arguments: str, columns: int = 80, **environment: str) -> str:
    """Run the command line on a terminal of its own and return what it printed there."""
    master, terminal = pty.openpty()
    os.set_blocking(master, False)
    surroundings = {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "24", "LC_ALL": "C.UTF-8"}
    inherited = {name: value for name, value in home.environment.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [home.program, *arguments],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=inherited | surroundings | environment,
    )
    os.close(terminal)
    printed = b""
    while True:
        select.select([master], [], [], 30)
        try:
            chunk = os.read(master, 65536)
        except OSError:  # all of the other side is closed
            break
        if not chunk:
            break
        printed += chunk
    os.close(master)
    assert process.wait(30) == 0
    return printed.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_piped_output_has_no_colour(shell: Shell, sqlite: str, command: tuple[str, ...]) -> None:
    failed(sqlite, "broken")
    with TaskRunHistory.connect(sqlite) as history:
        history.open_run("job")
    answer = shell(*command, "--db", sqlite)
    assert answer.status == 0
    assert "running" in answer.out
    assert "\x1b" not in answer.out + answer.err


def test_terminal_gets_a_coloured_table_and_no_color_is_respected(home: Home, sqlite: str) -> None:
    failed(sqlite, "the disk is full")
    coloured = on_terminal(home, "runs", "job", "--db", sqlite, columns=120)
    assert re.search(r"\x1b\[31mfailed", coloured)
    assert "the disk is full" in coloured
    plain = on_terminal(home, "runs", "job", "--db", sqlite, columns=120, NO_COLOR="1")
    assert not re.search(r"\x1b\[[\d;]*3\dm", plain)
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == re.sub(r"\x1b\[[\d;]*m", "", plain)
    assert "\x1b" not in on_terminal(home, "runs", "job", "--db", sqlite, TERM="dumb")
    assert "\x1b" not in on_terminal(home, "runs", "job", "--json", "--db", sqlite)


@pytest.mark.parametrize("columns", [20, 80])
def test_table_fits_a_terminal(home: Home, sqlite: str, columns: int) -> None:
    failed(sqlite, "words " * 100, task="a task with a long name " * 4 + "x")
    printed = re.sub(r"\x1b\[[\d;]*m", "", on_terminal(home, "tasks", "--db", sqlite, columns=columns))
    assert max(len(line) for line in printed.splitlines()) <= columns


@pytest.mark.parametrize("command", [("runs",), ("runs", "--problems"), ("runs", "import:*")])
def test_nothing_that_matters_is_lost_on_a_narrow_terminal(home: Home, sqlite: str, command: tuple[str, ...]) -> None:
    task = "import:customers/eu-central-1/warehouse-synchronisation"
    failed(sqlite, "Traceback\nConnectionError: the database server did not answer", task, "web-1.prod.example.com")
    arguments = (*command, "--tz", "America/Argentina/Buenos_Aires", "--db", sqlite)
    lines = re.sub(r"\x1b\[[\d;]*m", "", on_terminal(home, *arguments, columns=80)).splitlines()
    assert all(re.search(rf"(^| ){heading}( |$)", lines[0]) for heading in ("TASK", "#", "PHASE", "EXIT", "SOURCE"))
    assert "(Buenos_Aires)" in lines[0]
    assert re.search(r" 1 failed .* 3 web-1\.", lines[1])
    assert lines[1].split()[0] + "".join(map(str.strip, lines[2:-1])) == task
    assert lines[-1] == "  ConnectionError: the database server did not answer"
    assert max(map(len, lines)) <= 80


def test_error_that_would_be_cut_stands_below_its_run(home: Home, sqlite: str) -> None:
    error = "rsync: connection unexpectedly closed (0 bytes received so far) in the data stream"
    failed(sqlite, error)
    for columns, is_below in ((120, True), (200, False)):
        printed = on_terminal(home, "runs", "--db", sqlite, columns=columns, NO_COLOR="1")
        lines = re.sub(r"\x1b\[[\d;]*m", "", printed).splitlines()
        assert lines[-1].endswith(error)
        assert (len(lines), "ERROR" not in lines[0]) == ((3, True) if is_below else (2, False))


def test_long_task_id_is_folded_and_leaves_the_others_their_place(home: Home, sqlite: str) -> None:
    for task in ("job", "x" * 255):
        failed(sqlite, "broken", task)
    printed = on_terminal(home, "runs", "--db", sqlite, columns=200, NO_COLOR="1")
    lines = re.sub(r"\x1b\[[\d;]*m", "", printed).splitlines()
    assert lines[0].index("ATTEMPT") < 80
    assert lines[0].rstrip().endswith("ERROR")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_the_encoding_lacks_do_not_widen_a_table(home: Home, sqlite: str, encoding: str) -> None:
    failed(sqlite, "家族 " * 40, task="import:🚀" * 6)
    printed = on_terminal(home, "runs", "--db", sqlite, columns=80, PYTHONIOENCODING=encoding)
    lines = re.sub(r"\x1b\[[\d;]*m", "", printed).splitlines()
    assert "\\U0001f680" in printed
    assert max(map(len, lines)) <= 80
    assert len({re.search(r" 1 failed", line) is None for line in lines}) == 2


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (("runs", "job", "--phase", "timeout,"), "no runs match"),
        (("active",), "no runs match"),
        (("tasks", "nope*"), "no task matches nope*"),
        (("tasks", "--phase", "running"), "no tasks match"),
        (("last", "job", "--phase", "succeeded"), "no succeeded run of job"),
    ],
)
def test_nothing_found_is_said_on_a_terminal_only(
    home: Home, shell: Shell, sqlite: str, command: tuple[str, ...], line: str
) -> None:
    failed(sqlite, "broken")
    assert on_terminal(home, *command, "--db", sqlite) == f"taskruns: {line}\n"
    answer = shell(*command, "--db", sqlite)
    assert (answer.status, answer.out, answer.err) == (0, "", "")


def test_terminal_of_few_columns_shows_the_first_of_a_table(home: Home, sqlite: str) -> None:
    failed(sqlite, "x", task="job")
    printed = re.sub(r"\x1b\[[\d;]*m", "", on_terminal(home, "runs", "--db", sqlite, columns=40))
    assert printed.split()[:7] == ["TASK", "#", "PHASE", "STARTED", "(UTC)", "DURATION", "job"]


@pytest.mark.parametrize("command", COMMANDS[:3])
def test_hostile_text_does_no_harm_in_a_pipe(shell: Shell, sqlite: str, command: tuple[str, ...]) -> None:
    failed(sqlite, HOSTILE, source="[red]家[/red]")
    answer = shell(*command, "--db", sqlite)
    assert answer.status == 0
    assert not set("\x1b\x07\x9b\r\b\u202e\u2028\ufeff") & set(answer.out)
    for kept in ("[red]家[/red]", "{x}") if command[0] != "runs" else ("[red]家[/red]",):
        assert kept in answer.out


def test_hostile_text_does_no_harm_on_a_terminal(home: Home, sqlite: str) -> None:
    failed(sqlite, HOSTILE, task="[bold]x[/bold] [/nothing]")
    for command in (("runs",), ("show",), ("tasks",)):
        arguments = command if command == ("tasks",) else (*command, "[bold]x[/bold] [/nothing]")
        printed = on_terminal(home, *arguments, "--db", sqlite, columns=400)
        assert not set("\x07\x9b\b\u202e\u2028") & set(printed)
        assert "\x1b]" not in printed
        assert not re.search(r"\x1b(?!\[[\d;]*m)", printed)
        if command != ("runs",):
            assert "[bold]x[/bold] [/nothing]" in printed


def test_hostile_text_is_told_unchanged_as_json(shell: Shell, sqlite: str) -> None:
    failed(sqlite, HOSTILE)
    answer = shell("runs", "job", "--json", "--db", sqlite)
    assert len(answer.out.split("\n")) == 2
    assert json.loads(answer.out)["error"] == HOSTILE
    assert not set("\x1b\x07\r\b") & set(answer.out)


def test_columns_stay_in_line_below_wide_characters(shell: Shell, sqlite: str) -> None:
    for task in ("家族", "abcd", "é", "🎉"):
        failed(sqlite, "x", task=task)
    lines = shell("tasks", "--db", sqlite).out.splitlines()
    wide = {"家": 2, "族": 2, "🎉": 2}
    starts = {sum(wide.get(character, 1) for character in line[: line.index("failed")]) for line in lines[1:]}
    assert len(starts) == 1


@pytest.mark.parametrize("command", ["runs", "show job", "tasks", "check *", "stats --by hour"])
@pytest.mark.parametrize(("year", "zone"), [(1, "America/New_York"), (9999, "Asia/Tokyo")])
def test_run_at_the_ends_of_time_is_shown_in_any_zone(
    shell: Shell, sqlite: str, command: str, year: int, zone: str
) -> None:
    moment = datetime(year, 12, 31, 23, 59, 59, tzinfo=UTC) if year > 1 else datetime(1, 1, 1, tzinfo=UTC)
    with TaskRunHistory.connect(sqlite) as history:
        history.add_runs([TaskRun("job", 1, TaskPhase.FAILED, moment, moment)])
    answer = shell(*command.split(), "--tz", zone, "--db", sqlite)
    assert (answer.status, answer.err) == (int(command == "check *"), "")
    assert f"{year:04}-" in answer.out
    assert short_moment(moment, ZoneInfo(zone)).startswith(f"{year:04}-")


@pytest.mark.parametrize("options", [("--json",), ()])
def test_reader_that_ends_early_gets_no_traceback(home: Home, sqlite: str, options: tuple[str, ...]) -> None:
    with TaskRunHistory.connect(sqlite) as history, history.begin() as runs:
        for _ in range(3000):
            runs.open_run("job", submission="x" * 200)
    line = " ".join([home.program, "runs", "job", "--limit", "3000", "--db", sqlite, *options])
    done = subprocess.run(
        ["bash", "-c", f"{line} | head -1; echo ${{PIPESTATUS[0]}}"],
        env=home.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[1] == "141"
    assert "3000" in done.stdout or "ATTEMPT" in done.stdout


def test_output_that_cannot_be_written_is_said(home: Home, sqlite: str) -> None:
    failed(sqlite, "x")
    line = f"{home.program} runs job --json --db {sqlite} >/dev/full"
    done = subprocess.run(["sh", "-c", line], env=home.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "taskruns: standard output cannot be written: No space left on device\n"


def test_output_that_is_closed_is_as_good_as_none(home: Home, sqlite: str) -> None:
    failed(sqlite, "x")
    line = f"{home.program} runs job --json --db {sqlite} >&-"
    done = subprocess.run(["sh", "-c", line], env=home.environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("options", [("--json",), ()])
@pytest.mark.parametrize("locale", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C"}])
def test_locale_that_lacks_characters(
    home: Home, sqlite: str, options: tuple[str, ...], locale: dict[str, str]
) -> None:
    failed(sqlite, "naïve 家族 🎉")
    command = [home.program, "runs", "job", "--db", sqlite, *options]
    done = subprocess.run(command, env=home.environment | locale, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    if options:
        assert json.loads(done.stdout)["error"] == "naïve 家族 🎉"
    else:
        assert b"na" in done.stdout


def test_task_id_in_a_message_does_no_harm(shell: Shell, sqlite: str) -> None:
    answer = shell("runs", "\u202ex\u2028y", "--db", sqlite)
    assert answer.status == 1
    assert not {"\u202e", "\u2028"} & set(answer.err)
    assert len(answer.err.splitlines()) == 1


def test_very_long_error_is_shown_whole_by_show_alone(shell: Shell, sqlite: str) -> None:
    failed(sqlite, "\n".join(f"line {number}" for number in range(5000)))
    assert "line 2 " not in shell("runs", "job", "--db", sqlite).out
    assert "  line 2\n" in shell("show", "job", "--db", sqlite).out


def test_findings_are_coloured_on_a_terminal_only(home: Home) -> None:
    shown = on_terminal(home, "doctor")
    assert "\x1b[32mok" in shown
    assert "\x1b[33mnote" in shown
    assert "[32m" not in on_terminal(home, "doctor", NO_COLOR="1")
    assert "\x1b" not in home.taskruns("doctor").stdout
