"""The run of a task and its rules: plain values, no database.

The record and its phases follow the ``TaskRun`` of the Solti task model.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from operator import attrgetter
from typing import Any, Self

from taskruns.times import in_utc, parse_time, rfc3339

MAX_ATTEMPT = 2**32 - 1
"""The highest attempt number: attempts are u32, as in the Solti model."""

MAX_TOLD_ATTEMPT = 2**31
"""The highest number that events and imports may tell: one bad line must not end a task's numbering."""

MAX_NAME_LENGTH = 255
"""Characters in a task id, a source or a submission."""

MAX_ERROR_BYTES = 64 * 1024
"""Bytes of UTF-8 that are kept of an error; a longer one keeps its head and its tail."""

_ERROR_HEAD_BYTES = 16 * 1024

SUPERSEDED = "run outcome not observed (a later attempt started first)"
"""The error of a run whose supervisor has started the task again without telling how it ended."""


class TaskPhase(StrEnum):
    """Where a task stands; a stored run is ``RUNNING`` or one of the terminal phases."""

    PENDING = "pending"
    """Not started yet; no run has it."""
    RUNNING = "running"
    """In progress."""
    SUCCEEDED = "succeeded"
    """Ended well."""
    FAILED = "failed"
    """Ended with an error; another attempt may follow."""
    TIMEOUT = "timeout"
    """Was stopped because it took too long."""
    CANCELED = "canceled"
    """Was stopped because somebody asked for it."""
    EXHAUSTED = "exhausted"
    """Failed, and no further attempt is permitted."""

    @property
    def is_active(self) -> bool:
        """Whether the work may still go on: pending or running."""
        return self in (TaskPhase.PENDING, TaskPhase.RUNNING)

    @property
    def is_terminal(self) -> bool:
        """Whether this is a final outcome: every phase that is not active."""
        return not self.is_active


PROBLEMS = frozenset({TaskPhase.FAILED, TaskPhase.TIMEOUT, TaskPhase.EXHAUSTED})
"""The phases that somebody has to look at."""


RANK = {TaskPhase.FAILED: 1, TaskPhase.EXHAUSTED: 2, TaskPhase.TIMEOUT: 3}
"""Which outcome may replace which: the higher says more about the same end."""


