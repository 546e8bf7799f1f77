"""How many bytes a run takes, all indexes included, against a bare table with the same primary key.

    python benchmarks/bench_size.py [--tasks 20000] [--of-each 50] [KIND ...]

The bare table has the same columns, types and storage form, and neither an index nor a check; it is also made with the
seven fields that tell of a run alone. Tables are filled in two ways: *imported*, by ``add_runs`` in the order of the
key, and *live*, by an open and a close of each run, with the statements that a history sends, in the order of time,
while about a hundred are active. What PostgreSQL leaves behind depends on its transactions and on VACUUM: live there,
each statement is committed by itself, and a VACUUM comes whenever a fifth of the table is new, as autovacuum's would.
"""

import argparse
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

from pymysql.constants import CLIENT
from sqlalchemy import Column, Connection, Insert, MetaData, PrimaryKeyConstraint, Table, Update, false, make_url, text

from taskruns import TaskPhase, TaskRun, TaskRunHistory, statements
from taskruns.schema import metadata, task_runs

SERVERS = {
    "postgresql": os.environ.get("TASKRUNS_TEST_POSTGRES", "postgresql://postgres@127.0.0.1:5432/postgres"),
    "mariadb": os.environ.get("TASKRUNS_TEST_MARIADB", "mariadb://root@127.0.0.1:3306/mysql"),
}
NAME = "taskruns_bench_size"
CHUNK = 25_000  # as `taskruns import` does on SQLite
START = datetime(2026, 1, 1, tzinfo=UTC)
STEP = timedelta(seconds=7.776)  # a million are 90 days
FIELDS = ("task_id", "attempt", "phase", "started_at", "finished_at", "error", "exit_code")
PARTS = ("row", "key", "started", "active", "problems", "problems_of_task", "finished")

Sizes = dict[str, int]


def runs(tasks: int, of_each: int) -> Iterator[TaskRun]:
    """Yield runs in the order of the key. Tasks take turns, not in the order of their names; 5 % fail."""
    chance = random.Random(1)
    for number in range(tasks):
        for turn in range(of_each):
            place = turn * tasks + number * 7919 % tasks
            started_at = START + place * STEP + timedelta(microseconds=chance.randrange(1_000_000))
            failed = chance.random() < 0.05
            yield TaskRun(
                f"shop:import-{number:08}",
                turn + 1,
                TaskPhase.FAILED if failed else TaskPhase.SUCCEEDED,
                started_at,
                started_at + timedelta(seconds=chance.uniform(1, 200) * STEP.total_seconds()),
                error="ConnectionError: no reply" if failed else None,
                exit_code=int(failed),
                source="worker-17-eu",
            )


def plain(name: str, columns: Sequence[str]) -> Table:
    """Return a table of some of the columns, with the same key and nothing else."""
    copies = []
    for known in (task_runs.c[column] for column in columns):
        default = None if known.server_default is None else false()
        copies.append(
            Column(known.name, known.type, nullable=known.nullable, server_default=default, autoincrement=False)
        )
    key = PrimaryKeyConstraint("task_id", "attempt")
    options: dict[str, Any] = dict(task_runs.kwargs)
    return Table(name, MetaData(naming_convention=metadata.naming_convention), *copies, key, **options)


_OF = "task_id, attempt, phase, error, exit_code, source FROM story"
STARTS = f"SELECT started_at AS moment, 0 AS is_end, {_OF} WHERE '{{low}}' <= started_at AND started_at < '{{high}}'"
ENDS = f"SELECT finished_at AS moment, 1 AS is_end, {_OF} WHERE '{{low}}' <= finished_at AND finished_at < '{{high}}'"

VALUES = {
    "task_id": "task_id",
    "started_at": "moment",
    "source": "source",
    "to": "phase",
    "end": "moment",
    "why": "error",
    "code": "exit_code",
    "of_task": "task_id",
    "of_attempt": "attempt",
}
"""The field of an event that each parameter takes."""

CONSTANTS = {"submission": "NULL", "source_attempt": "NULL", "supervisor_id": str(0x3A5C_71D2_9E46_08B3)}


