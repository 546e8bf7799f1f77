"""The same for asyncio: the twins of :class:`TaskRunRepository`, :class:`TaskRunHistory` and :class:`EventRecorder`.

Each method does what its twin does, by running it in SQLAlchemy's bridge, so that no rule is written twice.
"""

from taskruns.aio.history import AsyncTaskRunHistory
from taskruns.aio.recorder import AsyncEventRecorder
from taskruns.aio.repository import AsyncTaskRunRepository

__all__ = ["AsyncEventRecorder", "AsyncTaskRunHistory", "AsyncTaskRunRepository"]
