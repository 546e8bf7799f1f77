"""Processes that write: ``python writers.py ROLE URL …`` waits for a line on stdin, and answers in JSON lines."""

import asyncio
import json
import mmap
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from subprocess import PIPE, Popen
from typing import IO, Any, Self
from zoneinfo import ZoneInfo

from taskruns import Retention, RunClosedError, RunNotFoundError, Span, TaskPhase, TaskRun, TaskRunHistory
from taskruns.aio import AsyncTaskRunHistory
from taskruns.retention import EMBEDDED

NOW = datetime.now(UTC)


class Writer:
    """One such process, seen from the test."""

    def __init__(self, role: str, url: str, *arguments: object) -> None:
        command = [sys.executable, __file__, role, url, *map(str, arguments)]
        self.process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True)
        self._first = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe

    def wait_until_ready(self) -> None:
        assert self._pipe(self.process.stdout).readline() == '"ready"\n', self.answers()

    def start(self) -> None:
        stdin = self._pipe(self.process.stdin)
        stdin.write("go\n")
        stdin.flush()

    def wait_for_answer(self) -> None:
        self._first = self._pipe(self.process.stdout).readline()

    def kill(self) -> list[Any]:
        """End it as ``kill -9`` does, and return what it had acknowledged."""
        self.process.kill()
        output = self._first + self._pipe(self.process.stdout).read()
        self.process.wait(60)  # its pipes are closed a moment before it is gone
        return [json.loads(line) for line in output.splitlines(keepends=True) if line.endswith("\n")]

    def answers(self) -> list[Any]:
        output, errors = self.process.communicate(timeout=600)
        assert (self.process.returncode, errors) == (0, "")
        return [json.loads(line) for line in output.splitlines()]


def race(url: str, *roles: tuple[object, ...]) -> list[list[Any]]:
    """Start one process for each role, with its arguments, at the same moment; return what each answered."""
    writers = [Writer(str(role), url, *arguments) for role, *arguments in roles]
    try:
        for writer in writers:
            writer.wait_until_ready()
        for writer in writers:
            writer.start()
        return [writer.answers() for writer in writers]
    finally:
        for writer in writers:
            writer.__exit__()


def say(value: object) -> None:
    os.write(1, f"{json.dumps(value)}\n".encode())  # at once, and whole, whichever thread says it


def opening(history: TaskRunHistory, task_id: str, count: str, started_at: str = "") -> None:
    """Open runs of one task; the time may be the same for all processes, as that of a schedule is."""
    moment = datetime.fromisoformat(started_at) if started_at else None
    for _ in range(int(count)):
        say(history.open_run(task_id, started_at=moment).attempt)


def opening_in_transactions(history: TaskRunHistory, task_id: str, count: str) -> None:
    for _ in range(int(count)):
        with history.begin(lock=task_id) as runs:
            last = runs.last_run(task_id)
            run = runs.open_run(task_id)
        say([last.attempt if last else 0, run.attempt])


def opening_and_closing(history: TaskRunHistory, tasks: str, count: str, first: str) -> None:
    for number in range(int(count)):
        run = history.open_run(f"task {(int(first) + number) % int(tasks)}")
        history.close_run(run.task_id, run.attempt, TaskPhase.SUCCEEDED)
    say(int(count))


def listing(history: TaskRunHistory, tasks: str, count: str) -> None:
    for number in range(int(count)):
        history.tasks()
        history.active_runs()
        history.runs(f"task {number % int(tasks)}", limit=5)
    say(int(count))


def closing(history: TaskRunHistory, phase: str, count: str, steps: str, own: str) -> None:
    """Close runs 1 to ``count``, each when the other process does: both tell in a file how far they are."""
    with (
        Path(steps).open("r+b") as file,
        mmap.mmap(file.fileno(), 0) as memory,
        memoryview(memory).cast("I") as reached,
    ):
        for attempt in range(1, int(count) + 1):
            reached[int(own)] = attempt
            while reached[1 - int(own)] < attempt:
                time.sleep(0)
            try:
                run = history.close_run("job", attempt, TaskPhase(phase))
            except RunClosedError as error:
                say(["lost", error.run.phase])
            else:
                say(["won", run.phase])


def acknowledging(history: TaskRunHistory, count: str) -> None:
    for _ in range(int(count)):
        run = history.open_run("job")
        say([run.attempt, False])
        history.close_run("job", run.attempt, TaskPhase.FAILED, error="e" * 5000, exit_code=1)
        say([run.attempt, True])


def acknowledging_together(history: TaskRunHistory, callers: str, twin: str) -> None:
    """Open and close runs until killed, through many callers at once; tell of each call that returned."""
    if twin == "tasks":
        asyncio.run(_acknowledging_tasks(str(history.url.render_as_string(hide_password=False)), int(callers)))
        return

    def work(number: int) -> None:
        task = f"job {number % 4}"
        while True:
            with history.record(task) as handle:
                say([task, handle.attempt, False])
            say([task, handle.attempt, True])

    with ThreadPoolExecutor(int(callers)) as pool:
        list(pool.map(work, range(int(callers))))


