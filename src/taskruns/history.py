"""The history of tasks in a database: what records runs. Each call is one transaction."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Self

from sqlalchemy import URL, Connection, Engine

from taskruns import engine, migrate, recovery
from taskruns.engine import only_reads, url_of
from taskruns.errors import SchemaVersionError
from taskruns.liveness import STALE_AFTER, Process
from taskruns.model import Outcome, TaskPhase, TaskRun
from taskruns.reader import RETRY_FOR, Reader
from taskruns.recording import OnError, Outage, RecordedRun, Recording, checked_on_error
from taskruns.repository import TaskRunRepository
from taskruns.retention import Retention, is_turn
from taskruns.retrying import OnRetry, Retry
from taskruns.spool import Spool
from taskruns.supervision import HEARTBEAT, Supervision, Watch
from taskruns.url import is_in_memory
from taskruns.writing import Start

if TYPE_CHECKING:
    from taskruns.bulk import Row, RowsAdded, RunsAdded
    from taskruns.commit import GroupCommit
    from taskruns.events import Event
    from taskruns.replay import Replayed
    from taskruns.stream import Stream
    from taskruns.timeline import Effect

_log = logging.getLogger("taskruns")


class TaskRunHistory(Reader):
    """The runs of all tasks in one database. May be shared between threads; a forked child may go on using it.

    On SQLite no other thread should write while the process forks: the child would find the file locked for good.

    Every call commits before it returns. Transient errors (a busy database, a deadlock, a lost connection) are tried
    again for up to ``retry_for`` seconds, safely: a start whose answer was lost is looked for before it is repeated.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        source: str | None = None,
        retry_for: float = RETRY_FOR,
        on_retry: OnRetry | None = None,
        heartbeat: float = HEARTBEAT,
        retention: Retention | None = None,
    ) -> None:
        super().__init__(engine, retry_for=retry_for, on_retry=on_retry)
        self.url = url_of(engine)
        self.retention = retention
        self.source = socket.gethostname() if source is None else source
        self._supervision = Supervision(self.url, self.source, heartbeat)
        self._group: GroupCommit | None = None
        self._outage = Outage(None if only_reads(engine) else self.url)

    @classmethod
    def connect(
        cls,
        url: str | URL,
        *,
        source: str | None = None,
        read_only: bool = False,
        lock_timeout: float = engine.LOCK_TIMEOUT,
        retry_for: float = RETRY_FOR,
        on_retry: OnRetry | None = None,
        heartbeat: float = HEARTBEAT,
        retention: Retention | None = None,
        group_commit: bool = False,
    ) -> Self:
        """Return the history in a database. Nothing is opened before it is needed.

        Args:
            url: An SQLAlchemy URL: ``sqlite:///FILE``, ``postgresql://…``, ``mysql://…`` or ``mariadb://…``. Options:
                ``synchronous=NORMAL``, ``cache_size=64`` (MiB; SQLite), ``prepare_threshold=none`` (PostgreSQL
                behind PgBouncer).
            source: What runs are marked with; the host's name unless given.
            read_only: Open an SQLite file, which must exist, to read it only; on a server the role decides.
            lock_timeout: Seconds to wait for another writer, who holds a lock (not behind PgBouncer).
            retry_for: Seconds for which a call goes on trying after a transient error.
            on_retry: Called with each transient error before the next try.
            heartbeat: Seconds until the first sign of life of a run that was opened here and is active; others follow
                as often, and at least every 10 s. Whoever judges by them waits for 60 s.
            retention: A policy that the history keeps up by itself, see :meth:`tidy`. None deletes nothing.
            group_commit: Write what many threads record at the same time in one transaction. Each call returns when it
                is durable, as without it. It costs a lone caller next to nothing, and has no effect in memory.

        Raises:
            ValueError: the URL is not that of a supported database.
            ModuleNotFoundError: its driver is not installed; the message names the extra that brings it.
        """
        own = engine.create(url, read_only=read_only, lock_timeout=lock_timeout)
        history = cls(
            own, source=source, retry_for=retry_for, on_retry=on_retry, heartbeat=heartbeat, retention=retention
        )
        if group_commit and not (read_only or is_in_memory(history.url)):
            from taskruns.commit import GroupCommit, Writer

            url = history.url
            history._group = GroupCommit(Writer(url, history._supervision, lock_timeout=lock_timeout))
        return history

    def dispose(self) -> None:
        """Close the idle connections. A later call opens new ones."""
        if self._group is not None:
            self._group.dispose()
        super().dispose()

    def upgrade(self) -> None:
        """Create the tables, or bring them to this version."""
        migrate.upgrade(self._engine)

    def prepare(self) -> None:
        """Create or upgrade the tables of an SQLite database where needed; on a server they have to be there.

        Raises:
            SchemaVersionError: the tables do not suit this code.
        """
        try:
            self.check_version()
        except SchemaVersionError:
            if self._engine.dialect.name != "sqlite":
                raise
            self.upgrade()

    @contextmanager
    def begin(self, *, lock: str | None = None, brief: bool = False) -> Iterator[TaskRunRepository]:
        """Make one transaction of several calls, committed at the end or rolled back by an exception.

        Args:
            lock: A task whose runs no other transaction with this lock may open meanwhile.
            brief: It lasts no longer than a moment. The history is registered by it, and not before it.
        """
        if not brief:
            self._register()
        with self._connections.one() as connection:
            self._require_current(connection)
            with (
                Watch(self._supervision, is_brief=brief) as watch,
                engine.transaction(connection, lock=lock),
            ):
                yield TaskRunRepository(connection, source=self.source, watch=watch)

    def open_run(
        self,
        task_id: str,
        *,
        attempt: int | None = None,
        started_at: datetime | None = None,
        source: str | None = None,
        submission: str | None = None,
        source_attempt: int | None = None,
    ) -> TaskRun:
        """Record that a run has started, and return it: see :meth:`TaskRunRepository.open_run`.

        An earlier active run of the task that was opened here is closed, as failed and ``recovered``: a later start
        shows that it is over. Runs of other histories, and those of :meth:`record`, are left alone.
        """
        start = Start.of(
            task_id,
            attempt,
            started_at,
            self.source if source is None else source,
            submission,
            source_attempt,
            self._supervision.own_number,
        )
        return self._open(start, is_certain=False)

    def _open(self, start: Start, *, is_certain: bool) -> TaskRun:
        supervision = self._supervision
        if supervision.is_due:
            self._register()
        group = self._group
        return self._call(
            lambda connection, lost: supervision.open(connection, start, lost=lost, is_certain=is_certain),
            first=None if group is None else lambda: group.open(start, is_certain=is_certain),
        )

    def _register(self, *, stream: str | None = None) -> None:
        """Register, or beat, if that is due."""
        if self._supervision.is_new:
            self._call(lambda connection, _lost: self._supervision.register(connection, stream=stream))
        elif self._supervision.is_due:
            self._call(lambda connection, _lost: self._supervision.attend(connection))

    def close_run(
        self,
        task_id: str,
        attempt: int,
        phase: TaskPhase,
        *,
        error: str | None = None,
        exit_code: int | None = None,
        finished_at: datetime | None = None,
        leave: bool = False,
    ) -> TaskRun:
        """Record how a run ended, and return it: see :meth:`TaskRunRepository.close_run`.

        ``leave``: nothing more is going to be opened here. The supervisor is removed by the same transaction.
        """
        outcome = Outcome.of(phase, error=error, exit_code=exit_code, finished_at=finished_at)

        supervision, group = self._supervision, None if leave else self._group
        run = self._call(
            lambda connection, lost: supervision.close(connection, task_id, attempt, outcome, lost=lost, leave=leave),
            first=None if group is None else lambda: group.close(task_id, attempt, outcome),
        )
        if self.retention is not None and not leave and is_turn(attempt):
            self.tidy(task_id)
        return run

    def add_runs(self, runs: Sequence[TaskRun]) -> RunsAdded:
        """Store runs as they are, in one transaction: see :meth:`TaskRunRepository.add_runs`."""
        from taskruns import bulk

        return self.add_rows(list(map(bulk.row_of, runs))).of_runs(runs)

    def add_rows(self, rows: Sequence[Row]) -> RowsAdded:
        """Store runs that are rows already, as :func:`taskruns.bulk.row_from_wire` makes them, in one transaction."""
        from taskruns import bulk

        def add(connection: Connection, _lost: bool) -> RowsAdded:  # noqa: FBT001  (as in Operation)
            with engine.transaction(connection):
                return bulk.add_rows(connection, rows)

        return self._call(add)

    def record_events(self, stream: Stream, events: Sequence[Event]) -> list[Effect]:
        """Do what events of a stream say, in one transaction, and return what each did; see :class:`EventRecorder`."""
        self._register(stream=stream.source)
        effects = self._call(lambda connection, _lost: self._supervision.write(connection, stream, events))
        if self.retention is not None:
            from taskruns.pruning import turns_of

            self.tidy(*turns_of(events, effects))
        return effects

    def recover(
        self,
        *,
        stale_after: float | None = STALE_AFTER,
        unsupervised_after: float | None = None,
        dry_run: bool = False,
    ) -> list[TaskRun]:
        """Close the active runs whose supervisor is dead, and return them, in transactions of their own.

        A supervisor on this host (the same start of its kernel, the same container) is dead when its process has
        ended; any other when it has not beaten for ``stale_after`` seconds, by the database's clock. A run is closed
        as failed and ``recovered``, at the last sign of life; the real outcome replaces that, if it comes yet. What
        has ended, and what has a sign of life meanwhile, is never touched.

        Args:
            stale_after: Seconds of silence that prove a death. None: only of this host, as whatever records does.
            unsupervised_after: Also close runs that have no supervisor and started so many seconds ago: those that
                were written by SQL, imported, or opened in a transaction of a host's own.
            dry_run: Only return what would be closed.
        """
        if dry_run:
            return self._ask(
                lambda runs: runs.recover(stale_after=stale_after, unsupervised_after=unsupervised_after, dry_run=True)
            )
        closed: list[TaskRun] = []  # outside, as a second try does not find what the first has closed

        def close(connection: Connection, _lost: bool) -> None:  # noqa: FBT001  (as in Operation)
            here = Process.here()
            closed.extend(
                recovery.recover(connection, here, stale_after=stale_after, unsupervised_after=unsupervised_after)
            )

        self._call(close)
        return closed

    def replay(self, *, seconds: float | None = None, wait: bool = False, stream: Stream | None = None) -> Replayed:
        """Write what is kept in the spool of this database, and remove it there.

        Files of living processes are left. A run that is replayed gets its task's next number: there the order of
        attempts is not that of their starts.

        Args:
            seconds: The time after which no further transaction is begun; what is left waits for the next time.
            wait: Wait for another process that is replaying, instead of leaving it to that.
            stream: Through which the events of its source go, as more of them follow; see :class:`EventRecorder`.

        Raises:
            OSError: the files cannot be used.
        """
        from taskruns.replay import replay

        supervision = self._supervision
        if stream is not None:
            supervision.hold()  # which of its runs are active is for the events to tell
        return replay(self._engine, self.url, supervision=supervision, stream=stream, seconds=seconds, wait=wait)

    def spool(self) -> Spool:
        """Return what keeps that which cannot be written here."""
        return Spool(self.url, lambda: self._supervision.own_number)

    def prune(
        self,
        retention: Retention = Retention(),  # noqa: B008  (immutable)
        *,
        task: str | None = None,
        dry_run: bool = False,
        on_progress: Callable[[int], None] | None = None,
    ) -> int:
        """Delete the runs that a policy does not keep, by the database's clock, and return how many.

        Any number of these may run at once, while others write: each deletes a few hundred runs at a time, and on
        SQLite leaves the others time between. One that was stopped is just started again. The memory is constant.

        Args:
            retention: The policy.
            task: Only of the tasks that match: ``*``, ``?`` and ``[...]`` as in the shell, ``[*]`` is a star.
            dry_run: Delete nothing, and return how many would be.
            on_progress: Called after each step with the number so far.
        """
        from taskruns.pruning import Pruning

        pass_ = Pruning(retention, task=task, dry_run=dry_run)
        while not pass_.is_done:
            self._call(pass_.step)
            if on_progress is not None:
                on_progress(pass_.count)
            time.sleep(pass_.pause)
        if not dry_run:
            self._call(lambda connection, _lost: recovery.remove_idle(connection, Process.here()))
        return pass_.count

    def tidy(self, *task_ids: str) -> None:
        """Prune some tasks and a bounded slice of the others by the history's own policy, if it has one.

        It takes some milliseconds for each and raises nothing: who records runs has other things to do. A close calls
        it where :func:`taskruns.retention.is_turn` says so, and so a table stays within bounds by itself.
        """
        if self.retention is None or not task_ids:
            return
        from taskruns import pruning

        policy = self.retention
        try:
            self._call_once(lambda connection, _lost: pruning.tidy(connection, policy, task_ids), Retry(0, None))
        except Exception:  # noqa: BLE001  (the next turn comes)
            _log.debug("old runs are not deleted at present", exc_info=True)

    def forget(self, task_id: str, attempt: int | None = None, *, error_only: bool = False) -> int:
        """Delete the runs of a task that have ended, or one of them, and return how many there were.

        With ``error_only`` the runs stay and their errors become ``[removed]``. Active runs stay as they are. On SQLite
        the text is overwritten in the file, and its log is emptied; a server keeps it in its logs and backups.
        """
        from taskruns.pruning import Forgetting

        forgetting = Forgetting(task_id, attempt, error_only=error_only)
        while not forgetting.is_done:
            self._call(forgetting.step)
        return forgetting.count

    def compact(self) -> None:
        """Give the space of deleted runs back to the file system. Writers wait meanwhile, and may give up."""
        from taskruns import pruning

        self._call(pruning.compact)

    def record(
        self, task_id: str, *, source: str | None = None, submission: str | None = None, on_error: OnError = "warn"
    ) -> Recording:
        """Record what runs inside ``with history.record(task_id):``, or a function, by ``@history.record(task_id)``.

        The run ends as succeeded; by an exception as failed, with its text as the error; as timeout on TimeoutError,
        as canceled on KeyboardInterrupt and CancelledError, by its code on SystemExit. The exception goes on.

        The code runs whatever happens to the recording: an error there is logged, once while the database stays out of
        use, and for 30 s after it no new try is made. ``on_error="raise"`` raises it instead, except where the code
        raises an exception of its own.
        """
        checked_on_error(on_error)

        def begin() -> RecordedRun:
            handle = RecordedRun()
            if on_error == "raise" or not self._outage.is_on:
                with self._outage.tolerated(task_id, on_error):
                    start = Start.of(
                        task_id, None, handle.started_at, self.source if source is None else source, submission, None
                    )
                    handle.run = self._open(start, is_certain=True)
            if handle.run is None:
                self._outage.keep_start(handle, task_id, self.source if source is None else source, submission)
            return handle

        def end(handle: RecordedRun, exception: BaseException | None) -> None:
            is_told = False
            try:
                if handle.run is not None and (on_error == "raise" or not self._outage.is_on):
                    with self._outage.tolerated(task_id, "warn" if exception is not None else on_error):
                        outcome = handle.outcome(exception)
                        handle.run = self.close_run(handle.run.task_id, handle.run.attempt, **outcome)
                        is_told = True
            finally:
                if not is_told:
                    is_kept = self._outage.keep_end(handle, task_id, exception)
                    if handle.run is not None:
                        self._supervision.closed(task_id, handle.run.attempt)
                        if not is_kept:
                            self._supervision.owe(task_id, handle.run.attempt, Outcome.of(**handle.outcome(exception)))

        return Recording(begin, end)
