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

_clock = time.perf_counter


@dataclass(frozen=True)
class Sample:
    """Pairs of an open and a close a second, and how long one call took, in milliseconds."""

    rate: float
    p50: float
    p99: float
    longest: float

    @classmethod
    def of(cls, pairs: int, seconds: float, latencies: Sequence[float]) -> "Sample":
        """Return what some callers had together."""
        ranked = sorted(latencies)

        def rank(part: float) -> float:
            return 1e3 * ranked[max(0, math.ceil(part * len(ranked)) - 1)]

        return cls(pairs / seconds, rank(0.5), rank(0.99), rank(1))


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


def _record(contender: Contender, caller: Any, names: Iterator[str], deadline: float, latencies: list[float]) -> int:
    """Record until the deadline, and return how many pairs had been stored by then."""
    pairs = 0
    while True:
        name = next(names)
        begun = _clock()
        attempt = caller.open(name)
        opened = _clock()
        caller.close(name, attempt)
        closed = _clock()
        if not contender.pair_is_one_call:
            latencies.append(opened - begun)
        latencies.append(closed - opened)
        if closed > deadline:
            return pairs
        pairs += 1


def _warm_up(caller: Any, names: Iterator[str]) -> None:
    for name in islice(names, WARM_UP):
        caller.close(name, caller.open(name))


def one_thread(contender: Contender, seconds: float, names: Sequence[str] = NAMES) -> Sample:
    """Record in this thread."""
    with _started(contender):
        caller, turns = contender.caller(), cycle(names)
        _warm_up(caller, turns)
        latencies: list[float] = []
        pairs = _record(contender, caller, turns, _clock() + seconds, latencies)
    return Sample.of(pairs, seconds, latencies)


def threads(contender: Contender, seconds: float, names: Sequence[str] = NAMES) -> Sample:
    """Record in threads of this process, which rarely meet on one task unless there is only one."""
    pairs = [0] * THREADS
    latencies: list[list[float]] = [[] for _ in range(THREADS)]
    failed: list[Exception] = []
    deadline = math.inf

    def begin() -> None:
        nonlocal deadline
        deadline = _clock() + seconds

    ready = threading.Barrier(THREADS, begin)

    def work(number: int) -> None:
        turns = cycle(names[number::THREADS] or names)
        try:
            caller = contender.caller()
            _warm_up(caller, turns)
            ready.wait()
            pairs[number] = _record(contender, caller, turns, deadline, latencies[number])
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
    return Sample.of(sum(pairs), seconds, [latency for own in latencies for latency in own])


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
    latencies: list[float] = []
    names = [cycle(NAMES[number::TASKS]) for number in range(TASKS)]
    contender.start()
    with ThreadPoolExecutor(THREADS) as pool:
        caller: Any = contender.caller() if contender.is_async else _Pooled(contender, pool)

        async def warm_up(number: int) -> None:
            for name in islice(names[number], WARM_UP):
                await caller.close(name, await caller.open(name))

        async def work(number: int) -> int:
            pairs = 0
            while True:
                name = next(names[number])
                begun = _clock()
                attempt = await caller.open(name)
                opened = _clock()
                await caller.close(name, attempt)
                closed = _clock()
                latencies.extend([opened - begun, closed - opened])
                if closed > deadline:
                    return pairs
                pairs += 1

        try:
            await asyncio.gather(*map(warm_up, range(TASKS)))
            deadline = _clock() + seconds
            pairs = sum(await asyncio.gather(*map(work, range(TASKS))))
        finally:
            await caller.leave() if contender.is_async else contender.stop()
    return Sample.of(pairs, seconds, latencies)


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
        found: list[tuple[int, list[float]]] = [receiver.recv() for receiver in receivers]
    except EOFError:
        raise RuntimeError(f"{contender.name}: a process failed") from None
    finally:
        for worker in workers:
            worker.join()
    return Sample.of(sum(pairs for pairs, _ in found), seconds, [one for _, own in found for one in own])


def _process(contender: Contender, seconds: float, names: list[str], ready: Barrier, sender: Connection) -> None:
    try:
        with _started(contender):
            caller, turns = contender.caller(), cycle(names)
            _warm_up(caller, turns)
            ready.wait()
            latencies: list[float] = []
            pairs = _record(contender, caller, turns, _clock() + seconds, latencies)
        sender.send((pairs, latencies))
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
