"""What a supervisor tells of its tasks, an event at a time: both vocabularies of Taskvisor.

``AttemptStarting``, ``AttemptFailed``, ``TaskFinished`` are its present names; ``TaskStarting``, ``TaskFailed``,
``ActorExhausted`` and ``ActorDead`` those of its first versions.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import Enum, auto
from functools import lru_cache
from typing import Any, NamedTuple, Self

from taskruns.model import (
    MAX_TOLD_ATTEMPT,
    Outcome,
    TaskPhase,
    checked_exit_code,
    checked_name,
    checked_number,
    clean_error,
)
from taskruns.times import parse_time


class Role(Enum):
    """What an event says of a run."""

    START = auto()
    """An attempt has started."""
    END = auto()
    """An attempt has ended: told once for each attempt, but for a timeout, which is also told as a failure."""
    VERDICT = auto()
    """What the supervisor makes of the end of an attempt, soon after it."""
    CLOSING = auto()
    """The task has ended; this concerns the run only if its own end was not told."""
    REMARK = auto()
    """No attempt will follow this success; likewise, and no run is made of it."""
    NONE = auto()
    """Nothing."""
    UNKNOWN = auto()
    """It is not known: no such kind."""


_PHASES: dict[str, tuple[Role, TaskPhase]] = {
    "task_stopped": (Role.END, TaskPhase.SUCCEEDED),
    "attempt_succeeded": (Role.END, TaskPhase.SUCCEEDED),
    "task_failed": (Role.END, TaskPhase.FAILED),
    "attempt_failed": (Role.END, TaskPhase.FAILED),
    "timeout_hit": (Role.END, TaskPhase.TIMEOUT),
    "attempt_timed_out": (Role.END, TaskPhase.TIMEOUT),
    "task_canceled": (Role.END, TaskPhase.CANCELED),
    "attempt_canceled": (Role.END, TaskPhase.CANCELED),
    "actor_exhausted": (Role.VERDICT, TaskPhase.EXHAUSTED),
    "actor_dead": (Role.VERDICT, TaskPhase.FAILED),
}
_STARTS = ("task_starting", "attempt_starting")
_FINISHED = "task_finished"
_WITHOUT_EFFECT = (
    "task_added",
    "task_add_requested",
    "task_add_failed",
    "task_removed",
    "task_remove_requested",
    "backoff_scheduled",
    "all_stopped_within_grace",
    "grace_exceeded",
    "runtime_failure",
)
_FAMILIES_WITHOUT_EFFECT = ("shutdown_", "Shutdown", "subscriber_", "Subscriber", "controller_", "Controller")

_CENTURY_MS = 36525 * 86_400_000
_CENTURIES = 102  # the years from the first moment in which a century may reach beyond it
_FIRST_MOMENT = datetime.min.replace(tzinfo=UTC)

_OUTCOMES: dict[str, tuple[TaskPhase, str | None] | None] = {
    "completed": (TaskPhase.SUCCEEDED, None),
    "failed": (TaskPhase.EXHAUSTED, "unknown"),  # or just failed, see Event.outcome()
    "fatal": (TaskPhase.FAILED, "fatal"),
    "panicked": (TaskPhase.FAILED, "panicked"),
    "canceled": (TaskPhase.CANCELED, None),
    "force_aborted": (TaskPhase.CANCELED, None),
    "rejected": None,
}
"""How a task ended, with the error where no reason is given; None if it has not run at all."""

_SUCCESS_REASON = "policy_exhausted_success"
"""With this reason ``ActorExhausted`` tells of a success after which no further attempt is due."""


def _camel_case(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


def _pascal_case(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


_KINDS = {
    form: name for name in (*_STARTS, *_PHASES, _FINISHED, *_WITHOUT_EFFECT) for form in (name, _pascal_case(name))
}
_OUTCOME_KINDS = {
    form: name for name in _OUTCOMES for form in (name, f"outcome_{name}", _pascal_case(name), _camel_case(name))
}
_SNAKE_KEYS = ("exit_code", "duration_ms", "timeout_ms", "outcome_kind")
_KEYS = {
    **{key: key for key in ("kind", "task", "attempt", "at", "reason", "id", "seq", *map(_camel_case, _SNAKE_KEYS))},
    **{key: _camel_case(key) for key in _SNAKE_KEYS},
    "taskId": "task",
    "task_id": "task",
}


@lru_cache(maxsize=1000)  # a supervisor's events are of few kinds
def _names(keys: tuple[str, ...]) -> tuple[tuple[str, ...] | None, int]:
    """Return what the keys of an event are called here, and how many mean nothing; None if they are called so."""
    names = tuple(_KEYS.get(key, "") for key in keys)
    return (None if names == keys else names), names.count("")


class Event(NamedTuple):
    """One event of a supervisor. Those that concern no run have a ``role`` that says so, and perhaps no task."""

    kind: str
    """Its name in snake case; as it was given if it is unknown."""
    role: Role
    """What it says of a run."""
    at: datetime
    """When it happened, UTC."""
    task_id: str = ""
    """The task; empty only where no run is concerned."""
    attempt: int | None = None
    """The supervisor's own number of the attempt, from 1."""
    phase: TaskPhase | None = None
    """The outcome of which it tells."""
    error: str | None = None
    """What went wrong, as it is stored."""
    exit_code: int | None = None
    """The exit code of the attempt's process."""
    duration: timedelta | None = None
    """How long the attempt took."""
    submission: str | None = None
    """The supervisor's identity of one submission of the task."""
    seq: int | str | None = None
    """The supervisor's number of the event, by which it is acknowledged."""
    unknown_keys: int = 0
    """How many keys of it mean nothing here."""

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Return the event that a JSON object describes; its keys and kind in camel or snake case.

        Without ``at`` it happened now: such an event, told again, is another one.

        Raises:
            ValueError: a key is missing, or a value is outside its rules.
            TypeError: a value has the wrong type.
        """
        if not isinstance(wire, Mapping):
            raise TypeError(f"an event is a JSON object, not {wire!r}")
        names, unknown_keys = _names(tuple(wire))
        told = wire if names is None else dict(zip(names, wire.values(), strict=True))
        get = told.get
        given = get("kind")
        if not isinstance(given, str):
            raise TypeError("the event lacks its kind" if given is None else f"kind is a string, not {given!r}")
        seq = get("seq")
        if seq is not None and (isinstance(seq, bool) or not isinstance(seq, int | str)):
            raise TypeError(f"seq is a whole number or a string, not {seq!r}")
        at, task_id, attempt = get("at"), get("task"), get("attempt")
        duration, exit_code, submission = get("durationMs"), get("exitCode"), get("id")
        moment = datetime.now(UTC) if at is None else parse_time(at, "at")
        kind = _KINDS.get(given, given)
        role, phase, error = _meaning(kind, told)
        if role is Role.NONE or role is Role.UNKNOWN:
            return cls(kind, role, moment, seq=seq, unknown_keys=unknown_keys)
        if task_id is None:
            raise ValueError("the event lacks its task")
        return cls(
            kind,
            role,
            moment,
            checked_name(task_id, "task id"),
            None if attempt is None else checked_number(attempt, "attempt", 1, MAX_TOLD_ATTEMPT),
            phase,
            error,
            None if exit_code is None else checked_exit_code(exit_code),
            None if duration is None else _duration(duration, moment),
            None if submission is None else _submission(submission),
            seq,
            unknown_keys,
        )

    @property
    def began_at(self) -> datetime:
        """When the attempt of whose end it tells began, as far as it says."""
        return self.at if self.duration is None else self.at - self.duration

    def outcome(self, source_attempt: int | None) -> Outcome:
        """Return how the attempt ended; ``source_attempt`` is the run's, for an event that does not tell the number."""
        phase = self.phase
        assert phase is not None  # noqa: S101  (for mypy: only starts have none)
        if self.role is Role.CLOSING and phase is TaskPhase.EXHAUSTED and (self.attempt or source_attempt or 1) == 1:
            phase = TaskPhase.FAILED  # the first attempt: there was nothing to exhaust
        return Outcome(phase, self.error, self.exit_code, self.at)