async def _acknowledging_tasks(url: str, callers: int) -> None:
    history = AsyncTaskRunHistory.connect(url, source="here", group_commit=True)

    async def work(number: int) -> None:
        task = f"job {number % 4}"
        while True:
            async with history.record(task) as handle:
                say([task, handle.attempt, False])
            say([task, handle.attempt, True])

    await asyncio.gather(*map(work, range(callers)))


def recording_together(history: TaskRunHistory, tasks: str, callers: str, count: str) -> None:
    """Open and close runs of all tasks through many threads at once; tell how many."""

    def work(number: int) -> None:
        for turn in range(int(count)):
            run = history.open_run(f"task {(number + turn) % int(tasks)}", started_at=NOW)
            history.close_run(run.task_id, run.attempt, TaskPhase.SUCCEEDED)

    with ThreadPoolExecutor(int(callers)) as pool:
        list(pool.map(work, range(int(callers))))
    say(int(callers) * int(count))


def writing_until(history: TaskRunHistory, stop: str) -> None:
    """Open and close runs until there is a file; tell how many, and the seconds of the longest call."""
    longest, count = 0.0, 0
    while not Path(stop).exists():
        began = time.monotonic()
        run = history.open_run(f"written {count % 100}")
        opened = time.monotonic()
        history.close_run(run.task_id, run.attempt, TaskPhase.SUCCEEDED)
        longest, count = max(longest, opened - began, time.monotonic() - opened), count + 1
        time.sleep(0.02)  # SQLite's writers hold each other up for seconds if none ever rests
    say([count, longest])


def churning(history: TaskRunHistory, seed: str, stop: str) -> None:
    """Do all that can be done to runs until there is a file; tell how many."""
    choose, count = random.Random(seed), 0
    while not Path(stop).exists():
        count += 1
        task, ago = f"task {choose.randrange(20)}", timedelta(hours=choose.uniform(24, 48))
        old = TaskRun(task, choose.randrange(1, 10**6), TaskPhase.FAILED, NOW - 500 * ago, NOW - 499 * ago)
        lost = TaskRun.starting(task, choose.randrange(1, 10**6), started_at=NOW - ago)
        history.add_runs([old, lost])
        run = history.open_run(task)
        history.close_run(task, run.attempt, choose.choice([TaskPhase.SUCCEEDED, TaskPhase.FAILED]), exit_code=None)
        history.recover(unsupervised_after=0)
        for known, phase in ((run, TaskPhase.TIMEOUT), (lost, TaskPhase.EXHAUSTED)):
            with suppress(RunClosedError, RunNotFoundError):
                history.close_run(task, known.attempt, phase, error="after all")
        if count % 5 == int(seed) % 5:
            history.prune(Retention(keep=0))
    say(count)


def peak_memory() -> int:
    """Return the peak of this process in KiB; ``getrusage`` counts what the one that started it had."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def summing_up_measured(history: TaskRunHistory) -> None:
    """Tell the statistics of all runs, by day in Berlin, and the peak of the memory in KiB before and after."""
    history.stats("nothing", by=Span.DAY)
    before = peak_memory()
    stats = history.stats(by=Span.DAY, zone=ZoneInfo("Europe/Berlin"))
    peak = peak_memory()
    parts = [[part.start.isoformat(), part.stats.to_wire()] for part in stats.parts]
    say([before, peak, stats.to_wire(), parts])


def pruning(history: TaskRunHistory) -> None:
    """Prune by the policy of the default database; tell after each step how many runs that were."""
    say(history.prune(EMBEDDED, on_progress=say))


def pruning_measured(history: TaskRunHistory) -> None:
    """Prune; tell the peak of the memory in KiB after the first steps and in the end, and how many runs that were."""
    peaks: list[int] = []

    def measure(_count: int) -> None:
        if len(peaks) < 20:
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    count = history.prune(EMBEDDED, on_progress=measure)
    say([peaks[-1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, count])


ROLES: dict[str, Callable[..., None]] = {
    "open": opening,
    "open in transactions": opening_in_transactions,
    "open and close": opening_and_closing,
    "list": listing,
    "close": closing,
    "acknowledge": acknowledging,
    "acknowledge together": acknowledging_together,
    "record together": recording_together,
    "write until": writing_until,
    "churn": churning,
    "stats measured": summing_up_measured,
    "prune": pruning,
    "prune measured": pruning_measured,
}

if __name__ == "__main__":
    role, url, *arguments = sys.argv[1:]
    with TaskRunHistory.connect(url, source="here", group_commit=role.endswith(" together")) as history:
        history.last_run("nothing")  # connected before the race begins
        say("ready")
        sys.stdin.readline()
        ROLES[role](history, *arguments)
