"""Closes the runs of the dead: those whose supervisor cannot tell any more how they ended."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import Connection, Row

from taskruns import engine, supervisor_statements
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
    supervisor: Supervisor | None = None


def supervisors(connection: Connection) -> list[Supervisor]:
    """Return who is registered, in the order they came."""
    return list(map(_supervisor, connection.execute(supervisor_statements.all_supervisors(connection.dialect.name))))


def _supervisor(row: Row[Any]) -> Supervisor:
    number, source, stream, *place, started_at, heartbeat_at, now, active = tuple(row)
    return Supervisor(number, source, stream, Process(*place), started_at, heartbeat_at, now - heartbeat_at, active)


def find_losses(
    connection: Connection,
    here: Process,
    *,
    stale_after: float | None = STALE_AFTER,
    unsupervised_after: float | None = None,
) -> list[Loss]:
    """Return the active runs of the dead supervisors, as seen from ``here``.

    ``unsupervised_after`` adds the runs without a known supervisor that started so many seconds ago, by the
    database's clock.
    """
    dead = {known.id: known for known in supervisors(connection) if known.is_dead(here, stale_after)}
    losses = []
    for ids in _portions(supervisor.id for supervisor in dead.values() if supervisor.active_runs):
        for row in connection.execute(supervisor_statements.runs_of_supervisors(ids)):
            run = run_of(row)
            assert run.supervisor_id is not None  # noqa: S101  (for mypy: it was asked for)
            supervisor = dead[run.supervisor_id]
            losses.append(Loss(ended(run, supervisor.process, supervisor.heartbeat_at), supervisor))
    if unsupervised_after is not None:
        for now, *values in connection.execute(supervisor_statements.unsupervised_runs(connection.dialect.name)):
            run = TaskRun(*values)
            if (now - run.started_at).total_seconds() > unsupervised_after:
                losses.append(Loss(ended(run, None, run.started_at)))
    return losses


def ended(run: TaskRun, watcher: Process | None, last_seen: datetime) -> TaskRun:
    """Return a run as it is closed when the process that watched over it was last seen at a moment."""
    why = "no supervisor" if watcher is None else f"supervisor {watcher} last seen {rfc3339(last_seen)}"
    lost = run.finish(TaskPhase.FAILED, error=f"run outcome not observed ({why})", finished_at=last_seen)
    return replace(lost, recovered=True)


def adopt(connection: Connection, here: Process, number: int, source: str) -> None:
    """Watch over the runs of a stream whose recorder is dead, by a transaction of its own: another one has come."""
    streams = [known.id for known in supervisors(connection) if known.stream and known.is_dead(here, None)]
    connection.commit()
    if streams:
        with engine.transaction(connection):
            given = {"dead": streams, "of_source": source, "watcher": number}
            connection.execute(supervisor_statements.adopt_runs(), given)


def remember(connection: Connection, number: int, source: str, process: Process) -> None:
    """Register the recorder of a stream for its process, in the caller's transaction, unless it is registered."""
    if connection.execute(supervisor_statements.get_supervisor(), {"watcher": number}).first() is None:
        connection.execute(
            supervisor_statements.beat(connection.dialect.name), supervisor_values(number, source, process, stream=True)
        )


def supervisor_values(number: int, source: str, process: Process, *, stream: bool) -> dict[str, Any]:
    """Return the parameters of ``supervisor_statements.beat``."""
    return {
        "id": number,
        "source": source,
        "stream": stream,
        "host": process.host,
        "boot_id": process.boot_id,
        "pid_namespace": process.pid_namespace,
        "pid": process.pid,
        "process_started": process.started,
    }


def close(connection: Connection, losses: Iterable[Loss]) -> list[TaskRun]:
    """Close runs in the caller's transaction; return those that were still active and without a sign of life.

    Who holds a run's lock is about to tell of it: nobody waits for that.
    """
    return [loss.run for loss in losses if _close(connection, loss)]


def _close(connection: Connection, loss: Loss) -> bool:
    run, supervisor = loss.run, loss.supervisor
    key = key_of(run.task_id, run.attempt)
    if connection.execute(supervisor_statements.lock_active(), key).first() is None:
        return False
    values = key | {"end": run.finished_at, "why": run.error}
    if supervisor is not None:
        values |= {"watcher": supervisor.id, "last_beat": supervisor.heartbeat_at}
    watched = (
        supervisor_statements.Watched.BY_NOBODY if supervisor is None else supervisor_statements.Watched.BY_THE_DEAD
    )
    return bool(connection.execute(supervisor_statements.recover_run(watched), values).rowcount)


def recover(
    connection: Connection,
    here: Process,
    *,
    stale_after: float | None = STALE_AFTER,
    unsupervised_after: float | None = None,
    most: int | None = None,
) -> Iterator[TaskRun]:
    """Close the runs that are lost, in transactions of its own, and yield them; then remove dead supervisors.

    ``most``: close, and remove, so many at the most.
    """
    losses = find_losses(connection, here, stale_after=stale_after, unsupervised_after=unsupervised_after)
    connection.commit()
    for runs in _portions(losses[:most]):
        with engine.transaction(connection):
            closed = close(connection, runs)
        yield from closed
    remove_idle(connection, here, stale_after=stale_after, most=most)


def remove_idle(
    connection: Connection, here: Process, *, stale_after: float | None = STALE_AFTER, most: int | None = None
) -> None:
    """Remove the dead supervisors that watch over no run, in transactions of its own."""
    dead = [known for known in supervisors(connection) if not known.active_runs and known.is_dead(here, stale_after)]
    connection.commit()
    for some in _portions(dead[:most]):
        with engine.transaction(connection):
            given = [{"watcher": supervisor.id, "last_beat": supervisor.heartbeat_at} for supervisor in some]
            connection.execute(supervisor_statements.remove_silent_supervisor(), given)


def _portions(values: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(values)
    while portion := list(islice(iterator, _AT_ONCE)):
        yield portion
