"""The history for asyncio."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Self

from sqlalchemy import URL, Connection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from taskruns import bulk, engine, migrate, pruning, recovery
from taskruns.aio.commit import AsyncGroupCommit
from taskruns.aio.reader import AsyncReader
from taskruns.aio.repository import AsyncTaskRunRepository
from taskruns.bulk import Row, RowsAdded, RunsAdded
from taskruns.commit import Writer
from taskruns.engine import only_reads, url_of
from taskruns.errors import SchemaVersionError
from taskruns.events import Event
from taskruns.liveness import STALE_AFTER, Process
from taskruns.model import Outcome, TaskPhase, TaskRun
from taskruns.pruning import Forgetting, Pruning, turns_of
from taskruns.reader import RETRY_FOR
from taskruns.recording import AsyncRecording, OnError, Outage, RecordedRun, checked_on_error
from taskruns.replay import Replayed, replay
from taskruns.retention import Retention, is_turn
from taskruns.retrying import OnRetry, Retry
from taskruns.spool import Spool
from taskruns.stream import Stream
from taskruns.supervision import HEARTBEAT, Supervision, Watch
from taskruns.timeline import Effect
from taskruns.url import ASYNC_DRIVERS, is_in_memory, parse_url, with_sync_driver
from taskruns.writing import Start

_log = logging.getLogger("taskruns")


class AsyncTaskRunHistory(AsyncReader):
    """The twin of :class:`taskruns.TaskRunHistory`. Belongs to the event loop that first uses it."""

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        source: str | None = None,
        retry_for: float = RETRY_FOR,
        on_retry: OnRetry | None = None,
        heartbeat: float = HEARTBEAT,
        retention: Retention | None = None,
    ) -> None:
        super().__init__(engine, retry_for=retry_for, on_retry=on_retry)
        self.url = url_of(engine.sync_engine)
        self.retention = retention
        self.source = socket.gethostname() if source is None else source
        self._supervision = Supervision(self.url, self.source, heartbeat)
        self._group: AsyncGroupCommit | None = None
        self._outage = Outage(None if only_reads(engine.sync_engine) else self.url)

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
        """Return the history in a database: see :meth:`taskruns.TaskRunHistory.connect`. Not awaited."""
        parsed = parse_url(url, drivers=ASYNC_DRIVERS)
        options = engine.engine_options(parsed, read_only=read_only, lock_timeout=lock_timeout)
        with engine.checked_options(parsed):
            own = create_async_engine(options.pop("url"), **options)
        engine.equipped(own.sync_engine, parsed, read_only=read_only, lock_timeout=lock_timeout)
        history = cls(
            own, source=source, retry_for=retry_for, on_retry=on_retry, heartbeat=heartbeat, retention=retention
        )
        if group_commit and not (read_only or is_in_memory(history.url)):
            url = with_sync_driver(history.url)
            history._group = AsyncGroupCommit(Writer(url, history._supervision, lock_timeout=lock_timeout))
        return history

    async def dispose(self) -> None:
        """Close the idle connections. A later call opens new ones."""
        if self._group is not None:
            await self._group.dispose()
        await super().dispose()

    async def upgrade(self) -> None:
        """Create the tables, or bring them to this version."""
        # Waiting in the lock itself would stop the event loop, which its holder may need to go on.
        while not migrate.lock.acquire(blocking=False):  # noqa: ASYNC110  (a thread's lock wakes no loop)
            await asyncio.sleep(0.02)
        try:
            async with self._engine.connect() as connection:
                await connection.run_sync(migrate.upgrade_connection)
        finally:
            migrate.lock.release()

    async def prepare(self) -> None:
        """Create or upgrade the tables of an SQLite database: see :meth:`taskruns.TaskRunHistory.prepare`."""
        try:
            await self.check_version()
        except SchemaVersionError:
            if self._engine.dialect.name != "sqlite":
                raise
            await self.upgrade()

    @asynccontextmanager
    async def begin(self, *, lock: str | None = None, brief: bool = False) -> AsyncIterator[AsyncTaskRunRepository]:
        """Make one transaction of several calls: see :meth:`taskruns.TaskRunHistory.begin`."""
        if not brief:
            await self._register()
        async with self._connections.one() as connection:
            await self._require_current(connection)
            transaction = await connection.run_sync(lambda connection: engine.transaction(connection, lock=lock))
            await connection.run_sync(lambda _: transaction.__enter__())
            with Watch(self._supervision, is_brief=brief) as watch:
                try:
                    yield AsyncTaskRunRepository(connection, source=self.source, watch=watch)
                except BaseException as error:
                    cause = error  # told by hand: sys.exc_info() knows nothing of it inside the bridge
                    await connection.run_sync(lambda _: transaction.__exit__(type(cause), cause, cause.__traceback__))
                    raise
                await connection.run_sync(lambda _: transaction.__exit__(None, None, None))

    async def open_run(
        self,
        task_id: str,
        *,
        attempt: int | None = None,
        started_at: datetime | None = None,
        source: str | None = None,
        submission: str | None = None,
        source_attempt: int | None = None,
    ) -> TaskRun:
        """Record that a run has started, and return it: see :meth:`taskruns.TaskRunHistory.open_run`."""
        start = Start.of(
            task_id,
            attempt,
            started_at,
            self.source if source is None else source,
            submission,
            source_attempt,
            self._supervision.own_number,
        )
        return await self._open(start, is_certain=False)

    async def _open(self, start: Start, *, is_certain: bool) -> TaskRun:
        supervision = self._supervision
        if supervision.is_due:
            await self._register()
        group = self._group
        return await self._call(
            lambda connection, lost: supervision.open(connection, start, lost=lost, is_certain=is_certain),
            first=None if group is None else lambda: group.open(start, is_certain=is_certain),
        )

    async def _register(self, *, stream: str | None = None) -> None:
        if self._supervision.is_new:
            await self._call(lambda connection, _lost: self._supervision.register(connection, stream=stream))
        elif self._supervision.is_due:
            await self._call(lambda connection, _lost: self._supervision.attend(connection))

    async def close_run(
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
        """Record how a run ended, and return it: see :meth:`taskruns.TaskRunHistory.close_run`."""
        outcome = Outcome.of(phase, error=error, exit_code=exit_code, finished_at=finished_at)

        supervision, group = self._supervision, None if leave else self._group
        run = await self._call(
            lambda connection, lost: supervision.close(connection, task_id, attempt, outcome, lost=lost, leave=leave),
            first=None if group is None else lambda: group.close(task_id, attempt, outcome),
        )
        if self.retention is not None and not leave and is_turn(attempt):
            await self.tidy(task_id)
        return run

    async def add_runs(self, runs: Sequence[TaskRun]) -> RunsAdded:
        """Store runs as they are, in one transaction: see :meth:`TaskRunRepository.add_runs`."""
        return (await self.add_rows(list(map(bulk.row_of, runs)))).of_runs(runs)

    async def add_rows(self, rows: Sequence[Row]) -> RowsAdded:
        """Store runs that are rows already, as :func:`taskruns.bulk.row_from_wire` makes them, in one transaction."""

        def add(connection: Connection, _lost: bool) -> RowsAdded:  # noqa: FBT001  (as in Operation)
            with engine.transaction(connection):
                return bulk.add_rows(connection, rows)

        return await self._call(add)

    async def record_events(self, stream: Stream, events: Sequence[Event]) -> list[Effect]:
        """Do what events of a stream say, in one transaction: see :meth:`taskruns.TaskRunHistory.record_events`."""
        await self._register(stream=stream.source)
        effects = await self._call(lambda connection, _lost: self._supervision.write(connection, stream, events))
        if self.retention is not None:
            await self.tidy(*turns_of(events, effects))
        return effects

    async def recover(
        self,
        *,
        stale_after: float | None = STALE_AFTER,
        unsupervised_after: float | None = None,
        dry_run: bool = False,
    ) -> list[TaskRun]:
        """Close the active runs whose supervisor is dead, and return them: see :meth:`TaskRunHistory.recover`."""
        if dry_run:
            return await self._ask(
                lambda runs: runs.recover(stale_after=stale_after, unsupervised_after=unsupervised_after, dry_run=True)
            )
        closed: list[TaskRun] = []  # outside, as a second try does not find what the first has closed

        def close(connection: Connection, _lost: bool) -> None:  # noqa: FBT001  (as in Operation)
            here = Process.here()
            closed.extend(
                recovery.recover(connection, here, stale_after=stale_after, unsupervised_after=unsupervised_after)
            )

        await self._call(close)
        return closed

    async def replay(
        self, *, seconds: float | None = None, wait: bool = False, stream: Stream | None = None
    ) -> Replayed:
        """Write what is kept in the spool of this database: see :meth:`taskruns.TaskRunHistory.replay`."""

        def replay_beside() -> Replayed:
            if stream is not None:
                self._supervision.hold()  # which of its runs are active is for the events to tell
            own = engine.create(with_sync_driver(self.url))
            try:
                return replay(own, self.url, supervision=self._supervision, stream=stream, seconds=seconds, wait=wait)
            finally:
                own.dispose()

        return await asyncio.to_thread(replay_beside)

    def spool(self) -> Spool:
        """Return what keeps that which cannot be written here. Not awaited; what it does waits for the disk."""
        return Spool(self.url, lambda: self._supervision.own_number)

    async def prune(
        self,
        retention: Retention = Retention(),  # noqa: B008  (immutable)
        *,
        task: str | None = None,
        dry_run: bool = False,
        on_progress: Callable[[int], None] | None = None,
    ) -> int:
        """Delete the runs that a policy does not keep: see :meth:`taskruns.TaskRunHistory.prune`."""
        pass_ = Pruning(retention, task=task, dry_run=dry_run)
        while not pass_.is_done:
            await self._call(pass_.step)
            if on_progress is not None:
                on_progress(pass_.count)
            await asyncio.sleep(pass_.pause)
        if not dry_run:
            await self._call(lambda connection, _lost: recovery.remove_idle(connection, Process.here()))
        return pass_.count

    async def tidy(self, *task_ids: str) -> None:
        """Prune some tasks and a bounded slice of the others: see :meth:`taskruns.TaskRunHistory.tidy`."""
        if self.retention is None or not task_ids:
            return
        policy = self.retention
        try:
            await self._call_once(lambda connection, _lost: pruning.tidy(connection, policy, task_ids), Retry(0, None))
        except Exception:  # noqa: BLE001  (the next turn comes)
            _log.debug("old runs are not deleted at present", exc_info=True)

    async def forget(self, task_id: str, attempt: int | None = None, *, error_only: bool = False) -> int:
        """Delete the runs of a task that have ended, or their errors: see :meth:`taskruns.TaskRunHistory.forget`."""
        forgetting = Forgetting(task_id, attempt, error_only=error_only)
        while not forgetting.is_done:
            await self._call(forgetting.step)
        return forgetting.count

    async def compact(self) -> None:
        """Give the space of deleted runs back to the file system: see :meth:`taskruns.TaskRunHistory.compact`."""
        await self._call(pruning.compact)

    def record(
        self, task_id: str, *, source: str | None = None, submission: str | None = None, on_error: OnError = "warn"
    ) -> AsyncRecording:
        """Record what runs inside ``async with history.record(task_id) as run:``, or a coroutine function.

        See :meth:`taskruns.TaskRunHistory.record`. A cancelation waits until the run is closed.
        """
        checked_on_error(on_error)

        async def begin() -> RecordedRun:
            handle = RecordedRun()
            if on_error == "raise" or not self._outage.is_on:
                with self._outage.tolerated(task_id, on_error):
                    start = Start.of(
                        task_id, None, handle.started_at, self.source if source is None else source, submission, None
                    )
                    handle.run = await self._open(start, is_certain=True)
            if handle.run is None:
                await asyncio.to_thread(
                    self._outage.keep_start, handle, task_id, self.source if source is None else source, submission
                )
            return handle

        async def end(handle: RecordedRun, exception: BaseException | None) -> None:
            is_told = False
            try:
                if handle.run is not None and (on_error == "raise" or not self._outage.is_on):
                    with self._outage.tolerated(task_id, "warn" if exception is not None else on_error):
                        outcome = handle.outcome(exception)
                        handle.run = await self.close_run(handle.run.task_id, handle.run.attempt, **outcome)
                        is_told = True
            finally:
                if not is_told:
                    is_kept = await asyncio.to_thread(self._outage.keep_end, handle, task_id, exception)
                    if handle.run is not None:
                        self._supervision.closed(task_id, handle.run.attempt)
                        if not is_kept:
                            self._supervision.owe(task_id, handle.run.attempt, Outcome.of(**handle.outcome(exception)))

        return AsyncRecording(begin, end)
