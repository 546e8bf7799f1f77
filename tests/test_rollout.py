"""Other versions of the tables, and other tables, in the database that this code works with."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, Engine, Integer, MetaData, String, Table, create_engine, inspect, text

from taskruns import RunClosedError, SchemaVersionError, TaskPhase, TaskRunHistory, TaskRunRepository, engine, migrate
from taskruns.schema import SCHEMA_VERSION, VERSION_TABLE

LATER = """
import sqlalchemy as sa
from alembic import op

revision = "1_9999"
down_revision = "{head}"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("task_runs", sa.Column("flavour", sa.String(20)))
    op.create_table("flavours", sa.Column("id", sa.Integer, primary_key=True))
    op.create_index("ix_task_runs_flavour", "task_runs", ["flavour"])


def downgrade() -> None:
    raise NotImplementedError
"""


@pytest.fixture
def own(empty_database: str) -> Iterator[Engine]:
    made = engine.create(empty_database)
    yield made
    made.dispose()


@pytest.fixture
def later(own: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A database that a later version of taskruns has upgraded."""
    copy = tmp_path / "migrations"
    shutil.copytree(migrate._migrations(), copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "versions" / "1_9999_later.py").write_text(LATER.format(head=SCHEMA_VERSION), encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(migrate, "_migrations", lambda: copy)
        migrate.upgrade(own)
    with own.connect() as connection:
        assert migrate.current(connection) == "1_9999"
        assert "flavour" in {column["name"] for column in inspect(connection).get_columns("task_runs")}
        assert inspect(connection).has_table("flavours")
    return own


def test_this_code_goes_on_with_a_later_database(later: Engine, empty_database: str) -> None:
    with TaskRunHistory.connect(empty_database, source="here") as history:
        history.open_run("job")
        closed = history.close_run("job", 1, TaskPhase.FAILED, error="boom")
        history.close_run("job", 1, TaskPhase.EXHAUSTED)
        assert history.get_run("job", 1) == closed.finish(
            TaskPhase.EXHAUSTED, error="boom", finished_at=closed.finished_at
        )
        with history.record("job"), history.begin(lock="job") as runs:
            assert [run.attempt for run in runs.active_runs()] == [2]
        assert [run.attempt for run in history.iter_runs("job")] == [2, 1]
        assert [run.phase for run in history.tasks()] == ["succeeded"]


def test_upgrade_leaves_a_later_database_as_it_is(later: Engine) -> None:
    migrate.upgrade(later)
    with later.connect() as connection:
        assert migrate.current(connection) == "1_9999"
        assert migrate.check(connection) == []


def test_check_still_sees_what_a_later_database_lacks(later: Engine) -> None:
    with later.begin() as connection:
        connection.execute(text("ALTER TABLE task_runs DROP COLUMN submission"))
    with later.connect() as connection:
        [line] = migrate.check(connection)
    assert "submission" in line


def set_version(own: Engine, version: str | None) -> None:
    with own.begin() as connection:
        connection.execute(text(f"DELETE FROM {VERSION_TABLE}"))
        if version is not None:
            connection.execute(text(f"INSERT INTO {VERSION_TABLE} VALUES (:version)"), {"version": version})


CALLS: list[Any] = [
    lambda history: history.open_run("job"),
    lambda history: history.close_run("job", 1, "failed"),
    lambda history: history.tasks(),
    lambda history: history.begin().__enter__(),
    lambda history: history.check_version(),
]


@pytest.mark.parametrize("found", ["2_0001", "0_0009", "not ours", None])
def test_unsuited_version_is_named_before_anything_is_done(own: Engine, empty_database: str, found: str | None) -> None:
    migrate.upgrade(own)
    set_version(own, found)
    for call in CALLS:
        with TaskRunHistory.connect(empty_database) as history:
            with pytest.raises(SchemaVersionError) as caught:
                call(history)
            assert (caught.value.found, caught.value.expected) == (found, SCHEMA_VERSION)
            assert SCHEMA_VERSION in str(caught.value)
            if found is not None:
                assert found in str(caught.value)
                assert "install" in str(caught.value)
            else:
                assert "taskruns db upgrade" in str(caught.value)
    with own.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM task_runs")) == 0


def test_empty_database_is_named_and_left_empty(own: Engine, empty_database: str) -> None:
    for call in CALLS:
        with TaskRunHistory.connect(empty_database) as history:
            with pytest.raises(SchemaVersionError, match="taskruns db upgrade") as caught:
                call(history)
            assert caught.value.found is None
    with own.connect() as connection:
        assert inspect(connection).get_table_names() == []


def test_history_works_once_the_tables_are_there(own: Engine, histories: Any, empty_database: str) -> None:
    history = histories.connect(empty_database)
    with pytest.raises(SchemaVersionError):
        history.open_run("job")
    history.upgrade()
    assert history.open_run("job").attempt == 1


@pytest.mark.parametrize("found", ["2_0001", "0_0009"])
def test_upgrade_refuses_a_database_of_another_major(own: Engine, found: str) -> None:
    migrate.upgrade(own)
    set_version(own, found)
    with pytest.raises(SchemaVersionError) as caught:
        migrate.upgrade(own)
    assert caught.value.found == found
    assert not migrate.lock.locked()


HOST = MetaData()
ORDERS = Table("orders", HOST, Column("id", Integer, primary_key=True), Column("name", String(20)))


def differences(own: Engine, metadata: MetaData, **options: Any) -> list[Any]:
    with own.connect() as connection:
        context = MigrationContext.configure(connection, opts=options)
        return list(compare_metadata(context, metadata))


@pytest.fixture
def host(own: Engine) -> Engine:
    """A host application's database, with its own migrations, and ours beside them."""
    with own.begin() as connection:
        HOST.create_all(connection)
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32) PRIMARY KEY)"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('host7')"))
        connection.execute(text("CREATE INDEX ix_orders_name ON orders (name)"))
    migrate.upgrade(own)
    return own


