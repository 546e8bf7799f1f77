"""Group commit when something ends in the middle: interrupts, cancelations, forks, dispose(), the interpreter."""

import asyncio
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from servers import Databases
from watchers import until

from taskruns import TaskPhase, TaskRun, TaskRunHistory, batches
from taskruns.aio import AsyncTaskRunHistory
from taskruns.commit import Call, Writer
from taskruns.model import Outcome
from taskruns.writing import Start

SUCCEEDED = TaskPhase.SUCCEEDED

SOAK_SERVERS = [pytest.param(kind, marks=pytest.mark.soak) for kind in ("postgresql", "mariadb")]


class Interrupted:
    """Interrupts a thread at the n-th place where Python would look for a signal, inside this package."""

    def __init__(self, number: int) -> None:
        self._left = number
        self.where: str | None = None

    def profile(self, frame: Any, kind: str, _argument: object) -> None:
        # Signals are handled where a function begins, and after a call of one that is not Python's.
        if kind not in ("call", "c_return") or not frame.f_globals.get("__name__", "").startswith("taskruns"):
            return
        self._left -= 1
        if self._left == 0:
            sys.setprofile(None)
            self.where = f"{frame.f_code.co_qualname}:{frame.f_lineno} ({kind})"
            raise KeyboardInterrupt

    def run(self, work: Callable[[], Any]) -> None:
        sys.setprofile(self.profile)
        try:
            with suppress(KeyboardInterrupt):
                work()
        finally:
            sys.setprofile(None)


class Scene:
    """Callers of one history, of whom one is interrupted while all are written by one batch."""

    def __init__(self, database: str) -> None:
        self.history = TaskRunHistory.connect(database, source="here", group_commit=True)
        self.history.check_version()
        self.group: Any = self.history._group

    def play(self, interrupted: Interrupted, place: int, name: str) -> dict[str, TaskRun]:
        """Have the caller in this place of the queue interrupted, and return what the others got."""
        found: dict[str, TaskRun] = {}
        is_led, is_free = threading.Event(), threading.Event()

        def call(task: str) -> None:
            found[task] = self.history.open_run(task)

        def be_interrupted() -> None:
            start = Start.of(f"interrupted {name}", None, None, "here", None, None)
            interrupted.run(lambda: self.group.open(start, is_certain=False))

        def held(calls: list[Call]) -> None:
            if [call.task_id for call in calls] == [f"first {name}"]:
                is_led.set()
                assert is_free.wait(30)
            Writer.write(self.group.writer, calls)

        self.group.writer.write = held
        tasks = [f"{which} {name}" for which in ("first", "second", "third", "fourth")]
        threads = [threading.Thread(target=call, args=(task,), daemon=True) for task in tasks]
        threads.insert(1 + place, threading.Thread(target=be_interrupted, daemon=True))
        for thread in threads:
            waiting = len(self.group._pending)
            thread.start()
            assert is_led.wait(30)
            if thread is not threads[0]:
                until(lambda: len(self.group._pending) > waiting or not thread.is_alive(), "it has come")  # noqa: B023  (used up at once)
        is_free.set()
        for thread in threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in threads), f"a caller hangs: interrupted at {interrupted.where}"
        assert set(found) == set(tasks), f"interrupted at {interrupted.where}"
        return found


@pytest.mark.parametrize("kind", ["sqlite", *SOAK_SERVERS], indirect=True)
@pytest.mark.parametrize("place", [0, 1], ids=["leader", "follower"])
def test_interrupt_at_any_moment_harms_nobody_else(database: str, place: int) -> None:
    scene = Scene(database)
    found: dict[str, TaskRun] = {}
    for count in itertools.count(1):
        interrupted = Interrupted(count)
        found |= scene.play(interrupted, place, str(count))
        if interrupted.where is None:
            break
    assert count > (20 if place == 0 else 5)
    scene.history.dispose()
    with TaskRunHistory.connect(database) as plain:
        stored = {run.task_id: run for run in plain.all_runs()}
        assert plain.count_runs() == len(stored)
    assert {task: run for task, run in stored.items() if not task.startswith("interrupted")} == found


