"""Statements that are compiled once, and runs out of the rows that a driver gives.

SQLAlchemy's way from a statement to a row costs several times what SQLite takes to find it.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Connection, Dialect, Insert, Select, TextClause, Update

from taskruns import engine
from taskruns.model import TaskPhase, TaskRun, trusted_run

if TYPE_CHECKING:
    from taskruns.stats import Ended

_MOST = 1000
"""Statements that are kept for a dialect; far more than there are, if nobody asks for ever new ones."""

_FEW = 100
"""Rows that a cursor may go on holding."""

_CURSOR = "_taskruns_cursor"

_log = logging.getLogger("sqlalchemy.engine.Engine")

T = TypeVar("T")

Statement = Select[Any] | Insert | Update | TextClause
"""What is prepared: it has its parameters' types, and stands for all its values."""

PHASES = {phase.value: phase for phase in TaskPhase}


class _Hints:
    """Has SQLAlchemy's compiler for SQLite write the INDEXED BY of a hint, which it leaves out."""

    def get_from_hint_text(self, table: object, text: str | None) -> str | None:  # noqa: ARG002  (SQLAlchemy's)
        """Return what is written after a table."""
        return text


def _hinting(compiler: type) -> type:
    return type("_Compiler", (_Hints, compiler), {})  # from what is loaded: with another database that one is not


class Prepared:
    """The text of a statement, and what its parameters need on their way to the driver."""

    def __init__(self, statement: Statement, dialect: Dialect) -> None:
        compiler = dialect.statement_compiler
        compiled: Any = (_hinting(compiler) if dialect.name == "sqlite" else compiler)(dialect, statement)
        self.text = str(compiled)
        self._statement = statement
        self._constants = {name: value for name, value in compiled.params.items() if value is not None}
        self._is_positional = compiled.positional
        binds = {name: bind for bind, name in compiled.bind_names.items()}
        # In the order of the text, with what makes the driver's value of it, if it needs that.
        self._sent: list[tuple[str, Callable[[Any], Any] | None]] = [
            (name, binds[name].type.dialect_impl(dialect).bind_processor(dialect))
            for name in (compiled.positiontup if compiled.positional else binds)
        ]

    def fetch(self, connection: Connection, parameters: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        """Send it, and return all rows: of a connection of ours as the driver gives them, else as SQLAlchemy does."""
        rows: Sequence[Sequence[Any]]
        if self._is_direct(connection):
            rows = self._send(connection, parameters, _all_rows)
            if len(rows) > _FEW:
                vars(connection).pop(_CURSOR)[1].close()  # or it would go on holding them
        else:
            rows = connection.execute(self._statement, dict(parameters)).all()
        return rows

    def write(self, connection: Connection, parameters: Mapping[str, Any]) -> int:
        """Send it, and return how many rows it has found."""
        if self._is_direct(connection):
            return self._send(connection, parameters, _row_count)
        # Which is kept for UPDATE and DELETE by itself: psycopg forgets that of an INSERT when its cursor is closed.
        options = {"preserve_rowcount": True}
        found: int = connection.execute(self._statement, dict(parameters), execution_options=options).rowcount
        return found

    def _is_direct(self, connection: Connection) -> bool:
        # Not a host's connection, which has whatever the host has set up; nor where SQLAlchemy is to log statements, or
        # to tell them to those that listen, such as telemetry does.
        heard = connection.engine.dispatch
        return not (
            heard.before_cursor_execute or heard.after_cursor_execute or _log.isEnabledFor(logging.INFO)
        ) and engine.is_own(connection)

    def _send(self, connection: Connection, parameters: Mapping[str, Any], take: Callable[[Any], T]) -> T:
        values = {**self._constants, **parameters} if self._constants else parameters
        sent: Any
        if self._is_positional:
            sent = [values[name] if process is None else process(values[name]) for name, process in self._sent]
        else:
            sent = {name: values[name] if process is None else process(values[name]) for name, process in self._sent}
        # What SQLAlchemy does besides takes as long as the rest: a connection of ours commits each statement by itself.
        try:
            cursor = _cursor_of(connection)
            cursor.execute(self.text, sent)
            return take(cursor)
        except connection.dialect.loaded_dbapi.Error as error:
            raise engine.as_sqlalchemy(connection, error, self.text) from error
        except BaseException as error:  # interrupted, or canceled: nobody knows where it stopped
            connection.invalidate(error)
            raise


def _cursor_of(connection: Connection) -> Any:
    """Return the one cursor that a connection is used with: to make one each time takes psycopg some microseconds."""
    dbapi = connection.connection.dbapi_connection
    kept = vars(connection)
    of, cursor = kept.get(_CURSOR, (None, None))
    if of is not dbapi:  # the connection was lost, and is another one now
        assert dbapi is not None  # noqa: S101  (for mypy)
        cursor = dbapi.cursor()
        kept[_CURSOR] = dbapi, cursor
    return cursor


def _all_rows(cursor: Any) -> Any:
    return cursor.fetchall()


def _row_count(cursor: Any) -> int:
    found: int = cursor.rowcount
    return found


def prepared(dialect: Dialect, build: Callable[..., Statement], *arguments: Any) -> Prepared:
    """Return the statement that ``build`` makes of some arguments, compiled at its first use."""
    # The dialect holds what holds it: they go together, which they never did from a dictionary with weak keys.
    kept: dict[Any, Prepared] = vars(dialect).setdefault("_taskruns_prepared", {})
    key = (build, arguments)
    found = kept.get(key)
    if found is None:
        if len(kept) >= _MOST:
            kept.clear()
        found = kept[key] = Prepared(build(*arguments), dialect)
    return found


def runs_of_rows(rows: Iterable[Sequence[Any]]) -> list[TaskRun]:
    """Return the runs of rows with the columns of ``statements.COLUMNS``, as a driver gives them.

    Their rules are constraints of the table. To have them checked again would take longer than all the rest.
    """
    phases, moment = PHASES, moment_of
    runs = []
    for task_id, attempt, phase, started_at, finished_at, error, code, recovered, inferred, *rest in rows:
        end = None if finished_at is None else moment(finished_at)
        head = (task_id, attempt, phases[phase], moment(started_at), end, error, code, bool(recovered), bool(inferred))
        runs.append(trusted_run((*head, *rest)))
    return runs


def ended_of_rows(rows: Sequence[Sequence[Any]]) -> "Sequence[Ended]":
    """Return what statistics are made of, out of rows of phase, start and end."""
    if not rows or (type(rows[0][1]) is not str and rows[0][1].tzinfo in (None, UTC)):
        return rows  # type: ignore[return-value]  # it is that already
    read = datetime.fromisoformat if type(rows[0][1]) is str else moment_of  # by one zone's clocks an hour may be none
    return [(phase, read(start), None if end is None else read(end)) for phase, start, end in rows]


def moment_of(value: Any) -> datetime:
    """Return the moment that a driver gives as text (SQLite), without a zone (MariaDB) or with one (PostgreSQL)."""
    if type(value) is str:
        return datetime.fromisoformat(value + "+00:00")  # quicker than to replace the zone afterwards
    moment: datetime = value
    if moment.tzinfo is UTC:
        return moment
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
