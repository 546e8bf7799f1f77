"""Closes the runs of the dead: those whose supervisor cannot tell any more how they ended."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import Connection, Row

from taskruns import engine, statements
from taskruns.liveness import STALE_AFTER, Process, Supervisor
from taskruns.model import TaskPhase, TaskRun
from taskruns.times import rfc3339
from taskruns.writing import key_of, run_of

T = TypeVar("T")

_AT_ONCE = 500
"""Runs that are closed by one transaction, and supervisors whose runs are asked for by one query."""


@dataclass(frozen=True, slots=True)
class Loss:
    """An active run nobody watches over, as it is to be closed."""

    run: TaskRun
    supervisor: Supervisor | None


@dataclass(frozen=True, slots=True)
class Losses:
    """What the dead have left behind."""

    supervisors: list[Supervisor]
    runs: list[Loss]


def supervisors(connection: Connection) -> list[Supervisor]:
    """Return who is registered, in the order they came."""
    return list(map(_supervisor, connection.execute(statements.all_supervisors(connection.dialect.name))))


def _supervisor(row: Row[Any]) -> Supervisor:
    number, source, host, boot_id, namespace, pid, process_started, started_at, heartbeat_at, now, active = tuple(row)
    process = Process(host, boot_id, namespace, pid, process_started)
    return Supervisor(number, source, process, started_at, heartbeat_at, now - heartbeat_at, active)


def find_losses(
    connection: Connection,
    here: Process,
    *,
    stale_after: float | None = STALE_AFTER,
    unsupervised_after: float | None = None,
) -> Losses:
    """Return the dead supervisors, as seen from ``here``, and their active runs.

    ``unsupervised_after`` adds the runs without a known supervisor that started so many seconds ago, by the
    database's clock.
    """
    dead = {known.id: known for known in supervisors(connection) if known.is_dead(here, stale_after)}
    losses = []
    for ids in _portions(supervisor.id for supervisor in dead.values() if supervisor.active_runs):
        for row in connection.execute(statements.runs_of_supervisors(ids)):
            run = run_of(row)
            assert run.supervisor_id is not None  # noqa: S101  (for mypy: it was asked for)
            supervisor = dead[run.supervisor_id]
            why = f"supervisor {supervisor} last seen {rfc3339(supervisor.heartbeat_at)}"
            losses.append(Loss(_ended(run, supervisor.heartbeat_at, why), supervisor))
    if unsupervised_after is not None:
        for now, *values in connection.execute(statements.unsupervised_runs(connection.dialect.name)):
            run = TaskRun(*values)
            if (now - run.started_at).total_seconds() > unsupervised_after:
                losses.append(Loss(_ended(run, run.started_at, "no supervisor"), None))
    return Losses(list(dead.values()), losses)


def _ended(run: TaskRun, last_seen: datetime, why: str) -> TaskRun:
    error = f"run outcome not observed ({why})"
    return replace(run.finish(TaskPhase.FAILED, error=error, finished_at=last_seen), recovered=True)


def close(connection: Connection, losses: Iterable[Loss]) -> list[TaskRun]:
    """Close runs in the caller's transaction; return those that were still active and without a sign of life."""
    return [loss.run for loss in losses if _close(connection, loss)]


def _close(connection: Connection, loss: Loss) -> bool:
    run, supervisor = loss.run, loss.supervisor
    values = key_of(run.task_id, run.attempt) | {"end": run.finished_at, "why": run.error}
    if supervisor is not None:
        values |= {"watcher": supervisor.id, "last_beat": supervisor.heartbeat_at}
    statement = statements.recover_run(supervised=supervisor is not None)
    return bool(connection.execute(statement, values).rowcount)


def recover(
    connection: Connection,
    here: Process,
    *,
    stale_after: float | None = STALE_AFTER,
    unsupervised_after: float | None = None,
) -> Iterator[TaskRun]:
    """Close the runs that are lost, and remove dead supervisors, in transactions of its own; yield these runs."""
    losses = find_losses(connection, here, stale_after=stale_after, unsupervised_after=unsupervised_after)
    connection.commit()
    for runs in _portions(losses.runs):
        with engine.transaction(connection):
            closed = close(connection, runs)
        yield from closed
    for dead in _portions(losses.supervisors):
        with engine.transaction(connection):
            for supervisor in dead:
                given = {"watcher": supervisor.id, "last_beat": supervisor.heartbeat_at}
                connection.execute(statements.remove_silent_supervisor(), given)


def _portions(values: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(values)
    while portion := list(islice(iterator, _AT_ONCE)):
        yield portion
