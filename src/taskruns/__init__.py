"""The flight recorder for tasks: one durable row for every attempt of every task, in your SQL database."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskruns.bulk import RunsAdded
    from taskruns.checks import TaskCheck
    from taskruns.errors import (
        AttemptConflictError,
        RunClosedError,
        RunExistsError,
        RunNotFoundError,
        SchemaVersionError,
        TaskRunsError,
    )
    from taskruns.events import Event
    from taskruns.filters import RunFilter, RunOrder
    from taskruns.history import TaskRunHistory
    from taskruns.liveness import Supervisor
    from taskruns.model import PROBLEMS, TaskPhase, TaskRun
    from taskruns.orm import SupervisorRow, TaskRunRow
    from taskruns.reading import RunPage
    from taskruns.recorder import EventRecorder
    from taskruns.replay import Replayed
    from taskruns.repository import TaskRunRepository
    from taskruns.retention import Retention
    from taskruns.stats import DurationStats, RunStats, Span, StatsPart
    from taskruns.summaries import TaskSummary
    from taskruns.timeline import Effect
    from taskruns.windows import Window

__all__ = [
    "PROBLEMS",
    "AttemptConflictError",
    "DurationStats",
    "Effect",
    "Event",
    "EventRecorder",
    "Replayed",
    "Retention",
    "RunClosedError",
    "RunExistsError",
    "RunFilter",
    "RunNotFoundError",
    "RunOrder",
    "RunPage",
    "RunStats",
    "RunsAdded",
    "SchemaVersionError",
    "Span",
    "StatsPart",
    "Supervisor",
    "SupervisorRow",
    "TaskCheck",
    "TaskPhase",
    "TaskRun",
    "TaskRunHistory",
    "TaskRunRepository",
    "TaskRunRow",
    "TaskRunsError",
    "TaskSummary",
    "Window",
]

_HOMES = {
    "PROBLEMS": "model",
    "Event": "events",
    "Effect": "timeline",
    "EventRecorder": "recorder",
    "Replayed": "replay",
    "Retention": "retention",
    "TaskPhase": "model",
    "TaskRun": "model",
    "TaskRunHistory": "history",
    "TaskRunRepository": "repository",
    "RunPage": "reading",
    "RunFilter": "filters",
    "RunOrder": "filters",
    "RunStats": "stats",
    "DurationStats": "stats",
    "Span": "stats",
    "StatsPart": "stats",
    "TaskCheck": "checks",
    "TaskSummary": "summaries",
    "Window": "windows",
    "RunsAdded": "bulk",
    "Supervisor": "liveness",
    "SupervisorRow": "orm",
    "TaskRunRow": "orm",
}


def __getattr__(name: str) -> Any:
    # Importing SQLAlchemy takes longer than many a job that `taskruns exec` runs: only who needs it pays for it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