@dataclass(frozen=True, slots=True)
class TaskRun:
    """One attempt of a task. Immutable, hashable, safe to pickle and to pass between threads.

    Raises:
        ValueError: the values contradict each other, or a time has no time zone.
    """

    task_id: str
    """The recurring task that this is a run of: 1 to 255 characters."""
    attempt: int
    """1-based number of this run within its task, at most 4294967295."""
    phase: TaskPhase
    """The phase the run ended in, or ``RUNNING`` while it is active."""
    started_at: datetime
    """When the run started: UTC, to the microsecond."""
    finished_at: datetime | None = None
    """When it ended; None exactly while it is active, never before ``started_at``."""
    error: str | None = None
    """What went wrong; always None for a run that is active or succeeded."""
    exit_code: int | None = None
    """What a shell would show in ``$?``: 128+N for a signal N, 124 for a timeout."""
    recovered: bool = False
    """True if the outcome was inferred, not observed."""
    start_inferred: bool = False
    """True if ``started_at`` was inferred from the end, as the start itself was not observed."""
    source: str | None = None
    """Where the run was recorded: the host, or the name given to a stream."""
    submission: str | None = None
    """What ties the attempts of one submission together."""
    source_attempt: int | None = None
    """The source's own attempt counter, which may start again at 1."""
    supervisor_id: int | None = field(default=None, compare=False)
    """Who watches over the run while it is active. Equal runs may have different ones."""

    def __post_init__(self) -> None:
        # These hold for every stored run, as constraints of the table; so a reader never trips over them.
        checked_number(self.attempt, "attempt", 1, MAX_ATTEMPT)
        if not isinstance(self.phase, TaskPhase):
            raise TypeError(f"phase is a TaskPhase, not {self.phase!r}")
        if self.phase is TaskPhase.PENDING:
            raise ValueError("a run is running or has ended, it is never pending")
        if self.started_at.tzinfo is None or (self.finished_at is not None and self.finished_at.tzinfo is None):
            raise ValueError("started_at and finished_at must be aware datetimes, such as datetime.now(timezone.utc)")
        if self.phase.is_active != (self.finished_at is None):
            raise ValueError(f"a {self.phase} run has {'no' if self.phase.is_active else 'a'} finished_at")
        if self.finished_at is not None and self.finished_at < self.started_at:
            raise ValueError("finished_at is before started_at")
        if self.error is not None and self.phase in (TaskPhase.RUNNING, TaskPhase.SUCCEEDED):
            raise ValueError(f"a {self.phase} run has no error")

    @staticmethod
    def starting(
        task_id: str,
        attempt: int,
        *,
        started_at: datetime | None = None,
        source: str | None = None,
        submission: str | None = None,
        source_attempt: int | None = None,
        supervisor_id: int | None = None,
    ) -> "TaskRun":
        """Return an active run that started now, or at ``started_at``.

        Raises:
            ValueError: a name, a number or a time is outside its rules.
            TypeError: an argument has the wrong type.
        """
        return trusted_run(
            (
                checked_name(task_id, "task id"),
                checked_attempt(attempt),
                TaskPhase.RUNNING,
                in_utc(started_at, "started_at") if started_at is not None else datetime.now(UTC),
                None,
                None,
                None,
                False,
                False,
                None if source is None else checked_name(source, "source"),
                None if submission is None else checked_name(submission, "submission"),
                None if source_attempt is None else checked_number(source_attempt, "source_attempt", 0, MAX_ATTEMPT),
                supervisor_id,
            )
        )

    def finish(
        self,
        phase: TaskPhase,
        *,
        error: str | None = None,
        exit_code: int | None = None,
        finished_at: datetime | None = None,
    ) -> "TaskRun":
        """Return this run, closed. A ``finished_at`` before the start is clamped to it, so no duration is negative.

        Raises:
            ValueError: ``phase`` is not terminal, or an argument is outside its rules.
        """
        return self.ended(Outcome.of(phase, error=error, exit_code=exit_code, finished_at=finished_at))

    def ended(self, outcome: "Outcome") -> "TaskRun":
        """Return this run, closed with an outcome."""
        return trusted_run(
            (
                self.task_id,
                self.attempt,
                outcome.phase,
                self.started_at,
                max(outcome.finished_at, self.started_at),
                outcome.error,
                outcome.exit_code,
                False,
                self.start_inferred,
                self.source,
                self.submission,
                self.source_attempt,
                self.supervisor_id,
            )
        )

    def numbered(self, attempt: int) -> "TaskRun":
        """Return this run with the number that the store gives to it."""
        return trusted_run((self.task_id, attempt, *_after_attempt(self)))

    def watched_by(self, supervisor_id: int | None) -> "TaskRun":
        """Return this run with the supervisor that watches over it."""
        return trusted_run((*_before_supervisor(self), supervisor_id))

    @property
    def is_active(self) -> bool:
        """Whether the run is still in progress."""
        return self.finished_at is None

    @property
    def duration(self) -> timedelta | None:
        """How long the run took; None while it is active."""
        return None if self.finished_at is None else self.finished_at - self.started_at

    def to_wire(self) -> dict[str, Any]:
        """Return the run as a JSON object: camelCase keys, RFC 3339 times in UTC, absent where null."""
        wire: dict[str, Any] = {
            "taskId": self.task_id,
            "attempt": self.attempt,
            "phase": self.phase.value,
            "startedAt": rfc3339(self.started_at),
            "finishedAt": None if self.finished_at is None else rfc3339(self.finished_at),
            "durationMs": None if self.duration is None else self.duration // timedelta(milliseconds=1),
            "error": self.error,
            "exitCode": self.exit_code,
            "recovered": self.recovered or None,
            "startInferred": self.start_inferred or None,
            "source": self.source,
            "submission": self.submission,
            "sourceAttempt": self.source_attempt,
        }
        return {key: value for key, value in wire.items() if value is not None}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Return the run that a JSON object describes. Unknown keys are ignored.

        Times are RFC 3339, or integer Unix milliseconds.

        Raises:
            ValueError: a key is missing, or a value is outside its rules.
            TypeError: a value has the wrong type.
        """
        if not isinstance(wire, Mapping):
            raise TypeError(f"a run is a JSON object, not {wire!r}")
        get = wire.get
        task_id, attempt, phase, started_at = get("taskId"), get("attempt"), get("phase"), get("startedAt")
        if task_id is None or attempt is None or phase is None or started_at is None:
            missing = [key for key in ("taskId", "attempt", "phase", "startedAt") if get(key) is None]
            raise ValueError(f"the run lacks {', '.join(missing)}")
        finished_at, error, exit_code = get("finishedAt"), get("error"), get("exitCode")
        source, submission, source_attempt = get("source"), get("submission"), get("sourceAttempt")
        # By place, as millions are read: a frozen class takes long enough to make.
        return cls(
            checked_name(task_id, "task id"),
            attempt,
            checked_phase(phase),
            parse_time(started_at, "startedAt"),
            None if finished_at is None else parse_time(finished_at, "finishedAt"),
            None if error is None else clean_error(error),
            None if exit_code is None else checked_exit_code(exit_code),
            "recovered" in wire and _checked_flag(wire, "recovered"),
            "startInferred" in wire and _checked_flag(wire, "startInferred"),
            None if source is None else checked_name(source, "source"),
            None if submission is None else checked_name(submission, "submission"),
            None if source_attempt is None else checked_number(source_attempt, "source_attempt", 0, MAX_ATTEMPT),
        )


def _checked_flag(wire: Mapping[str, Any], key: str) -> bool:
    value = wire.get(key) or False
    if not isinstance(value, bool):
        raise TypeError(f"{key} must be true or false, not {value!r}")
    return value


_FIELDS = [field.name for field in fields(TaskRun)]
_put = tuple(vars(TaskRun)[name].__set__ for name in _FIELDS)
_after_attempt, _before_supervisor = attrgetter(*_FIELDS[2:]), attrgetter(*_FIELDS[:-1])


def trusted_run(values: Iterable[Any]) -> TaskRun:
    """Return the run of values that keep its rules as it is, in the order of its fields.

    They are a table's, whose constraints hold the rules, or were checked before: to check takes longer than the rest.
    """
    run = TaskRun.__new__(TaskRun)
    for put, value in zip(_put, values, strict=True):
        put(run, value)
    return run


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended, as its caller tells it: checked, cleaned and bounded."""

    phase: TaskPhase
    error: str | None
    exit_code: int | None
    finished_at: datetime

    @classmethod
    def of(
        cls, phase: TaskPhase, *, error: str | None, exit_code: int | None, finished_at: datetime | None
    ) -> "Outcome":
        """Check what a caller tells of an end; now is the default of ``finished_at``."""
        phase = checked_phase(phase)
        if phase.is_active:
            raise ValueError(f"a run cannot end as {phase}")
        error = clean_error(error)
        if phase is TaskPhase.SUCCEEDED and error is not None:
            raise ValueError("a succeeded run has no error")
        moment = in_utc(finished_at, "finished_at") if finished_at is not None else datetime.now(UTC)
        return cls(phase, error, checked_exit_code(exit_code), moment)

    def refined(self, later: "Outcome") -> "Outcome":
        """Return this outcome with what ``later`` tells of the same end: failed < exhausted < timeout."""
        if not 0 < RANK.get(self.phase, 0) < RANK.get(later.phase, 0):
            return self
        first, second = (self, later) if later.phase is TaskPhase.EXHAUSTED else (later, self)
        exit_code = second.exit_code if first.exit_code is None else first.exit_code
        return Outcome(later.phase, first.error or second.error, exit_code, self.finished_at)

    def is_that_of(self, run: TaskRun) -> bool:
        """Whether ``run`` ended just so. When it ended is not compared."""
        return (self.phase, self.error, self.exit_code) == (run.phase, run.error, run.exit_code)

    def is_within(self, run: TaskRun) -> bool:
        """Whether ``run`` may be what this outcome has made of a lower one: told in part by this, in part before."""
        if self.phase is not run.phase:
            return False
        is_filled = self.phase is TaskPhase.EXHAUSTED  # which keeps what the failure before it has said
        return is_filled or (self.error in (None, run.error) and self.exit_code in (None, run.exit_code))


