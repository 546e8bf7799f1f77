"""A command as a child process: its signals, its terminal, its standard error, its time limit. POSIX only."""

import array
import errno
import fcntl
import os
import select
import shutil
import signal
import subprocess
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Self

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Signals that tell the wrapper to stop; the child's whole group gets them, as timeout(1) does it."""

_RELAYED = (*STOPPING, signal.SIGUSR1, signal.SIGUSR2)

TAIL_BYTES = 8 * 1024
"""What is kept of the end of standard error."""

_POLL = 0.02
"""Seconds between looks at what nothing tells about, such as a group of processes that gets empty."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    status: int
    """What a shell would show in ``$?``: 128+N for signal N, 124 for a timeout, 126 and 127 if it did not start."""
    not_started: str | None = None
    """Why it did not start."""
    killed_by: int | None = None
    """The signal that killed it."""
    timed_out: bool = False
    """Whether it was stopped for taking too long."""
    stopped_by: int | None = None
    """The signal by which the wrapper, or the command at its terminal, was told to stop."""
    stderr: str = ""
    """The end of what it wrote to standard error."""


class Signals:
    """The signals of this process as a queue, so that they are handled where the code is ready for them."""

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self.stopped_by: int | None = None
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._handlers = {number: signal.getsignal(number) for number in (*_RELAYED, signal.SIGCHLD, signal.SIGCONT)}
        for number, handler in self._handlers.items():
            # What nohup or a shell has set to be ignored stays so, for the child too.
            if handler is not signal.SIG_IGN or number in (signal.SIGCHLD, signal.SIGCONT):
                signal.signal(number, _noted)
        return self

    def __exit__(self, *_: object) -> None:
        # The pipe stays open: a thread may still wake us, and must not write into whatever gets its number.
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def wait(self, seconds: float | None) -> list[int]:
        """Return the signals that have come, waiting for one; it may return early with none."""
        poll = select.poll()  # select() cannot do with descriptors past 1023, and others may have been inherited
        poll.register(self._reader, select.POLLIN)
        poll.poll(None if seconds is None else seconds * 1000)
        try:
            numbers = list(os.read(self._reader, 4096))
        except BlockingIOError:
            return []
        for number in numbers:
            if number in STOPPING:
                self.stopped_by = number
        return numbers

    def wake(self) -> None:
        """End a wait, from another thread."""
        with suppress(BlockingIOError):
            os.write(self._writer, b"\0")


def _noted(_number: int, _frame: FrameType | None) -> None:
    """Let the wakeup descriptor have the signal."""


def open_standard_streams() -> None:
    """Open those of the descriptors 0 to 2 that are closed, lest a database file becomes some command's output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # noqa: PLR2004  (standard error)
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    signals: Signals,
    *,
    timeout: float | None,
    kill_after: float,
    keep_stderr: bool,
) -> Ended:
    """Run a command in a process group of its own and return how it ended.

    Its streams are this process's. With ``keep_stderr`` standard error passes through a pipe, so that its end can be
    kept. After ``timeout`` seconds the whole group gets SIGTERM, and SIGKILL if any of it is left ``kill_after``
    seconds later.
    """
    stderr = _Stderr() if keep_stderr else None
    try:
        child = _start(command, environment, None if stderr is None else stderr.writer)
    except OSError as error:
        if stderr is not None:
            stderr.finish()
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR) or not command[0]
        reason = "command not found" if missing else (error.strerror or "cannot be run").lower()
        return Ended(127 if missing else 126, not_started=f"{reason}: {command[0]}")
    if stderr is not None:
        stderr.start()
    watch = _Watch(child.pid, signals, timeout, kill_after)
    child.returncode = watch.until_end()
    tail = "" if stderr is None else stderr.finish()
    killed_by = -child.returncode if child.returncode < 0 else None
    status = child.returncode if killed_by is None else 128 + killed_by
    if (signals.stopped_by == signal.SIGINT and status == 0) or (
        signals.stopped_by in (signal.SIGHUP, signal.SIGQUIT) and status != 128 + signals.stopped_by
    ):
        # It has gone on: to many commands these say to drop the current line, to read their configuration anew, or to
        # tell their state.
        signals.stopped_by = None
    stopped_by = signals.stopped_by
    if stopped_by is None and watch.has_terminal:
        # Keys of the terminal reach the command alone, which has its foreground.
        stopped_by = next((key for key in (signal.SIGINT, signal.SIGQUIT) if status == 128 + key), None)
    if watch.timed_out:
        return Ended(124, timed_out=True, stderr=tail)
    return Ended(status, killed_by=killed_by, stopped_by=stopped_by, stderr=tail)


