"""Statements that are compiled once, and runs out of the rows that a driver gives.

SQLAlchemy's way from a statement to a row costs several times what SQLite takes to find it.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, CursorResult, Dialect
from sqlalchemy.dialects.sqlite.base import SQLiteCompiler
from sqlalchemy.sql import ClauseElement

from taskruns.model import TaskPhase, TaskRun

_MOST = 1000
"""Statements that are kept for a dialect; far more than there are, if nobody asks for ever new ones."""

PHASES = {phase.value: phase for phase in TaskPhase}


class _SQLiteCompiler(SQLiteCompiler):
    """Writes the INDEXED BY of a hint, which SQLAlchemy leaves out."""

    def get_from_hint_text(self, table: object, text: str | None) -> str | None:  # noqa: ARG002  (SQLAlchemy's)
        """Return what is written after a table."""
        return text


class Prepared:
    """The text of a statement, and what its parameters need on their way to the driver."""

    def __init__(self, statement: ClauseElement, dialect: Dialect) -> None:
        compiler = _SQLiteCompiler if dialect.name == "sqlite" else dialect.statement_compiler
        compiled: Any = compiler(dialect, statement)
        self.text = str(compiled)
        self._constants = dict(compiled.params)
        self._names = tuple(compiled.positiontup) if compiled.positional else None
        self._processors: dict[str, Callable[[Any], Any]] = {}
        for name, bind in compiled.binds.items():
            process = bind.type.dialect_impl(dialect).bind_processor(dialect)
            if process is not None:
                self._processors[name] = process

    def execute(self, connection: Connection, parameters: Mapping[str, Any]) -> CursorResult[Any]:
        """Send it; the rows are as the driver gives them."""
        values = self._constants | dict(parameters)
        for name, process in self._processors.items():
            values[name] = process(values[name])
        if self._names is None:
            return connection.exec_driver_sql(self.text, values)
        return connection.exec_driver_sql(self.text, tuple([values[name] for name in self._names]))


def prepared(dialect: Dialect, build: Callable[..., ClauseElement], *arguments: Any) -> Prepared:
    """Return the statement that ``build`` makes of some arguments, compiled at its first use."""
    kept = _kept.setdefault(dialect, {})
    key = (build, arguments)
    found = kept.get(key)
    if found is None:
        if len(kept) >= _MOST:
            kept.clear()
        found = kept[key] = Prepared(build(*arguments), dialect)
    return found


_kept: WeakKeyDictionary[Dialect, dict[Any, Prepared]] = WeakKeyDictionary()


def run_of_values(values: Any) -> TaskRun:
    """Return the run of a row with the columns of ``statements.COLUMNS``, as a driver gives them."""
    (task_id, attempt, phase, started_at, finished_at, error, code, recovered, inferred, *rest) = values
    return TaskRun(
        task_id,
        attempt,
        PHASES[phase],
        moment_of(started_at),
        None if finished_at is None else moment_of(finished_at),
        error,
        code,
        bool(recovered),
        bool(inferred),
        *rest,
    )


def moment_of(value: Any) -> datetime:
    """Return the moment that a driver gives as text (SQLite), without a zone (MariaDB) or with one."""
    if type(value) is str:
        return datetime.fromisoformat(value + "+00:00")  # quicker than to replace the zone afterwards
    moment: datetime = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    return moment