def spelled(connection: Connection, statement: Insert | Update, table: str) -> str:
    """Return a statement about ``table`` whose parameters are fields of an event."""
    kind: Any = type(connection.dialect)
    compiled: Any = statement.compile(dialect=kind(paramstyle="pyformat"))
    constants = {name: str(value) for name, value in compiled.params.items()} | CONSTANTS

    def value(found: re.Match[str]) -> str:
        return MARKS[connection.dialect.name].format(VALUES[found[1]]) if found[1] in VALUES else constants[found[1]]

    without_answer = str(compiled).partition(" RETURNING ")[0]
    return re.sub(r"%\((\w+)\)s", value, without_answer).replace("task_runs", table)


MARKS = {"sqlite": ":{}", "postgresql": "r.{}", "mariadb": "%({})s"}


def live(connection: Connection, table: str, count: int) -> None:
    """Fill a table as a history that goes on does."""
    kind = connection.dialect.name
    opening = spelled(connection, statements.open_next(kind), table)
    closing = spelled(connection, statements.close_run(), table)
    for low, high in pairwise(portions(count)):
        starts, ends = (part.format(low=f"{low:%F %T.%f}", high=f"{high:%F %T.%f}") for part in (STARTS, ENDS))
        if kind == "postgresql":
            body = f"IF r.is_end = 0 THEN {opening}; ELSE {closing}; END IF; COMMIT;"
            loop = f"FOR r IN {starts} UNION ALL {ends} ORDER BY moment LOOP {body} END LOOP;"
            connection.exec_driver_sql(f"DO $$ DECLARE r record; BEGIN {loop} END $$")
            connection.exec_driver_sql(f"VACUUM {table}")
            continue
        found = [dict(row) for part in (starts, ends) for row in connection.execute(text(part)).mappings()]
        events = iter(sorted(found, key=itemgetter("moment")))
        while some := list(islice(events, 200)):
            send(connection, [(closing if event["is_end"] else opening, event) for event in some])


def send(connection: Connection, due: list[tuple[str, dict[str, Any]]]) -> None:
    """Send statements in one transaction: both databases write in place, however many there are in one."""
    driver: Any = connection.connection.driver_connection
    cursor = driver.cursor()
    if connection.dialect.name == "sqlite":
        cursor.execute("BEGIN")
        for statement, event in due:
            cursor.execute(statement, event)
        cursor.execute("COMMIT")
        return
    filled = [cursor.mogrify(statement, event) for statement, event in due]
    cursor.execute("; ".join(["BEGIN", *filled, "COMMIT"]))
    while cursor.nextset():
        pass


def portions(count: int) -> list[datetime]:
    """Return moments between which the number of runs grows by a fifth."""
    found, before = [START + 2 * count * STEP], float(count)  # well after the last end
    while before > count / 100:
        before /= 1.2
        found.append(START + before * STEP)
    return [START, *reversed(found)]


SIZES = {
    "sqlite": "SELECT name, pgsize FROM dbstat WHERE aggregate = TRUE AND name IN"
    " (SELECT name FROM sqlite_master WHERE tbl_name = '{table}')",
    "postgresql": "SELECT '{table}', pg_table_size('{table}')"
    " UNION ALL SELECT indexrelname, pg_relation_size(indexrelid)"
    " FROM pg_stat_user_indexes WHERE relname = '{table}'",
    "mariadb": "SELECT index_name, CAST(stat_value * @@innodb_page_size AS INT) FROM mysql.innodb_index_stats"
    " WHERE database_name = DATABASE() AND table_name = '{table}' AND stat_name = 'size'",
}


def sizes(connection: Connection, table: str) -> Sizes:
    """Return the bytes of each part of a table."""
    kind = connection.dialect.name
    if kind == "mariadb":
        connection.execute(text(f"ANALYZE TABLE {table}")).all()
    found = connection.execute(text(SIZES[kind].format(table=table))).all()
    names = {table: "row", "PRIMARY": "row", f"pk_{table}": "key"}
    return {names.get(name, name.removeprefix("ix_task_runs_")): int(size) for name, size in found}


def emptied(connection: Connection, table: str) -> None:
    connection.execute(text(f"DELETE FROM {table}" if connection.dialect.name == "sqlite" else f"TRUNCATE {table}"))


