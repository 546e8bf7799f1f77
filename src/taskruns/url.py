"""The URLs of databases: what is accepted, and how they are shown."""

import re
from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

DRIVERS = {"sqlite": "pysqlite", "postgresql": "psycopg", "mysql": "pymysql", "mariadb": "pymysql"}
ASYNC_DRIVERS = {"sqlite": "aiosqlite", "postgresql": "psycopg", "mysql": "aiomysql", "mariadb": "aiomysql"}
EXTRAS = {"postgresql": "postgres", "mysql": "mysql", "mariadb": "mysql"}

_BACKENDS = {**{name: name for name in DRIVERS}, "postgres": "postgresql"}


def parse_name(name: str) -> URL:
    """Return what a user names a database by: a URL, or the path of an SQLite file."""
    scheme = re.match(r"([a-z]+)(\+[a-z0-9]+)?:", name)
    if "://" in name or (scheme is not None and scheme[1] in _BACKENDS):
        return parse_url(name)
    if not name.strip():
        raise ValueError("the database URL is empty")
    return parse_url(URL.create("sqlite", database=str(Path(name).expanduser())))


def parse_url(url: str | URL, *, drivers: dict[str, str] = DRIVERS) -> URL:
    """Return the URL of a database with its driver named and, for SQLite, the file's path made absolute.

    Raises:
        ValueError: this is not the URL of a database that taskruns supports.
    """
    if isinstance(url, str) and "://" not in url:
        raise ValueError("a database is named by a URL, such as sqlite:///runs.db or postgresql://host/name")
    try:
        parsed = make_url(url)
        backend, _, driver = parsed.drivername.partition("+")
    except (ArgumentError, ValueError):  # neither message repeats the URL, which may hold a password
        raise ValueError(
            "the database URL is not valid: it has the form scheme://user:password@host:port/name"
        ) from None
    backend = _BACKENDS.get(backend, backend)
    if backend not in drivers:
        raise ValueError(f"{backend!r} is not a supported database; these are: {', '.join(drivers)}")
    if "@" in (parsed.host or ""):
        raise ValueError("the database URL has an @ in its password: write it as %40")
    if not driver or driver in {*DRIVERS.values(), *ASYNC_DRIVERS.values()}:
        driver = drivers[backend]
    parsed = parsed.set(drivername=f"{backend}+{driver}")
    if backend == "sqlite" and is_file(parsed):
        # A later change of the working directory must not change which file it is.
        parsed = parsed.set(database=str(Path(parsed.database or "").absolute()))
    return parsed


def with_sync_driver(url: URL) -> URL:
    """Return the URL with a driver that needs no event loop."""
    backend = url.get_backend_name()
    return url.set(drivername=f"{backend}+{DRIVERS[backend]}") if url.get_dialect().is_async else url


def is_file(url: URL) -> bool:
    """Whether this is an SQLite database in a plain file: neither in memory nor a ``file:`` URI."""
    name = url.database
    return (
        url.get_backend_name() == "sqlite" and bool(name) and name != ":memory:" and not str(name).startswith("file:")
    )


def is_in_memory(url: URL) -> bool:
    """Whether this is an SQLite database that is not kept on disk."""
    name = str(url.database or ":memory:")
    return url.get_backend_name() == "sqlite" and (":memory:" in name or url.query.get("mode") == "memory")


def hide_password(url: URL) -> str:
    """Return the URL as text without its password, wherever it stands in it."""
    secret = {key: "***" for key in url.query if re.search("pass|secret|token", key.lower())}
    return url.update_query_dict(secret).render_as_string(hide_password=True).replace("%2A%2A%2A", "***")
