"""The recorder of events for asyncio."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from taskruns.aio.history import AsyncTaskRunHistory
from taskruns.events import Event
from taskruns.replay import Replayed
from taskruns.stream import Stream
from taskruns.timeline import Effect


class AsyncEventRecorder:
    """Turns a supervisor's events into runs: see :class:`taskruns.EventRecorder`. For the tasks of one event loop."""

    def __init__(self, history: AsyncTaskRunHistory, *, source: str | None = None) -> None:
        self._history = history
        self._stream = Stream(history.source if source is None else source)
        self._lock = asyncio.Lock()
        self.counts: Counter[Effect] = Counter()
        """How many events did what."""

    async def record(self, event: Event | Mapping[str, Any]) -> Effect:
        """Record one event, and return what it did: see :meth:`record_all`."""
        return (await self.record_all([event]))[0]

    async def record_all(self, events: Iterable[Event | Mapping[str, Any]]) -> list[Effect]:
        """Record events in one transaction: see :meth:`taskruns.EventRecorder.record_all`."""
        checked = [event if isinstance(event, Event) else Event.from_wire(event) for event in events]
        async with self._lock:
            effects = await self._history.record_events(self._stream, checked)
            self.counts.update(effects)
        return effects

    async def replay(self, *, seconds: float | None = None) -> Replayed:
        """Write what is kept in the spool: see :meth:`taskruns.EventRecorder.replay`."""
        async with self._lock:
            return await self._history.replay(seconds=seconds, stream=self._stream)
