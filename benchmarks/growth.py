"""What a pair costs in a table of many runs, against one that is empty: a part of bench_recording.py."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from contenders import OnTaskRuns
from databases import OURS, Database, execute, remove_file
from many_runs import Shape, postgresql_database, sqlite_file, task
from shapes import NAMES, Sample, one_thread
from sqlalchemy import make_url

_OF_EACH = 50


@contextmanager
def filled(database: Database, rows: int, folder: Path) -> Iterator[Database]:
    """Give a copy of a history of so many runs, beside a database that is emptied; the history itself is kept."""
    shape = Shape(rows // _OF_EACH, _OF_EACH)
    if database.kind == "sqlite":
        path = folder / "growth.db"
        shutil.copyfile(str(make_url(sqlite_file(shape, folder)).database), path)
        try:
            yield replace(database, url=f"sqlite:///{path}", keeps_runs=True)
        finally:
            remove_file(path)
        return
    server = make_url(database.url)
    admin = database.with_driver.set(database="postgres")
    postgresql_database(shape, server.set(database="postgres"))
    copy = f"{OURS}_growth"  # dropped with the other one
    execute(admin, f'CREATE DATABASE {copy} TEMPLATE "{shape.name}" STRATEGY FILE_COPY')  # since PostgreSQL 15
    yield replace(database, url=server.set(database=copy).render_as_string(hide_password=False), keeps_runs=True)


def cases(
    kinds: list[type[OnTaskRuns]], empty: Database, large: Database, rows: int, seconds: float
) -> dict[str, Callable[[], Sample]]:
    """Return what measures each contender with an empty table, and with the large one: of tasks that it has."""
    tasks = rows // _OF_EACH
    names = [task(number * tasks // len(NAMES)) for number in range(len(NAMES))]

    def of(kind: type[OnTaskRuns], database: Database) -> Callable[[], Sample]:
        def sample() -> Sample:
            contender = kind(database)
            contender.prepare()
            # What it touches of a large table is in memory, as in a service that has run for a while.
            return one_thread(contender, seconds, names, warm_up=len(names))

        return sample

    return {
        f"{kind(empty).name}{suffix}": of(kind, database)
        for kind in kinds
        for suffix, database in (("", empty), (suffix_of(rows), large))
    }


def suffix_of(rows: int) -> str:
    """Return what tells the large table's contenders from the others."""
    return f", {rows:,} runs"
