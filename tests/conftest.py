"""What the tests share: databases, and one history fixture for every database, sync and async."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from histories import Histories
from hypothesis import HealthCheck, settings
from servers import KINDS, Databases, available

from taskruns import TaskRunHistory, supervision

settings.register_profile(
    "taskruns",
    deadline=None,  # a shared machine pauses now and then
    derandomize=os.environ.get("CI") == "true",
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("taskruns")


@pytest.fixture(scope="session")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    found = Databases(f"taskruns_test_{worker}_{os.getpid()}", tmp_path_factory.mktemp("databases"))
    yield found
    found.close()


@pytest.fixture(autouse=True)
def reclaimed(databases: Databases) -> Iterator[None]:
    """Have databases that a test has borrowed emptied for the next one."""
    yield
    supervision._be_born()  # or who has left a run active would go on beating, in the database of another test
    databases.reclaim()


@pytest.fixture(autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the processes of a test keep what they could not write: nowhere else."""
    path = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("TASKRUNS_STATE_DIR", str(path))
    return path


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, databases: Databases) -> str:
    """A kind of database."""
    return available(str(request.param), databases)


@pytest.fixture
def database(kind: str, databases: Databases) -> str:
    """The URL of a database with empty tables, of each kind."""
    return databases.migrated(kind)


@pytest.fixture
def empty_database(kind: str, databases: Databases) -> str:
    """The URL of a new database without tables, of each kind."""
    return databases.empty(kind)


@pytest.fixture
def postgresql(databases: Databases) -> str:
    """The URL of a PostgreSQL database with empty tables."""
    return databases.migrated(available("postgresql", databases))


@pytest.fixture
def mariadb(databases: Databases) -> str:
    """The URL of a MariaDB database with empty tables."""
    return databases.migrated(available("mariadb", databases))


@pytest.fixture
def sqlite(databases: Databases) -> str:
    """The URL of an SQLite database with empty tables."""
    return databases.migrated("sqlite")


@pytest.fixture(params=["sync", "async"])
def histories(request: pytest.FixtureRequest) -> Iterator[Histories]:
    """Connects histories, sync and async."""
    if request.param == "sync":
        found = Histories(None)
        yield found
        found.close()
        return
    with asyncio.Runner() as runner:
        found = Histories(runner)
        yield found
        found.close()


@pytest.fixture
def history(database: str, histories: Histories) -> TaskRunHistory:
    """An empty history on every database, sync and async."""
    return histories.connect(database, source="here")


@pytest.fixture
def repository_root() -> Path:
    return Path(__file__).parents[1]
