"""A million runs: pruned while others write, and kept within bounds by those who write them."""

import random
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import make_url
from writers import Writer

from taskruns import TaskPhase, TaskRunHistory
from taskruns.bulk import Row
from taskruns.retention import EMBEDDED
from taskruns.times import rfc3339

pytestmark = pytest.mark.soak

COUNT = 1_000_000
SPAN = timedelta(days=730)


def rows(tasks: int) -> Iterator[Row]:
    """Runs of so many tasks, spread over two years; every seventh has failed."""
    first = datetime.now(UTC) - SPAN
    for number in range(COUNT):
        start = first + SPAN * (number / COUNT)
        phase = "failed" if number % 7 == 0 else "succeeded"
        times = rfc3339(start), rfc3339(start + timedelta(seconds=1))
        key = f"task {number % tasks}", number // tasks + 1
        yield (*key, phase, *times, None, None, False, False, "here", None, None)


def portions(all_rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    portion: list[Row] = []
    for row in all_rows:
        portion.append(row)
        if len(portion) == size:
            yield portion
            portion = []
    yield portion


def started(stack: ExitStack, role: str, url: str, *arguments: object) -> Writer:
    writer = stack.enter_context(Writer(role, url, *arguments))
    writer.wait_until_ready()
    writer.start()
    return writer


@pytest.mark.parametrize("tasks", [50, COUNT], ids=["50 tasks", "unique ids"])
def test_pruned_while_others_write(
    database: str, tasks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with TaskRunHistory.connect(database) as history:
        for portion in portions(rows(tasks), 20_000):
            history.add_rows(portion)
    stop = tmp_path / "stop"
    with ExitStack() as stack:
        writers = [started(stack, "write until", database, stop) for _ in range(4)]
        began = time.monotonic()
        measured = started(stack, "prune measured", database)
        killed = started(stack, "prune", database)
        assert killed.process.stdout is not None
        for _ in range(50):
            killed.process.stdout.readline()
        killed.kill()
        restarted = started(stack, "prune measured", database)
        answers = [measured.answers()[0], restarted.answers()[0]]
        seconds = time.monotonic() - began
        stop.touch()
        written = [writer.answers()[0] for writer in writers]
    with TaskRunHistory.connect(database) as history:
        again = history.prune(EMBEDDED)
        left = sum(1 for _ in history.all_runs())
    longest = max(seconds for _, seconds in written)
    deleted = COUNT + sum(count for count, _ in written) - left
    with capsys.disabled():
        print(
            f"\n{make_url(database).get_backend_name()}, {tasks} tasks: {deleted} of {COUNT} deleted in {seconds:.0f} s"
            f" by two passes and a third that was killed; {sum(count for count, _ in written)} runs written meanwhile,"
            f" longest call {longest * 1000:.0f} ms; memory {[(a // 1024, b // 1024) for a, b, _ in answers]} MiB"
        )
    assert again < 20  # what has become old since
    assert longest < 1
    assert all(after - before < 8 * 1024 for before, after, _ in answers)


@pytest.mark.parametrize("order", ["chronological", "random"])
@pytest.mark.parametrize("tasks", [50, COUNT], ids=["50 tasks", "unique ids"])
def test_a_database_that_prunes_itself_is_bounded(
    sqlite: str, tasks: int, order: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(str(make_url(sqlite).database))
    numbers = list(range(COUNT))
    if order == "random":
        random.Random(1).shuffle(numbers)
    first = datetime.now(UTC) - SPAN
    sizes = []
    began = time.monotonic()
    with TaskRunHistory.connect(f"{sqlite}?synchronous=NORMAL", retention=EMBEDDED) as history:
        for count, number in enumerate(numbers, 1):
            start = first + SPAN * (number / COUNT)
            run = history.open_run(f"task {number % tasks}", started_at=start)
            phase = TaskPhase.FAILED if number % 7 == 0 else TaskPhase.SUCCEEDED
            history.close_run(run.task_id, run.attempt, phase, finished_at=start + timedelta(seconds=1))
            if count % (COUNT // 10) == 0:
                sizes.append(path.stat().st_size >> 10)
        seconds = time.monotonic() - began
        due = history.prune(EMBEDDED)
        kept = sum(1 for _ in history.all_runs())
        history.compact()
    least = path.stat().st_size >> 10
    with capsys.disabled():
        print(
            f"\n{tasks} tasks, {order}: {COUNT} runs in {seconds:.0f} s, of which the policy keeps {kept};"
            f" there were {due} more. Size after each tenth {sizes} KiB; compacted, of what is kept alone: {least} KiB"
        )
    assert due <= 0.25 * kept + 2000
    assert sizes[-1] <= 2 * least + 1000
