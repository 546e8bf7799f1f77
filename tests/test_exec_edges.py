"""What a command sees of `taskruns exec` around it: nothing, if it can be helped."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Home

SHELL = ("sh", "-c")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def until(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def both(home: Home, command: list[str], **options: object) -> tuple[str, str]:
    """Return what a command prints, without the wrapper and inside it."""
    plain = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL, **options)  # type: ignore[call-overload]  # of any kind
    wrapped = home.taskruns("exec", "job", "--", *command, **options)
    assert (wrapped.returncode, wrapped.stderr) == (0, plain.stderr)
    return plain.stdout, wrapped.stdout


@pytest.mark.parametrize("locale", [{}, {"LANG": "C.UTF-8"}, {"LC_ALL": "POSIX"}, {"LC_CTYPE": "C.UTF-8"}])
def test_environment_is_as_it_was(home: Home, locale: dict[str, str]) -> None:
    # Without a locale, as under cron, Python sets one for itself.
    environment = {"HOME": str(home.path), "PATH": os.environ["PATH"], "ODD": "a=b\nc\udcff", **locale}
    for name in ("PYTHONPATH", "COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG"):
        if name in os.environ:
            environment[name] = os.environ[name]
    plain, wrapped = both(home, ["env", "-0"], env=environment, errors="surrogateescape")
    added = {"TASKRUNS_TASK=job", "TASKRUNS_ATTEMPT=1", "TASKRUNS_TRY=1", ""}
    assert set(wrapped.split("\0")) == set(plain.split("\0")) | added


def test_signals_are_set_as_they_were(home: Home) -> None:
    command = ["grep", "-E", "^(SigBlk|SigIgn|SigPnd|ShdPnd)", "/proc/self/status"]
    plain, wrapped = both(home, command)
    assert "SigBlk" in plain
    assert wrapped == plain


def test_directory_umask_priority_and_limits_are_as_they_were(home: Home, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    script = "cd place && umask 027 && ulimit -n 333 && exec nice -n 3 "
    show = "pwd; umask; ulimit -n; nice; ps -o sid= -p $$"
    plain = subprocess.run(
        [*SHELL, f"{script} sh -c '{show}'"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    wrapped = subprocess.run(
        [*SHELL, f"{script} {home.program} exec job -- sh -c '{show}'"],
        cwd=tmp_path,
        env=home.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert plain.stdout.split()[:4] == [str(place), "0027", "333", "3"]
    assert wrapped.stdout == plain.stdout


def test_command_gets_no_descriptor_of_ours(home: Home) -> None:
    command = ["ls", "/proc/self/fd"]
    plain, wrapped = both(home, command)
    assert wrapped == plain


def test_what_the_command_does_not_read_is_left_in_the_input(home: Home) -> None:
    script = f"{home.program} exec job -- head -c 4; cat"
    done = subprocess.run(
        [*SHELL, script], env=home.environment, input="one\ntwo\n", capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("one\n")
    lines = f"while read -r line; do {home.program} exec job -- echo $line </dev/null; done"
    done = subprocess.run(
        [*SHELL, lines], env=home.environment, input="1\n2\n3\n", capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n2\n3\n"


def test_reader_of_the_output_that_ends_early(home: Home) -> None:
    script = f"{home.program} exec job -- yes | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], env=home.environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (141, "y\n", "")
    (run,) = home.runs("job")
    assert (run.phase, run.error, run.exit_code) == ("failed", "killed by signal 13 (SIGPIPE)", 141)


def test_reader_of_standard_error_that_ends_early(home: Home) -> None:
    script = f"{home.program} exec job -- sh -c 'exec yes >&2' 2>&1 >/dev/null | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script], env=home.environment, capture_output=True, text=True, check=False, timeout=30
    )
    assert (done.returncode, done.stdout) == (141, "y\n")
    (run,) = home.runs("job")
    assert (run.phase, run.exit_code) == ("failed", 141)


def test_one_file_for_both_streams_has_all_of_both(home: Home, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = "for i in 1 2 3 4 5 6 7 8 9; do echo out $i; echo err $i >&2; done"
    with log.open("wb") as file:  # not for appending: the position is shared
        home.taskruns("exec", "job", "--", *SHELL, script, stdout=file, stderr=subprocess.STDOUT)
    lines = log.read_text().splitlines()
    for stream in ("out", "err"):
        assert [line for line in lines if line.startswith(stream)] == [f"{stream} {i}" for i in range(1, 10)]
    assert len(lines) == 18


def test_last_words_are_passed_on_before_the_wrapper_ends(home: Home) -> None:
    script = "head -c 60000 /dev/zero | tr '\\0' x >&2; kill -KILL $$"
    done = home.taskruns("exec", "job", "--", *SHELL, script)
    assert done.returncode == 137
    assert done.stderr == "x" * 60000


def test_slow_reader_of_standard_error_gets_all_and_holds_up_no_timeout(home: Home, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = f"echo $$ > {pid}; exec head -c 3000000 /dev/zero >&2"
    with home.start(
        "exec", "job", "--timeout", "0.5s", "--kill-after", "0.3s", "--", *SHELL, script, stderr=subprocess.PIPE
    ) as wrapper:
        until(pid.exists, "the command has started")
        until(lambda: not Path(f"/proc/{pid.read_text().strip()}").exists(), "it is stopped although nobody reads")
        assert wrapper.stderr is not None
        received = len(wrapper.stderr.read())
    assert wrapper.returncode == 124
    assert 64 * 1024 < received < 3000000


def test_quiet_is_quiet(home: Home) -> None:
    done = home.taskruns("exec", "--quiet", "job", "--", "no-such-command")
    assert (done.returncode, done.stdout, done.stderr) == (127, "", "")
    done = home.taskruns("exec", "--quiet", "job", "--", *SHELL, "echo own >&2; exit 1")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "own\n")
    assert [run.error for run in home.runs("job")] == ["command not found: no-such-command", "own"]


@pytest.mark.parametrize(
    ("head", "mode", "status", "error"),
    [
        ("#!/no/such/interpreter\n", 0o755, 127, "command not found"),
        ("#!/bin/sh\n", 0o644, 126, "permission denied"),
    ],
)
def test_file_that_cannot_be_run(home: Home, tmp_path: Path, head: str, mode: int, status: int, error: str) -> None:
    script = tmp_path / "script"
    script.write_text(head)
    script.chmod(mode)
    for command in ("./script", str(script)):
        done = home.taskruns("exec", "job", "--", command, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (status, f"taskruns: {error}: {command}\n")


def test_command_is_looked_for_in_the_path_past_what_cannot_be_run(home: Home, tmp_path: Path) -> None:
    for name, mode in (("first", 0o644), ("second", 0o755)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tool").write_text(f"#!/bin/sh\necho {name}\n")
        (tmp_path / name / "tool").chmod(mode)
    path = home.environment["PATH"]
    home.environment["PATH"] = f"{tmp_path}/first:{tmp_path}/second:{path}"
    assert home.taskruns("exec", "job", "--", "tool").stdout == "second\n"
    home.environment["PATH"] = f"{tmp_path}/first:{path}"
    assert home.taskruns("exec", "job", "--", "tool").returncode == 126


def test_sleep_lasts_as_long_as_it_does(home: Home) -> None:
    home.taskruns("exec", "job", "--", "sleep", "0.3")
    (run,) = home.runs("job")
    assert run.duration is not None
    assert 0.3 <= run.duration.total_seconds() < 0.8


def test_first_of_several_runs_at_once_makes_the_database(home: Home) -> None:
    wrappers = [home.start("exec", "job", "--", "true", stderr=subprocess.PIPE, text=True) for _ in range(5)]
    assert [(wrapper.communicate(timeout=60)[1], wrapper.returncode) for wrapper in wrappers] == [("", 0)] * 5
    assert [(run.attempt, run.phase) for run in home.runs("job")] == [(n, "succeeded") for n in range(1, 6)]


def start(home: Home, *arguments: str) -> "subprocess.Popen[str]":
    """Start a run whose command prints a line first, and wait for that."""
    wrapper = home.start("exec", "job", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert wrapper.stdout is not None
    assert wrapper.stdout.readline() == "up\n"
    return wrapper


WAITS = "i=0; while [ $i -lt 400 ]; do sleep 0.05; i=$((i+1)); done"


def test_every_signal_to_stop_is_passed_on(home: Home) -> None:
    script = f"trap 'echo told' TERM; trap 'echo interrupted; exit 7' INT; echo up; {WAITS}"
    with start(home, "--", *SHELL, script) as wrapper:
        wrapper.terminate()
        assert wrapper.stdout is not None
        assert wrapper.stdout.readline() == "told\n"
        wrapper.send_signal(signal.SIGINT)
        assert wrapper.communicate(timeout=20)[0] == "interrupted\n"
    assert wrapper.returncode == 7
    (run,) = home.runs("job")
    assert (run.phase, run.exit_code) == ("canceled", 7)


def test_command_that_ends_well_when_told_to_stop_is_canceled_with_its_own_status(home: Home) -> None:
    with start(home, "--retries", "1", "--", *SHELL, f"trap 'exit 0' TERM; echo up; {WAITS}") as wrapper:
        wrapper.terminate()
        assert wrapper.wait(20) == 0
    (run,) = home.runs("job")
    assert (run.phase, run.exit_code) == ("canceled", 0)


def test_stop_after_the_time_limit_changes_nothing(home: Home) -> None:
    limits = ("--timeout", "0.3s", "--kill-after", "2s")
    with start(home, *limits, "--", *SHELL, f"trap 'echo told' TERM; echo up; {WAITS}") as wrapper:
        assert wrapper.stdout is not None
        assert wrapper.stdout.readline() == "told\n"  # by the time limit
        wrapper.terminate()
        assert wrapper.wait(20) == 124
    (run,) = home.runs("job")
    assert (run.phase, run.exit_code) == ("timeout", 124)
    assert run.duration is not None
    assert 2.3 <= run.duration.total_seconds() < 4


def test_command_that_obeys_the_time_limit_has_timed_out_all_the_same(home: Home) -> None:
    limits = ("--timeout", "0.3s", "--kill-after", "60s")
    with start(home, *limits, "--", *SHELL, f"trap 'exit 0' TERM; echo up; {WAITS}") as wrapper:
        assert wrapper.wait(20) == 124
    (run,) = home.runs("job")
    assert (run.phase, run.exit_code) == ("timeout", 124)


def test_reload_long_ago_is_not_why_a_command_fails(home: Home) -> None:
    script = "trap 'echo reloaded' HUP; echo up; sleep 0.2; while ! test -e end; do sleep 0.05; done; exit 3"
    with start(home, "--retries", "1", "--backoff", "0s", "--", *SHELL, f"cd {home.path}; {script}") as wrapper:
        wrapper.send_signal(signal.SIGHUP)
        assert wrapper.stdout is not None
        assert wrapper.stdout.readline() == "reloaded\n"
        (home.path / "end").touch()
        wrapper.communicate(timeout=20)
    assert wrapper.returncode == 3
    assert [(run.phase, run.exit_code) for run in home.runs("job")] == [("failed", 3), ("exhausted", 3)]


def test_stopped_wrapper_goes_on_where_it_was(home: Home) -> None:
    with start(home, "--", *SHELL, "echo up; sleep 0.3; exit 3") as wrapper:
        wrapper.send_signal(signal.SIGSTOP)
        time.sleep(0.6)
        assert wrapper.poll() is None
        wrapper.send_signal(signal.SIGCONT)
        assert wrapper.wait(20) == 3


@pytest.mark.soak  # the moments are those of a machine that does nothing else
@pytest.mark.parametrize("count", [6, 200])
def test_stop_at_any_moment_leaves_neither_a_process_nor_an_active_run(home: Home, count: int) -> None:
    home.taskruns("exec", "job", "--", "true")
    seconds = str(random.randint(100_000, 999_999))
    moments = random.Random(count)
    began = time.monotonic()
    home.taskruns("exec", "job", "--", "true")
    usual = time.monotonic() - began
    statuses = []
    for _ in range(count):
        wrapper = home.start("exec", "job", "--", "sleep", seconds, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(usual * 0.3, usual * 1.2))
        wrapper.terminate()
        statuses.append(wrapper.wait(30))
    assert set(statuses) <= {143, -signal.SIGTERM}  # the latter before it minds signals
    assert 143 in statuses
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(seconds.encode() in command for command in commands)
    runs = home.runs("job")
    assert {run.phase for run in runs[:2]} == {"succeeded"}
    assert {(run.phase, run.exit_code) for run in runs[2:]} == {("canceled", 143)}
    assert len(runs) - 2 >= statuses.count(143)


def test_wrapper_that_is_killed_leaves_its_run_to_be_seen(home: Home, tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    script = f"echo up; sleep 0.5; touch {ended}"
    with start(home, "--", *SHELL, script) as wrapper:
        wrapper.kill()
        assert wrapper.wait(10) == -9
    until(ended.exists, "the command has ended by itself")
    assert [run.phase for run in home.runs("job")] == ["running"]
    assert home.taskruns("exec", "job", "--", "true").returncode == 0
    lost, run = home.runs("job")
    assert (lost.phase, lost.recovered) == ("failed", True)
    assert lost.finished_at is not None
    assert lost.started_at <= lost.finished_at < run.started_at
    assert re.fullmatch(r"run outcome not observed \(supervisor .*:\d+ last seen 20.*Z\)", lost.error or "")
    assert run.phase == "succeeded"


def test_program_is_found_as_a_module_too(home: Home) -> None:
    command = [sys.executable, "-m", "taskruns", "exec", "job", "--", *SHELL, "exit 5"]
    done = subprocess.run(command, env=home.environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (5, "", "")
