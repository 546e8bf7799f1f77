"""The databases of the tests: on servers that are given or found, else on throw-away servers of their own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
from sqlalchemy import URL, Engine, create_engine, inspect, make_url, text
from sqlalchemy.exc import OperationalError

from taskruns import TaskRunHistory

KINDS = ("sqlite", "postgresql", "mariadb")

_GIVEN = {"postgresql": "TASKRUNS_TEST_POSTGRES", "mariadb": "TASKRUNS_TEST_MARIADB"}
_USUAL = {
    "postgresql": "postgresql+psycopg://postgres@127.0.0.1:5432/postgres",
    "mariadb": "mariadb+pymysql://root@127.0.0.1:3306/mysql",
}
_START_TIMEOUT = 60


class MissingServerError(Exception):
    """There is no server of this kind, nor the programs to start one."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


def as_user(user: str) -> dict[str, Any]:
    """Arguments of a subprocess: PostgreSQL and PgBouncer refuse to run as root."""
    is_root = sys.platform != "win32" and os.geteuid() == 0
    return {"user": user, "group": user, "extra_groups": []} if is_root else {}


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} within {_START_TIMEOUT} s")
        time.sleep(0.02)


@contextmanager
def own_directory(user: str) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="taskruns-test-"))
    try:
        if sys.platform != "win32" and os.geteuid() == 0:
            shutil.chown(directory, user)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _answers(url: URL) -> bool:
    engine = create_engine(url, connect_args={"connect_timeout": 3})
    try:
        with engine.connect():
            return True
    except OperationalError:
        return False
    finally:
        engine.dispose()


class OwnServer:
    """A throw-away server, which can be stopped, and started again with the same port and data."""

    def __init__(self, url: URL, command: Sequence[str | Path], stopped_by: signal.Signals, **options: Any) -> None:
        self.url = url
        self._command = command
        self._stopped_by = stopped_by
        self._options = options
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._launch()
        try:
            wait_for(self._is_up, f"{self._command[0]} did not answer")
        except TimeoutError:
            self.kill()
            raise

    def stop(self) -> None:
        """Have it cut all connections and end."""
        self._process.send_signal(self._stopped_by)
        self._process.wait(_START_TIMEOUT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    @contextmanager
    def down(self, *, killed: bool = False) -> Iterator[None]:
        """Have it stopped, or killed, for a while."""
        if killed:
            self.kill()
        else:
            self.stop()
        try:
            yield
        finally:
            self.start()

    def _launch(self) -> None:
        quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        self._process = subprocess.Popen(self._command, start_new_session=True, **quiet, **self._options)

    def _is_up(self) -> bool:
        if self._process.poll() is not None:
            self._launch()  # what was left of a killed one was in the way
        return _answers(self.url)


@contextmanager
def _own_postgresql() -> Iterator[OwnServer]:
    root = Path("/")
    places = ["usr/lib/postgresql/*/bin", "opt/homebrew/opt/postgresql*/bin"]
    directories = [str(directory) for place in places for directory in root.glob(place)]
    initdb = shutil.which("initdb", path=os.pathsep.join([*sorted(directories, reverse=True), os.environ["PATH"]]))
    if initdb is None:
        raise MissingServerError(f"no PostgreSQL at 127.0.0.1:5432, no {_GIVEN['postgresql']}, no initdb")
    url = make_url(_USUAL["postgresql"]).set(port=free_port())
    with own_directory("postgres") as directory:
        data = directory / "data"
        options: dict[str, Any] = {"cwd": directory, **as_user("postgres")}
        form = ["-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C"]
        subprocess.run([initdb, "-D", str(data), *form, "--no-sync"], check=True, stdout=subprocess.DEVNULL, **options)
        settings = ["listen_addresses=127.0.0.1", f"unix_socket_directories={directory}", "fsync=off"]
        given = [argument for setting in settings for argument in ("-c", setting)]
        program = Path(initdb).resolve().with_name("postgres")
        server = OwnServer(url, [program, "-D", data, "-p", str(url.port), *given], signal.SIGQUIT, **options)
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def _own_mariadb() -> Iterator[OwnServer]:
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])
    install, program = shutil.which("mariadb-install-db", path=path), shutil.which("mariadbd", path=path)
    if install is None or program is None:
        raise MissingServerError(f"no MariaDB at 127.0.0.1:3306, no {_GIVEN['mariadb']}, no mariadbd")
    url = make_url(_USUAL["mariadb"]).set(port=free_port())
    user = ["--user=root"] if os.geteuid() == 0 else []
    with own_directory("root") as directory:
        place = ["--no-defaults", *user, f"--datadir={directory / 'data'}", "--skip-name-resolve"]
        subprocess.run(
            [install, *place, "--auth-root-authentication-method=normal", "--skip-test-db"],
            check=True,
            capture_output=True,
        )
        command = [
            program,
            *place,
            f"--socket={directory / 'sock'}",
            f"--pid-file={directory / 'pid'}",
            f"--port={url.port}",
            "--bind-address=127.0.0.1",
            "--innodb-flush-log-at-trx-commit=2",  # outlives the process, as a commit has to
            "--skip-log-bin",
        ]
        server = OwnServer(url, command, signal.SIGTERM)
        try:
            yield server
        finally:
            server.kill()