def _meaning(kind: str, told: Mapping[str, Any]) -> tuple[Role, TaskPhase | None, str | None]:
    """Return what an event says of a run: its role and, of an end, the phase and the error."""
    if kind in _STARTS:
        return Role.START, None, None
    if kind == _FINISHED:
        return _finish(told)
    if kind not in _PHASES:
        known = kind in _WITHOUT_EFFECT or kind.startswith(_FAMILIES_WITHOUT_EFFECT)
        return (Role.NONE if known else Role.UNKNOWN), None, None
    role, phase = _PHASES[kind]
    reason = told.get("reason")
    error = None if reason is None else clean_error(reason)
    if phase is TaskPhase.SUCCEEDED:
        return role, phase, None
    if phase is TaskPhase.EXHAUSTED and reason == _SUCCESS_REASON:
        return Role.REMARK, TaskPhase.SUCCEEDED, None
    if error is None:
        if kind == "actor_dead":
            error = "fatal"
        elif phase is TaskPhase.FAILED:
            error = "unknown"
        elif phase is TaskPhase.TIMEOUT:
            limit = told.get("durationMs") if told.get("timeoutMs") is None else told["timeoutMs"]
            error = "timed out" if limit is None else f"timed out after {_milliseconds(limit, 'timeoutMs')} ms"
    return role, phase, error


def _finish(told: Mapping[str, Any]) -> tuple[Role, TaskPhase | None, str | None]:
    given = told.get("outcomeKind")
    if not isinstance(given, str):
        raise TypeError(f"TaskFinished has an outcomeKind, such as completed; not {given!r}")
    name = _OUTCOME_KINDS.get(given)
    if name is None:
        return Role.UNKNOWN, None, None
    outcome = _OUTCOMES[name]
    if outcome is None:
        return Role.NONE, None, None
    phase, default = outcome
    error = clean_error(told.get("reason"))
    return Role.CLOSING, phase, None if phase is TaskPhase.SUCCEEDED else error or default


def _milliseconds(value: Any, what: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what} is a number of milliseconds, not {value!r}")
    if not 0 <= value <= _CENTURY_MS:
        raise ValueError(f"{what} must be 0 to {_CENTURY_MS}, not {value}")
    return value


def _submission(value: Any) -> str:
    # Taskvisor's own is a number.
    return checked_name(str(value) if type(value) is int else value, "submission")


def _duration(value: Any, end: datetime) -> timedelta:
    duration = timedelta(milliseconds=_milliseconds(value, "durationMs"))
    if end.year <= _CENTURIES and duration > end - _FIRST_MOMENT:
        raise ValueError(f"durationMs is more than the time before {end}")
    return duration
