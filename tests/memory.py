"""A history in memory, in plain Python: what the questions to a database are answered by as well."""

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, time, timedelta, tzinfo
from fnmatch import fnmatchcase
from math import ceil
from typing import Any, TypeVar

from taskruns import PROBLEMS, DurationStats, RunOrder, RunStats, Span, StatsPart, TaskPhase, TaskRun, TaskSummary
from taskruns.globs import is_glob
from taskruns.windows import Window

G = TypeVar("G", bound=Hashable)


@dataclass(frozen=True)
class Wanted:
    """The arguments of a filter, as they are given."""

    task_id: str | None = None
    task_glob: str | None = None
    phases: frozenset[TaskPhase] | None = None
    started: Window = field(default_factory=Window)
    finished: Window = field(default_factory=Window)
    min_duration: timedelta | None = None
    max_duration: timedelta | None = None
    exit_code: int | None = None
    source: str | None = None
    submission: str | None = None
    recovered: bool | None = None
    active: bool | None = None
    error: str | None = None

    def __repr__(self) -> str:
        given = {name: value for name, value in vars(self).items() if value not in (None, Window())}
        return f"Wanted({given})"

    @property
    def is_of_one_task(self) -> bool:
        without_sets_of_one = re.sub(r"\[[*?[]\]", "", self.task_glob or "*")
        return self.task_id is not None or not is_glob(without_sets_of_one)

    @property
    def only_problems(self) -> bool:
        return bool(self.phases) and self.phases is not None and self.phases <= PROBLEMS

    @property
    def has_window(self) -> bool:
        return Window() != self.started or Window() != self.finished

    def matches(self, run: TaskRun) -> bool:
        return (
            self.task_id in (None, run.task_id)
            and (self.task_glob is None or fnmatchcase(run.task_id, self.task_glob))
            and (self.phases is None or run.phase in self.phases)
            and self.started.contains(run.started_at)
            and (Window() == self.finished or (not run.is_active and self.finished.contains(ended(run))))
            and (self.min_duration is None or (not run.is_active and took(run) >= self.min_duration))
            and (self.max_duration is None or (not run.is_active and took(run) <= self.max_duration))
            and self.exit_code in (None, run.exit_code)
            and self.source in (None, run.source)
            and self.submission in (None, run.submission)
            and self.recovered in (None, run.recovered)
            and self.active in (None, run.is_active)
            and (self.error is None or self.error in (run.error or ""))
        )


def ended(run: TaskRun) -> datetime:
    assert run.finished_at is not None
    return run.finished_at


def took(run: TaskRun) -> timedelta:
    return ended(run) - run.started_at


def grouped(runs: Iterable[TaskRun], key: Any) -> dict[Any, list[TaskRun]]:
    groups = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return groups


@dataclass(frozen=True)
class Memory:
    """Some runs."""

    runs: Sequence[TaskRun]

    def wanted(self, wanted: Wanted) -> list[TaskRun]:
        return [run for run in self.runs if wanted.matches(run)]

    def listed(self, wanted: Wanted, order: RunOrder) -> list[TaskRun]:
        found = self.wanted(wanted)
        if order is RunOrder.LONGEST:
            found = [run for run in found if not run.is_active]
            return sorted(found, key=lambda run: (took(run), run.task_id, run.attempt), reverse=True)

        def place(run: TaskRun) -> Any:
            if wanted.is_of_one_task:
                return run.attempt
            return ended(run) if wanted.only_problems else run.started_at, run.task_id, run.attempt

        return sorted(found, key=place, reverse=order is RunOrder.NEWEST)

    def active(self, wanted: Wanted) -> list[TaskRun]:
        found = [run for run in self.wanted(wanted) if run.is_active]
        return sorted(found, key=lambda run: (run.started_at, run.task_id, run.attempt))

    def last(self, task_id: str, phases: frozenset[TaskPhase] | None) -> TaskRun | None:
        found = self.wanted(Wanted(task_id, phases=phases))
        return max(found, key=lambda run: run.attempt, default=None)

    def tasks(self) -> list[TaskRun]:
        groups = grouped(self.runs, lambda run: run.task_id)
        return [max(groups[task_id], key=lambda run: run.attempt) for task_id in sorted(groups)]

    def stats(self, wanted: Wanted, by: Span | None, zone: tzinfo) -> RunStats:
        runs = self.wanted(wanted)
        whole = stats_of(runs)
        if by is None:
            return whole
        groups = grouped(runs, lambda run: begin(run.started_at, by, zone))
        parts = [StatsPart(start.astimezone(zone), stats_of(groups[start])) for start in sorted(groups)]
        return RunStats(whole.by_phase, whole.duration, whole.last_success_at, whole.last_problem_at, tuple(parts))

    def summaries(
        self, glob: str | None, phases: frozenset[TaskPhase] | None, stale_before: datetime | None, window: Window
    ) -> list[TaskSummary]:
        found = []
        for last in self.tasks():
            task_id = last.task_id
            success = self.last(task_id, frozenset([TaskPhase.SUCCEEDED]))
            is_stale = stale_before is None or success is None or ended(success) < stale_before
            if is_stale and (glob is None or fnmatchcase(task_id, glob)) and (phases is None or last.phase in phases):
                newest = self.listed(Wanted(task_id), RunOrder.NEWEST)[:20]
                stats = stats_of(self.wanted(Wanted(task_id, started=window)))
                problem = self.last(task_id, PROBLEMS)
                found.append(TaskSummary(last, success, problem, tuple(run.phase for run in newest), stats))
        return found


def stats_of(runs: Iterable[TaskRun]) -> RunStats:
    runs = list(runs)
    over = [run for run in runs if not run.is_active]
    spans = sorted(map(took, over))

    def at(percent: int) -> timedelta:
        return spans[ceil(len(spans) * percent / 100) - 1]

    duration = None
    if spans:
        mean = sum(spans, timedelta()) / len(spans)
        duration = DurationStats(mean, spans[0], at(50), at(95), at(99), spans[-1])
    succeeded = (ended(run) for run in over if run.phase is TaskPhase.SUCCEEDED)
    problems = (ended(run) for run in over if run.phase in PROBLEMS)
    by_phase = Counter(run.phase for run in runs)
    return RunStats(dict(by_phase), duration, max(succeeded, default=None), max(problems, default=None))


def begin(moment: datetime, by: Span, zone: tzinfo) -> datetime:
    """Return when the day, or hour, of a moment begins by the clock of a zone."""
    local = moment.astimezone(zone)
    if by is Span.DAY:
        return datetime.combine(local.date(), time(), zone).astimezone(UTC)
    return moment - timedelta(minutes=local.minute, seconds=local.second, microseconds=local.microsecond)
