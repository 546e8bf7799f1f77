"""How a sample is taken: one thread, several, asyncio tasks, or processes that record for a second.

Nothing but the standard library, as Luigi's environment has nothing else of ours.
"""

import asyncio
import math
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import Any

THREADS, TASKS, PROCESSES = 16, 64, 4
NAMES = [f"shop:import-{number:08}" for number in range(200)]
ONE_NAME = NAMES[:1]
WARM_UP = 7
"""Pairs of each caller before the clock starts: by then psycopg has prepared its statements."""
RAMP = 0.2
"""The part of a sample's time for which all record already before it begins, as they do not end their pairs at once."""

_clock = time.perf_counter


@dataclass(frozen=True)
class Sample:
    """Pairs of an open and a close a second, and how long one call took, in milliseconds."""

    rate: float
    p50: float
    p99: float
    longest: float

    @classmethod
    def of(cls, tallies: "Sequence[_Tally]", seconds: float) -> "Sample":
        """Return what some callers had together."""
        ranked = sorted(latency for tally in tallies for latency in tally.latencies)

        def rank(part: float) -> float:
            return 1e3 * ranked[max(0, math.ceil(part * len(ranked)) - 1)]

        # Where the disk stood still all the time it is one, so that there is a ratio.
        return cls(max(1, sum(tally.pairs for tally in tallies)) / seconds, rank(0.5), rank(0.99), rank(1))


class Contender:
    """A way to record runs. It is made anew for each sample, and may be pickled before it is started."""

    name: str
    is_async = False
    pair_is_one_call = False
    """Whether only ``close`` does anything."""

    def prepare(self) -> None:
        """Make the tables as new."""
        raise NotImplementedError

    def start(self) -> None:
        """Connect, in the process that records."""

    def caller(self) -> Any:
        """Return what one thread calls ``open`` and ``close`` of; called in that thread."""
        return self

    def stop(self) -> None:
        """Leave nothing open."""

    def sample(self, shape: str, seconds: float) -> Sample:
        """Return what was measured on new tables."""
        self.prepare()
        return SHAPES[shape](self, seconds)


@contextmanager
def _started(contender: Contender) -> Iterator[None]:
    contender.start()
    try:
        yield
    finally:
        contender.stop()


class _Tally:
    """What one caller has stored in the time of a sample."""

    def __init__(self, contender: Contender, seconds: float) -> None:
        self._is_one_call = contender.pair_is_one_call
        self._begins = _clock() + RAMP * seconds
        self._ends = self._begins + seconds
        self.pairs = 0
        self.latencies: list[float] = []

    def add(self, begun: float, opened: float, closed: float) -> bool:
        """Count a pair, and return whether there is time for another."""
        if closed > self._begins:
            self.latencies.append(closed - opened)
            if not self._is_one_call:
                self.latencies.append(opened - begun)
            self.pairs += closed <= self._ends
        return closed <= self._ends

    def record(self, caller: Any, names: Iterator[str]) -> None:
        """Record until the end."""
        has_time = True
        while has_time:
            name = next(names)
            begun = _clock()
            attempt = caller.open(name)
            opened = _clock()
            caller.close(name, attempt)
            has_time = self.add(begun, opened, _clock())

    async def record_async(self, caller: Any, names: Iterator[str]) -> None:
        """Record until the end."""
        has_time = True
        while has_time:
            name = next(names)
            begun = _clock()
            attempt = await caller.open(name)
            opened = _clock()
            await caller.close(name, attempt)
            has_time = self.add(begun, opened, _clock())


def _warm_up(caller: Any, names: Iterator[str], pairs: int = WARM_UP) -> None:
    for name in islice(names, pairs):
        caller.close(name, caller.open(name))


def one_thread(contender: Contender, seconds: float, names: Sequence[str] = NAMES, *, warm_up: int = WARM_UP) -> Sample:
    """Record in this thread."""
    with _started(contender):
        caller, turns = contender.caller(), cycle(names)
        _warm_up(caller, turns, warm_up)
        tally = _Tally(contender, seconds)
        tally.record(caller, turns)
    return Sample.of([tally], seconds)


