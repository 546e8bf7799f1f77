"""Whether a process is still there: what identifies it, and asking the system for it. Standard library only."""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Self

STALE_AFTER = 60.0
"""Seconds without a heartbeat after which a supervisor counts as dead where its process cannot be seen."""

ID_BITS = 53
"""Bits of a supervisor's number: as many as a number of JavaScript holds. Drawn at random, none is used twice."""

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told apart from all others: of other hosts, other containers, and from those that had its number.

    A process number means something only in its pid namespace, and only until the next boot. Where the system tells
    neither (it is not Linux), no process can be judged by its number.
    """

    host: str
    boot_id: str | None
    """Changes with each start of the kernel (random(4))."""
    pid_namespace: int | None
    """Differs between containers (pid_namespaces(7))."""
    pid: int
    started: int | None
    """Its start, in clock ticks since boot (proc_pid_stat(5)): the number may be another process's later."""

    @classmethod
    def here(cls) -> Self:
        """Return the running process."""
        pid = os.getpid()
        boot_id = namespace = None
        with suppress(OSError):
            namespace = (_PROC / "self/ns/pid").stat().st_ino
            boot_id = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        state = _state(pid)
        return cls(socket.gethostname(), boot_id, namespace, pid, None if state is None else state[1])

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"

    def is_gone(self, here: "Process") -> bool | None:
        """Whether it has ended; None if that cannot be seen from ``here``."""
        place = (self.boot_id, self.pid_namespace)
        if None in place or self.started is None or place != (here.boot_id, here.pid_namespace):
            return None
        state = _state(self.pid)
        if state is not None:
            return state[0] in "ZX" or state[1] != self.started
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
        return None  # hidden from this user


@dataclass(frozen=True, slots=True)
class Supervisor:
    """A process that records runs, and watches over those that are active."""

    id: int
    source: str
    """What it marks its runs with."""
    stream: bool
    """Whether it records what another process tells of its runs."""
    process: Process
    started_at: datetime
    """When it was registered, by the database's clock: UTC."""
    heartbeat_at: datetime
    """Its last sign of life, by the same clock. It beats only while it has an active run."""
    silence: timedelta
    """How long ago that was when the database was asked, by the same clock: no two clocks are ever compared."""
    active_runs: int
    """How many runs it watches over."""

    def is_dead(self, here: Process, stale_after: float | None = STALE_AFTER) -> bool:
        """Whether its process has ended or, where that cannot be seen, it has been silent for ``stale_after`` seconds.

        None as ``stale_after``: of other hosts silence proves nothing. Of this one it does, for the time before it was
        started anew.
        """
        is_gone = self.process.is_gone(here)
        if is_gone is not None:
            return is_gone
        if stale_after is None:
            return self.process.host == here.host and self.silence.total_seconds() > STALE_AFTER
        return self.silence.total_seconds() > stale_after


def _state(pid: int) -> tuple[str, int] | None:
    """Return the state of a process and its start; None if they cannot be read."""
    try:
        fields = (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
        return fields[0].decode("ascii"), int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
