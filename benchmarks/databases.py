"""The databases that bench_recording.py measures: what is made in them, emptied between samples, and removed."""

import os
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL, create_engine, make_url, text

from taskruns import TaskRunHistory
from taskruns.url import parse_url

OURS = f"taskruns_recording_{os.getpid()}"
"""What the database on a server is called, so that two benchmarks do not meet; those beside it add to the name."""


@dataclass(frozen=True)
class Database:
    """A database with the tables of taskruns, all of it for the benchmark."""

    name: str
    url: str
    synchronous: str = "FULL"
    keeps_runs: bool = False

    @property
    def kind(self) -> str:
        return make_url(self.url).get_backend_name()

    @property
    def path(self) -> Path:
        """The file of an SQLite database."""
        return Path(str(make_url(self.url).database))

    @property
    def with_driver(self) -> URL:
        """The URL for an engine of SQLAlchemy's own."""
        return parse_url(make_url(self.url).set(query={}))

    def empty(self) -> None:
        """Make the tables as new, unless it is for what it holds."""
        if self.keeps_runs:
            return
        if self.kind == "sqlite":
            remove_file(self.path)
            shutil.copyfile(self.path.with_suffix(".empty"), self.path)
            return
        engine = create_engine(self.with_driver, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            for table in ("task_runs", "supervisors"):
                connection.execute(text(f"TRUNCATE TABLE {table}"))
        engine.dispose()

    def of_peer(self, peer: str, *, wal: bool = False) -> URL:
        """Return the URL of a new database for another library, on the same disk or server; it names no driver.

        An SQLite file has the journal that SQLite gives it by itself, unless it is to be ``wal``.
        """
        if self.kind == "sqlite":
            path = self.path.with_name(f"{peer}.db")
            remove_file(path)
            if wal:
                with closing(sqlite3.connect(path)) as connection:
                    connection.execute("PRAGMA journal_mode = WAL")
            return URL.create("sqlite", database=str(path))
        server = self.with_driver
        database = f"{OURS}_{peer}"
        execute(server, f"DROP DATABASE IF EXISTS {database}", f"CREATE DATABASE {database}")
        return server.set(drivername=self.kind, database=database)

    def drop(self) -> None:
        """Remove what a server keeps, also of the peers."""
        if self.kind == "sqlite":
            return
        server = self.with_driver
        engine = create_engine(server)
        known = "pg_database" if self.kind == "postgresql" else "information_schema.schemata"
        column = "datname" if self.kind == "postgresql" else "schema_name"
        with engine.connect() as connection:
            names = list(connection.scalars(text(f"SELECT {column} FROM {known}")))
        engine.dispose()
        home = server.set(database="postgres" if self.kind == "postgresql" else "")
        force = " WITH (FORCE)" if self.kind == "postgresql" else ""
        ours = [name for name in names if name == OURS or name.startswith(f"{OURS}_")]
        execute(home, *(f"DROP DATABASE {name}{force}" for name in ours))


def execute(server: URL, *statements: str) -> None:
    """Execute what cannot be part of a transaction."""
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


def remove_file(path: Path) -> None:
    """Remove an SQLite database."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def upgraded(url: str) -> str:
    """Make the tables of a database, and return its URL."""
    with TaskRunHistory.connect(url) as history:
        history.upgrade()
    return url


def sqlite_databases(folder: Path) -> list[Database]:
    """Return the file as taskruns opens it by itself, and without a sync at each commit."""
    path = folder / "runs.db"
    upgraded(f"sqlite:///{path.with_suffix('.empty')}")
    return [
        Database("SQLite FULL", f"sqlite:///{path}"),
        Database("SQLite NORMAL", f"sqlite:///{path}?synchronous=NORMAL", "NORMAL"),
    ]


def server_database(name: str, url: str) -> Database:
    """Return a new database on a server, made from any other one there."""
    server = make_url(url)
    execute(parse_url(server), f"CREATE DATABASE {OURS}")
    return Database(name, upgraded(server.set(database=OURS).render_as_string(hide_password=False)))