def checked_run(run: TaskRun) -> TaskRun:
    """Return a run as it is stored: its names and numbers are checked, its error is cleaned."""
    checked_name(run.task_id, "task id")
    checked_exit_code(run.exit_code)
    if run.source is not None:
        checked_name(run.source, "source")
    if run.submission is not None:
        checked_name(run.submission, "submission")
    if run.source_attempt is not None:
        checked_number(run.source_attempt, "source_attempt", 0, MAX_ATTEMPT)
    if run.error is None:
        return run
    error = clean_error(run.error)
    return run if error == run.error else replace(run, error=error)


_PHASES = {phase.value: phase for phase in TaskPhase}  # several times quicker to ask than the class


def checked_phase(value: str) -> TaskPhase:
    """Return the phase that ``value`` names."""
    try:
        return _PHASES[value]
    except (KeyError, TypeError):
        raise ValueError(f"no such phase: {value!r}; the phases are {', '.join(TaskPhase)}") from None


def checked_name(value: str, what: str) -> str:
    """Return ``value`` if it can name a task, a source or a submission.

    White space at an end is refused because MariaDB pads it away when it compares keys.
    """
    if not isinstance(value, str):
        raise TypeError(f"a {what} is a string, not {type(value).__name__}")
    if not 1 <= len(value) <= MAX_NAME_LENGTH:
        raise ValueError(f"a {what} has 1 to {MAX_NAME_LENGTH} characters, not {len(value)}")
    if value.isascii() and value.isprintable() and value[0] != " " != value[-1]:
        return value  # what nearly all are, told quickly
    if value != value.strip():
        raise ValueError(f"a {what} has no white space at its ends: {value!r}")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        raise ValueError(f"a {what} has no control characters and is valid Unicode: {value!r}")
    return value


