"""The same tables for users of the ORM, to join runs with their own models."""

from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy.orm import DeclarativeBase, Mapped

from taskruns import schema
from taskruns.model import TaskPhase

for _dialect in ("sqlite", "postgresql", "mysql", "mariadb"):
    schema.complete(_dialect)  # a host may compare or create the tables with its own


class _Base(DeclarativeBase):
    metadata = schema.metadata


class TaskRunRow(_Base):
    """A row of ``task_runs``; its fields are those of :class:`taskruns.TaskRun`."""

    __table__ = schema.task_runs

    if TYPE_CHECKING:
        task_id: Mapped[str]
        attempt: Mapped[int]
        phase: Mapped[TaskPhase]
        started_at: Mapped[datetime]
        finished_at: Mapped[datetime | None]
        error: Mapped[str | None]
        exit_code: Mapped[int | None]
        recovered: Mapped[bool]
        start_inferred: Mapped[bool]
        source: Mapped[str | None]
        submission: Mapped[str | None]
        source_attempt: Mapped[int | None]
        supervisor_id: Mapped[int | None]


class SupervisorRow(_Base):
    """A row of ``supervisors``: a process that watches over active runs."""

    __table__ = schema.supervisors

    if TYPE_CHECKING:
        id: Mapped[int]
        source: Mapped[str]
        stream: Mapped[bool]
        host: Mapped[str]
        boot_id: Mapped[str | None]
        pid_namespace: Mapped[int | None]
        pid: Mapped[int]
        process_started: Mapped[int | None]
        started_at: Mapped[datetime]
        heartbeat_at: Mapped[datetime]
