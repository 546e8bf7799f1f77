"""``taskruns doctor``: what is configured, whether it works, and what to do where it does not."""

import os
import platform
import queue
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from taskruns import engine, migrate, recovery, spool, statements
from taskruns.cli import advice
from taskruns.cli.discovery import DEFAULT, Database, db_option, places
from taskruns.cli.finding import Finding, Findings
from taskruns.cli.options import json_option
from taskruns.cli.storage import existing, file, place, size
from taskruns.liveness import Process
from taskruns.repository import TaskRunRepository
from taskruns.retrying import cause_of
from taskruns.schema import SCHEMA_VERSION
from taskruns.times import rfc3339
from taskruns.url import is_file

PATIENCE = engine.CONNECT_TIMEOUT + 1.0
"""Seconds without a finding after which whatever is asked counts as hanging; a driver that gives up says more."""

UNPRUNED = timedelta(days=400)
"""The age of a run that nothing seems to prune."""

LONG = timedelta(days=1)
"""The time for which a run may be active without a remark."""

MANY_TASKS = 100
"""Tasks are counted up to here."""

MUCH_FREE = 16 * 1024 * 1024
"""Bytes of free pages in an SQLite file from which they are worth a remark, if they are half of it."""


@click.command("doctor", short_help="Say what is configured, and whether it works.")
@click.option("--cron", is_flag=True, help="Look from where cron stands, and print a crontab line that works.")
@json_option
@db_option
def doctor_command(cron: bool, as_json: bool) -> int:
    """Say what is configured, whether it works, and what to do where it does not.

    The exit status is 1 if there is a problem. Nothing is changed.
    """
    option = click.get_current_context().find_root().obj
    if cron and sys.platform == "win32":
        raise click.UsageError("--cron needs Linux or macOS")
    if cron:
        from taskruns.cli import crontab  # noqa: PLC0415  (there is none on Windows)

        findings = crontab.examine(option)
    else:
        findings = bounded(examine(option))
    status = 0
    for finding in findings:
        if finding.check == "crontab" and not as_json:
            click.echo(f"\n{finding.message}")
        elif as_json:
            finding.print_json()
        else:
            finding.print()
        status |= finding.status == "problem"
    return status