def threads(contender: Contender, seconds: float, names: Sequence[str] = NAMES) -> Sample:
    """Record in threads of this process, which rarely meet on one task unless there is only one."""
    tallies: list[_Tally] = []
    failed: list[Exception] = []
    ready = threading.Barrier(THREADS, lambda: tallies.extend(_Tally(contender, seconds) for _ in range(THREADS)))

    def work(number: int) -> None:
        turns = cycle(names[number::THREADS] or names)
        try:
            caller = contender.caller()
            _warm_up(caller, turns)
            ready.wait()
            tallies[number].record(caller, turns)
        except threading.BrokenBarrierError:
            pass
        except Exception as error:  # noqa: BLE001  (raised below)
            failed.append(error)
            ready.abort()

    with _started(contender):
        workers = [threading.Thread(target=work, args=[number]) for number in range(THREADS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    if failed:
        raise failed[0]
    return Sample.of(tallies, seconds)


def threads_on_one_name(contender: Contender, seconds: float) -> Sample:
    """Record in threads that all open and close runs of the same task."""
    return threads(contender, seconds, ONE_NAME)


def tasks(contender: Contender, seconds: float) -> Sample:
    """Record in asyncio tasks; what knows no asyncio does so through a pool of threads, each with its own caller."""
    return asyncio.run(_tasks(contender, seconds))


class _Pooled:
    """Calls in the threads of a pool."""

    def __init__(self, contender: Contender, pool: ThreadPoolExecutor) -> None:
        self._contender = contender
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._local = threading.local()

    async def open(self, task_id: str) -> int:
        return int(await self._loop.run_in_executor(self._pool, self._call, "open", task_id))

    async def close(self, task_id: str, attempt: int) -> None:
        await self._loop.run_in_executor(self._pool, self._call, "close", task_id, attempt)

    def _call(self, method: str, *arguments: Any) -> Any:
        if not hasattr(self._local, "caller"):
            self._local.caller = self._contender.caller()
        return getattr(self._local.caller, method)(*arguments)


async def _tasks(contender: Contender, seconds: float) -> Sample:
    names = [cycle(NAMES[number::TASKS]) for number in range(TASKS)]
    contender.start()
    with ThreadPoolExecutor(THREADS) as pool:
        caller: Any = contender.caller() if contender.is_async else _Pooled(contender, pool)

        async def warm_up(turns: Iterator[str]) -> None:
            for name in islice(turns, WARM_UP):
                await caller.close(name, await caller.open(name))

        try:
            await asyncio.gather(*map(warm_up, names))
            tallies = [_Tally(contender, seconds) for _ in range(TASKS)]
            both = zip(tallies, names, strict=True)
            await asyncio.gather(*(tally.record_async(caller, turns) for tally, turns in both))
        finally:
            await caller.leave() if contender.is_async else contender.stop()
    return Sample.of(tallies, seconds)


def processes(contender: Contender, seconds: float) -> Sample:
    """Record in new processes of one thread each."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(PROCESSES)
    receivers, workers = [], []
    for number in range(PROCESSES):
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=_process, args=(contender, seconds, NAMES[number::PROCESSES], ready, sender))
        worker.start()
        sender.close()  # so that the end of the process is seen here
        receivers.append(receiver)
        workers.append(worker)
    try:
        tallies: list[_Tally] = [receiver.recv() for receiver in receivers]
    except EOFError:
        raise RuntimeError(f"{contender.name}: a process failed") from None
    finally:
        for worker in workers:
            worker.join()
    return Sample.of(tallies, seconds)


def _process(contender: Contender, seconds: float, names: list[str], ready: Barrier, sender: Connection) -> None:
    try:
        with _started(contender):
            caller, turns = contender.caller(), cycle(names)
            _warm_up(caller, turns)
            ready.wait()
            tally = _Tally(contender, seconds)
            tally.record(caller, turns)
        sender.send(tally)
    except BaseException:
        ready.abort()
        raise


SHAPES: dict[str, Callable[[Contender, float], Sample]] = {
    "one": one_thread,
    "threads": threads,
    "tasks": tasks,
    "processes": processes,
    "one-name": threads_on_one_name,
}
TITLES = {
    "one": "one thread",
    "threads": f"{THREADS} threads",
    "tasks": f"{TASKS} asyncio tasks",
    "processes": f"{PROCESSES} processes",
    "one-name": f"{THREADS} threads, one task name",
}
