"""Streams of events written by hand, and the history that each must give: see the directory `data`."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from taskruns import EventRecorder, TaskRunHistory
from taskruns.aio import AsyncEventRecorder, AsyncTaskRunHistory

DATA = Path(__file__).with_name("data")
STREAMS = [str(path.relative_to(DATA).with_suffix("")) for path in sorted(DATA.glob("*/???.jsonl"))]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def events(stream: str) -> list[dict[str, Any]]:
    return lines(DATA / f"{stream}.jsonl")


def expected(stream: str) -> list[dict[str, Any]]:
    own = DATA / f"{stream}.history.jsonl"
    return lines(own if own.exists() else own.with_name("history.jsonl"))


def recorder(history: TaskRunHistory) -> EventRecorder:
    return EventRecorder(history, source="supervisor")


def recorded(history: TaskRunHistory) -> list[dict[str, Any]]:
    return [run.to_wire() for run in sorted(history.all_runs(), key=lambda run: (run.task_id, run.attempt))]


def test_each_lifecycle_is_told_in_both_vocabularies() -> None:
    assert len(STREAMS) == 2 * len(list(DATA.iterdir()))


@pytest.mark.parametrize("stream", STREAMS)
def test_stream_gives_its_history_and_a_replay_changes_nothing(database: str, stream: str) -> None:
    told = events(stream)
    with TaskRunHistory.connect(database) as history:
        own = recorder(history)
        own.record_all(told)
        assert recorded(history) == expected(stream)
        own.record_all(told)
        assert recorded(history) == expected(stream)
        recorder(history).record_all(told)
        assert recorded(history) == expected(stream)


@pytest.mark.parametrize("stream", [stream for stream in STREAMS if stream.endswith("new")])
def test_asynchronous_recorder_gives_the_same(database: str, stream: str) -> None:
    async def record() -> None:
        async with AsyncTaskRunHistory.connect(database) as history:
            own = AsyncEventRecorder(history, source="supervisor")
            told = events(stream)
            await own.record(told[0])
            await own.record_all(told[1:])
            await AsyncEventRecorder(history, source="supervisor").record_all(told)

    asyncio.run(record())
    with TaskRunHistory.connect(database) as history:
        assert recorded(history) == expected(stream)


@pytest.mark.parametrize("stream", STREAMS)
def test_recorder_needs_no_memory_and_every_event_may_be_told_twice(database: str, stream: str) -> None:
    with TaskRunHistory.connect(database) as history:
        for event in events(stream):
            recorder(history).record(event)
            recorder(history).record(event)
        assert recorded(history) == expected(stream)


@pytest.mark.parametrize("stream", STREAMS)
def test_replay_may_begin_again_anywhere(sqlite: str, stream: str) -> None:
    told = events(stream)
    with TaskRunHistory.connect(sqlite) as history:
        for number in range(1, len(told) + 1):
            recorder(history).record_all(told[:number])
        assert recorded(history) == expected(stream)


def test_recorders_of_two_sources_keep_apart(database: str) -> None:
    told = events("success/old")
    with TaskRunHistory.connect(database) as history:
        recorder(history).record_all(told)
        EventRecorder(history, source="another").record_all(told)
        [first, second] = recorded(history)
    assert first == expected("success/old")[0]
    assert second == first | {"attempt": 2, "source": "another"}


def at(second: float, kind: str, attempt: int, **facts: Any) -> dict[str, Any]:
    return {"kind": kind, "task": "job", "attempt": attempt, "at": 1_772_330_400_000 + round(1000 * second)} | facts


@pytest.mark.parametrize(
    ("told", "runs"),
    [
        (  # attempts that overlap, the start of the last one lost
            [
                *(at(0, "TaskStarting", 1), at(10, "TaskStopped", 1), at(20, "TaskStarting", 7)),
                at(30, "TaskFailed", 5, durationMs=15_000),
            ],
            3,
        ),
        ([at(180, "ActorDead", 1, durationMs=20_000), at(190, "ActorDead", 2, durationMs=20_000)], 2),
        # a failure that turns out to be a timeout, without durations
        ([at(0, "TaskStarting", 1), at(10, "TaskFailed", 1), at(10.001, "TimeoutHit", 1)], 1),
    ],
)
def test_odd_streams_change_nothing_when_told_again(sqlite: str, told: list[dict[str, Any]], runs: int) -> None:
    with TaskRunHistory.connect(sqlite) as history:
        recorder(history).record_all(told)
        first = recorded(history)
        assert len(first) == runs
        for _ in range(2):
            recorder(history).record_all(told)
            assert recorded(history) == first


def test_runs_of_a_submission_are_found_among_those_of_others(sqlite: str) -> None:
    told = [
        event
        for number in range(300)
        for event in (
            at(number, "TaskStarting", 1, id=number),
            at(number + 250.5, "TaskStopped", 1, id=number),
        )
    ]
    told.sort(key=lambda event: event["at"])
    with TaskRunHistory.connect(sqlite) as history:
        for place in range(0, len(told), 50):
            recorder(history).record_all(told[place : place + 50])
        first = recorded(history)
        assert [(run["submission"], run["durationMs"]) for run in first] == [
            (str(number), 250_500) for number in range(300)
        ]
        recorder(history).record_all(told)
        assert recorded(history) == first
