"""Runs a command and records its attempts. The command runs, and ends as it would, whatever the database does."""

import math
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from taskruns import process, spool
from taskruns.history import TaskRunHistory
from taskruns.model import Outcome, TaskPhase, TaskRun
from taskruns.process import Ended, Signals
from taskruns.retention import is_turn
from taskruns.retrying import OnRetry, Retry, cause_of
from taskruns.spool import Spool

PATIENCE = 5.0
"""Seconds that a command and its retries are held up by a database, in all.

Once the database has taken the start of a run, its end is given more of them on a machine with more than ``CROWD``
processes waiting for each processor, up to ``MOST_PATIENCE``: what passes there is not the database's time. 400
wrappers at once need it to record their ends.
"""

MOST_PATIENCE = 60.0
"""Seconds that patience may grow to."""

CROWD = 4
"""Processes waiting for a processor, above which a machine is crowded."""

OPENING_SHARE, CHECKING_SHARE = 0.4, 0.6
"""The parts of ``PATIENCE`` for a start, and for one that must not overlap, so that some are left for its end."""


Connect = Callable[[OnRetry], TaskRunHistory]
"""Returns the history, whose calls tell of each transient error. It may fail, but it waits for no database."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run and how."""

    task_id: str
    command: Sequence[str]
    timeout: float | None = None
    """Seconds that an attempt may take."""
    kill_after: float = 10.0
    """Seconds from the polite signal at the timeout to the one that cannot be ignored."""
    retries: int = 0
    """How often a failed attempt is followed by another."""
    backoff: tuple[float, float] = (1.0, 60.0)
    """Seconds before the first retry, doubled for each that follows, and the most they may become."""
    no_overlap: bool = False
    """Whether to start nothing while the task has an active run."""
    conflict_exit_code: int = 1
    """The exit status when that is so."""
    keep_stderr: bool = True
    """Whether the end of standard error becomes the error of a failed run."""


def execute(plan: Plan, connect: Connect, say: Callable[[str], None] | None) -> int:
    """Run the command, up to ``plan.retries`` times again until it succeeds, and return the exit status.

    Args:
        plan: What to run and how.
        connect: Returns the history.
        say: Takes a line for the user, if he wants to hear any.
    """
    with Signals() as signals:
        recorder = _Recorder(connect, signals, say)
        submission = uuid.uuid4().hex if plan.retries else None
        number = 0
        while True:
            number += 1
            record = recorder.open(plan, submission, number if plan.retries else None)
            if record.overlaps is not None:
                run = record.overlaps
                recorder.say(
                    f"{plan.task_id} is running already: attempt {run.attempt}, started at {run.started_at:%F %T} UTC"
                )
                return plan.conflict_exit_code
            if signals.stopped_by is not None:
                status = 128 + signals.stopped_by
                recorder.close(record, TaskPhase.CANCELED, _stopped_before(signals.stopped_by), status)
                return status
            ended = process.run(
                plan.command,
                _environment(plan.task_id, record.run, number),
                signals,
                timeout=plan.timeout,
                kill_after=plan.kill_after,
                keep_stderr=plan.keep_stderr,
            )
            if ended.not_started is not None:
                recorder.say(ended.not_started)
            phase, error = _outcome(ended, plan, is_last=number > plan.retries)
            recorder.close(record, phase, error, ended.status)
            if phase in (TaskPhase.SUCCEEDED, TaskPhase.CANCELED) or number > plan.retries:
                return ended.status
            first, most = plan.backoff
            if _sleep(min(most, first * 2 ** min(number - 1, 64)), signals):
                return 128 + (signals.stopped_by or 0)


def _environment(task_id: str, run: TaskRun | None, number: int) -> dict[str, str]:
    environment = {**os.environ, "TASKRUNS_TASK": task_id, "TASKRUNS_TRY": str(number)}
    environment.pop("TASKRUNS_ATTEMPT", None)  # another one's, if we were started by one
    if run is not None:
        environment["TASKRUNS_ATTEMPT"] = str(run.attempt)
    with suppress(OSError):
        # In the C locale, which is cron's, Python sets LC_CTYPE for itself (PEP 538); the command has its own idea.
        given = Path("/proc/self/environ").read_bytes().split(b"\0")
        if not any(entry.startswith(b"LC_CTYPE=") for entry in given):
            environment.pop("LC_CTYPE", None)
    return environment


