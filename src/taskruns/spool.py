"""What could not be written to a database, kept in files until it can be: ``taskruns.replay`` writes it then.

A file is JSON lines: a header, then events as in docs/events.md, each with its ``source``. Those of a recorded run have
``startedAt`` too, which identifies it together with the task, the source, ``id`` and ``attempt`` (its submission and
its source attempt), and ``run``, its number, if it was opened in the database. A file belongs to the process that holds
its lock, and nobody else touches it: as long as a start in it has no end yet.
"""

import errno
import hashlib
import json
import os
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

from sqlalchemy import URL

from taskruns.liveness import Process
from taskruns.model import Outcome, TaskPhase, TaskRun, clean_error
from taskruns.times import rfc3339
from taskruns.url import hide_password, is_file, is_in_memory

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

VERSION = 1
"""What the header of a file says of its form."""

MAX_FILE = 64 * 1024 * 1024
"""Bytes of one file, but for the ends of runs whose starts are in it."""

MAX_ALL = 4 * MAX_FILE
"""Bytes of the files of one database; likewise."""

STARTED, FORGOTTEN = "TaskStarting", "StartForgotten"

KINDS = {
    TaskPhase.SUCCEEDED: "TaskStopped",
    TaskPhase.FAILED: "TaskFailed",
    TaskPhase.TIMEOUT: "TimeoutHit",
    TaskPhase.CANCELED: "TaskCanceled",
    TaskPhase.EXHAUSTED: "ActorExhausted",
}

Identity = tuple[str, str | None, str | None, int | None, datetime]


def identity_of(run: TaskRun) -> Identity:
    """Return what tells a run from all others before the database has given it a number."""
    return run.task_id, run.source, run.submission, run.source_attempt, run.started_at


def directory() -> Path:
    """Return the directory of the files: TASKRUNS_STATE_DIR, else that of the systemd unit, else the user's own."""
    if named := os.environ.get("TASKRUNS_STATE_DIR"):
        return Path(named).absolute() / "spool"
    if of_unit := os.environ.get("STATE_DIRECTORY"):
        return Path(of_unit.split(":")[0]) / "taskruns" / "spool"
    from platformdirs import user_state_path  # noqa: PLC0415  (only where it is asked for)

    try:
        path = user_state_path("taskruns") / "spool"
    except RuntimeError:
        path = Path()
    if not path.is_absolute():
        raise OSError(errno.ENOENT, "there is no home directory: name one by TASKRUNS_STATE_DIR")
    return path


def has_spool(url: URL) -> bool:
    """Whether anything can be kept for a database: one in memory is gone before it could be replayed."""
    return not is_in_memory(url)


def files(url: URL) -> list[Path]:
    """Return the files of a database, the oldest first."""
    return _files(_key(_plain(url))) if has_spool(url) else []


def _files(key: str) -> list[Path]:
    with suppress(OSError):
        return sorted(path for path in directory().iterdir() if path.name.startswith(key) and path.suffix == ".jsonl")
    return []


def rejected(url: URL) -> list[Path]:
    """Return the files of lines that could not be replayed into a database."""
    with suppress(OSError):
        return sorted(directory().glob(f"{_key(_plain(url))}-*.rejected"))
    return []


def _made_at(path: Path) -> int:
    return int(path.name.split("-")[1])


def _marker(key: str) -> Path:
    return directory() / f"{key}.told"


def _plain(url: URL) -> URL:
    """Return the URL without what does not change which database it is: driver, user, options, the usual port."""
    backend = url.get_backend_name().replace("mariadb", "mysql")
    if backend == "sqlite":
        return url.set(drivername=backend, query={} if is_file(url) else url.query)
    place = {name: value for name, value in url.query.items() if name in _PLACES}
    port = None if url.port == _PORTS.get(backend) else url.port
    return URL.create(backend, host=url.host, port=port, database=url.database, query=place)


_PORTS = {"postgresql": 5432, "mysql": 3306}
_PLACES = ("host", "port", "dbname", "service", "unix_socket", "options")


