"""Statements that are kept: not for longer than their engine, and for any number of threads."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from histories import Histories

from taskruns import RunFilter, RunOrder, RunPage, TaskPhase, TaskRun, TaskRunHistory, Window, prepared

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
RUNS = [
    TaskRun(f"task {number % 7}", number, TaskPhase.FAILED, NOON, NOON + timedelta(seconds=number))
    for number in range(1, 200)
]


def test_statements_go_with_their_engine(database: str, histories: Histories) -> None:
    dialects = []
    for _ in range(3):
        history: Any = histories.connect(database)
        history.add_runs(RUNS[:3])
        history.runs("task 1")
        history.count_runs(RunFilter(started=Window(NOON)))
        dialects.append(weakref.ref(history._engine.dialect))
    histories.close()
    histories._connected.clear()
    del history
    gc.collect()
    assert [dialect() for dialect in dialects] == [None, None, None]


def test_threads_ask_different_questions_at_once(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with TaskRunHistory.connect(database) as history:
        history.add_runs(RUNS)
        monkeypatch.setattr(prepared, "_MOST", 5)  # so that they are thrown away all the time

        def ask(number: int) -> bool:
            window = Window(NOON if number & 1 else None, NOON + timedelta(1) if number & 2 else None)
            shortest = timedelta(seconds=number) if number & 4 else None
            phases = TaskPhase.FAILED if number & 8 else None
            wanted = RunFilter(f"task {number % 7}", started=window, min_duration=shortest, phases=phases)
            found: RunPage = history.runs(wanted, order=list(RunOrder)[number % 3], limit=100)
            of_task = {run.attempt for run in RUNS if run.attempt % 7 == number % 7}
            expected = {attempt for attempt in of_task if shortest is None or attempt >= number}
            count = history.count_runs(wanted)
            return {run.attempt for run in found.runs} == expected and count == len(expected)

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(ask, range(160)))
        assert len(vars(history._engine.dialect)["_taskruns_prepared"]) <= 5 + 8