def _outcome(ended: Ended, plan: Plan, *, is_last: bool) -> tuple[TaskPhase, str | None]:
    tail = f"\n{ended.stderr}" if ended.stderr else ""
    if ended.timed_out:
        return TaskPhase.TIMEOUT, f"timed out after {plan.timeout:g} s{tail}"
    if ended.stopped_by is not None:
        return TaskPhase.CANCELED, f"stopped by {_name(ended.stopped_by)}{tail}"
    if ended.status == 0:
        return TaskPhase.SUCCEEDED, None
    phase = TaskPhase.EXHAUSTED if is_last and plan.retries else TaskPhase.FAILED
    if ended.not_started is not None:
        return phase, ended.not_started
    if ended.killed_by is not None:
        return phase, f"killed by {_name(ended.killed_by)}{tail}"
    return phase, ended.stderr or f"exited with status {ended.status}"


def _stopped_before(number: int) -> str:
    return f"stopped by {_name(number)} before the command was started"


def _name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _sleep(seconds: float, signals: Signals) -> bool:
    """Sleep, unless told to stop; whether that was so."""
    until = time.monotonic() + seconds
    while signals.stopped_by is None and (left := until - time.monotonic()) > 0:
        signals.wait(left)
    return signals.stopped_by is not None


_SILENCE = "the database does not answer"
_LOST = "this run will not be recorded, the command runs all the same"

HOUSE_SHARE = 0.2
"""The part of ``PATIENCE`` for which a wrapper, when all is recorded, goes on with what it does for others."""


def _patience() -> float:
    crowd = os.getloadavg()[0] / (os.cpu_count() or 1) / CROWD
    return min(max(PATIENCE, PATIENCE * crowd), MOST_PATIENCE)


class _Recorder:
    """Records runs with a bounded patience: what takes longer is kept. It says once if that is so."""

    def __init__(self, connect: Connect, signals: Signals, listener: Callable[[str], None] | None) -> None:
        # Here, where drivers are imported, before there is a database to be patient with; and once for all attempts, as
        # what a history has learned of the database is not asked again.
        self._history = self._spool = self._failure = None
        try:
            self._history = connect(self._note)
            self._spool = self._history.spool()
        except Exception as error:  # noqa: BLE001  (whatever it is, the command goes on)
            self._failure = cause_of(error)
        self._trouble: str | None = None
        self._signals = signals
        self._listener = listener
        self._spent = 0.0
        self._is_said = self._has_begun = False

    def open(self, plan: Plan, submission: str | None, source_attempt: int | None) -> "_Record":
        """Begin to record an attempt, and wait a while for its number."""
        record = _Record(plan, submission, source_attempt, self._history, self._spool, self._signals.wake)
        record.is_first, self._has_begun = not self._has_begun, True
        if self._history is None:
            self._warn(f"{_LOST}: {self._failure}")
            return record
        record.begin()
        # Whether a command may start at all is worth more waiting, as long as nothing speaks against the database.
        share = CHECKING_SHARE if plan.no_overlap else OPENING_SHARE
        self._wait(record.is_open, share, lambda: plan.no_overlap and self._trouble is None, stop_early=True)
        record.start_anyway()
        is_unchecked = plan.no_overlap and record.run is None and record.overlaps is None
        if record.failure is not None:
            self._warn_of(record)
        elif is_unchecked and self._signals.stopped_by is None:
            self._warn(f"whether {plan.task_id} is running already is not known, since {self._trouble or _SILENCE}")
        return record

    def close(self, record: "_Record", phase: TaskPhase, error: str | None, exit_code: int) -> None:
        """Record how an attempt ended, and wait a while until it is written."""
        if self._history is None:
            return
        record.end(phase, error, exit_code)
        self._wait(record.is_done, 1.0, lambda: record.run is not None, stop_early=False)
        if not record.is_written:
            record.keep_end()
            self._warn_of(record)
        elif record.house is not None:
            self._wait(record.house, HOUSE_SHARE, lambda: False, stop_early=True)

    def _warn_of(self, record: "_Record") -> None:
        """Say that the database does not have a run, once in an outage: that others have kept runs tells of it."""
        why = record.failure or self._trouble or _SILENCE
        if record.not_kept is not None:
            self._warn(f"{_LOST}: {why}; nor can it be kept: {record.not_kept}")
        elif self._listener is not None and self._spool is not None and not self._is_said and self._spool.is_news():
            self._warn(f"this run is kept in {self._spool.path} until the database can be used again: {why}")

    def _note(self, error: BaseException) -> None:
        self._trouble = cause_of(error)

    def _wait(self, event: threading.Event, share: float, is_reached: Callable[[], bool], *, stop_early: bool) -> None:
        began = time.monotonic()
        while not event.is_set() and not (stop_early and self._signals.stopped_by is not None):
            waited = time.monotonic() - began
            patience = _patience() if is_reached() else PATIENCE
            left = min(patience * share - waited, patience - self._spent - waited)
            if left <= 0:
                break
            self._signals.wait(min(left, 1.0))
        self._spent += time.monotonic() - began

    def _warn(self, line: str) -> None:
        if not self._is_said:
            self._is_said = True
            self.say(line)

    def say(self, line: str) -> None:
        """Say something to the user."""
        if self._listener is not None:
            self._listener(line)


