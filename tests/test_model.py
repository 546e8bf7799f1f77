"""The rules of a run without a database, and its wire format."""

import json
import pickle
import time
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import example, given, strategies as st

from taskruns import (
    PROBLEMS,
    AttemptConflictError,
    RunClosedError,
    RunExistsError,
    RunNotFoundError,
    SchemaVersionError,
    TaskPhase,
    TaskRun,
    TaskRunsError,
)
from taskruns.model import MAX_ATTEMPT, MAX_ERROR_BYTES, clean_error
from taskruns.times import parse_time, rfc3339

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
RUN = TaskRun.starting("job", 1, started_at=NOON)
TERMINAL = [phase for phase in TaskPhase if phase.is_terminal]


def names() -> st.SearchStrategy[str]:
    characters = st.characters(exclude_categories=["Cc", "Cs"])
    return st.text(characters, min_size=1, max_size=255).filter(lambda name: name == name.strip())


def times() -> st.SearchStrategy[datetime]:
    zones = st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30)), timezone(timedelta(hours=-11))])
    return st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=zones)  # noqa: DTZ001  (the zones are given beside)


def errors() -> st.SearchStrategy[str]:
    parts = ["://", ":", "@", "/", "user", "secret", "8080", " ", "?", "\n", "\x00", "\ud800", "é"]
    return st.lists(st.one_of(st.sampled_from(parts), st.text(max_size=5)), max_size=20).map("".join)


@st.composite
def runs(draw: st.DrawFn) -> TaskRun:
    run = TaskRun.starting(
        draw(names()),
        draw(st.integers(1, MAX_ATTEMPT)),
        started_at=draw(times()),
        source=draw(st.none() | names()),
        submission=draw(st.none() | names()),
        source_attempt=draw(st.none() | st.integers(0, MAX_ATTEMPT)),
    )
    if draw(st.booleans()):
        return run
    phase = draw(st.sampled_from(TERMINAL))
    return run.finish(
        phase,
        error=None if phase is TaskPhase.SUCCEEDED else draw(st.none() | st.text()),
        exit_code=draw(st.none() | st.integers(-(2**31), 2**31 - 1)),
        finished_at=draw(times()),
    )


def test_phases_are_active_or_terminal() -> None:
    assert {phase.value for phase in TaskPhase if phase.is_active} == {"pending", "running"}
    assert {phase.value for phase in TERMINAL} == {"succeeded", "failed", "timeout", "canceled", "exhausted"}
    assert {phase.value for phase in PROBLEMS} == {"failed", "timeout", "exhausted"}


@pytest.mark.parametrize(
    "values",
    [
        {"attempt": 0},
        {"attempt": MAX_ATTEMPT + 1},
        {"phase": TaskPhase.PENDING},
        {"phase": TaskPhase.FAILED},
        {"finished_at": NOON},
        {"phase": TaskPhase.FAILED, "finished_at": NOON - timedelta(microseconds=1)},
        {"error": "boom"},
        {"phase": TaskPhase.SUCCEEDED, "finished_at": NOON, "error": "boom"},
        {"started_at": NOON.replace(tzinfo=None)},
        {"phase": TaskPhase.FAILED, "finished_at": NOON.replace(tzinfo=None)},
    ],
)
def test_contradicting_values_make_no_run(values: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"task_id": "job", "attempt": 1, "phase": TaskPhase.RUNNING, "started_at": NOON}
    assert TaskRun(**arguments).is_active
    with pytest.raises(ValueError):
        TaskRun(**(arguments | values))


def test_run_starts_now_unless_told() -> None:
    before = datetime.now(UTC)
    run = TaskRun.starting("job", 1)
    assert before <= run.started_at <= datetime.now(UTC)
    assert (run.is_active, run.duration, run.phase) == (True, None, TaskPhase.RUNNING)


@given(runs(), st.sampled_from(TERMINAL), times())
def test_finished_run_is_terminal_and_never_shorter_than_nothing(run: TaskRun, phase: TaskPhase, end: datetime) -> None:
    done = run.finish(phase, exit_code=5, finished_at=end)
    assert (done.phase, done.exit_code, done.is_active, done.recovered) == (phase, 5, False, False)
    assert done.finished_at == max(end, run.started_at)
    assert done.duration is not None
    assert done.duration >= timedelta(0)
    assert (done.task_id, done.attempt, done.started_at) == (run.task_id, run.attempt, run.started_at)


