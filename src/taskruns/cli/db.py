"""``taskruns db``."""

from collections.abc import Iterator
from contextlib import contextmanager

import click
from sqlalchemy import Connection

from taskruns import engine, migrate
from taskruns.cli import complain
from taskruns.cli.discovery import database, db_option
from taskruns.errors import SchemaVersionError
from taskruns.history import TaskRunHistory
from taskruns.schema import SCHEMA_VERSION


@click.group("db")
@db_option
def db_command() -> None:
    """Look after the database."""


@db_command.command("upgrade", short_help="Create the tables, or bring them up to date.")
@click.option("--sql", is_flag=True, help="Print the DDL for an empty database of this kind instead of running it.")
@db_option
def upgrade(sql: bool) -> None:
    """Create the tables, or bring them to the version of this taskruns."""
    found = database()
    if sql:
        click.echo(migrate.sql(found.url), nl=False)
        return
    with TaskRunHistory.connect(found.url) as history:
        history.upgrade()
    complain(f"{found} is at version {SCHEMA_VERSION} or newer")


@db_command.command("current")
@db_option
def current() -> int:
    """Print the version of the database's tables."""
    with _reading() as connection:
        version = migrate.current(connection)
    if version is None:
        complain("the database has no taskruns tables: run `taskruns db upgrade`")
        return 1
    click.echo(version)
    return 0


@db_command.command("check", short_help="Check the version of the tables, and their structure.")
@db_option
def check() -> int:
    """Check that the tables are of a version that suits, and are what that version makes them."""
    with _reading() as connection:
        try:
            migrate.require(connection)
        except SchemaVersionError as error:
            complain(str(error))
            return 1
        version = migrate.current(connection)
        differences = migrate.check(connection)
    for difference in differences:
        click.echo(difference)
    if differences:
        complain(f"the tables differ from those of version {version}")
        return 1
    click.echo(f"version {version}, no difference")
    return 0


@db_command.command("where")
@db_option
def where() -> None:
    """Print the database in use, and what names it. Passwords are hidden."""
    found = database()
    click.echo(f"{found} ({found.named_by})")


@contextmanager
def _reading() -> Iterator[Connection]:
    found = database()
    found.require()
    with found.options_checked():
        own = engine.create(found.url, read_only=True)
        connection = own.connect()
    try:
        with connection:
            yield connection
    finally:
        own.dispose()
