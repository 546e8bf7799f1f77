"""Statistics of a million runs: equal to what plain Python computes, in the memory that those of fewer take."""

import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from math import ceil
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from servers import Databases
from writers import Writer

from taskruns import TaskRunHistory
from taskruns.bulk import Row
from taskruns.times import rfc3339

pytestmark = pytest.mark.soak

SPAN = timedelta(days=400)
FIRST = datetime(2025, 3, 1, tzinfo=UTC)
PHASES = ["succeeded", "succeeded", "succeeded", "failed", "timeout", "canceled"]


def times(count: int) -> Iterator[tuple[str, datetime, int]]:
    """Yield the phase, the start and the duration in microseconds of so many runs."""
    choose = random.Random(count)
    for number in range(count):
        yield choose.choice(PHASES), FIRST + SPAN * (number / count), int(choose.expovariate(1e-8))


def rows(count: int) -> Iterator[Row]:
    for number, (phase, start, span) in enumerate(times(count)):
        key = f"task {number % 50}", number // 50 + 1
        begin_and_end = rfc3339(start), rfc3339(start + timedelta(microseconds=span))
        yield (*key, phase, *begin_and_end, None, None, False, False, "here", None, None)


def wire_of(runs: list[tuple[str, datetime, int]]) -> dict[str, Any]:
    """Return what is told of some runs, computed plainly."""
    spans = sorted(span for _, _, span in runs)

    def milliseconds(span: int) -> float:
        return span // 1000 + span % 1000 / 1000

    percentiles = {f"p{percent}": milliseconds(spans[ceil(len(spans) * percent / 100) - 1]) for percent in (50, 95, 99)}
    ends = defaultdict(list)
    for phase, start, span in runs:
        ends["problem" if phase in ("failed", "timeout") else phase].append(start + timedelta(microseconds=span))
    by_phase = Counter(phase for phase, _, _ in runs)
    return {
        "runs": len(runs),
        "byPhase": by_phase,
        "successRate": by_phase["succeeded"] / (len(runs) - by_phase["canceled"]),
        "attemptsPerSuccess": len(runs) / by_phase["succeeded"],
        "durationMs": {
            "mean": milliseconds(round(sum(spans) / len(spans))),
            "min": milliseconds(spans[0]),
            "max": milliseconds(spans[-1]),
            **percentiles,
        },
        "lastSuccessAt": rfc3339(max(ends["succeeded"])),
        "lastProblemAt": rfc3339(max(ends["problem"])),
    }


def test_statistics_of_a_million_runs(kind: str, databases: Databases, capsys: pytest.CaptureFixture[str]) -> None:
    growth = {}
    for count in (100_000, 1_000_000):
        database = databases.migrated(kind)
        with TaskRunHistory.connect(database) as history:
            all_rows = rows(count)
            while portion := list(islice(all_rows, 20_000)):
                history.add_rows(portion)
        began = time.monotonic()
        with Writer("stats measured", database) as writer:
            writer.wait_until_ready()
            writer.start()
            [[before, peak, whole, parts]] = writer.answers()
        seconds, growth[count] = time.monotonic() - began, peak - before
        with capsys.disabled():
            print(
                f"\n{kind}: statistics of {count} runs by day in {seconds:.1f} s, {before} KiB of memory, then {peak}"
            )
        every = list(times(count))
        days = defaultdict(list)
        for run in every:
            days[run[1].astimezone(ZoneInfo("Europe/Berlin")).date()].append(run)
        assert whole == wire_of(every)
        assert [(start[:10], stats) for start, stats in parts] == [
            (day.isoformat(), wire_of(days[day])) for day in sorted(days)
        ]
    assert growth[1_000_000] < growth[100_000] + 5_000