def _start(command: Sequence[str], environment: Mapping[str, str], stderr: int | None) -> "subprocess.Popen[bytes]":
    def start(arguments: Sequence[str]) -> "subprocess.Popen[bytes]":
        # Other descriptors pass through, as under timeout(1): a lock file, for instance. Ours do not: see PEP 446.
        return subprocess.Popen(arguments, env=environment, stderr=stderr, process_group=0, close_fds=False)  # noqa: S603  (its purpose)

    try:
        return start(command)
    except OSError as error:
        script = shutil.which(command[0])
        if error.errno != errno.ENOEXEC or script is None:
            raise
        return start(["/bin/sh", script, *command[1:]])  # a script without #!, as execvp(3) does it


class _Watch:
    """Watches over a running child: passes signals on, keeps to the time limit, follows it when it stops."""

    def __init__(self, pid: int, signals: Signals, timeout: float | None, kill_after: float) -> None:
        self._pid = self._group = pid
        self._signals = signals
        self._kill_after = kill_after
        self._next: float | None = None if timeout is None else time.monotonic() + timeout
        self.timed_out = False
        self._terminal = _Terminal(pid)
        self.has_terminal = os.isatty(0) and self._terminal.give()

    def until_end(self) -> int:
        """Return the exit code, or minus the signal that killed it."""
        while True:
            pid, status = os.waitpid(self._pid, os.WNOHANG | os.WUNTRACED)
            if pid and os.WIFSTOPPED(status):
                self._stopped(os.WSTOPSIG(status))
            elif pid:
                break
            else:
                self._wait()
        if self.timed_out:
            self._clear_group()
        self._terminal.take()
        return os.waitstatus_to_exitcode(status)

    def _wait(self) -> None:
        pause = None if self._next is None else max(0.0, self._next - time.monotonic())
        for number in self._signals.wait(pause):
            self._pass_on(number)
        if self._next is not None and time.monotonic() >= self._next:
            self._time_is_up()

    def _pass_on(self, number: int) -> None:
        if number in STOPPING:
            self._tell_group(number)
            self._tell_group(signal.SIGCONT)
        elif number in _RELAYED:
            with suppress(ProcessLookupError):
                os.kill(self._pid, number)
        elif number == signal.SIGCONT:
            self._resume()

    def _time_is_up(self) -> None:
        if self.timed_out:
            self._tell_group(signal.SIGKILL)
            self._next = None
        else:
            self.timed_out = True
            self._tell_group(signal.SIGTERM)
            self._tell_group(signal.SIGCONT)  # a stopped process would not see the other
            self._next = time.monotonic() + self._kill_after

    def _clear_group(self) -> None:
        """Wait for what the child has left in its group, then kill it, and wait a moment for that."""
        until = self._next
        if until is not None and not self._is_group_gone(until):
            self._tell_group(signal.SIGKILL)
        self._is_group_gone(time.monotonic() + 1)  # what is killed stays as long as nobody reaps it

    def _is_group_gone(self, until: float) -> bool:
        while self._tell_group(0):
            if time.monotonic() >= until:
                return False
            time.sleep(_POLL)
        return True

    def _tell_group(self, number: int) -> bool:
        try:
            os.killpg(self._group, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def _stopped(self, by: int) -> None:
        if by == signal.SIGSTOP:
            return  # somebody did that on purpose, to this process alone
        if by in (signal.SIGTTIN, signal.SIGTTOU) and self._terminal.give():
            self._tell_group(signal.SIGCONT)
            return
        if self._terminal.exists:
            self._terminal.take()
            os.kill(0, by)  # as the terminal would have done, had the whole job been in one group
            time.sleep(_POLL)  # a group that no shell looks after is not stopped: do not spin
            self._resume()

    def _resume(self) -> None:
        if os.isatty(0):
            self._terminal.give()
        self._tell_group(signal.SIGCONT)


class _Terminal:
    """The foreground of the controlling terminal, which the child gets as long as this process's group has it."""

    def __init__(self, group: int) -> None:
        self._group = group
        self.exists = self._move(0, 0) is not None

    def give(self) -> bool:
        """Give the foreground to the child if it is ours to give; whether the child has it."""
        return bool(self._move(os.getpgrp(), self._group))

    def take(self) -> None:
        """Take the foreground back from the child."""
        self._move(self._group, os.getpgrp())

    @staticmethod
    def _move(giver: int, taker: int) -> bool | None:
        try:
            terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
        except OSError:
            return None  # there is no controlling terminal
        # From the background this would stop us.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
        try:
            if os.tcgetpgrp(terminal) == giver:
                os.tcsetpgrp(terminal, taker)
            return os.tcgetpgrp(terminal) == taker
        except OSError:
            return False
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(terminal)


class _Stderr(threading.Thread):
    """Passes the child's standard error on, as it comes, and keeps its end.

    A thread, since a reader that is slow, or a terminal that is held, must not keep signals and time limits waiting.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._reader, self.writer = os.pipe()
        self._stop_reader, self._stop_writer = os.pipe()
        self._tail = bytearray()
        self._is_cut = False

    def start(self) -> None:
        """Begin; the child has its end of the pipe by now."""
        os.close(self.writer)
        super().start()

    def finish(self) -> str:
        """Pass on what the child has written before it ended, and return the end of all it has written.

        Descendants that still hold the pipe are not waited for.
        """
        if self.ident is None:
            os.close(self.writer)
        else:
            os.close(self._stop_writer)
            self.join()
        os.close(self._stop_reader)
        return self._text()

    def run(self) -> None:
        """Pass on until the pipe is closed by all who write to it, or until :meth:`finish`."""
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        poll.register(self._stop_reader, select.POLLIN)
        left: int | None = None
        while left is None or left > 0:
            if left is None and any(descriptor == self._stop_reader for descriptor, _ in poll.poll()):
                left = self._in_pipe()
                continue
            chunk = os.read(self._reader, 65536 if left is None else min(left, 65536))
            if not chunk or not self._pass_on(chunk):
                break
            left = None if left is None else left - len(chunk)
        os.close(self._reader)  # so that writers see what they would have seen without us between

    def _in_pipe(self) -> int:
        count = array.array("i", [0])
        fcntl.ioctl(self._reader, termios.FIONREAD, count)
        return count[0]

    def _pass_on(self, chunk: bytes) -> bool:
        self._tail += chunk
        if len(self._tail) > 16 * TAIL_BYTES:
            del self._tail[:-TAIL_BYTES]
            self._is_cut = True
        rest = memoryview(chunk)
        while rest:
            try:
                rest = rest[os.write(2, rest) :]
            except BlockingIOError:
                select.select([], [2], [])
            except OSError:
                return False
        return True

    def _text(self) -> str:
        tail = bytes(self._tail)
        if len(tail) > TAIL_BYTES:
            tail, self._is_cut = tail[-TAIL_BYTES:], True
        text = tail.decode(errors="replace")
        if self._is_cut:
            # Half a line says little, and might be the half of a URL that shows its password.
            text = "[...]\n" + (text.partition("\n")[2] or text.partition(" ")[2] or text)
        return text.strip()
