"""How Alembic meets the database: as `alembic` from the repository, or through `taskruns.migrate` from the wheel."""

import os
from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy import Connection, func, select

from taskruns import engine, schema
from taskruns.url import parse_name

LOCK_KEY = 0x7461736B72756E73  # "taskruns"
LOCK_NAME = "taskruns migrate"
LOCK_TIMEOUT = 300  # seconds; another host may be building an index on a large table

config = context.config


def render_item(type_: str, obj: Any, _autogen: AutogenContext) -> str | Literal[False]:
    """Let revisions spell a type out, since they outlive the class that it has today."""
    if type_ == "type" and isinstance(obj, schema.UTCDateTime):
        return "sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), 'mysql', 'mariadb')"
    if type_ == "type" and isinstance(obj, schema.LongText):
        return "sa.Text().with_variant(mysql.MEDIUMTEXT(), 'mysql', 'mariadb')"
    return False


def migrate(connection: Connection) -> None:
    """Run the migrations while no other process does: without a lock concurrent ones fail on every database.

    On PostgreSQL and SQLite they are one transaction. MariaDB commits each DDL statement by itself.
    """
    backend = connection.dialect.name
    if backend != "sqlite":
        connection.execution_options(isolation_level="READ COMMITTED")
    if backend in ("mysql", "mariadb"):
        with connection.begin():
            connection.exec_driver_sql(f"SET SESSION lock_wait_timeout = {LOCK_TIMEOUT}")
            if connection.scalar(select(func.get_lock(LOCK_NAME, LOCK_TIMEOUT))) != 1:
                raise TimeoutError(f"another migration has been running for more than {LOCK_TIMEOUT} s")
    sqlite = connection.connection.dbapi_connection if backend == "sqlite" else None
    try:
        with connection.begin():
            if sqlite is not None:
                # The driver's own transactions begin late, and not before DDL. Ours begin nothing by themselves.
                isolation_level, sqlite.isolation_level = sqlite.isolation_level, None
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            if backend == "postgresql":
                # Of the transaction, not of the session: so it works behind PgBouncer too.
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}s'")
                connection.execute(select(func.pg_advisory_xact_lock(LOCK_KEY)))
            context.configure(
                connection=connection,
                render_as_batch=backend == "sqlite",
                render_item=render_item,
                **schema.comparison(backend),
            )
            context.run_migrations()
    finally:
        if sqlite is not None:
            sqlite.isolation_level = isolation_level
        if backend in ("mysql", "mariadb"):
            with connection.begin():
                connection.scalar(select(func.release_lock(LOCK_NAME)))


def url() -> str:
    """Return the database that is meant when no connection is given."""
    return (
        config.attributes.get("url") or os.environ.get("TASKRUNS_DB") or config.get_main_option("sqlalchemy.url") or ""
    )


if context.is_offline_mode():
    parsed = parse_name(url())
    context.configure(
        url=parsed,
        literal_binds=True,
        dialect_opts={"paramstyle": "named"},
        **schema.comparison(parsed.get_backend_name()),
    )
    with context.begin_transaction():
        context.run_migrations()
elif "connection" in config.attributes:
    migrate(config.attributes["connection"])
else:
    own = engine.create(parse_name(url()))
    with own.connect() as connection:
        migrate(connection)
    own.dispose()
