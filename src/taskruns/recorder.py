"""Writes the events of a supervisor into a history, as they come."""

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from taskruns.events import Event
from taskruns.history import TaskRunHistory
from taskruns.replay import Replayed
from taskruns.stream import Stream
from taskruns.timeline import Effect


class EventRecorder:
    """Turns a supervisor's events into runs. May be shared between threads.

    An event belongs to a run by what is stored and by its time, not by what the recorder remembers: events may be
    repeated, come in another order, or be told again from the first one on, and the history stays the same.

    ``source`` names the stream, the host's name unless given. What else records the same tasks needs another name.
    """

    def __init__(self, history: TaskRunHistory, *, source: str | None = None) -> None:
        self._history = history
        self._stream = Stream(history.source if source is None else source)
        self._lock = threading.Lock()
        self.counts: Counter[Effect] = Counter()
        """How many events did what."""

    def record(self, event: Event | Mapping[str, Any]) -> Effect:
        """Record one event, and return what it did: see :meth:`record_all`."""
        return self.record_all([event])[0]

    def record_all(self, events: Iterable[Event | Mapping[str, Any]]) -> list[Effect]:
        """Record events in one transaction, which is committed when this returns; return what each did.

        An event is an :class:`Event` or a mapping with its keys, see :meth:`Event.from_wire`.

        Raises:
            ValueError: an event has a value outside its rules; none is recorded.
            TypeError: a value has the wrong type; likewise.
        """
        checked = [event if isinstance(event, Event) else Event.from_wire(event) for event in events]
        with self._lock:
            effects = self._history.record_events(self._stream, checked)
            self.counts.update(effects)
        return effects

    def replay(self, *, seconds: float | None = None) -> Replayed:
        """Write what is kept in the spool, the events of this source as those that are recorded here.

        See :meth:`TaskRunHistory.replay`.
        """
        with self._lock:
            return self._history.replay(seconds=seconds, stream=self._stream)
