"""`taskruns db`: the tables and their version."""

import re
import sqlite3
from pathlib import Path

import pytest
from commands import Home, Shell
from sqlalchemy import create_engine, make_url, text

from taskruns import TaskRunHistory
from taskruns.schema import SCHEMA_VERSION


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture
def shell(home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(home, monkeypatch, capsys)


def execute(url: str, *statements: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


def test_upgrade_makes_the_tables_and_may_be_repeated(shell: Shell, empty_database: str) -> None:
    for _ in range(2):
        answer = shell("db", "upgrade", "--db", empty_database)
        assert (answer.status, answer.out) == (0, "")
        assert SCHEMA_VERSION in answer.err
    current = shell("db", "current", "--db", empty_database)
    assert (current.status, current.out, current.err) == (0, f"{SCHEMA_VERSION}\n", "")
    check = shell("db", "check", "--db", empty_database)
    assert (check.status, check.out, check.err) == (0, f"version {SCHEMA_VERSION}, no difference\n", "")
    with TaskRunHistory.connect(empty_database) as history:
        assert history.open_run("job").attempt == 1


def test_server_database_without_tables_is_advised(shell: Shell, empty_database: str) -> None:
    if make_url(empty_database).get_backend_name() == "sqlite":
        assert shell("db", "upgrade", "--db", empty_database).status == 0
        execute(empty_database, "DROP TABLE taskruns_version", "DROP TABLE task_runs")
    for arguments, status in (
        (("tasks",), 2),
        (("runs", "job"), 2),
        (("db", "current"), 1),
        (("db", "check"), 1),
    ):
        answer = shell(*arguments, "--db", empty_database)
        assert (answer.status, answer.out) == (status, "")
        assert "no taskruns tables" in answer.err
        assert "`taskruns db upgrade`" in answer.err
        assert len(answer.err.splitlines()) == 1


@pytest.mark.parametrize(("version", "message"), [("2_0001", "2_0001"), ("0_0009", "0_0009"), ("nonsense", "nonsense")])
def test_version_that_does_not_suit_is_said(shell: Shell, sqlite: str, version: str, message: str) -> None:
    execute(sqlite, f"UPDATE taskruns_version SET version_num = '{version}'")
    for arguments, status in ((("tasks",), 2), (("db", "check"), 1), (("db", "upgrade"), 2)):
        answer = shell(*arguments, "--db", sqlite)
        assert (answer.status, answer.out) == (status, "")
        assert message in answer.err
        assert SCHEMA_VERSION in answer.err
        assert len(answer.err.splitlines()) == 1
    assert shell("db", "current", "--db", sqlite).out == f"{version}\n"


def test_newer_version_of_this_major_is_used(shell: Shell, sqlite: str) -> None:
    execute(sqlite, "UPDATE taskruns_version SET version_num = '1_0099'", "ALTER TABLE task_runs ADD COLUMN novel TEXT")
    assert shell("tasks", "--db", sqlite).status == 0
    check = shell("db", "check", "--db", sqlite)
    assert (check.status, check.out, check.err) == (0, "version 1_0099, no difference\n", "")
    assert shell("db", "upgrade", "--db", sqlite).status == 0
    assert shell("db", "current", "--db", sqlite).out == "1_0099\n"


def test_check_shows_a_column_that_is_missing_and_one_too_many(shell: Shell, empty_database: str) -> None:
    assert shell("db", "upgrade", "--db", empty_database).status == 0
    execute(
        empty_database, "ALTER TABLE task_runs ADD COLUMN novel INTEGER", "ALTER TABLE task_runs DROP COLUMN source"
    )
    answer = shell("db", "check", "--db", empty_database)
    assert answer.status == 1
    lines = answer.out.splitlines()
    assert any(re.match(r"add column: .*source", line) for line in lines)
    assert any(re.match(r"remove column: .*novel", line) for line in lines)
    assert answer.err == f"taskruns: the tables differ from those of version {SCHEMA_VERSION}\n"


def test_check_shows_an_index_that_is_missing(shell: Shell, empty_database: str) -> None:
    assert shell("db", "upgrade", "--db", empty_database).status == 0
    engine = create_engine(empty_database, isolation_level="AUTOCOMMIT")
    from sqlalchemy import inspect

    with engine.connect() as connection:
        names = [index["name"] for index in inspect(connection).get_indexes("task_runs")]
        assert names
        suffix = " ON task_runs" if engine.dialect.name in ("mysql", "mariadb") else ""
        connection.execute(text(f"DROP INDEX {names[0]}{suffix}"))
    engine.dispose()
    answer = shell("db", "check", "--db", empty_database)
    assert answer.status == 1
    assert f"add index: {names[0]}" in answer.out


def test_printed_ddl_makes_the_same_tables(shell: Shell, kind: str, empty_database: str) -> None:
    answer = shell("db", "upgrade", "--sql", "--db", empty_database)
    assert (answer.status, answer.err) == (0, "")
    assert re.search(r"^CREATE TABLE (IF NOT EXISTS )?task_runs ", answer.out, re.MULTILINE)
    if kind == "sqlite":
        path = make_url(empty_database).database
        assert path is not None
        assert not Path(path).exists()
        connection = sqlite3.connect(path)
        connection.executescript(answer.out)
        connection.close()
    else:
        statements = [part.strip() for part in re.split(r";\s*$", answer.out, flags=re.MULTILINE)]
        execute(empty_database, *(part.replace(":", r"\:") for part in statements if re.sub(r"--.*", "", part).strip()))
    assert shell("db", "check", "--db", empty_database).out == f"version {SCHEMA_VERSION}, no difference\n"


@pytest.mark.parametrize("url", ["postgresql://127.0.0.1:1/x", "mysql://127.0.0.1:1/x", "sqlite:////no/such/x.db"])
def test_ddl_is_printed_without_a_database(shell: Shell, url: str) -> None:
    answer = shell("db", "upgrade", "--sql", "--db", url)
    assert (answer.status, answer.err) == (0, "")
    assert re.search(r"^CREATE TABLE (IF NOT EXISTS )?task_runs ", answer.out, re.MULTILINE)
    assert SCHEMA_VERSION in answer.out


@pytest.mark.parametrize("command", ["upgrade", "current", "check"])
def test_server_that_is_down_is_one_line_and_2(shell: Shell, command: str) -> None:
    answer = shell("db", command, "--db", "postgresql://u:geheim@127.0.0.1:1/x")
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith("taskruns: the database cannot be used: ")
    assert len(answer.err.splitlines()) == 1
    assert "geheim" not in answer.err


def test_upgrade_makes_a_private_file_with_its_directory(shell: Shell, home: Home) -> None:
    assert shell("db", "upgrade").status == 0
    path = home.path / ".local/share/taskruns/taskruns.db"
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_commands_need_no_more_than_they_are_told(shell: Shell, home: Home) -> None:
    for wrong in (("db", "where", "x"), ("db", "current", "--nothing"), ("db", "upgrade", "--sql=1")):
        answer = shell(*wrong)
        assert (answer.status, answer.out, len(answer.err.splitlines())) == (2, "", 1)
    assert list(home.path.iterdir()) == []