class Gate:
    """Has the writer wait with a batch in which there is a certain task, and tells when it has come to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_reached, self.is_open = threading.Event(), threading.Event()
        self.tasks: list[str] = []
        write = Writer.write

        def watched(writer: Writer, calls: list[Call]) -> None:
            if any(call.task_id == "gate" for call in calls):
                self.tasks = [call.task_id for call in calls]
                self.is_reached.set()
                assert self.is_open.wait(30)
            write(writer, calls)

        monkeypatch.setattr(Writer, "write", watched)

    async def reached(self) -> None:
        while not self.is_reached.is_set():  # noqa: ASYNC110  (another thread sets it)
            await asyncio.sleep(0.001)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


async def waiting(history: Any, count: int) -> None:
    while len(history._group._pending) < count:  # noqa: ASYNC110  (nothing tells of it)
        await asyncio.sleep(0.001)


def stored(database: str) -> dict[str, list[TaskRun]]:
    with TaskRunHistory.connect(database) as plain:
        runs = itertools.groupby(plain.all_runs(), lambda run: run.task_id)
        return {task: list(of_task) for task, of_task in runs if task != "before"}


def test_canceled_callers_do_not_hinder_the_others(database: str, gate: Gate) -> None:
    async def scenario() -> list[Any]:
        async with AsyncTaskRunHistory.connect(database, group_commit=True) as history:
            await history.open_run("before")
            names = ["gate", *[f"written {n}" for n in range(6)]]
            written = [asyncio.create_task(history.open_run(name)) for name in names]
            await gate.reached()
            assert gate.tasks == names
            pending = [asyncio.create_task(history.open_run(f"pending {n}")) for n in range(6)]
            await waiting(history, 6)
            for task in (*written[1:4], *pending[:3]):
                task.cancel()
            await asyncio.sleep(0)
            gate.is_open.set()
            found = await asyncio.gather(*written, *pending, return_exceptions=True)
            again = await history.open_run("again")
            group: Any = history._group
            assert not group._pending
            return [*found, again]

    found = asyncio.run(scenario())
    canceled = [isinstance(one, asyncio.CancelledError) for one in found]
    assert canceled == [False, *[True] * 3, *[False] * 3, *[True] * 3, *[False] * 3, False]
    runs = stored(database)
    # Who is canceled while the writer is at it is written; who waits still is not.
    assert set(runs) == {"gate", "again", *(f"written {n}" for n in range(6)), *(f"pending {n}" for n in range(3, 6))}
    assert [runs[run.task_id] for run in found if isinstance(run, TaskRun)] == [
        [run] for run in found if isinstance(run, TaskRun)
    ]


@pytest.mark.parametrize("is_in_flight", [True, False], ids=["written", "pending"])
def test_canceled_recording_leaves_no_run_behind_as_running(database: str, gate: Gate, is_in_flight: bool) -> None:
    entered = []

    async def record(history: AsyncTaskRunHistory, task: str) -> None:
        async with history.record(task):
            entered.append(task)

    async def scenario() -> None:
        async with AsyncTaskRunHistory.connect(database, group_commit=True) as history:
            await history.open_run("before")
            others = [asyncio.create_task(record(history, name)) for name in ("gate", "other")]
            if is_in_flight:
                recording = asyncio.create_task(record(history, "canceled"))
            await gate.reached()
            assert gate.tasks == ["gate", "other", *(["canceled"] if is_in_flight else [])]
            if not is_in_flight:
                recording = asyncio.create_task(record(history, "canceled"))
                await waiting(history, 1)
            recording.cancel()
            await asyncio.sleep(0.01)
            gate.is_open.set()
            found = await asyncio.gather(recording, *others, return_exceptions=True)
            assert [type(one) for one in found] == [asyncio.CancelledError, type(None), type(None)]

    asyncio.run(scenario())
    phases = {task: [run.phase for run in runs] for task, runs in stored(database).items()}
    assert phases == {"gate": ["succeeded"], "other": ["succeeded"], "canceled": ["canceled"]}
    assert sorted(entered) == ["gate", "other"]


@pytest.mark.parametrize("kind", ["sqlite", *SOAK_SERVERS], indirect=True)
def test_dispose_while_callers_write_loses_nothing(database: str) -> None:
    with TaskRunHistory.connect(database, group_commit=True) as history:
        count, is_over = 5, threading.Event()

        def work(number: int) -> None:
            for _ in range(count):
                run = history.open_run(f"job {number}")
                history.close_run(run.task_id, run.attempt, TaskPhase.SUCCEEDED)

        def dispose() -> None:
            while not is_over.wait(0.002):
                history.dispose()

        disposing = threading.Thread(target=dispose)
        disposing.start()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        is_over.set()
        disposing.join()
    assert {task: [run.phase for run in runs] for task, runs in stored(database).items()} == {
        f"job {number}": ["succeeded"] * count for number in range(8)
    }


def test_dispose_of_the_asynchronous_history_waits_for_what_is_written(database: str, gate: Gate) -> None:
    async def scenario() -> None:
        history = AsyncTaskRunHistory.connect(database, group_commit=True)
        await history.open_run("before")
        working = [asyncio.create_task(history.open_run(name)) for name in ("gate", "other")]
        await gate.reached()
        disposing = asyncio.create_task(history.dispose())
        late = asyncio.create_task(history.open_run("late"))
        await asyncio.sleep(0.05)
        assert not disposing.done()
        gate.is_open.set()
        await disposing
        assert [run.attempt for run in await asyncio.gather(*working, late)] == [1, 1, 1]
        assert (await history.open_run("again")).attempt == 1
        await history.dispose()

    asyncio.run(scenario())
    assert set(stored(database)) == {"gate", "other", "late", "again"}


def test_callers_that_get_no_thread_write_each_for_itself(sqlite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    async def scenario() -> list[TaskRun]:
        async with AsyncTaskRunHistory.connect(sqlite, group_commit=True) as history:
            await history.open_run("before")
            with monkeypatch.context() as patched:
                patched.setattr(ThreadPoolExecutor, "submit", refuse)
                found = await asyncio.gather(*[history.open_run(f"job {number}") for number in range(3)])
            return [*found, await history.open_run("after")]

    found = asyncio.run(asyncio.wait_for(scenario(), 30))
    assert stored(sqlite) == {run.task_id: [run] for run in found}


FORKING = """
import os, sys, threading
from taskruns import TaskPhase, TaskRunHistory