def test_host_applications_tables_are_none_of_ours(host: Engine) -> None:
    with host.connect() as connection:
        assert migrate.check(connection) == []
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "host7"
        names = set(inspect(connection).get_table_names())
    assert names == {"orders", "alembic_version", "task_runs", "supervisors", VERSION_TABLE}


def test_our_tables_are_named_for_a_host_to_leave_them_out(host: Engine) -> None:
    def include_name(name: str | None, kind: str, _parents: object) -> bool:
        return kind != "table" or name in HOST.tables

    [change] = differences(host, HOST, include_name=include_name)
    assert change[0] == "remove_index"  # the host's own, that its metadata does not know
    assert change[1].name == "ix_orders_name"


def test_repository_joins_a_hosts_transaction(host: Engine) -> None:
    with host.connect() as connection, engine.transaction(connection):
        runs = TaskRunRepository(connection, source="host")
        connection.execute(ORDERS.insert().values(id=1, name="first"))
        run = runs.open_run("order")

    def fail_at_the_end() -> None:
        with host.connect() as connection, engine.transaction(connection):
            connection.execute(ORDERS.insert().values(id=2, name="second"))
            TaskRunRepository(connection).open_run("order")
            raise RuntimeError("host")

    with pytest.raises(RuntimeError, match="host"):
        fail_at_the_end()
    with host.connect() as connection:
        assert connection.scalars(text("SELECT name FROM orders")).all() == ["first"]
        assert TaskRunRepository(connection).tasks() == [run]


def test_repository_closes_what_changed_since_a_hosts_snapshot(mariadb: str) -> None:
    repeatable = create_engine(mariadb, isolation_level="REPEATABLE READ")
    with TaskRunHistory.connect(mariadb) as history, repeatable.connect() as connection:
        for _ in range(3):
            history.close_run("job", history.open_run("job").attempt, TaskPhase.FAILED)
        history.open_run("job")
        runs = TaskRunRepository(connection)
        assert [run.phase for run in runs.runs("job").runs] == ["running", "failed", "failed", "failed"]
        timeout = history.close_run("job", 1, TaskPhase.TIMEOUT)
        succeeded = history.close_run("job", 4, TaskPhase.SUCCEEDED)
        assert runs.close_run("job", 1, TaskPhase.EXHAUSTED) == timeout
        assert runs.close_run("job", 2, TaskPhase.EXHAUSTED).phase is TaskPhase.EXHAUSTED
        assert runs.close_run("job", 4, TaskPhase.SUCCEEDED) == succeeded
        with pytest.raises(RunClosedError) as caught:
            runs.close_run("job", 4, TaskPhase.FAILED)
        assert caught.value.run == succeeded
    repeatable.dispose()
