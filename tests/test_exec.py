"""Real commands under `taskruns exec`."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Home

from taskruns import TaskPhase

SHELL = ("sh", "-c")
PYTHON = (sys.executable, "-c")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def until(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def outcomes(home: Home, task: str) -> list[tuple[str, str | None, int | None]]:
    return [(run.phase, run.error, run.exit_code) for run in home.runs(task)]


@pytest.mark.parametrize("megabytes", [4, pytest.param(100, marks=pytest.mark.soak)])
def test_both_streams_pass_byte_for_byte_and_memory_stays_flat(home: Home, tmp_path: Path, megabytes: int) -> None:
    script = f"""
import os, threading
def write(descriptor):
    for number in range({megabytes} * 16):
        data = memoryview(bytes([number % 251]) * 65535 + b"\\n")
        while data:
            data = data[os.write(descriptor, data):]
writers = [threading.Thread(target=write, args=(descriptor,)) for descriptor in (1, 2)]
[writer.start() for writer in writers]
[writer.join() for writer in writers]
"""
    peaks = {}
    for size in ("none", "much"):
        command = [*PYTHON, script if size == "much" else "pass"]
        with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
            wrapper = home.start("exec", "loud", "--", *command, stdout=out, stderr=err)
            _, _, usage = os.wait4(wrapper.pid, 0)
            wrapper.returncode = 0
        peaks[size] = usage.ru_maxrss
    expected = hashlib.sha256(b"".join(bytes([n % 251]) * 65535 + b"\n" for n in range(megabytes * 16))).hexdigest()
    for stream in ("out", "err"):
        assert hashlib.sha256((tmp_path / stream).read_bytes()).hexdigest() == expected
    assert peaks["much"] - peaks["none"] < 8 * 1024, f"KiB: {peaks}"
    assert [phase for phase, _, _ in outcomes(home, "loud")] == ["succeeded", "succeeded"]


def test_input_passes(home: Home) -> None:
    done = home.taskruns("exec", "sum", "--", "sha256sum", input="some text\n")
    assert done.stdout.split()[0] == hashlib.sha256(b"some text\n").hexdigest()


def test_status_and_the_end_of_standard_error_are_recorded(home: Home) -> None:
    done = home.taskruns("exec", "job", "--", *SHELL, "echo fine; echo first >&2; echo last >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "fine\n", "first\nlast\n")
    assert outcomes(home, "job") == [("failed", "first\nlast", 3)]


def test_failure_without_a_word_gets_a_sentence(home: Home) -> None:
    assert home.taskruns("exec", "job", "--", "false").returncode == 1
    assert outcomes(home, "job") == [("failed", "exited with status 1", 1)]


def test_death_by_a_signal(home: Home) -> None:
    assert home.taskruns("exec", "job", "--", *SHELL, "kill -KILL $$").returncode == 137
    assert outcomes(home, "job") == [("failed", "killed by signal 9 (SIGKILL)", 137)]


@pytest.mark.parametrize(
    ("command", "status", "error"),
    [
        ("no-such-command", 127, "command not found: no-such-command"),
        ("/no/such/file", 127, "command not found: /no/such/file"),
        ("/etc/passwd", 126, "permission denied: /etc/passwd"),
        ("/etc", 126, "permission denied: /etc"),
        ("", 127, "command not found: "),
    ],
)
def test_command_that_does_not_start(home: Home, command: str, status: int, error: str) -> None:
    done = home.taskruns("exec", "job", "--", command)
    assert (done.returncode, done.stderr) == (status, f"taskruns: {error}\n")
    assert outcomes(home, "job") == [("failed", error, status)]


def test_script_without_an_interpreter_line_is_run_by_sh(home: Home, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("echo from $1\n")
    script.chmod(0o755)
    assert home.taskruns("exec", "job", "--", str(script), "sh").stdout == "from sh\n"


def test_timeout_clears_the_whole_group(home: Home, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"trap '' TERM; (trap '' TERM; sleep 60) & echo $! $$ > {pids}; while :; do sleep 60 & wait; done"
    done = home.taskruns("exec", "job", "--timeout", "0.5s", "--kill-after", "0.5s", "--", *SHELL, script)
    assert done.returncode == 124
    assert not any(is_alive(int(pid)) for pid in pids.read_text().split())
    ((phase, error, code),) = outcomes(home, "job")
    assert (phase, error, code) == ("timeout", "timed out after 0.5 s", 124)
    (run,) = home.runs("job")
    assert run.duration is not None
    assert 1.0 <= run.duration.total_seconds() < 3


def test_timeout_kills_what_the_command_leaves_behind(home: Home, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"(trap '' TERM; exec sleep 60) & echo $! > {pids}; echo working >&2; wait"
    done = home.taskruns("exec", "job", "--timeout", "0.5", "--kill-after", "0.3", "--", *SHELL, script)
    assert done.returncode == 124
    assert not is_alive(int(pids.read_text()))
    assert outcomes(home, "job") == [("timeout", "timed out after 0.5 s\nworking", 124)]


def test_daemon_that_holds_standard_error_is_not_waited_for(home: Home) -> None:
    began = time.monotonic()
    done = home.taskruns("exec", "job", "--", *SHELL, "echo before >&2; setsid sleep 30 >/dev/null & exit 5")
    assert (done.returncode, done.stderr) == (5, "before\n")
    assert time.monotonic() - began < 10
    assert outcomes(home, "job") == [("failed", "before", 5)]


def test_retries_until_success(home: Home) -> None:
    script = "echo $TASKRUNS_TASK $TASKRUNS_ATTEMPT $TASKRUNS_TRY; echo try $TASKRUNS_TRY >&2; test $TASKRUNS_TRY = 3"
    home.taskruns("exec", "job", "--", "true")
    done = home.taskruns("exec", "job", "--retries", "3", "--backoff", "0.1s", "--", *SHELL, script)
    assert (done.returncode, done.stdout) == (0, "job 2 1\njob 3 2\njob 4 3\n")
    first, *tries = home.runs("job")
    assert [(run.phase, run.error, run.source_attempt) for run in tries] == [
        ("failed", "try 1", 1),
        ("failed", "try 2", 2),
        ("succeeded", None, 3),
    ]
    assert first.submission is None
    assert tries[0].submission
    assert len({run.submission for run in tries}) == 1


def test_retries_used_up(home: Home) -> None:
    began = time.monotonic()
    done = home.taskruns("exec", "job", "--retries", "3", "--backoff", "0.2s..0.4s", "--", *SHELL, "exit 9")
    assert done.returncode == 9
    assert time.monotonic() - began > 0.2 + 0.4 + 0.4
    assert [(phase, code) for phase, _, code in outcomes(home, "job")] == [("failed", 9)] * 3 + [("exhausted", 9)]


def test_retry_that_times_out(home: Home) -> None:
    script = "test $TASKRUNS_TRY = 1 && exit 1; sleep 30"
    options = ("--retries", "1", "--backoff", "0.1", "--timeout", "0.4")
    assert home.taskruns("exec", "job", *options, "--", *SHELL, script).returncode == 124
    assert [phase for phase, _, _ in outcomes(home, "job")] == ["failed", "timeout"]


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "QUIT"])
def test_stopped_by_a_signal(home: Home, tmp_path: Path, name: str) -> None:
    number = signal.Signals[f"SIG{name}"]
    pids = tmp_path / "pids"
    script = f"sleep 60 & echo $! $$ > {pids}.new; mv {pids}.new {pids}; wait; exit"
    wrapper = home.start("exec", "job", "--retries", "2", "--", *SHELL, script)
    until(pids.exists, "the command has started")
    wrapper.send_signal(number)
    assert wrapper.wait(20) == 128 + number
    shell = int(pids.read_text().split()[1])
    assert not is_alive(shell)
    ((phase, error, code),) = outcomes(home, "job")
    assert (phase, code) == ("canceled", 128 + number)
    assert error == f"stopped by signal {number} (SIG{name})"
    background = int(pids.read_text().split()[0])
    if is_alive(background):  # a shell lets what it starts with & ignore INT and QUIT
        os.kill(background, signal.SIGKILL)


def test_stop_is_told_to_the_whole_group(home: Home, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"{sys.executable} -c 'import time; time.sleep(60)' & echo $! > {pids}.new; mv {pids}.new {pids}; wait"
    wrapper = home.start("exec", "job", "--", *SHELL, script)
    until(pids.exists, "the command has started")
    wrapper.terminate()
    assert wrapper.wait(20) == 143
    until(lambda: not is_alive(int(pids.read_text())), "the grandchild is gone")


def test_stopped_while_waiting_for_a_retry(home: Home, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    wrapper = home.start("exec", "job", "--retries", "5", "--backoff", "60s", "--", *SHELL, f"touch {ran}; exit 1")
    until(lambda: ran.exists() and [run.phase for run in home.runs("job")] == ["failed"], "the first try")
    time.sleep(0.2)
    wrapper.terminate()
    assert wrapper.wait(10) == 143
    assert [run.phase for run in home.runs("job")] == ["failed"]


def test_hangup_that_the_command_takes_as_a_request_to_reload(home: Home, tmp_path: Path) -> None:
    ready, seen = tmp_path / "ready", tmp_path / "seen"
    script = f"trap 'touch {seen}' HUP; touch {ready}; until test -e {seen}; do sleep 0.05; done; true"
    wrapper = home.start("exec", "job", "--", *SHELL, script)
    until(ready.exists, "the command is ready")
    wrapper.send_signal(signal.SIGHUP)
    assert wrapper.wait(20) == 0
    assert outcomes(home, "job") == [("succeeded", None, 0)]


@pytest.mark.parametrize("name", ["USR1", "USR2"])
def test_user_signals_reach_the_command_alone(home: Home, tmp_path: Path, name: str) -> None:
    ready, seen = tmp_path / "ready", tmp_path / "seen"
    script = f"sleep 60 & trap 'kill -0 $! && touch {seen}; kill $!' {name}; touch {ready}; wait; wait; test -e {seen}"
    wrapper = home.start("exec", "job", "--", *SHELL, script)
    until(ready.exists, "the command is ready")
    wrapper.send_signal(signal.Signals[f"SIG{name}"])
    assert wrapper.wait(20) == 0
    assert outcomes(home, "job") == [("succeeded", None, 0)]


def test_hangup_that_is_ignored_stays_ignored(home: Home) -> None:
    mask = 1 << (signal.SIGHUP - 1)
    ignored = r"int(re.search('SigIgn:\s*(.*)', open('/proc/self/status').read())[1], 16)"
    script = f"import re; print(bool({ignored} & {mask}))"
    for prefix, expected in ((["nohup"], "True\n"), ([], "False\n")):
        command = [*prefix, home.program, "exec", "job", "--", *PYTHON, script]
        done = subprocess.run(
            command, env=home.environment, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
        )
        assert done.stdout == expected


def test_overlapping_runs_keep_their_own_times(home: Home) -> None:
    home.taskruns("exec", "job", "--", "true")
    long = home.start("exec", "job", "--", "sleep", "2")
    until(lambda: len(home.runs("job")) == 2, "the long run has started")
    home.taskruns("exec", "job", "--", "sleep", "0.3")
    assert long.wait(20) == 0
    _, first, second = (run.duration for run in home.runs("job"))
    assert first is not None
    assert 2.0 <= first.total_seconds() < 3.0
    assert second is not None
    assert 0.3 <= second.total_seconds() < 1.0


@pytest.mark.parametrize("count", [6, pytest.param(16, marks=pytest.mark.soak)])
def test_one_of_many_that_must_not_overlap_starts(home: Home, tmp_path: Path, count: int) -> None:
    home.taskruns("exec", "other", "--", "true")
    gate = tmp_path / "gate"
    command = ("exec", "job", "--no-overlap", "--", *SHELL, f"until test -e {gate}; do sleep 0.1; done; echo ran")
    wrappers = [home.start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(count)]
    until(lambda: sum(wrapper.poll() is not None for wrapper in wrappers) == count - 1, "all but one are refused", 60)
    gate.touch()
    results = [(wrapper.communicate(timeout=20), wrapper.returncode) for wrapper in wrappers]
    assert sorted(status for _, status in results) == [0] + [1] * (count - 1)
    assert [out for (out, _), _ in results if out] == ["ran\n"]
    assert all("job is running already: attempt 1" in err for (_, err), status in results if status)
    assert [run.phase for run in home.runs("job")] == ["succeeded"]


def test_overlap_has_the_status_that_was_asked_for(home: Home, tmp_path: Path) -> None:
    started = tmp_path / "started"
    running = home.start("exec", "job", "--", *SHELL, f"touch {started}; exec sleep 60")
    until(started.exists, "the first one runs")
    done = home.taskruns("exec", "job", "--no-overlap", "--conflict-exit-code", "75", "-q", "--", "echo", "no")
    assert (done.returncode, done.stdout, done.stderr) == (75, "", "")
    running.terminate()
    running.wait(20)
    assert home.taskruns("exec", "job", "--no-overlap", "--", "echo", "yes").stdout == "yes\n"


def test_standard_error_that_is_left_to_the_command(home: Home, tmp_path: Path) -> None:
    script = "import os; print(os.path.samefile('/proc/self/fd/2', 'err')); raise SystemExit(4)"
    with (tmp_path / "err").open("wb") as err:
        done = home.taskruns(
            "exec", "job", "--error", "none", "--", *PYTHON, script, cwd=tmp_path, stdout=subprocess.PIPE, stderr=err
        )
    assert (done.returncode, done.stdout) == (4, "True\n")
    assert outcomes(home, "job") == [("failed", "exited with status 4", 4)]


def test_error_is_bounded_and_shows_no_half_of_a_password(home: Home) -> None:
    url = r"printf 'postgres://user:%0100000d@host/x\n' 7"
    script = rf"{{ {url}; printf 'x%.0s' $(seq 7900); printf '\nend\0 \377 \n'; }} >&2; exit 1"
    home.taskruns("exec", "job", "--", "bash", "-c", script, stderr=subprocess.DEVNULL)
    ((_, error, _),) = outcomes(home, "job")
    assert error is not None
    assert error.startswith("[...]\nxxx")
    assert error.endswith("x\nend\ufffd \ufffd")
    assert "0007" not in error


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(home: Home, closed: str) -> None:
    line = f"{home.program} exec job -- sh -c 'echo out; echo err >&2; exit 6' {closed}"
    done = subprocess.run(["sh", "-c", line], env=home.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 6
    assert done.stdout == ("" if ">&-" in closed.replace("2>&-", "") else "out\n")
    ((phase, error, code),) = outcomes(home, "job")
    assert (phase, error, code) == ("failed", "err", 6)


def test_other_descriptors_pass(home: Home) -> None:
    reader, writer = os.pipe()
    home.taskruns("exec", "job", "--", "bash", "-c", f"echo through >&{writer}", pass_fds=[writer])
    os.close(writer)
    with os.fdopen(reader) as passed:
        assert passed.read() == "through\n"


def test_what_follows_the_dashes_is_literal(home: Home) -> None:
    command = ("printf", "%s|", "--timeout", "--", "-q", "$HOME", "*", "a b", "")
    assert home.taskruns("exec", "job", "--", *command).stdout == "--timeout|--|-q|$HOME|*|a b||"


@pytest.mark.parametrize(
    "arguments",
    [
        ("exec",),
        ("exec", "job"),
        ("exec", "job", "--"),
        ("exec", "job", "--bogus", "--", "true"),
        ("exec", "job", "--timeout", "soon", "--", "true"),
        ("exec", "job", "--backoff", "9s..1s", "--", "true"),
        ("exec", "job", "--retries", "-1", "--", "true"),
        ("exec", " job", "--", "true"),
        ("exec", "a\nb", "--", "true"),
        ("exec", "j" * 256, "--", "true"),
        ("exec", "job", "--error", "all", "--", "true"),
    ],
)
def test_wrong_usage_is_one_line_and_125(home: Home, arguments: tuple[str, ...]) -> None:
    done = home.taskruns(*arguments)
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith("taskruns: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "task", ["it's", 'a "b"', "50%", "%s", "\\", "🦊", "'; DROP TABLE task_runs; --", "[*]", "a" * 255]
)
def test_odd_task_ids(home: Home, task: str) -> None:
    done = home.taskruns("exec", task, "--", "true")
    assert (done.returncode, done.stderr) == (0, "")
    assert [run.task_id for run in home.runs(task)] == [task]


def test_an_interrupted_write_of_the_wrapper_leaves_the_command_alone(home: Home, tmp_path: Path) -> None:
    started, ended = tmp_path / "started", tmp_path / "ended"
    wrapper = home.start("exec", "job", "--", *SHELL, f"touch {started}; sleep 0.5; touch {ended}")
    until(started.exists, "the command has started")
    wrapper.kill()
    wrapper.wait(10)
    until(ended.exists, "the command has ended by itself")
    assert [run.phase for run in home.runs("job")] == [TaskPhase.RUNNING]


def test_environment_of_a_nested_run_is_its_own(home: Home) -> None:
    show = "echo $TASKRUNS_TASK $TASKRUNS_ATTEMPT"
    inner = f"{home.program} exec inner -- sh -c '{show}'; {show}"
    home.taskruns("exec", "inner", "--", "true")
    assert home.taskruns("exec", "outer", "--", *SHELL, inner).stdout == "inner 2\nouter 1\n"


def test_the_history_is_read_as_it_was_written(home: Home) -> None:
    home.taskruns("exec", "job", "--", *SHELL, "exit 2")
    (line,) = home.taskruns("runs", "job", "--json").stdout.splitlines()
    wire = json.loads(line)
    assert (wire["taskId"], wire["attempt"], wire["phase"], wire["exitCode"]) == ("job", 1, "failed", 2)


def test_options_of_the_command_are_its_own_without_the_dashes_too(home: Home) -> None:
    done = home.taskruns("exec", "-q", "job", "--timeout", "60", "printf", "%s|", "-q", "--timeout", "x")
    assert (done.returncode, done.stdout) == (0, "-q|--timeout|x|")
