"""The events of a supervisor give its true history, however they are repeated, reordered or cut off."""

import itertools
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from taskruns import EventRecorder, TaskPhase, TaskRun, TaskRunHistory
from taskruns.model import SUPERSEDED

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
NAMES = {  # old and new
    "start": ("TaskStarting", "AttemptStarting"),
    "succeeded": ("TaskStopped", "AttemptSucceeded"),
    "failed": ("TaskFailed", "AttemptFailed"),
    "timeout": ("TimeoutHit", "AttemptTimedOut"),
    "canceled": ("TaskCanceled", "AttemptCanceled"),
}

numbers = itertools.count()


@dataclass
class Attempt:
    """What really happened, the events that tell of it, and what each of them makes of the run."""

    session: int
    run: TaskRun
    events: list[dict[str, Any]] = field(default_factory=list)
    states: list[TaskRun] = field(default_factory=list)

    def tell(self, kind: str, at: datetime, state: TaskRun, **facts: Any) -> None:
        event = {"kind": kind, "task": self.run.task_id, "at": at.isoformat()} | facts
        self.events.append(event | {"attempt": self.run.source_attempt} if kind != "TaskFinished" else event)
        self.states.append(state)


@st.composite
def histories(draw: st.DrawFn, most_sessions: int = 3) -> list[Attempt]:
    """Make sessions of a supervisor that runs one task, one attempt after the other; each may end by a kill."""
    task, attempts, now = f"task {next(numbers)}", list[Attempt](), NOON
    vocabulary = draw(st.sampled_from([0, 1]))
    tick = timedelta(milliseconds=draw(st.sampled_from([1, 10, 60_000])))
    sessions = draw(st.integers(1, most_sessions))
    # Without them, an end that comes before its start cannot be told from one of the same attempt before the restart.
    has_durations = sessions > 1 or draw(st.booleans())
    for session in range(sessions):
        for number in range(1, draw(st.integers(1, 4)) + 1):
            now += tick
            last = attempts[-1].run.attempt if attempts else 0
            run = TaskRun(
                task, number if number > last else last + 1, TaskPhase.RUNNING, now, source="s", source_attempt=number
            )
            attempt = Attempt(session, run)
            attempt.tell(NAMES["start"][vocabulary], now, run)
            attempts.append(attempt)
            now += tick * draw(st.integers(1, 5))
            facts = {"durationMs": (now - run.started_at) // timedelta(milliseconds=1)} if has_durations else {}
            _end(draw, attempt, vocabulary, now, facts)
            now += tick
    return attempts


def _end(draw: st.DrawFn, attempt: Attempt, vocabulary: int, now: datetime, facts: dict[str, Any]) -> None:
    outcome = draw(st.sampled_from(["succeeded", "failed", "exhausted", "fatal", "timeout", "canceled", "killed"]))
    tick = timedelta(milliseconds=1)
    if outcome in ("succeeded", "canceled"):
        ended = attempt.run.finish(TaskPhase(outcome), finished_at=now)
        attempt.tell(NAMES[outcome][vocabulary], now, ended, **facts)
        if draw(st.booleans()) and outcome == "succeeded" and vocabulary == 0:
            attempt.tell("ActorExhausted", now + tick, ended, reason="policy_exhausted_success")
    elif outcome == "timeout":
        ended = attempt.run.finish(TaskPhase.TIMEOUT, error="timed out after 50 ms", finished_at=now)
        attempt.tell(NAMES[outcome][vocabulary], now, ended, timeoutMs=50, **facts)
        attempt.tell(NAMES["failed"][vocabulary], now + tick / 10, ended, reason="timed out", **facts)
    elif outcome == "killed":
        if draw(st.booleans()) and vocabulary == 1:  # and the supervisor lives to tell
            ended = attempt.run.finish(TaskPhase.CANCELED, error="gave up", finished_at=now)
            attempt.tell("TaskFinished", now, ended, outcomeKind="force_aborted", reason="gave up")
    else:
        ended = attempt.run.finish(TaskPhase.FAILED, error="boom", exit_code=3, finished_at=now)
        attempt.tell(NAMES["failed"][vocabulary], now, ended, reason="boom", exitCode=3, **facts)
        if outcome == "exhausted" and vocabulary == 0:
            exhausted = replace(ended, phase=TaskPhase.EXHAUSTED)
            attempt.tell("ActorExhausted", now + tick / 10, exhausted, reason="no more")
        elif outcome == "fatal" and vocabulary == 0:
            attempt.tell("ActorDead", now + tick / 10, ended, reason="boom: fatal")
        elif vocabulary == 1:
            attempt.tell("TaskFinished", now + tick / 10, ended, outcomeKind="failed", reason="at last")


def events_of(attempts: list[Attempt]) -> list[dict[str, Any]]:
    return [event for attempt in attempts for event in attempt.events]


def history_of(attempts: list[Attempt], told: int | None = None) -> list[TaskRun]:
    """Return what the first ``told`` events tell, in the order of their starts."""
    runs: list[TaskRun] = []
    left = len(events_of(attempts)) if told is None else told
    for attempt in attempts:
        if left <= 0:
            break
        if runs and runs[-1].is_active:
            lost = runs[-1].finish(TaskPhase.FAILED, error=SUPERSEDED, finished_at=attempt.run.started_at)
            runs[-1] = replace(lost, recovered=True)
        runs.append(attempt.states[min(left, len(attempt.states)) - 1])
        left -= len(attempt.states)
    return runs


def stored(history: TaskRunHistory, attempts: list[Attempt]) -> list[TaskRun]:
    runs = history.iter_runs(attempts[0].run.task_id)
    return sorted(runs, key=lambda run: run.started_at)


def unnumbered(runs: list[TaskRun]) -> list[TaskRun]:
    return [replace(run, attempt=1) for run in runs]


def record(history: TaskRunHistory, events: list[dict[str, Any]], data: st.DataObject) -> None:
    """Record events in portions, some of them by a new recorder."""
    recorder = EventRecorder(history, source="s")
    while events:
        size = data.draw(st.integers(1, len(events)))
        if data.draw(st.booleans()):
            recorder = EventRecorder(history, source="s")
        recorder.record_all(events[:size])
        events = events[size:]


def repeated(events: list[dict[str, Any]], data: st.DataObject) -> list[dict[str, Any]]:
    """Repeat some events later on."""
    events = list(events)
    for _ in range(data.draw(st.integers(0, 4))):
        first = data.draw(st.integers(0, len(events) - 1))
        events.insert(data.draw(st.integers(first + 1, len(events))), events[first])
    return events


@pytest.fixture
def there(database: str) -> Any:
    with TaskRunHistory.connect(database, source="here") as history:
        yield history


few = settings(max_examples=20, report_multiple_bugs=False)


@few
@given(attempts=histories(), data=st.data())
def test_events_of_each_attempt_in_any_order(
    there: TaskRunHistory, attempts: list[Attempt], data: st.DataObject
) -> None:
    events: list[dict[str, Any]] = []
    for attempt in attempts:
        events += shuffled(attempt.events, attempts, attempt, data)
    record(there, repeated(events, data), data)
    assert stored(there, attempts) == history_of(attempts)


@few
@given(attempts=histories(), data=st.data())
def test_events_of_each_session_in_any_order(
    there: TaskRunHistory, attempts: list[Attempt], data: st.DataObject
) -> None:
    events: list[dict[str, Any]] = []
    for _, group in itertools.groupby(attempts, key=lambda attempt: attempt.session):
        session = list(group)
        events += shuffled(events_of(session), attempts, session[0], data)
    record(there, repeated(events, data), data)
    assert unnumbered(stored(there, attempts)) == unnumbered(history_of(attempts))


def shuffled(
    events: list[dict[str, Any]], attempts: list[Attempt], first: Attempt, data: st.DataObject
) -> list[dict[str, Any]]:
    """Shuffle events, of which those of the attempt ``first`` happened first, as far as they can be told apart.

    The end of a task comes behind the ends of its attempts, which its supervisor has waited for. After a restart the
    same goes for verdicts, and an end that comes before its start looks like that of an attempt that was killed.
    """
    place = attempts.index(first)
    if place and len(attempts[place - 1].events) == 1:
        return events
    last = {"TaskFinished"} if attempts[-1].session == 0 else {"TaskFinished", "ActorExhausted", "ActorDead"}
    return sorted(data.draw(st.permutations(events)), key=lambda event: event["kind"] in last)


@few
@given(attempts=histories(), data=st.data())
def test_a_stream_that_breaks_off_gives_the_history_up_to_there(
    there: TaskRunHistory, attempts: list[Attempt], data: st.DataObject
) -> None:
    events = events_of(attempts)
    told = data.draw(st.integers(1, len(events)))
    record(there, repeated(events[:told], data), data)
    assert stored(there, attempts) == history_of(attempts, told)


@few
@given(attempts=histories(), data=st.data())
def test_a_stream_told_again_from_the_start_changes_nothing(
    there: TaskRunHistory, attempts: list[Attempt], data: st.DataObject
) -> None:
    events = events_of(attempts)
    for _ in range(data.draw(st.integers(1, 3))):
        record(there, events[: data.draw(st.integers(1, len(events)))], data)
    record(there, events, data)
    assert stored(there, attempts) == history_of(attempts)
    record(there, events, data)
    assert stored(there, attempts) == history_of(attempts)


@few
@given(attempts=histories(most_sessions=1), data=st.data())
def test_what_was_lost_is_made_good_when_all_is_told_again(
    there: TaskRunHistory, attempts: list[Attempt], data: st.DataObject
) -> None:
    events = events_of(attempts)
    # The end of a task names no attempt: with the start of the last one lost, it would end the one before.
    some = [event for event in events if event["kind"] != "TaskFinished" and data.draw(st.booleans())]
    record(there, some, data)
    record(there, events, data)
    assert unnumbered(stored(there, attempts)) == unnumbered(history_of(attempts))
