"""The tables: columns, constraints and indexes. ``migrations/`` builds the same.

What only some database has is added by :func:`complete`: when tables are created, compared, or seen as ``TaskRunRow``.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ColumnElement,
    Connection,
    DateTime,
    Dialect,
    Enum,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    TextClause,
    event,
    false,
    text,
)
from sqlalchemy.schema import SchemaItem
from sqlalchemy.types import TypeDecorator, TypeEngine

from taskruns.model import MAX_ATTEMPT, MAX_NAME_LENGTH, TaskPhase
from taskruns.times import in_utc

SCHEMA_VERSION = "1_0003"
"""The oldest revision this code works with, as MAJOR_NUMBER. Within a major, migrations only add."""

VERSION_TABLE = "taskruns_version"
"""Where Alembic keeps the revision; its own name, so that a host's ``alembic_version`` is left alone."""

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)


class UTCDateTime(TypeDecorator[datetime]):
    """An aware datetime, stored in UTC to the microsecond; a naive one is refused.

    SQLite keeps text that sorts by time, MariaDB DATETIME(6), PostgreSQL timestamptz.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[datetime]:
        """Return the type of the database's own."""
        if dialect.name in ("mysql", "mariadb"):
            from sqlalchemy.dialects import mysql  # noqa: PLC0415  (only where it is in use, as it takes long)

            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        return dialect.type_descriptor(DateTime(timezone=True))

    def bind_processor(self, dialect: Dialect) -> Callable[[datetime | None], Any] | None:
        """Return what makes the driver's value of one: for SQLite text, several times quicker than by SQLAlchemy."""
        return _as_text if dialect.name == "sqlite" else super().bind_processor(dialect)

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return what the driver gets."""
        if value is None:
            return None
        value = in_utc(value, "a stored time")
        return value if dialect.name == "postgresql" else value.replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        """Return what the driver gave, in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _as_text(value: datetime | None) -> str | None:
    return None if value is None else in_utc(value, "a stored time").isoformat(" ", "microseconds")[: -len("+00:00")]


class LongText(TypeDecorator[str]):
    """A text of any length: MariaDB's TEXT ends at 64 KiB."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[str]:
        """Return the type of the database's own."""
        if dialect.name in ("mysql", "mariadb"):
            from sqlalchemy.dialects import mysql  # noqa: PLC0415  (as above)

            return dialect.type_descriptor(mysql.MEDIUMTEXT())
        return super().load_dialect_impl(dialect)


def _name() -> String:
    return String(MAX_NAME_LENGTH)


task_runs = Table(
    "task_runs",
    metadata,
    Column(
        "task_id",
        # Byte order everywhere: the same order on all databases, and prefixes can use the key.
        _name().with_variant(String(MAX_NAME_LENGTH, collation="C"), "postgresql"),
        nullable=False,
        comment="The recurring task; compared byte for byte",
    ),
    Column(
        "attempt",
        BigInteger,
        autoincrement=False,
        nullable=False,
        comment="Number of the run within its task, from 1 to 4294967295",
    ),
    Column(
        "phase",
        Enum(
            TaskPhase,
            native_enum=False,
            create_constraint=False,
            length=16,
            values_callable=lambda phases: [phase.value for phase in phases],
        ),
        nullable=False,
        comment="running while active, else succeeded, failed, timeout, canceled or exhausted",
    ),
    Column("started_at", UTCDateTime, nullable=False, comment="When the run started, UTC"),
    Column("finished_at", UTCDateTime, comment="When the run ended, UTC; null exactly while it is active"),
    Column(
        "error",
        LongText,
        comment="What went wrong; null for a run that is active or succeeded",
    ),
    Column("exit_code", Integer, comment="What a shell would show in $?: 128+N for signal N, 124 for a timeout"),
    Column(
        "recovered",
        Boolean,
        nullable=False,
        server_default=false(),
        comment="Whether the outcome was inferred, not observed",
    ),
    Column(
        "start_inferred",
        Boolean,
        nullable=False,
        server_default=false(),
        comment="Whether started_at was inferred from the end, not observed",
    ),
    Column("source", _name(), comment="The host, or the name given to a stream"),
    Column("submission", _name(), comment="What ties the attempts of one submission together"),
    Column("source_attempt", BigInteger, comment="The own attempt counter of the source"),
    Column("supervisor_id", BigInteger, comment="Who watches over the run while it is active"),
    PrimaryKeyConstraint("task_id", "attempt"),
    CheckConstraint(f"attempt BETWEEN 1 AND {MAX_ATTEMPT}", "attempt"),
    CheckConstraint("phase IN ('running', 'succeeded', 'failed', 'timeout', 'canceled', 'exhausted')", "phase"),
    CheckConstraint("(phase = 'running') = (finished_at IS NULL)", "active"),
    CheckConstraint("finished_at >= started_at", "times"),
    CheckConstraint("error IS NULL OR phase NOT IN ('running', 'succeeded')", "error"),
    comment="One row for every attempt of every task",
)

