"""Which runs are asked for, and in which order. Pure."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from types import UnionType

from taskruns.globs import Glob
from taskruns.model import PROBLEMS, TaskPhase, TaskRun, checked_exit_code, checked_name, checked_phase
from taskruns.windows import Window

Phases = TaskPhase | Iterable[TaskPhase] | None
"""A phase, several, or None for all."""

ANY_TIME = Window()
"""The window without an end."""


class RunOrder(StrEnum):
    """In which order runs are listed."""

    NEWEST = "newest"
    """Newest first: by attempt in one task, else by start, and problems (where only they are asked for) by end."""
    OLDEST = "oldest"
    """The reverse."""
    LONGEST = "longest"
    """By duration, the longest first. Active runs have none and are left out."""


@dataclass(frozen=True, slots=True)
class RunFilter:
    """Which runs are asked for: those that meet all that is given.

    Raises:
        ValueError: a value is outside its rules, ``error`` has no window, or no duration is between the two given.
        TypeError: it has the wrong type.
    """

    task_id: str | None = None
    """Runs of this task."""
    task_glob: str | None = None
    """Runs of the tasks that match: ``*``, ``?`` and ``[...]`` as in the shell, ``[*]`` is a star."""
    phases: Phases = None
    """Runs in one of these phases, such as :data:`taskruns.PROBLEMS`."""
    started: Window = ANY_TIME
    """Runs that started within."""
    finished: Window = ANY_TIME
    """Runs that ended within. On its own it is slow for what ended long ago: only problems have an index for it."""
    min_duration: timedelta | None = None
    """Runs that took at least so long. Active ones have taken nothing yet, and are left out."""
    max_duration: timedelta | None = None
    """Runs that took at most so long, likewise."""
    exit_code: int | None = None
    """Runs with this exit code."""
    source: str | None = None
    """Runs from this host, or stream."""
    submission: str | None = None
    """The attempts of this submission."""
    recovered: bool | None = None
    """Runs whose outcome was inferred, or was observed."""
    active: bool | None = None
    """Runs that are in progress, or have ended."""
    error: str | None = None
    """Runs whose error contains this, case and all. It is looked for in each run of the window that it needs."""

    def __post_init__(self) -> None:
        for name, what in (("task_id", "task id"), ("source", "source"), ("submission", "submission")):
            if (value := getattr(self, name)) is not None:
                checked_name(value, what)
        for name, kind in _KINDS.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} is {_told(kind)}, not {getattr(self, name)!r}")
        if self.task_glob is not None and self.task_id is None:
            literal = Glob(self.task_glob).literal
            if literal is not None:
                object.__setattr__(self, "task_id", checked_name(literal, "task id"))
                object.__setattr__(self, "task_glob", None)
        if self.phases is not None:
            named = [self.phases] if isinstance(self.phases, str) else self.phases
            object.__setattr__(self, "phases", frozenset(map(checked_phase, named)))
        checked_exit_code(self.exit_code)
        if self.min_duration is not None and self.max_duration is not None and self.min_duration > self.max_duration:
            raise ValueError(f"no run takes at least {self.min_duration} and at most {self.max_duration}")
        if self.error is not None:
            self._check_error(self.error)

    def _check_error(self, error: str) -> None:
        if not error:
            raise ValueError("the text to look for in errors is empty")
        if re.search("[\0\ud800-\udfff]", error):
            raise ValueError(f"a text to look for in errors has no NUL and is valid Unicode: {error!r}")
        if not self.has_window:
            raise ValueError("a text in the error is looked for in a window of time: give one of start or end")

    @property
    def has_window(self) -> bool:
        """Whether the time is limited, at one end at least."""
        return self.started != ANY_TIME or self.finished != ANY_TIME

    @property
    def only_problems(self) -> bool:
        """Whether no phase but problems is asked for."""
        return isinstance(self.phases, frozenset) and bool(self.phases) and self.phases <= PROBLEMS

    def matches(self, run: TaskRun) -> bool:
        """Whether a run, as it is, is one of those that are asked for."""
        assert self.phases is None or isinstance(self.phases, frozenset)  # noqa: S101  (for mypy: see above)
        return (
            self.task_id in (None, run.task_id)
            and (self.task_glob is None or Glob(self.task_glob).matches(run.task_id))
            and (self.phases is None or run.phase in self.phases)
            and self.started.contains(run.started_at)
            and (self.finished == ANY_TIME or (run.finished_at is not None and self.finished.contains(run.finished_at)))
            and (self.min_duration is None or (run.duration is not None and run.duration >= self.min_duration))
            and (self.max_duration is None or (run.duration is not None and run.duration <= self.max_duration))
            and self.exit_code in (None, run.exit_code)
            and self.source in (None, run.source)
            and self.submission in (None, run.submission)
            and self.recovered in (None, run.recovered)
            and self.active in (None, run.is_active)
            and (self.error is None or self.error in (run.error or ""))
        )

    def tightened(self) -> "RunFilter":
        """Return the same question, each window narrowed by what the other one and the durations imply.

        An index knows one of the times only.
        """
        started, finished = self.started, self.finished
        if finished is ANY_TIME and (started is ANY_TIME or not self.only_problems):
            return self
        least, most = self.min_duration or timedelta(0), self.max_duration
        try:
            if finished.until is not None:
                started = _narrowed(started, until=finished.until - least)
            if finished.since is not None and most is not None:
                started = _narrowed(started, since=finished.since - most)
            if self.only_problems:
                if started.since is not None:
                    finished = _narrowed(finished, since=started.since + least)
                if started.until is not None and most is not None:
                    finished = _narrowed(finished, until=started.until + most)
        except OverflowError:
            return self
        return replace(self, started=started, finished=finished)


def _narrowed(window: Window, *, since: datetime | None = None, until: datetime | None = None) -> Window:
    """Return the part of a window from one moment to another; where there is none, an empty one."""
    since = max((moment for moment in (window.since, since) if moment is not None), default=None)
    until = min((moment for moment in (window.until, until) if moment is not None), default=None)
    return Window(since, max(since, until) if since is not None and until is not None else until)


def filter_of(wanted: str | RunFilter | None, phases: Phases = None) -> RunFilter:
    """Return the filter that a caller means: a task id is short for one, as None is for all runs.

    Raises:
        ValueError: a value is outside its rules.
    """
    if not isinstance(wanted, RunFilter):
        if not isinstance(wanted, str | None):
            raise TypeError(f"a task id or a RunFilter says which runs are wanted, not {wanted!r}")
        return _filter_of_task(wanted) if phases is None else RunFilter(wanted, phases=phases)
    return wanted if phases is None else replace(wanted, phases=phases)


_KINDS: Mapping[str, UnionType | type] = {
    "task_glob": str | None,
    "started": Window,
    "finished": Window,
    "min_duration": timedelta | None,
    "max_duration": timedelta | None,
    "recovered": bool | None,
    "active": bool | None,
    "error": str | None,
}


def _told(kind: UnionType | type) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("datetime.", "").replace(" |", " or")


_filter_of_task = lru_cache(maxsize=256)(RunFilter)