@pytest.mark.parametrize("phase", ["pending", "running", "broken"])
def test_run_cannot_finish_as_what_is_no_end(phase: Any) -> None:
    with pytest.raises(ValueError):
        RUN.finish(phase)


def test_run_is_immutable_and_hashable() -> None:
    with pytest.raises(AttributeError):
        RUN.attempt = 2  # type: ignore[misc]  # which is the point
    assert {RUN: 1}[TaskRun.starting("job", 1, started_at=NOON)] == 1


@given(runs())
def test_what_is_written_reads_back_equal(run: TaskRun) -> None:
    wire = json.loads(json.dumps(run.to_wire()))
    assert None not in wire.values()
    assert TaskRun.from_wire(wire) == run
    assert TaskRun.from_wire(wire | {"unknown": [1], "durationMs": -5}) == run


def test_wire_format_has_the_keys_of_the_model() -> None:
    run = TaskRun.starting("job", 2, started_at=NOON, source="web-1", submission="s", source_attempt=0)
    done = run.finish(TaskPhase.FAILED, error="boom", exit_code=0, finished_at=NOON + timedelta(seconds=1.2345))
    assert RUN.to_wire() == {
        "taskId": "job",
        "attempt": 1,
        "phase": "running",
        "startedAt": "2026-11-24T12:00:00.000000Z",
    }
    assert done.to_wire() == {
        "taskId": "job",
        "attempt": 2,
        "phase": "failed",
        "startedAt": "2026-11-24T12:00:00.000000Z",
        "finishedAt": "2026-11-24T12:00:01.234500Z",
        "durationMs": 1234,
        "error": "boom",
        "exitCode": 0,
        "source": "web-1",
        "submission": "s",
        "sourceAttempt": 0,
    }


def test_recovered_is_written_only_when_true() -> None:
    recovered = TaskRun("job", 1, TaskPhase.FAILED, NOON, NOON, recovered=True)
    assert recovered.to_wire()["recovered"] is True
    assert TaskRun.from_wire(recovered.to_wire()) == recovered


def test_inferred_start_is_written_only_when_true() -> None:
    inferred = TaskRun("job", 1, TaskPhase.FAILED, NOON, NOON, start_inferred=True)
    assert inferred.to_wire()["startInferred"] is True
    assert TaskRun.from_wire(inferred.to_wire()) == inferred


@pytest.mark.parametrize(
    "change",
    [
        {"taskId": None},
        {"attempt": None},
        {"phase": None},
        {"startedAt": None},
        {"attempt": 0},
        {"attempt": "1"},
        {"attempt": 1.5},
        {"attempt": True},
        {"phase": "Running"},
        {"phase": []},
        {"phase": "failed"},
        {"finishedAt": "2026-11-24T12:00:00Z"},
        {"phase": "failed", "finishedAt": "2026-11-24T11:59:59Z"},
        {"phase": "failed", "finishedAt": "2026-11-24T12:00:00Z", "exitCode": "1"},
        {"phase": "failed", "finishedAt": "2026-11-24T12:00:00Z", "error": 5},
        {"startedAt": "yesterday"},
        {"startedAt": "2026-11-24T12:00:00"},
        {"startedAt": "2026-13-24T12:00:00Z"},
        {"startedAt": "2026-11-24"},
        {"startedAt": 1.5},
        {"startedAt": 1_764_000_000},
        {"startedAt": -1},
        {"startedAt": 10**30},
        {"recovered": "yes"},
        {"startInferred": 1},
        {"source": 5},
        {"sourceAttempt": -1},
        {"taskId": "x" * 256},
    ],
)
def test_wire_that_describes_no_run_is_refused(change: dict[str, Any]) -> None:
    assert TaskRun.from_wire(RUN.to_wire()) == RUN
    with pytest.raises((ValueError, TypeError)):
        TaskRun.from_wire(RUN.to_wire() | change)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2026-11-24T12:00:00Z", NOON),
        ("2026-11-24t12:00:00.5z", NOON + timedelta(milliseconds=500)),
        ("2026-11-24 14:00:00.000001+02:00", NOON + timedelta(microseconds=1)),
        ("2026-11-24T12:00:00.123456789Z", NOON + timedelta(microseconds=123456)),
        (1_795_521_600_123, NOON + timedelta(milliseconds=123)),
        (100_000_000_000, datetime(1973, 3, 3, 9, 46, 40, tzinfo=UTC)),
    ],
)
def test_times_are_read_as_text_or_milliseconds(value: str | int, expected: datetime) -> None:
    assert parse_time(value) == expected