def hot_share(connection: Connection, table: str) -> float:
    """Return which part of the updates wrote to no index."""
    query = text(f"SELECT n_tup_hot_upd, n_tup_upd FROM pg_stat_user_tables WHERE relname = '{table}'")
    connection.execute(text("SELECT pg_stat_force_next_flush()"))  # from PostgreSQL 15 on
    hot, updates = connection.execute(query).one()
    return float(hot / updates)


def measure(kind: str, folder: Path, tasks: int, of_each: int) -> dict[str, Sizes]:
    """Return the parts' bytes of each of the tables."""
    url = f"sqlite:///{folder}/runs.db?cache_size=512" if kind == "sqlite" else new_database(kind)
    found: dict[str, Sizes] = {}
    with TaskRunHistory.connect(url) as history:
        history.upgrade()
        some = runs(tasks, of_each)
        while chunk := list(islice(some, CHUNK)):
            history.add_runs(chunk)
        with history._engine.connect() as connection:
            found["imported"] = sizes(connection, "task_runs")
            tell(kind, "imported")
            connection.execute(text("CREATE TABLE story AS SELECT * FROM task_runs"))
            for table in (plain("bare", task_runs.c.keys()), plain("fields", FIELDS)):
                names = ", ".join(table.c.keys())
                table.create(connection)
                connection.execute(
                    text(f"INSERT INTO {table.name} ({names}) SELECT {names} FROM story ORDER BY task_id, attempt")
                )
                found[table.name] = sizes(connection, table.name)
            tell(kind, "bare tables")
            if kind == "postgresql":
                connection.execute(text("SET synchronous_commit = off"))
            for name, table_name in (("live", "task_runs"), ("live bare", "bare")):
                emptied(connection, table_name)
                live(connection, table_name, tasks * of_each)
                found[name] = sizes(connection, table_name)
                tell(kind, name)
                assert connection.scalar(text(f"SELECT count(finished_at) FROM {table_name}")) == tasks * of_each
                if kind == "postgresql":
                    print(f"postgresql, {name}: {hot_share(connection, table_name):.2f} of the updates are HOT")
    if kind != "sqlite":
        on_server(kind, f"DROP DATABASE {NAME}")
    return found


def tell(kind: str, done: str) -> None:
    print(f"{time.strftime('%T')} {kind}: {done}", file=sys.stderr, flush=True)


def on_server(kind: str, *commands: str) -> None:
    with TaskRunHistory.connect(SERVERS[kind]) as history, history._engine.connect() as connection:
        for command in commands:
            connection.execute(text(command))


def new_database(kind: str) -> str:
    on_server(kind, f"DROP DATABASE IF EXISTS {NAME}", f"CREATE DATABASE {NAME}")
    url = make_url(SERVERS[kind]).set(database=NAME)
    if kind == "mariadb":
        url = url.update_query_dict({"client_flag": str(CLIENT.MULTI_STATEMENTS)})
    return url.render_as_string(hide_password=False)


def report(kind: str, found: dict[str, Sizes], count: int) -> None:
    """Print bytes a run: of each part, of all, and of the bare tables with the ratio to them."""
    ways = "imported", "live"
    print(f"\n| {kind}, bytes a run | imported | live |\n|---|---|---|")
    for part in PARTS:
        if part in found["live"]:
            line(part, [f"{found[way][part] / count:.1f}" for way in ways])
    whole = {name: sum(parts.values()) / count for name, parts in found.items()}
    line("all", [f"{whole[way]:.0f}" for way in ways])
    bare = whole["bare"], whole["live bare"]
    line("bare row", [f"{size:.0f}" for size in bare])
    line("all / bare row", [f"{whole[way] / size:.2f}" for way, size in zip(ways, bare, strict=True)])
    line("bare row, seven fields", [f"{whole['fields']:.0f}", ""])
    line("all / seven fields", [f"{whole['imported'] / whole['fields']:.2f}", ""])


def line(label: str, cells: list[str]) -> None:
    print(f"| {label} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=20_000)
    parser.add_argument("--of-each", type=int, default=50)
    parser.add_argument("kinds", metavar="KIND", nargs="*", default=list(SIZES))
    options = parser.parse_args()
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(kind, Path(folder), options.tasks, options.of_each)
        report(kind, found, options.tasks * options.of_each)


if __name__ == "__main__":
    main()