def _key(plain: URL) -> str:
    return hashlib.sha256(hide_password(plain).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Waiting:
    """A file that waits to be replayed."""

    path: Path
    database: str
    """The URL without its password."""
    events: int
    oldest: datetime
    """When the file was made."""
    is_alive: bool
    """Whether it belongs to a living process."""


def waiting(url: URL | None = None) -> list[Waiting]:
    """Return what is kept for a database, or for all of them."""
    found = []
    for path in _files("") if url is None else files(url):
        with suppress(OSError, ValueError, TypeError, IndexError, KeyError):  # replayed just now, or none of ours
            with path.open("rb") as file:
                database = json.loads(file.readline())["db"]
                events = sum(line.endswith(b"\n") for line in file)
            made = datetime.fromtimestamp(_made_at(path) / 1e9, UTC)
            descriptor = take(path)
            if descriptor is not None:
                release(descriptor)
            found.append(Waiting(path, database, events, made, descriptor is None))
    return found


class Spool:
    """Keeps what this process could not write to a database. May be shared between threads.

    What is added is on disk when a call returns. Each call may raise OSError, and then has added nothing: the disk is
    full, or more would exceed ``MAX_FILE`` or ``MAX_ALL``. A forked child keeps files of its own.
    """

    def __init__(self, url: URL, number: Callable[[], int | None] = lambda: None) -> None:
        """Keep what is for the database of a URL; ``number`` returns that of the supervisor that this process is."""
        self._number = number
        self._has_spool = has_spool(url)
        self._key = _key(_plain(url))
        self._database = hide_password(_plain(url))
        self.begin_anew()
        _spools.add(self)

    def begin_anew(self) -> None:
        """Begin with no file: another process has them, of which this one is a fork."""
        self._header = b""
        self._guard = threading.Lock()
        self._own: list[Path] = []
        self._path: Path | None = None
        self._descriptor: int | None = None  # of the file, while it is locked
        self._starts: dict[Identity, tuple[int, int]] = {}  # those without an end, and where they stand in the file

    @property
    def path(self) -> Path | None:
        """The file to which was added last."""
        return self._path

    def is_news(self) -> bool:
        """Whether nobody has been told yet that something is kept for this database; from now on somebody has."""
        marker = _marker(self._key)
        with suppress(OSError):
            kept = _files(self._key)
            if marker.exists() and kept and marker.stat().st_mtime_ns < _made_at(kept[0]):
                marker.unlink(missing_ok=True)  # of an outage before
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY, stat.S_IRUSR | stat.S_IWUSR))
            return True
        return not marker.exists()

    def remaining(self) -> int:
        """Return how many bytes of what was added here are still to be replayed."""
        size, left = 0, []
        for path in self._own:
            with suppress(FileNotFoundError):
                size += path.stat().st_size
                left.append(path)
        self._own = left
        return size

    def add_start(self, run: TaskRun) -> TaskRun:
        """Keep the start of a run, whose number here means nothing, and return the run as it is kept.

        It starts a microsecond later where another run of the task would otherwise be taken for it.
        """
        with self._mine():
            while identity_of(run) in self._starts:
                run = replace(run, started_at=run.started_at + timedelta(microseconds=1))
            self._starts[identity_of(run)] = self._append(_line(run, STARTED, run.started_at))
        return run

    def add_end(self, run: TaskRun, outcome: Outcome, *, attempt: int | None = None) -> None:
        """Keep the end of a run: of one whose start was kept, or of one that the database has as ``attempt``."""
        more = {
            "reason": outcome.error,
            "exitCode": outcome.exit_code,
            "durationMs": max(outcome.finished_at - run.started_at, timedelta()) // timedelta(milliseconds=1),
            "run": attempt,
        }
        line = _line(run, KINDS[outcome.phase], outcome.finished_at, more)
        with self._mine():
            self._append(line, is_capped=identity_of(run) not in self._starts)
            self._starts.pop(identity_of(run), None)

    def add_events(self, source: str, wires: Sequence[Mapping[str, Any]]) -> None:
        """Keep events of a stream, as they were told, each with its ``at``."""
        lines = []
        for wire in wires:
            told = {name: value for name, value in wire.items() if not isinstance(value, dict | list)}  # unknown keys
            told.pop("startedAt", None)
            if isinstance(told.get("reason"), str):
                told["reason"] = clean_error(told["reason"])  # as it would be stored: without passwords
            lines.append(_encoded(told | {"source": source}))
        with self._mine():
            self._append(b"".join(lines))

    def forget(self, run: TaskRun) -> None:
        """Take a start back, as the database has it after all; nothing if it was not kept, or has its end."""
        with self._mine():
            place = self._starts.pop(identity_of(run), None)
            if place is None or self._descriptor is None:
                return
            begin, end = place
            if os.fstat(self._descriptor).st_size > end:
                self._append(_line(run, FORGOTTEN, run.started_at), is_capped=False)
            elif begin == len(self._header):
                self._remove()
            else:
                os.ftruncate(self._descriptor, begin)
                os.fsync(self._descriptor)

    @contextmanager
    def _mine(self) -> Iterator[None]:
        """Keep other threads out and, in the end, the lock of the file only while a start in it has no end."""
        with self._guard:
            try:
                yield
            finally:
                if not self._starts and self._descriptor is not None:
                    release(self._descriptor)
                    self._descriptor = None

    def _append(self, data: bytes, *, is_capped: bool = True) -> tuple[int, int]:
        """Add lines, or nothing if that fails, and return where they begin and end."""
        if not self._has_spool:
            raise OSError(errno.ENOTSUP, "nothing is kept for a database in memory")
        if is_capped:
            self._check_room(len(data))
        descriptor = self._taken()
        is_new = descriptor is None
        if descriptor is None:
            descriptor = self._make()
        begin = os.fstat(descriptor).st_size
        self._header = self._header or _encoded(
            {
                "spool": VERSION,
                "db": self._database,
                "process": asdict(Process.here()),
                "supervisor": self._number(),
            }
        )
        header = self._header if is_new else b""
        try:
            _write(descriptor, header + data)
            os.fsync(descriptor)
            if is_new:
                _sync_directory(directory())
        except BaseException:
            if is_new:
                self._remove()
            else:
                with suppress(OSError):
                    os.ftruncate(descriptor, begin)
            raise
        begin += len(header)
        return begin, begin + len(data)

    def _check_room(self, size: int) -> None:
        used = 0
        for path in _files(self._key):
            with suppress(OSError):
                used += path.stat().st_size
        if used + size > MAX_ALL:
            raise OSError(errno.ENOSPC, f"the spool of this database is full, it holds {used >> 20} MiB")
        own = 0
        with suppress(OSError):
            own = 0 if self._path is None else self._path.stat().st_size
        if own + size > MAX_FILE:
            if self._starts:  # whose ends belong into the same file
                raise OSError(errno.ENOSPC, f"the spool of this process is full, it holds {own >> 20} MiB")
            self._path = None

    def _taken(self) -> int | None:
        """Return the file, locked; None if there is none, or it is being replayed, with which it comes to its end."""
        if self._descriptor is None and self._path is not None:
            self._descriptor = take(self._path)
        return self._descriptor

    def _make(self) -> int:
        path = directory()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        while self._descriptor is None:
            new = path / f"{self._key}-{time.time_ns()}-{os.getpid()}.jsonl"
            with suppress(FileExistsError):
                os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, stat.S_IRUSR | stat.S_IWUSR))
                self._path, self._descriptor = new, take(new)  # None if somebody has found it empty, and removed it
                self._own.append(new)
        return self._descriptor

    def _remove(self) -> None:
        if self._path is not None and self._descriptor is not None:
            with suppress(OSError):
                self._path.unlink()
            release(self._descriptor)
        self._path = self._descriptor = None