def test_integers_that_can_only_be_seconds_are_refused() -> None:
    with pytest.raises(ValueError, match="99999999999 can only be seconds"):
        parse_time(99_999_999_999)


@given(times())
def test_time_as_text_is_27_characters_and_reads_back(moment: datetime) -> None:
    text = rfc3339(moment)
    assert len(text) == 27
    assert text.endswith("Z")
    assert parse_time(text) == moment


@given(errors())
@example("x" * MAX_ERROR_BYTES + "é")
@example("😀" * MAX_ERROR_BYTES)
@example("://a:" + "x" * 510 + "@" + "y" * 10 + "@")
@example("://a:p/x@b@c")
@example("://://@@")
@example("://a:b@" + "😀" * MAX_ERROR_BYTES + "://a:b@")
def test_cleaning_an_error_twice_changes_nothing_and_it_is_bounded(text: str) -> None:
    cleaned = clean_error(text)
    if cleaned is None:
        assert text == ""
        return
    assert len(cleaned.encode()) <= MAX_ERROR_BYTES
    assert "\x00" not in cleaned
    assert clean_error(cleaned) == cleaned


SECRETS = ["secret", "p:ss", "p@ss", "pa/ss", "%40", "geheim!", "'", "x" * 500, "***"]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("form", ["postgresql://bob:{}@host/db", "redis://:{}@host", "'mysql+x://bob:{}@h:1/d?q=1'"])
def test_passwords_in_urls_are_masked(secret: str, form: str) -> None:
    cleaned = clean_error(f"cannot reach {form.format(secret)}, sorry")
    assert cleaned == f"cannot reach {form.format('***')}, sorry"


@pytest.mark.parametrize(
    "text", ["http://host:8080/", "http://host:80/@me", "http://host/a:b", "a@b.c: no", "://", "see http://x and a@b"]
)
def test_text_without_a_password_is_left_alone(text: str) -> None:
    assert clean_error(text) == text


@pytest.mark.parametrize("piece", ["://", "://a:", "://a:b", ":", "://@", "@", "://a:1/", "://" + "a" * 300])
def test_cleaning_takes_linear_time(piece: str) -> None:
    def seconds(size: int) -> float:
        text = piece * (size // len(piece))
        start = time.perf_counter()
        clean_error(text)
        return time.perf_counter() - start

    # Quadratic time would be 64 times as long; the bound leaves room for a busy machine.
    small, large = min(seconds(10_000) for _ in range(3)), min(seconds(80_000) for _ in range(2))
    assert large < 40 * small + 0.05


@given(runs())
def test_runs_pickle(run: TaskRun) -> None:
    assert pickle.loads(pickle.dumps(run)) == run


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RunNotFoundError("job", 3), ["'job'", "3"]),
        (RunExistsError("job", 3), ["'job'", "3"]),
        (RunClosedError(RUN.finish(TaskPhase.FAILED)), ["'job'", "1", "failed"]),
        (AttemptConflictError("job"), ["'job'"]),
        (SchemaVersionError(None, "1_0001"), ["1_0001", "taskruns db upgrade"]),
        (SchemaVersionError("1_0001", "1_0002"), ["1_0001", "1_0002", "taskruns db upgrade"]),
        (SchemaVersionError("2_0001", "1_0001"), ["2_0001", "1_0001", "pip install"]),
    ],
)
def test_errors_name_what_they_are_about_and_pickle(error: TaskRunsError, words: list[str]) -> None:
    assert isinstance(error, TaskRunsError)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
    assert all(word in str(error) for word in words)