class _OutdatedError(Exception):
    """The command has started meanwhile, later than was about to be written."""


class _Record:
    """Records one attempt: its start, as soon as the database takes it, and its end.

    In a thread, since only the end of the process stops a call that hangs in a driver. While the command runs it goes
    on trying: a run whose start was delayed has its true times all the same.
    """

    def __init__(
        self,
        plan: Plan,
        submission: str | None,
        source_attempt: int | None,
        history: TaskRunHistory | None,
        spool: Spool | None,
        wake: Callable[[], None],
    ) -> None:
        self._plan = plan
        self._history = history
        self._spool = spool
        self._wake = wake
        self._start: dict[str, Any] = {"submission": submission, "source_attempt": source_attempt}
        self._end: dict[str, Any] = {}
        self._has_ended = threading.Event()
        self._decision = threading.Lock()
        self._starts_anyway = False
        self._is_repeated = False
        self._may_be_written = False  # with the time of the start that it has had till then
        self._kept: TaskRun | None = None  # the start, as it is in the spool
        self.is_open = threading.Event()
        """Whether the first attempt to open the run is over."""
        self.is_done = threading.Event()
        """Whether nothing more will be written."""
        self.run: TaskRun | None = None
        self.overlaps: TaskRun | None = None
        """The active run because of which this one does not start."""
        self.failure: str | None = None
        """Why the run is not recorded."""
        self.is_written = False
        """Whether the outcome is stored."""
        self.is_first = True
        """Whether the command runs for the first time."""
        self.house: threading.Event | None = None
        """Whether all is done that is done for others; None if nothing is."""
        self.not_kept: str | None = None
        """Why what could not be written could not be kept either."""

    def begin(self) -> None:
        """Start to open the run."""
        threading.Thread(target=self._work, daemon=True).start()

    def start_anyway(self) -> None:
        """Decide that the command starts, unless it was found before that the task is active.

        A start that the database does not have yet is kept: the process may be killed before it has.
        """
        with self._decision:
            self._starts_anyway = self.overlaps is None
            if not self._may_be_written:
                self._take_time()  # anew, where the database was ready and is waited for all the same
            if self._starts_anyway and self.run is None:
                with self._keeping() as spool:
                    self._kept = spool.add_start(self._told())
                    self._start["started_at"] = self._kept.started_at

    def keep_end(self) -> None:
        """Keep what the database does not have of the run, now that it has ended."""
        with self._decision, self._keeping() as spool:
            if not self.is_written:
                run = self.run or self._kept or self._told()
                number = None if self.run is None else self.run.attempt
                spool.add_end(run, Outcome.of(**self._end), attempt=number)

    @contextmanager
    def _keeping(self) -> Iterator[Spool]:
        assert self._spool is not None  # noqa: S101  (for mypy: there is one where there is a history)
        try:
            yield self._spool
        except OSError as error:
            self.not_kept = error.strerror or str(error)

    def _told(self) -> TaskRun:
        assert self._history is not None  # noqa: S101  (as above)
        return TaskRun.starting(self._plan.task_id, 1, source=self._history.source, **self._start)

    def end(self, phase: TaskPhase, error: str | None, exit_code: int) -> None:
        """Tell how the run ended, just now."""
        finished_at = self._start["started_at"] + timedelta(seconds=time.monotonic() - self._clock)
        self._end = {"phase": phase, "error": error, "exit_code": exit_code, "finished_at": finished_at}
        self._has_ended.set()

    def _take_time(self) -> None:
        """Take the time of the start: once the database is ready, or when the command stops waiting for it."""
        self._clock = time.monotonic()
        self._start["started_at"] = datetime.now(UTC)

    def _work(self) -> None:
        self._attempt(self._open)
        self.is_open.set()
        self._wake()
        if self.overlaps is None:
            if self.run is not None:
                self.house = threading.Event()
                threading.Thread(target=self._keep_house, args=(self.run, self.house), daemon=True).start()
            else:
                self._hang_up()
            self._has_ended.wait()
            self._attempt(self._close)
        self._hang_up()
        self.is_done.set()
        self._wake()

    def _hang_up(self) -> None:
        """Hold no connection while nothing is said: there may be more commands running than connections."""
        assert self._history is not None  # noqa: S101  (or this thread would not run)
        with suppress(Exception):
            self._history.dispose()

    def _attempt(self, step: Callable[[TaskRunHistory], None]) -> None:
        assert self._history is not None  # noqa: S101  (as above)
        try:
            step(self._history)
        except Exception as error:  # noqa: BLE001  (whatever it is, the command goes on)
            self.failure = cause_of(error)
        else:
            self.failure = None

    def _keep_house(self, run: TaskRun, done: threading.Event) -> None:
        """Do what a history needs now and then, beside the command: in a thread which nobody has to wait for.

        It takes over the connection of the start.
        """
        with suppress(Exception):
            assert self._history is not None  # noqa: S101  (for mypy: there is a run)
            with self._history as history:
                if self.is_first:
                    history.recover(stale_after=None)
                    if spool.files(history.url):
                        history.replay(seconds=PATIENCE * HOUSE_SHARE)
                if is_turn(run.attempt):
                    history.tidy(run.task_id)
        done.set()
        self._wake()

    def _open(self, history: TaskRunHistory) -> None:
        history.prepare()
        while True:
            with suppress(_OutdatedError):
                run = Retry(math.inf, history.on_retry).call(self._open_once, history)
                break
        with self._decision:
            self.run = run
            if self._kept is not None and run is not None:
                with self._keeping() as spool:
                    spool.forget(self._kept)
                self._kept = None

    def _open_once(self, history: TaskRunHistory) -> TaskRun | None:
        with history.begin(lock=self._plan.task_id, brief=True) as runs:
            with self._decision:
                if "started_at" not in self._start:
                    self._take_time()  # now that nobody is waited for any more
                start = dict(self._start)
            if self._plan.no_overlap and not self._is_repeated:
                active = runs.active_runs(self._plan.task_id)
                if active and runs.recover(task_id=self._plan.task_id):
                    active = runs.active_runs(self._plan.task_id)
                with self._decision:
                    if active and not self._starts_anyway:
                        self.overlaps = active[0]
                        return None
            again, self._is_repeated = self._is_repeated, True
            run = runs.open_run(self._plan.task_id, **start, again=again)
            with self._decision:
                if start != self._start:
                    raise _OutdatedError
                self._may_be_written = True
            return run

    def _close(self, history: TaskRunHistory) -> None:
        if self.run is None:
            self._open(history)
        if self.run is not None:
            history.close_run(self.run.task_id, self.run.attempt, **self._end, leave=True)
            self.is_written = True
