"""Which runs are kept: a policy, by the age of what has ended and by the newest of each task."""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from taskruns.model import TaskPhase, checked_number
from taskruns.times import parse_duration

TURN = 32
"""Runs after which a database that prunes itself does so once."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How long runs are kept after their end.

    A run is deleted once it has ended longer ago than the age of its phase, but never while it is active, among the
    newest ``keep`` of its task, the task's latest run or its latest succeeded one, by attempt: so numbers go on.

    Raises:
        ValueError: a value is negative or out of range.
        TypeError: it has the wrong type.
    """

    succeeded: timedelta | None = timedelta(days=90)
    """The age of succeeded runs; None keeps them for ever."""
    others: timedelta | None = timedelta(days=365)
    """The age of runs that ended otherwise; None keeps them for ever."""
    keep: int = 10
    """How many of a task's newest runs stay whatever their age."""
    forget_idle: timedelta | None = None
    """A task of which nothing is active, and all ended longer ago than this, is deleted whole; a later run is its
    first again. None never does that."""

    def __post_init__(self) -> None:
        for name in ("succeeded", "others", "forget_idle"):
            age = getattr(self, name)
            if age is None:
                continue
            if not isinstance(age, timedelta):
                raise TypeError(f"{name} is a timedelta or None, not {age!r}")
            if age < timedelta(0):
                raise ValueError(f"{name} must not be negative, as {age} is")
        checked_number(self.keep, "keep", 0, 2**31 - 1)

    @classmethod
    def parse(cls, text: str) -> "Retention | None":
        """Return the policy of a configuration; None for ``off``.

        It names what differs from that of the embedded database, separated by commas or spaces: ``succeeded=30d,
        others=never, keep=5, forget-idle=400d``. An age is a number with ``s``, ``m``, ``h``, ``d`` or ``w``, or
        ``never``.

        Raises:
            ValueError: the text is none.
        """
        if text.strip() == "off":
            return None
        named: dict[str, str] = {}
        for pair in re.split(r"[,\s]+", text.strip(", \t\n")):
            name, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(f"a retention is off, or values such as succeeded=30d,keep=5, not {text!r}")
            if name in named:
                raise ValueError(f"{name} is there twice in {text!r}")
            named[name] = value
        return EMBEDDED.changed(named)

    def changed(self, values: Mapping[str, str]) -> "Retention":
        """Return this policy with some of its values changed, which are texts as in :meth:`parse`.

        Raises:
            ValueError: there is no such value, or it cannot be read.
        """
        unknown = [name for name in values if name not in _NAMES]
        if unknown:
            raise ValueError(f"there is no {unknown[0]!r} in a retention, only {', '.join(_NAMES)}")
        changes: dict[str, Any] = {name.replace("-", "_"): _value(name, text) for name, text in values.items()}
        return replace(self, **changes)

    def __str__(self) -> str:
        ages = {"succeeded": self.succeeded, "others": self.others, "forget-idle": self.forget_idle}
        told = [f"{name}={'never' if age is None else _readable(age)}" for name, age in ages.items()]
        return ", ".join([*told, f"keep={self.keep}"])

    def cutoffs(self, now: datetime) -> "Cutoffs":
        """Return the moments before which runs must have ended to be old."""
        return Cutoffs(_before(now, self.succeeded), _before(now, self.others), _before(now, self.forget_idle))


_NAMES = ("succeeded", "others", "keep", "forget-idle")

EMBEDDED = Retention(forget_idle=timedelta(days=400))
"""The policy of the database that nobody has named: it is looked after by nobody either."""


@dataclass(frozen=True, slots=True)
class Cutoffs:
    """The moments of a policy; None where nothing is old."""

    succeeded: datetime | None
    others: datetime | None
    idle: datetime | None

    @property
    def latest(self) -> datetime | None:
        """The moment that every run which may be deleted has ended before."""
        return max((moment for moment in (self.succeeded, self.others, self.idle) if moment is not None), default=None)

    def is_old(self, phase: TaskPhase, finished_at: datetime | None) -> bool:
        """Whether a run has outlived the age of its phase."""
        cutoff = self.succeeded if phase is TaskPhase.SUCCEEDED else self.others
        return finished_at is not None and cutoff is not None and finished_at < cutoff

    def is_idle(self, finished_at: datetime | None) -> bool:
        """Whether a run ended so long ago that its task may be idle."""
        return finished_at is not None and self.idle is not None and finished_at < self.idle


def is_turn(attempt: int) -> bool:
    """Whether a database that prunes itself does so after the end of this run.

    After every 32nd of a task, and now and then after a first one: a task id that is never used again has no 32nd.
    """
    return attempt % TURN == 0 or (attempt == 1 and secrets.randbelow(TURN) == 0)


def _readable(age: timedelta) -> str:
    return f"{age.days}d" if age == timedelta(days=age.days) else f"{age.total_seconds():g}s"


def _before(now: datetime, age: timedelta | None) -> datetime | None:
    try:
        return None if age is None else now - age
    except OverflowError:
        return None


def _value(name: str, text: str) -> timedelta | int | None:
    if name == "keep":
        if not (text.isascii() and text.isdecimal()):
            raise ValueError(f"keep is a number, not {text!r}")
        return int(text)
    if text == "never":
        return None
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
