"""PostgreSQL behind PgBouncer in transaction mode, where no two transactions need share a session."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from servers import Databases, as_user, available, free_port, missing, own_directory, wait_for
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import OperationalError

from taskruns import PROBLEMS, RunFilter, Span, TaskPhase, TaskRun, TaskRunHistory, migrate
from taskruns.aio import AsyncTaskRunHistory

SETTINGS = """
[databases]
{name} = host={host} port={port} dbname={name} user={user} {password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {own_port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 4
ignore_startup_parameters = extra_float_digits
"""


@pytest.fixture
def pgbouncer(databases: Databases) -> Iterator[str]:
    """The URL of an empty database, by way of a PgBouncer."""
    direct = make_url(databases.empty(available("postgresql", databases)))
    program = shutil.which("pgbouncer", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"]))
    if program is None:
        missing("no pgbouncer")
    port = free_port()
    with own_directory("postgres") as directory:
        file = directory / "pgbouncer.ini"
        file.write_text(
            SETTINGS.format(
                name=direct.database,
                host=direct.host,
                port=direct.port or 5432,
                user=direct.username,
                password=f"password='{direct.password}'" if direct.password else "",
                own_port=port,
            )
        )
        file.chmod(0o644)
        process = start(program, file)
        url = direct.set(host="127.0.0.1", port=port).update_query_dict({"prepare_threshold": "none"})
        try:
            wait_for(lambda: answers(url.render_as_string(hide_password=False)), "PgBouncer did not answer")
            yield url.render_as_string(hide_password=False)
        finally:
            process.terminate()
            process.wait()


def start(program: str, file: Path) -> subprocess.Popen[bytes]:
    command = [program, "-q", str(file)]
    silent = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=file.parent, stdin=silent, stdout=silent, stderr=silent, **as_user("postgres"))


def answers(url: str) -> bool:
    plain = make_url(url).difference_update_query(["prepare_threshold"])
    engine = create_engine(plain)
    try:
        with engine.connect() as connection:
            return bool(connection.scalar(text("SELECT 1")))
    except OperationalError:
        return False
    finally:
        engine.dispose()


def test_everything_works_without_sessions(pgbouncer: str) -> None:
    with TaskRunHistory.connect(pgbouncer) as history:
        history.upgrade()
        with history._engine.connect() as connection:
            assert migrate.check(connection) == []
        run = history.open_run("job")
        assert history.close_run("job", 1, TaskPhase.SUCCEEDED) == history.get_run("job", 1)
        with history.begin(lock="job") as runs:
            assert runs.active_runs("job") == []
            runs.open_run("job")
        with history.record("job"):
            pass
        assert [found.attempt for found in history.iter_runs("job")] == [3, 2, 1]
        assert [found.attempt for found in history.tasks()] == [3]
        assert run.attempt == 1

        def record(_: int) -> TaskRun:
            opened = history.open_run("contended")
            return history.close_run("contended", opened.attempt, TaskPhase.FAILED, error="x")

        # More connections than the pooler has, each statement often enough for psycopg to prepare it by itself.
        with ThreadPoolExecutor(10) as pool:
            attempts = sorted(run.attempt for run in pool.map(record, range(100)))
        assert attempts == list(range(1, 101))


def test_questions_are_answered_without_sessions(pgbouncer: str) -> None:
    with TaskRunHistory.connect(pgbouncer) as history:
        history.upgrade()
        for number in range(30):
            history.close_run("job", history.open_run("job").attempt, list(PROBLEMS)[number % 3])

        def ask(_: int) -> tuple[int, ...]:
            page = history.runs(RunFilter(task_glob="j*"), phases=PROBLEMS, limit=4)
            following = history.runs(RunFilter(task_glob="j*"), phases=PROBLEMS, limit=4, after=page.next_cursor)
            [summary] = history.summaries("j*")
            return page.runs[0].attempt, following.runs[-1].attempt, history.stats(by=Span.DAY).runs, summary.stats.runs

        with ThreadPoolExecutor(10) as pool:
            assert set(pool.map(ask, range(50))) == {(30, 23, 30, 30)}


def test_everything_works_without_sessions_asynchronously(pgbouncer: str) -> None:
    async def scenario() -> list[int]:
        async with AsyncTaskRunHistory.connect(pgbouncer) as history:
            await history.upgrade()
            opened = await asyncio.gather(*(history.open_run("job") for _ in range(40)))
            await asyncio.gather(*(history.close_run("job", run.attempt, TaskPhase.SUCCEEDED) for run in opened))
            assert await history.active_runs() == []
            return sorted(run.attempt for run in opened)

    assert asyncio.run(scenario()) == list(range(1, 41))