OWN: dict[str, Callable[[], AbstractContextManager[OwnServer]]] = {
    "postgresql": _own_postgresql,
    "mariadb": _own_mariadb,
}


@contextmanager
def _server(kind: str) -> Iterator[URL]:
    given = os.environ.get(_GIVEN[kind])
    if given is not None:
        url = make_url(given)
        if not _answers(url):
            raise MissingServerError(f"no server answers at {_GIVEN[kind]}")
        yield url
    elif _answers(make_url(_USUAL[kind])):
        yield make_url(_USUAL[kind])
    else:
        with OWN[kind]() as server:
            yield server.url


class Databases:
    """What one process of pytest has: its own databases, of every kind."""

    def __init__(self, name: str, directory: Path) -> None:
        self._name = name
        self._directory = directory
        self._stack = ExitStack()
        self._missing: dict[str, MissingServerError] = {}
        self._admins: dict[str, Engine] = {}
        self._migrated: dict[str, str] = {}
        self._owners: dict[str, Engine] = {}
        self._lent: list[tuple[str, str]] = []
        self._free: dict[str, list[str]] = {"postgresql": [], "mariadb": []}
        self._count = 0

    def close(self) -> None:
        self._stack.close()

    def server(self, kind: str) -> Engine:
        """An engine on the server of this kind, each statement committed by itself."""
        if kind in self._missing:
            raise self._missing[kind]
        if kind not in self._admins:
            try:
                url = self._stack.enter_context(_server(kind))
            except MissingServerError as error:
                self._missing[kind] = error
                raise
            self._admins[kind] = create_engine(url, isolation_level="AUTOCOMMIT")
            self._stack.callback(self._admins[kind].dispose)
        return self._admins[kind]

    def empty(self, kind: str) -> str:
        """A database without tables, for one test."""
        if kind == "sqlite":
            return self._new(kind)
        url = self._free[kind].pop() if self._free[kind] else self._new(kind)
        self._lent.append((kind, url))
        return url

    def reclaim(self) -> None:
        """Empty what was lent, since making and dropping a database takes a server far longer."""
        while self._lent:
            kind, url = self._lent.pop()
            engine = create_engine(url, isolation_level="AUTOCOMMIT")
            with engine.connect() as connection:
                for name in inspect(connection).get_table_names():
                    connection.execute(text(f"DROP TABLE {name}"))
            engine.dispose()
            self._free[kind].append(url)

    def _new(self, kind: str) -> str:
        self._count += 1
        name = f"{self._name}_{self._count}"
        if kind == "sqlite":
            return f"sqlite:///{self._directory / name}.db"
        server = self.server(kind)
        options = " CHARACTER SET latin1" if kind == "mariadb" else ""  # the tables must not lean on a good default
        with server.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}{options}"))
        self._stack.callback(self._drop, server, name)
        return server.url.set(database=name).render_as_string(hide_password=False)

    def migrated(self, kind: str) -> str:
        """A database with the tables, which are empty: on a server the same one for every test."""
        if kind not in self._migrated:
            url = self._new(kind)
            with TaskRunHistory.connect(url) as history:
                history.upgrade()
            self._migrated[kind] = url
            if kind != "sqlite":
                # Some tests cut all connections, this one too.
                self._owners[kind] = create_engine(url, isolation_level="AUTOCOMMIT", pool_pre_ping=True)
                self._stack.callback(self._owners[kind].dispose)
        if kind == "sqlite":
            template = str(make_url(self._migrated[kind]).database)
            self._count += 1
            copy = self._directory / f"{self._name}_{self._count}.db"
            shutil.copy(template, copy)
            return f"sqlite:///{copy}"
        with self._owners[kind].connect() as connection:
            for table in ("task_runs", "supervisors"):
                connection.execute(text(f"DELETE FROM {table}"))
        return self._migrated[kind]

    @staticmethod
    def _drop(server: Engine, name: str) -> None:
        force = " WITH (FORCE)" if server.dialect.name == "postgresql" else ""
        with server.connect() as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS {name}{force}"))


def missing(reason: str) -> NoReturn:
    """Whatever is needed and not there: silence would look like success."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def available(kind: str, databases: Databases) -> str:
    """Return the kind if there is a server of it."""
    if kind != "sqlite":
        try:
            databases.server(kind)
        except MissingServerError as error:
            missing(str(error))
    return kind