history = TaskRunHistory.connect(sys.argv[1], group_commit=True)
done = []

def record(task, count):
    for _ in range(count):
        run = history.open_run(task)
        history.close_run(task, run.attempt, TaskPhase.SUCCEEDED)
    done.append(task)

def record_in_threads(name, count):
    threads = [threading.Thread(target=record, args=(f"{name} {number}", count)) for number in range(4)]
    for thread in threads:
        thread.start()
    return threads

record("before", 1)
threads = record_in_threads("parent", 30)
if len(sys.argv) > 2:
    for thread in threads:
        thread.join()
children = []
for number in range(5):
    child = os.fork()
    if child == 0:
        assert not history._group._pending and history._group._leader is None
        for thread in record_in_threads(f"child {number}", 3):
            thread.join()
        os._exit(0 if len([task for task in done if task.startswith("child")]) == 4 else 1)
    children.append(child)
for child in children:
    assert os.waitpid(child, 0)[1] == 0
for thread in threads:
    thread.join()
history.dispose()
"""

LEAVING = """
import asyncio, sys, threading
from taskruns import TaskRunHistory
from taskruns.aio import AsyncTaskRunHistory

told = set()

def tell(run):
    told.add(run.task_id)
    sys.stdout.write(f"{run.task_id}:{run.attempt}\\n")
    sys.stdout.flush()

