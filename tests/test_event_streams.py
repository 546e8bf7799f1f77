"""Streams of events written by hand, and the history that each must give: see the directory `data`."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
from histories import Driven, Histories

from taskruns import EventRecorder, TaskRunHistory
from taskruns.aio import AsyncEventRecorder

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
    if isinstance(history, Driven):
        twin = AsyncEventRecorder(cast(Any, history)._twin, source="supervisor")
        return cast(EventRecorder, Driven(twin, cast(Any, history)._runner))
    return EventRecorder(history, source="supervisor")


def recorded(history: TaskRunHistory) -> list[dict[str, Any]]:
    runs = [run.to_wire() for latest in history.tasks() for run in history.iter_runs(latest.task_id)]
    return sorted(runs, key=lambda run: (run["taskId"], run["attempt"]))


def test_each_lifecycle_is_told_in_both_vocabularies() -> None:
    assert len(STREAMS) == 2 * len(list(DATA.iterdir()))


@pytest.mark.parametrize("stream", STREAMS)
def test_stream_gives_its_history_and_a_replay_changes_nothing(history: TaskRunHistory, stream: str) -> None:
    told = events(stream)
    own = recorder(history)
    own.record_all(told)
    assert recorded(history) == expected(stream)
    own.record_all(told)
    assert recorded(history) == expected(stream)
    recorder(history).record_all(told)
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


def test_recorders_of_two_sources_keep_apart(database: str, histories: Histories) -> None:
    history = histories.connect(database)
    told = events("success/old")
    recorder(history).record_all(told)
    with TaskRunHistory.connect(database) as other:
        EventRecorder(other, source="another").record_all(told)
    [first, second] = recorded(history)
    assert first == expected("success/old")[0]
    assert second == first | {"attempt": 2, "source": "another"}