def bounded(findings: Findings) -> Findings:
    """Yield the findings as long as they come: a server, or a file system, may hang whoever asks it."""
    heard: queue.SimpleQueue[Finding | BaseException | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            for finding in findings:
                heard.put(finding)
        except BaseException as error:  # noqa: BLE001  (raised by whoever waits)
            heard.put(error)
        heard.put(None)

    threading.Thread(target=ask, name="taskruns-doctor", daemon=True).start()
    while True:
        try:
            found = heard.get(timeout=PATIENCE)
        except queue.Empty:
            message = f"no answer within {PATIENCE:.0f} s"
            yield Finding("reachable", "problem", message, "see whether the server, or the disk of the file, hangs")
            return
        if found is None:
            return
        if isinstance(found, BaseException):
            raise found
        yield found


def examine(option: str | None) -> Findings:
    """Look at everything, from what is near to what may be far."""
    yield from program()
    found: list[Database] = []
    yield from configuration(option, found)
    yield from state_directory()
    if found:
        for check in OF_DATABASE:
            yield from _unbroken(check, found[0])


def _unbroken(check: Callable[[Database], Iterable[Finding]], database: Database) -> Findings:
    """Turn what goes wrong in a check into a problem; what is a fault of this program stays an error."""
    name = check.__name__.removeprefix("sqlite_")
    try:
        yield from check(database)
    except click.ClickException as error:
        yield Finding(name, "problem", error.format_message(), "correct it")
    except Exception as error:
        if (line := advice(error)) is None:
            raise
        yield Finding(name, "problem", line)


def program() -> Findings:
    """Say what is running."""
    python = f"Python {platform.python_version()}"
    yield Finding("taskruns", "ok", f"{version('taskruns')}, {python}, {platform.platform(terse=True)}")


def configuration(option: str | None, found: list[Database]) -> Findings:
    """Say which database is meant, put it into ``found``, and what else is named without being used."""
    winner = ""
    try:
        for by, ask in places(option):
            try:
                named = ask()
                database = None if named is None else Database.named(named, by)
            except click.ClickException as error:
                message = error.format_message()
                if winner:
                    yield Finding("configuration", "note", f"{message}, but {winner} comes first")
                else:
                    yield Finding("configuration", "problem", message, "correct or remove it")
                winner = winner or by
                continue
            if database is None:
                continue
            if not winner:
                winner = by
                found.append(database)
                yield Finding("database", "ok", f"{database} ({by})")
            else:
                yield Finding("configuration", "note", f"{by} names {database}, but {winner} comes first")
    except click.ClickException as error:  # no home directory
        if not winner:
            yield Finding("configuration", "problem", error.format_message())
        return
    yield from _default(winner, found)


def _default(winner: str, found: list[Database]) -> Findings:
    """Say what is used where nothing is named, or that it is there and not used."""
    try:
        default = Database.default()
    except click.ClickException as error:  # its retention cannot be read
        if not winner:
            yield Finding("configuration", "problem", error.format_message(), "correct or remove it")
        return
    if not winner:
        found.append(default)
        yield Finding("database", "ok", f"{default} (the default)")
    elif not (found and found[0].url == default.url) and os.path.exists(str(default.url.database)):  # noqa: PTH110  (as in existing())
        yield Finding("configuration", "note", f"the default, {default}, exists, but {winner} comes first")


def state_directory() -> Findings:
    """Say whether this user may keep what cannot be written into the database."""
    try:
        path = spool.directory()
    except OSError as error:  # no home directory
        yield Finding("state", "problem", str(error.strerror), "name a directory by TASKRUNS_STATE_DIR")
        return
    nearest = existing(path)
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        yield Finding("state", "ok", f"{path} is writable" if nearest == path else f"{path} can be made")
    else:
        yield Finding("state", "problem", f"{nearest} is not a writable directory", "name one by TASKRUNS_STATE_DIR")


def spooled(database: Database) -> Findings:
    """Say what is kept until a database can be used again."""
    kept = spool.waiting(database.url)
    if kept:
        events = sum(some.events for some in kept)
        message = f"{events} event{'s' * (events != 1)} not in the database yet, since {_moment(kept[0].oldest)}"
        if all(some.is_alive for some in kept):
            yield Finding("spool", "note", f"{message}, of processes that are still at it")
        else:
            yield Finding("spool", "problem", message, "run `taskruns replay`, once the database can be used")
    for name in sorted({some.database for some in spool.waiting()} - {some.database for some in kept}):
        message = f"something is kept for another database: {name}"
        yield Finding("spool", "note", message, "run `taskruns --db URL replay` with the URL that it has now")
    if rejected := spool.rejected(database.url):
        message = f"lines that could not be replayed are in {rejected[0]}"
        yield Finding("spool", "problem", message, "look at them, and remove the file")


def self_pruning(database: Database) -> Findings:
    """Say what a database deletes by itself."""
    if database.retention is not None:
        yield Finding("retention", "ok", f"what is old is deleted by itself: {database.retention}")
    elif database.named_by == DEFAULT:
        message = "this database grows without end, as its retention is off"
        yield Finding("retention", "note", message, "run `taskruns prune` now and then")


def sqlite_file(database: Database) -> Findings:
    """Look at the file of an SQLite database, as the system sees it."""
    if is_file(database.url):
        path = Path(str(database.url.database))
        yield from place(path)
        yield from file(path)
    elif database.url.get_backend_name() == "sqlite" and "file:" not in str(database.url.database):
        yield Finding(
            "file", "problem", "a database in memory ends with the process that writes it", "name a file or a server"
        )


def sqlite_library(database: Database) -> Findings:
    """Look at the SQLite that Python has."""
    if database.url.get_backend_name() != "sqlite":
        return
    if has_wal_reset_bug(sqlite3.sqlite_version_info):
        yield Finding(
            "sqlite",
            "note",
            f"SQLite {sqlite3.sqlite_version}: versions before 3.51.3 have the WAL-reset bug, a race of a checkpoint "
            "with a writer which, very rarely, damages a database (unless whoever built it put the correction in)",
            "use SQLite 3.51.3 or newer when your system offers it, and keep backups until then",
        )
    else:
        yield Finding("sqlite", "ok", f"SQLite {sqlite3.sqlite_version}")


def has_wal_reset_bug(library: tuple[int, ...]) -> bool:
    """Whether an SQLite of this version has the WAL-reset bug: corrected in 3.51.3, and for two older lines."""
    return library < (3, 51, 3) and not any(
        corrected <= library < (3, corrected[1] + 1) for corrected in ((3, 44, 6), (3, 50, 7))
    )


def reachable(database: Database) -> Findings:
    """Connect, and look into the database."""
    backend = database.url.get_backend_name()
    with database.options_checked():
        try:
            own = engine.create(database.url, read_only=True, lock_timeout=engine.CONNECT_TIMEOUT / 2)
        except ModuleNotFoundError as error:
            yield Finding("driver", "problem", *str(error).split(": ", 1))
            return
    driver: Any = own.dialect.dbapi
    if backend != "sqlite":
        yield Finding("driver", "ok", f"{driver.__name__} {driver.__version__}")
    if is_file(database.url) and not os.path.isfile(str(database.url.database)):  # noqa: PTH113  (as in existing())
        return  # which has been said
    try:
        with database.options_checked():
            connection = own.connect()
        with connection:
            if backend != "sqlite":
                yield Finding("reachable", "ok", _server(connection))
            for check in OF_CONTENTS:
                yield from check(connection)
    except SQLAlchemyError as error:
        yield Finding("reachable", "problem", cause_of(error), _remedy(backend))
    finally:
        own.dispose()


def _server(connection: Connection) -> str:
    dialect: Any = connection.dialect
    name = "PostgreSQL" if dialect.name == "postgresql" else "MariaDB" if dialect.is_mariadb else "MySQL"
    return f"{name} {'.'.join(map(str, dialect.server_version_info))}"


def _remedy(backend: str) -> str:
    if backend == "sqlite":
        return "see whether the file is an SQLite database and nobody locks it; if it is damaged, restore a backup"
    return "see whether the server runs, and correct host, port, name, user or password in the URL"


def tables(connection: Connection) -> Findings:
    """Say whether the tables are there, of a version that suits, and as it makes them."""
    found = migrate.current(connection)
    by_itself = connection.dialect.name == "sqlite"
    if not migrate.suits(found):
        if found is not None and found.split("_")[0] != SCHEMA_VERSION.split("_")[0]:
            message = f"the tables have version {found}, this taskruns needs {SCHEMA_VERSION}"
            yield Finding("tables", "problem", message, "install a taskruns of the same major version")
            return
        message = "there are no tables" if found is None else f"the tables are of version {found}, too old"
        if by_itself:
            yield Finding("tables", "note", message, "the next command that records a run, or `taskruns db upgrade`")
        else:
            yield Finding("tables", "problem", message, "run `taskruns db upgrade`, as the owner of the database")
        return
    newer = "" if found == SCHEMA_VERSION else f", newer than this taskruns needs ({SCHEMA_VERSION})"
    yield Finding("tables", "ok", f"version {found}{newer}")
    if differences := migrate.check(connection):
        more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
        message = f"the tables differ from those of their version: {differences[0]}{more}"
        yield Finding("tables", "note", message, "see `taskruns db check`")


def runs(connection: Connection) -> Findings:
    """Say what is active, how much there is, and whether it is ever pruned."""
    if not migrate.suits(migrate.current(connection)):
        return
    count, since = connection.execute(statements.active_count()).one()
    if count:
        message = f"{count} {'run is' if count == 1 else 'runs are'} active, the oldest since {_moment(since)}"
        late = datetime.now(UTC) - since > LONG
        advised = "see `taskruns active` whether they still run" if late else None
        yield Finding("active", "note" if late else "ok", message, advised)
    else:
        yield Finding("active", "ok", "no run is active")
    oldest = connection.execute(statements.oldest_runs(limit=100)).all()
    if not oldest:
        yield Finding("runs", "ok", "no runs yet")
        return
    tasks = len(TaskRunRepository(connection).tasks(limit=MANY_TASKS + 1))
    many = f"more than {MANY_TASKS} tasks" if tasks > MANY_TASKS else f"{tasks} task{'s' * (tasks != 1)}"
    yield Finding("runs", "ok", f"runs of {many}, the oldest of {_moment(oldest[0].started_at)}")
    finished = next((run.finished_at for run in oldest if run.finished_at is not None), None)
    if finished is not None and datetime.now(UTC) - finished > UNPRUNED:
        message = f"nothing prunes this database: it has runs that finished in {finished:%B %Y}"
        yield Finding("pruning", "note", message, "`taskruns prune` deletes what is old")


def watchers(connection: Connection) -> Findings:
    """Say whether runs are active whose process is gone."""
    if not migrate.suits(migrate.current(connection)):
        return
    here = Process.here()
    stale = [known for known in recovery.supervisors(connection) if known.active_runs and known.is_dead(here)]
    if stale:
        count = sum(known.active_runs for known in stale)
        message = f"{count} {'run is' if count == 1 else 'runs are'} active whose process is gone: {stale[0].process}"
        yield Finding("supervisors", "problem", message, "run `taskruns recover`")


def _moment(moment: datetime) -> str:
    return rfc3339(moment.replace(microsecond=0)).replace(".000000", "")


def sqlite_pages(connection: Connection) -> Findings:
    """Say how large an SQLite file is, and in which mode it is written."""
    if connection.dialect.name != "sqlite":
        return
    pages, free, of, mode = (
        connection.exec_driver_sql(f"PRAGMA {name}").scalar()
        for name in ("page_count", "freelist_count", "page_size", "journal_mode")
    )
    assert isinstance(pages, int)  # noqa: S101  (for mypy)
    assert isinstance(free, int)  # noqa: S101  (as above)
    assert isinstance(of, int)  # noqa: S101  (as above)
    much = free * of > MUCH_FREE and free * 2 > pages
    message = f"{size(pages * of)}, {size(free * of)} of them free"
    yield Finding(
        "size", "note" if much else "ok", message, "`taskruns prune --compact` gives them back" if much else None
    )
    path = connection.exec_driver_sql("PRAGMA database_list").one()[2]
    # A reader who may not write is told of another mode than the file's, see engine.py.
    is_told = os.access(path, os.W_OK) and os.access(os.path.dirname(path), os.W_OK)  # noqa: PTH120  (may be empty)
    if mode not in ("wal", "memory") and pages and is_told:
        yield Finding("journal", "note", f"the journal mode is {mode}, not wal: the next writer changes that")


OF_DATABASE: Sequence[Callable[[Database], Iterable[Finding]]] = (
    sqlite_file,
    sqlite_library,
    self_pruning,
    spooled,
    reachable,
)
"""Checks of a database that need no connection, and the one that connects."""

OF_CONTENTS: Sequence[Callable[[Connection], Iterable[Finding]]] = (sqlite_pages, tables, runs, watchers)
"""Checks of what is in the database."""