def record(history, task):
    while True:
        tell(history.open_run(task))

async def record_beside(history, task):
    while True:
        tell(await history.open_run(task))

async def main():
    history = AsyncTaskRunHistory.connect(sys.argv[1], group_commit=True)
    tasks = [asyncio.create_task(record_beside(history, f"task {number}")) for number in range(4)]
    while len(told) < 8:
        await asyncio.sleep(0.01)

history = TaskRunHistory.connect(sys.argv[1], group_commit=True)
for number in range(4):
    threading.Thread(target=record, args=(history, f"thread {number}"), daemon=True).start()
asyncio.run(main())
"""


def run_script(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("kind", ["sqlite", "postgresql", SOAK_SERVERS[1]], indirect=True)
def test_children_forked_while_threads_write_write_by_themselves(kind: str, database: str) -> None:
    # In a child forked in the middle of a write SQLite itself finds its file locked: by a thread that does not exist.
    done = run_script(FORKING, database, *(["when they have ended"] if kind == "sqlite" else []))
    assert done.stderr == ""
    expected = {f"parent {thread}": 30 for thread in range(4)}
    expected |= {f"child {number} {thread}": 3 for number in range(5) for thread in range(4)}
    assert {task: [(run.attempt, run.phase) for run in runs] for task, runs in stored(database).items()} == {
        task: [(attempt, "succeeded") for attempt in range(1, count + 1)] for task, count in expected.items()
    }


@pytest.mark.parametrize("kind", ["sqlite", *SOAK_SERVERS], indirect=True)
def test_interpreter_that_ends_without_dispose_has_stored_what_it_told(database: str) -> None:
    told = run_script(LEAVING, database).stdout.splitlines()  # drivers for asyncio complain that nobody closed them
    runs = stored(database)
    for task in (f"{kind} {number}" for kind in ("task", "thread") for number in range(4)):
        acknowledged = [int(line.partition(":")[2]) for line in told if line.startswith(f"{task}:")]
        assert acknowledged
        attempts = [run.attempt for run in runs[task]]
        assert attempts == list(range(1, len(attempts) + 1))
        assert len(attempts) - len(acknowledged) in (0, 1)


class SoftLimitError(Exception):
    """What a signal handler raises to have something end in good time."""


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SoftLimitError])
@pytest.mark.parametrize("kind", ["sqlite", *SOAK_SERVERS])
def test_interrupt_between_two_statements_leaves_no_transaction_open(
    kind: str, databases: Databases, monkeypatch: pytest.MonkeyPatch, interrupt: type[BaseException]
) -> None:
    with TaskRunHistory.connect(databases.migrated(kind), source="here", group_commit=True) as history:
        history.open_run("ending")
        group: Any = history._group
        number = history._supervision.own_number
        calls = [
            Call("ending", attempt=1, outcome=Outcome.of(SUCCEEDED, error=None, exit_code=0, finished_at=None)),
            Call("starting", Start.of("starting", None, None, "here", None, None, number)),
        ]

        def interrupted(*_: object) -> None:
            raise interrupt

        with monkeypatch.context() as patched:
            patched.setattr(batches, "_both" if kind == "postgresql" else "_open", interrupted)
            with pytest.raises(interrupt):
                group.writer.write(calls)
        assert [type(call.error) for call in calls] == [ConnectionAbortedError] * 2  # they look whether it was written
        assert calls[0].error is not calls[1].error
        assert [run.task_id for run in history.active_runs()] == ["ending"]
        assert history.close_run("ending", 1, SUCCEEDED) == history.get_run("ending", 1)
        assert history.open_run("starting").attempt == 1