def take(path: Path) -> int | None:
    """Open and lock a file; None if somebody else has it, or it is gone."""
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "nothing is kept on a system without file locks")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
    except FileNotFoundError:
        return None
    _descriptors.add(descriptor)
    with suppress(FileNotFoundError, BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    release(descriptor)
    return None


def release(descriptor: int) -> None:
    """Unlock and close a file."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # by itself, as a child that was just forked may have it open too
    _descriptors.discard(descriptor)
    os.close(descriptor)


def end_outage(url: URL) -> None:
    """Take it that the outage of a database is over, if nothing is kept for it any more: the next one is news."""
    if not files(url):
        with suppress(OSError):
            _marker(_key(_plain(url))).unlink(missing_ok=True)


@contextmanager
def replay_lock(url: URL, *, wait: bool) -> Iterator[bool]:
    """Keep others from replaying what is kept for a database; whether they let us."""
    if fcntl is None:
        yield False
        return
    flags = os.O_CREAT | os.O_RDWR
    descriptor = os.open(directory() / f"{_key(_plain(url))}.lock", flags, stat.S_IRUSR | stat.S_IWUSR)
    _descriptors.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        release(descriptor)


def _line(run: TaskRun, kind: str, at: datetime, more: Mapping[str, Any] | None = None) -> bytes:
    wire = {
        "kind": kind,
        "task": run.task_id,
        "at": rfc3339(at),
        "attempt": run.source_attempt,
        "id": run.submission,
        "source": run.source,
        "startedAt": rfc3339(run.started_at),
        **(more or {}),
    }
    return _encoded({name: value for name, value in wire.items() if value is not None})


def _encoded(wire: Mapping[str, Any]) -> bytes:
    return json.dumps(wire).encode() + b"\n"


def _write(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_spools: "weakref.WeakSet[Spool]" = weakref.WeakSet()
_descriptors: set[int] = set()
"""The files that this process has locked."""


def _leave_to_parent() -> None:
    """Have a forked child hold no lock of its parent's."""
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()
    for spool in list(_spools):
        spool.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