def checked_attempt(value: int) -> int:
    """Return ``value`` if it can number a run."""
    return checked_number(value, "attempt", 1, MAX_ATTEMPT)


def checked_number(value: int, what: str, low: int, high: int) -> int:
    """Return ``value`` if it is a whole number from ``low`` to ``high``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{what} is a whole number, not {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{what} must be {low} to {high}, not {value}")
    return value


def checked_exit_code(value: int | None) -> int | None:
    """Return ``value`` if it is an i32, or None."""
    return None if value is None else checked_number(value, "exit_code", -(2**31), 2**31 - 1)


_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")  # PostgreSQL refuses NUL, no encoding has lone surrogates

# The password of a URL: up to the last "@" before the path, else (an unescaped "/" in it) up to the next "@", unless
# what stands there is a port. The lengths are bounded so that hostile text costs no more than linear time.
_URL_PASSWORD = re.compile(r"(://[^\s/:]{0,256}):(?:[^\s/]{1,2048}@|(?!\d+[/?#])[^\s@]{1,2048}@)(?:[^\s/]{0,2048}@)*")


def clean_error(text: str | None) -> str | None:
    """Return an error as it is stored: what no database holds replaced, URL passwords masked, bounded.

    The result is None for an empty text, and cleaning a cleaned text changes nothing.
    """
    if text is None:
        return None
    if not isinstance(text, str):
        raise TypeError(f"error is a string, not {type(text).__name__}")
    cut = len(text) - 2 * MAX_ERROR_BYTES
    if cut > 0:
        # More than enough on both sides of what will be cut out: neither an end that is kept, nor a URL in it, is near.
        text = text[:MAX_ERROR_BYTES] + text[-MAX_ERROR_BYTES:]
    if not text.isascii() or "\0" in text:
        text = _UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", text)
    if "://" in text and "@" in text:
        text = _URL_PASSWORD.sub(r"\1:***@", text)
    if len(text) * 4 > MAX_ERROR_BYTES:  # a character has at most four bytes, so a short text needs no encoding
        encoded = text.encode()
        if len(encoded) > MAX_ERROR_BYTES:
            mark = f"\n[... {len(encoded) - MAX_ERROR_BYTES + max(cut, 0)} or more bytes cut ...]\n"
            head = encoded[:_ERROR_HEAD_BYTES].decode(errors="ignore")
            tail = encoded[len(mark) + _ERROR_HEAD_BYTES - MAX_ERROR_BYTES :].decode(errors="ignore")
            text = head + mark + tail
    return text or None