supervisors = Table(
    "supervisors",
    metadata,
    Column("id", BigInteger, autoincrement=False, nullable=False, comment="A random number"),
    Column("source", _name(), nullable=False, comment="What it marks its runs with"),
    Column(
        "stream",
        Boolean,
        nullable=False,
        server_default=false(),
        comment="Whether it records what another process tells of its runs",
    ),
    Column("host", _name(), nullable=False, comment="The name of its host"),
    Column("boot_id", String(36), comment="The start of the host's kernel since which its process numbers hold"),
    Column("pid_namespace", BigInteger, comment="The namespace of its process number: each container has its own"),
    Column("pid", BigInteger, nullable=False, comment="The number of its process"),
    Column("process_started", BigInteger, comment="When its process started, in clock ticks since boot"),
    Column("started_at", UTCDateTime, nullable=False, comment="When it was registered, by the database's clock, UTC"),
    Column("heartbeat_at", UTCDateTime, nullable=False, comment="When it last beat, by the database's clock, UTC"),
    PrimaryKeyConstraint("id"),
    comment="The processes that watch over active runs",
)

IS_PROBLEM = "phase IN ('failed', 'timeout', 'exhausted')"
"""The condition of a run that somebody has to look at. SQLite uses the index only for a query with this very text."""


def _index(name: str, *columns: ColumnElement[Any], dialects: Sequence[str], where: TextClause | None = None) -> None:
    index = Index(f"ix_task_runs_{name}", *columns, info={"dialects": dialects, "where": where})
    index.ddl_if(dialect=tuple(dialects))  # type: ignore[arg-type]  # several are documented, not typed


# Which readers these serve, what each costs, and why there are no others: docs/databases.md.
_PARTIAL, _FULL_ONLY = ("sqlite", "postgresql"), ("mysql", "mariadb")
_index("started", task_runs.c.started_at, dialects=(*_PARTIAL, *_FULL_ONLY))
_index("active", task_runs.c.started_at, where=text("finished_at IS NULL"), dialects=_PARTIAL)
_index("problems", task_runs.c.finished_at, where=text(IS_PROBLEM), dialects=_PARTIAL)
_index("problems_of_task", task_runs.c.task_id, task_runs.c.attempt, where=text(IS_PROBLEM), dialects=_PARTIAL)
_index("finished", task_runs.c.finished_at.desc(), task_runs.c.phase, dialects=_FULL_ONLY)


def complete(dialect: str) -> None:
    """Give the tables the options that only databases of this kind have, for whoever creates or compares them.

    Where an option is named, SQLAlchemy loads the dialect that it belongs to, and what just records starts without
    those of other databases.
    """
    if dialect in ("sqlite", "postgresql"):
        for index in task_runs.indexes:
            index.dialect_kwargs[f"{dialect}_where"] = index.info["where"]
    if dialect == "sqlite":
        for table in metadata.tables.values():
            table.dialect_kwargs["sqlite_with_rowid"] = False
    elif dialect in ("mysql", "mariadb"):
        for table in metadata.tables.values():
            # A server may default to latin1 and to a collation that knows no case.
            table.dialect_kwargs[f"{dialect}_charset"] = "utf8mb4"
            table.dialect_kwargs[f"{dialect}_collate"] = "utf8mb4_bin"


@event.listens_for(task_runs, "before_create")
@event.listens_for(supervisors, "before_create")
def _complete(_table: Table, connection: Connection, **_: object) -> None:
    complete(connection.dialect.name)


def _differs(  # Alembic's signature
    _context: object, _column: object, _metadata_column: object, found: str | None, _default: object, known: str | None
) -> bool | None:
    """Tell Alembic that MariaDB's 0 is the ``false`` it was given; None leaves the question to Alembic."""
    return False if (found, known) == ("0", "false") else None


def comparison(dialect: str) -> dict[str, Any]:
    """Return how Alembic compares a database of this kind with :data:`metadata`."""
    complete(dialect)

    def is_ours(name: str | None, kind: str, _parents: object) -> bool:
        # The database may be a host application's: the rest of it is none of our business.
        return kind != "table" or name in metadata.tables

    def belongs(item: SchemaItem, _name: object, kind: str, _reflected: object, _compared: object) -> bool:
        return kind != "index" or dialect in item.info.get("dialects", (dialect,))

    return {
        "target_metadata": metadata,
        "version_table": VERSION_TABLE,
        "include_name": is_ours,
        "include_object": belongs,
        "compare_server_default": _differs,
        "autogenerate_plugins": ["alembic.autogenerate.*", "alembic.ext.checkconstraint_byname"],
    }
