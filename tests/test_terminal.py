"""`taskruns exec` on a terminal, as a shell with job control runs it."""

import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Home

CTRL_C, CTRL_Z, CTRL_BACKSLASH = b"\x03", b"\x1a", b"\x1c"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


class Terminal:
    """An interactive bash on a pseudo-terminal."""

    def __init__(self, home: Home) -> None:
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            environment = {**home.environment, "PS1": "ready> ", "TERM": "dumb"}
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "--noediting", "-i"], environment)
        self.seen = ""
        self.expect("ready> ")
        self.send("stty -echo\n")
        self.expect("ready> ")

    def send(self, data: str | bytes) -> None:
        os.write(self._master, data.encode() if isinstance(data, str) else data)

    def expect(self, pattern: str, seconds: float = 15) -> "re.Match[str]":
        """Read until the pattern appears, and forget what was read up to its end."""
        deadline = time.monotonic() + seconds
        while (match := re.search(pattern, self.seen)) is None:
            left = deadline - time.monotonic()
            assert left > 0, f"no {pattern!r} in {self.seen!r}"
            if select.select([self._master], [], [], left)[0]:
                self.seen += os.read(self._master, 65536).decode(errors="replace")
        self.seen = self.seen[match.end() :]
        return match

    def status(self) -> int:
        """Return the exit status of the last command, once the shell is ready again."""
        self.expect("ready> ")
        self.send("echo status=$?\n")
        return int(self.expect(r"status=(\d+)")[1])

    def foreground(self) -> int:
        return os.tcgetpgrp(self._master)

    def close(self) -> None:
        os.close(self._master)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def terminal(home: Home) -> Iterator[Terminal]:
    terminal = Terminal(home)
    yield terminal
    terminal.close()


def phases(home: Home) -> list[str]:
    return [run.phase for run in home.runs("job")]


def test_command_has_the_foreground_and_reads_a_line(home: Home, terminal: Terminal) -> None:
    # Whoever reads has waited for the foreground, which comes a moment after the start.
    script = (
        "import os; name = input('name? '); print(os.isatty(0), os.isatty(1), os.tcgetpgrp(0) == os.getpgrp(), name)"
    )
    terminal.send(f'{home.program} exec job -- {sys.executable} -c "{script}"\n')
    terminal.expect(r"name\? ")
    terminal.send("sun\n")
    terminal.expect("True True True sun")
    assert terminal.status() == 0
    assert terminal.foreground() == os.getpgid(terminal.pid)
    assert phases(home) == ["succeeded"]


@pytest.mark.parametrize(
    ("key", "status", "error"),
    [
        (CTRL_C, 130, "stopped by signal 2 (SIGINT)"),
        (CTRL_BACKSLASH, 131, "stopped by signal 3 (SIGQUIT)"),
    ],
)
def test_keys_that_stop(home: Home, terminal: Terminal, key: bytes, status: int, error: str) -> None:
    terminal.send(f"ulimit -c 0; {home.program} exec job --retries 2 -- sh -c 'echo on its way; exec sleep 60'\n")
    terminal.expect("on its way")
    terminal.send(key)
    assert terminal.status() == status
    (run,) = home.runs("job")
    assert (run.phase, run.error, run.exit_code) == ("canceled", error, status)


def test_command_that_survives_ctrl_c_succeeds(home: Home, terminal: Terminal) -> None:
    terminal.send(
        f"{home.program} exec job -- bash -c 'trap \"echo not now\" INT; echo on its way; read line; echo got $line'\n"
    )
    terminal.expect("on its way")
    terminal.send(CTRL_C)
    terminal.expect("not now")
    terminal.send("more\n")
    terminal.expect("got more")
    assert terminal.status() == 0
    assert phases(home) == ["succeeded"]


def test_ctrl_z_stops_the_job_and_fg_continues_it(home: Home, terminal: Terminal) -> None:
    terminal.send(f"{home.program} exec job -- bash -c 'echo on its way; read line; echo got $line'\n")
    terminal.expect("on its way")
    terminal.send(CTRL_Z)
    terminal.expect("Stopped")
    assert terminal.status() == 128 + signal.SIGTSTP
    assert terminal.foreground() == os.getpgid(terminal.pid)
    terminal.send("fg\n")
    terminal.expect("exec job")
    terminal.send("again\n")
    terminal.expect("got again")
    assert terminal.status() == 0
    assert phases(home) == ["succeeded"]


def test_background_job_that_reads_stops_until_it_is_in_front(home: Home, terminal: Terminal) -> None:
    terminal.send(f"{home.program} exec job -- bash -c 'read line; echo got $line' &\n")
    terminal.expect("ready> ")
    terminal.send("until jobs | grep Stopped; do sleep 0.1; done\n")
    terminal.expect("Stopped")
    terminal.expect("ready> ")
    terminal.send("fg\n")
    terminal.expect("exec job")
    terminal.send("at last\n")
    terminal.expect("got at last")
    assert terminal.status() == 0


def test_pipeline_of_which_it_is_a_part(home: Home, terminal: Terminal) -> None:
    terminal.send(f"{home.program} exec job -- bash -c 'read line; echo $line' | tr a-z A-Z\n")
    time.sleep(1.5)
    terminal.send("shout\n")
    terminal.expect("SHOUT")
    assert terminal.status() == 0


def test_ctrl_c_while_standard_input_is_a_file(home: Home, terminal: Terminal) -> None:
    terminal.send(f"{home.program} exec job -- sh -c 'echo on its way; exec sleep 60' </dev/null\n")
    terminal.expect("on its way")
    terminal.send(CTRL_C)
    assert terminal.status() == 130
    assert phases(home) == ["canceled"]


def test_password_is_read_from_the_terminal_although_standard_input_is_a_file(home: Home, terminal: Terminal) -> None:
    terminal.send(f"{home.program} exec job -- bash -c 'read line </dev/tty; echo got $line' </dev/null\n")
    time.sleep(1.5)
    terminal.send("secret\n")
    terminal.expect("got secret")
    assert terminal.status() == 0
