"""A database that goes down under callers that are written together: none hangs, and nothing is lost or doubled."""

import inspect
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from callers import CALLERS
from servers import OwnServer
from sqlalchemy.exc import DBAPIError
from test_outages import own_database, server, servers

from taskruns import TaskPhase, TaskRunHistory

__all__ = ["own_database", "server", "servers"]  # fixtures

COUNT, TASKS = 64, 48


class Diary:
    """What callers have told, and what they were told."""

    def __init__(self) -> None:
        self.is_back = threading.Event()
        self.opened: dict[str, tuple[str, int]] = {}
        self.closed: set[str] = set()
        self.errors: dict[str, Exception] = {}
        self.longest = 0.0

    async def work(self, history: Any, number: int) -> None:
        """Open and close runs until the database is back; every start has a name of its own."""
        for turn in itertools.count():
            is_last, name, began = self.is_back.is_set(), f"{number}/{turn}", time.monotonic()
            try:
                run = await told(history.open_run(f"job {number % TASKS}", submission=name))
                self.opened[name] = (run.task_id, run.attempt)
                await told(history.close_run(run.task_id, run.attempt, TaskPhase.FAILED, error=name))
                self.closed.add(name)
            except DBAPIError as error:
                self.errors[name] = error
            self.longest = max(self.longest, time.monotonic() - began)
            if is_last:
                return


async def told(answer: Any) -> Any:
    return await answer if inspect.isawaitable(answer) else answer


def to_its_end(work: Any) -> None:
    """Run a coroutine that waits for nothing."""
    with pytest.raises(StopIteration):
        work.send(None)


def soak(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.soak)


@pytest.mark.parametrize(
    ("server", "twin", "seconds", "retry_for"),
    [
        ("postgresql", "threads", 1, 30),
        *(soak(kind, twin, 10, limit) for kind in ("postgresql", "mariadb") for twin in CALLERS for limit in (30, 5)),
    ],
    indirect=["server"],
)
@pytest.mark.parametrize("killed", [False, soak(True)], ids=["stopped", "killed"])
def test_callers_of_a_database_that_goes_down(
    server: OwnServer,
    own_database: str,
    twin: str,
    seconds: float,
    retry_for: float,
    killed: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    diary = Diary()
    callers = CALLERS[twin](own_database, retry_for=retry_for)

    def go_down() -> None:
        time.sleep(0.1)
        with server.down(killed=killed):
            time.sleep(seconds)
        diary.is_back.set()

    def caller(number: int) -> Callable[[Any], Any]:
        if twin == "tasks":
            return lambda history: diary.work(history, number)
        return lambda history: to_its_end(diary.work(history, number))

    outage = threading.Thread(target=go_down)
    outage.start()
    found = callers.together(*map(caller, range(COUNT)), limit=seconds + 2 * retry_for + 60)
    outage.join()
    callers.close()
    with TaskRunHistory.connect(own_database) as history:
        stored = list(history.all_runs())
    with capsys.disabled():
        print(
            f"\n{server.url.get_backend_name()}, {twin}, down for {seconds} s, {retry_for=}: {len(stored)} runs, "
            f"{len(diary.closed)} pairs told, {len(diary.errors)} errors "
            f"({dict(Counter(type(error).__name__ for error in diary.errors.values()))}), "
            f"the longest pair took {diary.longest:.1f} s"
        )
    assert found == [None] * COUNT
    assert not diary.errors or retry_for < seconds
    known = {run.submission: run for run in stored}
    assert len(known) == len(stored), "a start is stored twice"
    for name, key in diary.opened.items():
        assert (known[name].task_id, known[name].attempt) == key
    for name in diary.closed:
        assert (known[name].phase, known[name].error, known[name].recovered) == ("failed", name, False)
    assert set(known) <= diary.opened.keys() | diary.errors.keys()
    for task in range(TASKS):
        attempts = [run.attempt for run in stored if run.task_id == f"job {task}"]
        assert attempts == list(range(1, len(attempts) + 1))
