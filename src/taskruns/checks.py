"""Whether tasks are well, and why not."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

from sqlalchemy import Connection

from taskruns import reading, recovery
from taskruns.filters import RunFilter
from taskruns.globs import Glob
from taskruns.liveness import Process
from taskruns.model import PROBLEMS, TaskPhase, TaskRun, checked_name
from taskruns.summaries import last_success, last_success_at, latest_runs, within_last
from taskruns.wording import last_line, local, readable

_COUNTED = 100
"""Problems in a row that are counted at least."""

_LINE = 200
"""Characters of an error that are told."""

_AT_ONCE = 500
"""Tasks that are looked at together."""


@dataclass(frozen=True, slots=True)
class TaskCheck:
    """Whether a task is well."""

    task_id: str
    """The task."""
    last_run: TaskRun | None
    """The run with the highest attempt; None if the task was never seen, and then it is not well."""
    reasons: tuple[str, ...]
    """Why it is not well, in words."""

    @property
    def is_well(self) -> bool:
        """Whether there is no reason to say that it is not."""
        return not self.reasons

    def to_wire(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        wire = {"taskId": self.task_id, "ok": self.is_well, "reasons": list(self.reasons)}
        return wire if self.last_run is None else {**wire, "lastRun": self.last_run.to_wire()}


@dataclass(frozen=True, slots=True)
class Rules:
    """What tasks that are well keep to: see :meth:`TaskRunRepository.check`.

    Raises:
        ValueError: a value is negative.
        TypeError: it has the wrong type.
    """

    succeeded_within: timedelta | None = None
    max_problems: int | None = None
    max_running: timedelta | None = None
    zone: tzinfo = UTC
    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __post_init__(self) -> None:
        if self.max_problems is not None and type(self.max_problems) is not int:
            raise TypeError(f"max_problems is a whole number or None, not {self.max_problems!r}")
        if self.max_problems is not None and self.max_problems < 0:
            raise ValueError(f"max_problems must not be negative: {self.max_problems}")
        for name in ("succeeded_within", "max_running"):
            span = getattr(self, name)
            if span is not None and not isinstance(span, timedelta):
                raise TypeError(f"{name} is a timedelta or None, not {span!r}")
            if span is not None and span < timedelta(0):
                raise ValueError(f"{name} must not be negative: {span}")

    @property
    def are_none(self) -> bool:
        """Whether none is given: then the latest run that has ended is not to be a problem."""
        return self.succeeded_within is None and self.max_problems is None and self.max_running is None

    def success(self, ended_at: datetime | None) -> Iterator[str]:
        """Yield what is wrong with the end of the last success of a task."""
        if ended_at is None:
            yield "never succeeded"
        elif self.succeeded_within is not None and self.now - ended_at > self.succeeded_within:
            yield f"no success for {readable(self.now - ended_at)} (last {local(ended_at, self.zone)})"

    @property
    def counted(self) -> int:
        """How many problems in a row are counted; of more it is only told that there may be more."""
        return min(max(_COUNTED, (self.max_problems or 0) + 2), 2**31 - 1)

    def problems(self, count: int) -> Iterator[str]:
        """Yield what is wrong with the number of problems since the last success of a task."""
        if self.max_problems is not None and count > self.max_problems:
            told = f"{count}{' or more' if count >= self.counted else ''} problem{'s' if count > 1 else ''}"
            yield f"{told} in a row, more than {self.max_problems}"

    def running(self, oldest: TaskRun | None) -> Iterator[str]:
        """Yield what is wrong with the oldest active run of a task."""
        if self.max_running is not None and oldest is not None and self.now - oldest.started_at > self.max_running:
            since = local(oldest.started_at, self.zone)
            yield f"running for {readable(self.now - oldest.started_at)} since {since}, attempt {oldest.attempt}"

    def lost(self, run: TaskRun) -> Iterator[str]:
        """Yield what is wrong with a run whose process is gone, and that nobody has closed yet."""
        yield f"its process is gone, attempt {run.attempt}, running since {local(run.started_at, self.zone)}"

    def ended(self, last: TaskRun | None) -> Iterator[str]:
        """Yield what is wrong with the latest run of a task that has ended."""
        if self.are_none and last is not None and last.finished_at is not None and last.phase in PROBLEMS:
            age = readable(self.now - last.finished_at)
            line = last_line(last.error)
            error = f": {line[:_LINE]}{'…' * (len(line) > _LINE)}" if line else ""
            ended = "timed out" if last.phase is TaskPhase.TIMEOUT else last.phase
            yield f"{ended} {age} ago ({local(last.finished_at, self.zone)}), attempt {last.attempt}{error}"


def check(connection: Connection, task_glob: str, rules: Rules, *, limit: int, after: str | None) -> list[TaskCheck]:
    """Return whether some tasks are well, in the order of their ids: see :meth:`TaskRunRepository.check`."""
    limit = reading.check_limit(limit)
    glob = Glob(task_glob)
    found: list[TaskCheck] = []
    lost = _lost(connection)
    at_once = min(limit, _AT_ONCE) if task_glob == "*" else _AT_ONCE  # others may leave out most of them
    for latest in latest_runs(connection, glob, after, at_once=at_once):
        matching = [run for run in latest if glob.matches(run.task_id)][: limit - len(found)]
        overdue = _overdue(connection, matching, rules)
        for run in matching:
            reasons = _reasons(connection, run, rules, overdue.get(run.task_id), lost.get(run.task_id, []))
            found.append(TaskCheck(run.task_id, run, tuple(reasons)))
        if len(found) == limit:
            break
    if not found and glob.literal is not None and (after is None or after < glob.literal):
        found.append(TaskCheck(checked_name(glob.literal, "task id"), None, ("never seen",)))
    return found


def _lost(connection: Connection) -> Mapping[str, list[TaskRun]]:
    """Return of each task the active runs whose process is gone, as they are going to be closed, newest first."""
    lost: dict[str, list[TaskRun]] = {}
    for loss in recovery.find_losses(connection, Process.here()):
        lost.setdefault(loss.run.task_id, []).append(loss.run)
    return {task_id: sorted(runs, key=lambda run: -run.attempt) for task_id, runs in lost.items()}


def _overdue(connection: Connection, tasks: Sequence[TaskRun], rules: Rules) -> Mapping[str, TaskRun]:
    """Return of each of some tasks, in order, the run that has been active for longest, if that is too long."""
    if rules.max_running is None or not tasks:
        return {}
    before = within_last(rules.max_running, rules.now).since
    if before is None:
        return {}
    active = reading.active_between(connection, tasks[0].task_id, tasks[-1].task_id, before)
    return {run.task_id: run for run in reversed(active)}


def _reasons(
    connection: Connection, latest: TaskRun, rules: Rules, overdue: TaskRun | None, lost: Sequence[TaskRun]
) -> Iterator[str]:
    # Nothing is asked of a task whose latest run has succeeded in time, as of nearly all.
    if rules.succeeded_within is not None or rules.max_problems is not None:
        success = last_success(connection, latest)
        if rules.succeeded_within is not None:
            lately = within_last(rules.succeeded_within, rules.now)
            yield from rules.success(last_success_at(connection, success, lately))
        if rules.max_problems is not None and success != latest:
            after = 0 if success is None else success.attempt
            count = reading.problems_after(connection, latest.task_id, after, rules.counted)
            yield from rules.problems(count + sum(run.attempt > after for run in lost))
    yield from rules.running(overdue)
    if rules.are_none:
        ended = latest if latest.finished_at is not None else None
        ended = ended or reading.last_run(connection, RunFilter(latest.task_id, active=False))
        if lost and (ended is None or lost[0].attempt > ended.attempt):
            yield from rules.lost(lost[0])
        else:
            yield from rules.ended(ended)
