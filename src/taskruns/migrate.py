"""The tables' versions: Alembic without an ini file, from the wheel as from the repository."""

import threading
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from sqlalchemy import URL, Connection, Engine, Select, column, inspect, select, table
from sqlalchemy.exc import OperationalError, ProgrammingError

from taskruns.errors import SchemaVersionError
from taskruns.schema import SCHEMA_VERSION, VERSION_TABLE, comparison, metadata

if TYPE_CHECKING:
    from alembic.config import Config

lock = threading.Lock()
"""Alembic's context is global to the process: two migrations at once, even of two databases, break each other."""

_CURRENT: Select[Any] = select(column("version_num")).select_from(table(VERSION_TABLE))


def upgrade(engine: Engine) -> None:
    """Create the tables, or bring them to this version. Many may do so at once; a newer database is left as it is."""
    with lock, engine.connect() as connection:
        upgrade_connection(connection)


def upgrade_connection(connection: Connection) -> None:
    """Upgrade through an open connection that is in no transaction. The caller holds :data:`lock`."""
    from alembic import command  # noqa: PLC0415  (only here: a process that just records starts without Alembic)

    found = current(connection)
    if suits(found):
        return
    if found is not None and _numbers(found)[0] != _numbers(SCHEMA_VERSION)[0]:
        raise SchemaVersionError(found, SCHEMA_VERSION)
    connection.commit()
    command.upgrade(_config(connection=connection), "head")


def current(connection: Connection) -> str | None:
    """Return the version of the database's tables; None if it has none."""
    version: str | None
    try:
        version = connection.execute(_CURRENT).scalar()
    except (OperationalError, ProgrammingError):
        connection.rollback()
        if not inspect(connection).has_table(VERSION_TABLE):
            return None
        # Another process has just made it; or the error is another one, and comes again.
        version = connection.execute(_CURRENT).scalar()
    return version


def suits(found: str | None) -> bool:
    """Whether this code works with tables of version ``found``: the same major, and not older than it needs."""
    if found is None:
        return False
    (major, number), (needed_major, needed_number) = _numbers(found), _numbers(SCHEMA_VERSION)
    return major == needed_major and number >= needed_number


def _numbers(version: str) -> tuple[int, int]:
    major, _, number = version.partition("_")
    return (int(major), int(number)) if major.isdecimal() and number.isdecimal() else (-1, -1)


def require(connection: Connection) -> None:
    """Check that the database's tables suit this code, by one query.

    Raises:
        SchemaVersionError: they are missing, too old, or of another major version.
    """
    found = current(connection)
    if not suits(found):
        raise SchemaVersionError(found, SCHEMA_VERSION)


def check(connection: Connection) -> list[str]:
    """Return how the database's tables differ from those this code knows: one line each, none if they agree.

    What only a newer version has is no difference: within a major, migrations only add.
    """
    from alembic.autogenerate import compare_metadata  # noqa: PLC0415  (as above)
    from alembic.runtime.migration import MigrationContext  # noqa: PLC0415  (as above)

    context = MigrationContext.configure(connection, opts=comparison(connection.dialect.name))
    differences = compare_metadata(context, metadata)
    found = current(connection)
    newer = found is not None and suits(found) and found != SCHEMA_VERSION
    flat = (change for entry in differences for change in (entry if isinstance(entry, list) else [entry]))
    return [_line(change) for change in flat if not (newer and change[0].startswith("remove_"))]


def _line(change: tuple[Any, ...]) -> str:
    what, *details = change
    names = [str(getattr(detail, "name", detail)) for detail in details if not isinstance(detail, dict)]
    return f"{what.replace('_', ' ')}: {' '.join(name for name in names if name != 'None')}"


def sql(url: URL) -> str:
    """Return the DDL that builds the tables in an empty database of this kind. No database is touched."""
    from alembic import command  # noqa: PLC0415  (as above)

    script = StringIO()
    with lock:
        command.upgrade(_config(output=script, url=url.render_as_string(hide_password=False)), "head", sql=True)
    return script.getvalue()


def _config(output: TextIO | None = None, **attributes: Any) -> "Config":
    from alembic.config import Config  # noqa: PLC0415  (as above)

    config = Config(output_buffer=output, attributes=attributes)
    config.set_main_option("script_location", str(_migrations()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _migrations() -> Path:
    packaged = Path(str(files("taskruns"))) / "migrations"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "migrations"
