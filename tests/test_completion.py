"""Help for every command, and completion."""

import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from commands import Home, Shell
from servers import missing

from taskruns import TaskRunHistory
from taskruns.cli import cli


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture
def shell(home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(home, monkeypatch, capsys)


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command, as it is called."""
    found = []
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        found.append((*path, name))
        if isinstance(command, click.Group):
            found += commands(command, (*path, name))
    return found


ALL = commands(cli)


def test_every_command_is_known_here() -> None:
    assert {" ".join(path) for path in ALL} == {
        *("exec", "runs", "show", "tasks", "active", "last", "stats", "watch", "ingest", "replay", "export", "import"),
        *("check", "completion", "supervisors", "recover", "doctor", "prune", "forget"),
        *("db", "db upgrade", "db current", "db check", "db where"),
    }


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("path", [(), *ALL], ids=" ".join)
def test_help_is_a_result(shell: Shell, path: tuple[str, ...], option: str) -> None:
    answer = shell(*path, option)
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.startswith(f"Usage: {' '.join(('taskruns', *path))} ")


@pytest.mark.parametrize("group", [(), ("db",)])
def test_list_of_commands_fits_a_terminal_uncut(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, group: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    listed = shell(*group, "--help").out.split("Commands:\n")[1].splitlines()
    assert len(listed) == len(
        [path for path in ALL if len(path) == len(group) + 1 and path[: len(group)] == tuple(group)]
    )
    assert not any("..." in line for line in listed)


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_command_and_option_is_explained(path: tuple[str, ...]) -> None:
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), name)
        assert found is not None
        command = found
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.opts
        else:
            assert (parameter.metavar or str(parameter.name).upper()).strip("-. ").split(".")[0] in (
                command.help or ""
            ).replace("command", "COMMAND")


@pytest.mark.parametrize("arguments", [(), ("db",)])
def test_nothing_asked_is_the_help_on_standard_error(shell: Shell, arguments: tuple[str, ...]) -> None:
    answer = shell(*arguments)
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith("Usage: taskruns ")
    assert "Commands:" in answer.err
    assert "(see " not in answer.err


def test_version(shell: Shell, home: Home) -> None:
    answer = shell("--version")
    assert (answer.status, answer.out, answer.err) == (0, f"taskruns, version {version('taskruns')}\n", "")
    assert home.taskruns("--version").stdout == answer.out


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--timeout", ""),
        ("--timeout", "soon"),
        ("--timeout", "-1"),
        ("--timeout", "1y"),
        ("--timeout", "1e3"),
        ("--timeout", "nan"),
        ("--timeout", "inf"),
        ("--timeout", "1 2"),
        ("--timeout", "99999999999999999999d"),
        ("--timeout", "1" * 400),
        ("--kill-after", "x"),
        ("--backoff", "1..x"),
        ("--backoff", "2s..1s"),
        ("--backoff", "..5"),
        ("--backoff", "1.."),
        ("--backoff", "1s..2s..3s"),
        ("--retries", "-1"),
        ("--retries", "some"),
        ("--conflict-exit-code", "256"),
        ("--error", "all"),
    ],
)
def test_what_cannot_be_read_is_said_before_the_command_runs(shell: Shell, home: Home, option: str, value: str) -> None:
    answer = shell("exec", option, value, "job", "--", "touch", str(home.path / "ran"))
    assert (answer.status, answer.out) == (125, "")
    assert option in answer.err
    assert len(answer.err.splitlines()) == 1
    assert not (home.path / "ran").exists()


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_completion_is_a_script_of_the_shell(shell: Shell, name: str) -> None:
    answer = shell("completion", name)
    assert (answer.status, answer.err) == (0, "")
    assert "_TASKRUNS_COMPLETE" in answer.out
    program = shutil.which(name)
    if program is None:
        return  # its syntax cannot be checked here; that it is made is shown
    assert subprocess.run([program, "-n"], input=answer.out, text=True, check=False).returncode == 0


def completed(home: Home, line: str, *words: str) -> list[str]:
    """What a real bash offers at the end of a line."""
    bash = shutil.which("bash")
    if bash is None:
        missing("no bash")
    script = f"""
        eval "$(taskruns completion bash)"
        COMP_WORDS=({line}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}
        complete -p taskruns >/dev/null || exit 9
        $(complete -p taskruns | sed -E 's/.* -F ([^ ]+).*/\\1/') taskruns "${{COMP_WORDS[COMP_CWORD]}}" ''
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = home.environment | {"PATH": f"{Path(home.program).parent}:{home.environment['PATH']}"}
    done = subprocess.run([bash, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_bash_completes_commands_options_and_task_ids(home: Home) -> None:
    assert completed(home, "taskruns runs b") == [""]  # there is no database yet, and none is made
    assert not (home.path / ".local").exists()
    (home.path / ".local/share/taskruns").mkdir(parents=True)
    with TaskRunHistory.connect(home.database) as history:
        history.upgrade()
        for task in ("backup", "backup:db", "billing", "zebra", "b", "ba"):
            history.open_run(task)
    assert completed(home, "taskruns comp") == ["completion"]
    assert completed(home, "taskruns runs --lim") == ["--limit"]
    assert completed(home, "taskruns runs ba") == ["ba", "backup", "backup:db"]
    assert completed(home, "taskruns show z") == ["zebra"]
    assert completed(home, "taskruns exec bil") == ["billing"]


def test_completion_follows_the_database_that_was_named(home: Home, sqlite: str) -> None:
    with TaskRunHistory.connect(sqlite) as history:
        history.open_run("named")
    assert completed(home, f"taskruns --db {sqlite} runs n") == ["named"]
    assert completed(home, f"taskruns runs --db {sqlite} n") == ["named"]
