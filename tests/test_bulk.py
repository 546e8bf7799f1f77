"""Runs in bulk: what is added, skipped and refused, and the way through all of them, on every database and twin."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from histories import Histories
from sqlalchemy import create_engine, event
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from taskruns import RunsAdded, TaskPhase, TaskRun, TaskRunHistory, TaskRunRepository, bulk

FROM = datetime(2026, 3, 1, 2, 15, 0, 123456, tzinfo=UTC)
TEXTS = [r"\N", "\\", "a\tb\nc\rd\\n", "\\.", "quo\"ted, 'too'", "é 漢 \U0001f600", "\x01\x1f\x7f", " padded ", "NULL"]


def run_of(task: str, attempt: int, **fields: Any) -> TaskRun:
    values: dict[str, Any] = {"phase": TaskPhase.FAILED, "error": "broke", "exit_code": 1, "source": "there"}
    started_at = FROM + timedelta(seconds=attempt)
    return TaskRun(task, attempt, **{"started_at": started_at, "finished_at": started_at, **values, **fields})


def active(task: str, attempt: int) -> TaskRun:
    return TaskRun.starting(task, attempt, started_at=FROM, source="there")


@pytest.fixture
def some() -> list[TaskRun]:
    return [run_of("b", 2), run_of("a", 3), run_of("a", 1), active("a", 4)]


def all_of(history: TaskRunHistory) -> list[TaskRun]:
    return list(history.all_runs())


def in_order(runs: list[TaskRun]) -> list[TaskRun]:
    return sorted(runs, key=lambda run: (run.task_id, run.attempt))


def test_runs_are_stored_as_they_are(history: TaskRunHistory, some: list[TaskRun]) -> None:
    assert history.add_runs(some) == RunsAdded(4, 0, [])
    assert all_of(history) == in_order(some)
    assert history.open_run("a").attempt == 5


def test_every_field_comes_back(history: TaskRunHistory) -> None:
    runs = [run_of("text", number, error=text, exit_code=None) for number, text in enumerate(TEXTS, 1)]
    runs += [
        run_of("å\\N", 1, exit_code=-(2**31), source="s\\t", submission="\\", source_attempt=0),
        run_of("many", 2**32 - 1, recovered=True, start_inferred=True, source=None, source_attempt=2**32 - 1),
        run_of("early", 1, started_at=datetime(1, 1, 1, tzinfo=UTC), finished_at=datetime.max.replace(tzinfo=UTC)),
        run_of("elsewhere", 1, started_at=FROM.astimezone(timezone(timedelta(hours=-9, minutes=-30)))),
        *(run_of("phase", number, phase=phase, error=None) for number, phase in enumerate(TaskPhase, 1) if number > 2),
    ]
    assert history.add_runs(runs).added == len(runs)
    assert all_of(history) == in_order(runs)
    assert history.add_runs(runs) == RunsAdded(0, len(runs), [])


def test_nothing_is_added_of_nothing(history: TaskRunHistory) -> None:
    assert history.add_runs([]) == RunsAdded(0, 0, [])
    assert all_of(history) == []


def test_equal_runs_are_skipped_and_others_are_conflicts(history: TaskRunHistory, some: list[TaskRun]) -> None:
    history.add_runs(some)
    others = [run_of("b", 2, error="another"), active("b", 3), run_of("a", 4)]
    assert history.add_runs([*others, *some]) == RunsAdded(1, 4, [others[0], others[2]])
    assert all_of(history) == in_order([*some, others[1]])


@pytest.mark.parametrize(
    "field",
    [
        {"phase": TaskPhase.TIMEOUT},
        {"started_at": FROM},
        {"finished_at": FROM + timedelta(hours=1)},
        {"error": None},
        {"exit_code": None},
        {"recovered": True},
        {"start_inferred": True},
        {"source": None},
        {"submission": "5"},
        {"source_attempt": 1},
    ],
)
def test_runs_are_equal_in_every_field(history: TaskRunHistory, field: dict[str, Any]) -> None:
    history.add_runs([run_of("a", 1)])
    other = run_of("a", 1, **field)
    assert history.add_runs([other]) == RunsAdded(0, 0, [other])


def test_who_watches_over_a_run_is_not_its_content(history: TaskRunHistory) -> None:
    watched = replace(active("a", 1), supervisor_id=7)
    assert history.add_runs([watched]).added == 1
    assert all_of(history) == [active("a", 1)]
    assert history.add_runs([watched]).equal == 1


def test_of_one_key_the_first_is_added(history: TaskRunHistory) -> None:
    first, other, once_more = run_of("a", 1), run_of("a", 1, error="other"), run_of("a", 1)
    assert history.add_runs([first, first, other, once_more]) == RunsAdded(1, 2, [other])
    assert history.add_runs([other, first, run_of("a", 2)]) == RunsAdded(1, 1, [other])
    assert all_of(history) == [first, run_of("a", 2)]


def test_errors_are_kept_as_everywhere(history: TaskRunHistory) -> None:
    runs = [run_of("a", 1, error="nul \0, half \ud800, http://me:secret@host"), run_of("a", 2, error="x" * 100_000)]
    assert history.add_runs(runs).added == 2
    first, second = all_of(history)
    assert first.error == "nul \ufffd, half \ufffd, http://me:***@host"
    assert len(second.error or "") == 65536
    assert history.add_runs(runs) == RunsAdded(0, 2, [])


@pytest.mark.parametrize("wrong", [{"task_id": " a"}, {"source": ""}, {"submission": "\n"}, {"exit_code": 2**31}])
def test_what_cannot_be_stored_is_refused_and_nothing_is_added(history: TaskRunHistory, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        history.add_runs([run_of("a", 1), replace(run_of("a", 2), **wrong)])
    assert all_of(history) == []


def test_many_runs_of_which_some_are_there(history: TaskRunHistory) -> None:
    runs = [run_of(f"task {task}", attempt) for task in range(7) for attempt in range(1, 101)]
    history.add_runs(runs[::3])
    other = run_of("task 3", 50, error="other")
    assert history.add_runs([*runs, other]) == RunsAdded(len(runs) - len(runs[::3]), len(runs[::3]), [other])
    assert all_of(history) == runs


def test_adding_is_part_of_the_callers_transaction(history: TaskRunHistory, some: list[TaskRun]) -> None:
    history.add_runs(some[:1])
    with pytest.raises(RuntimeError), history.begin() as runs:  # noqa: PT012  (a transaction)
        runs.open_run("mine")
        assert runs.add_runs(some) == RunsAdded(3, 1, [])
        raise RuntimeError
    assert all_of(history) == some[:1]
    with history.begin() as runs:
        runs.add_runs(some)
        assert [run.attempt for run in runs.all_runs("a")] == [1, 3, 4]
    assert all_of(history) == in_order(some)


def test_a_hosts_connection_rolls_back_what_was_added(database: str, some: list[TaskRun]) -> None:
    engine = create_engine(database)
    with engine.connect() as connection:
        TaskRunRepository(connection).add_runs(some[:2])
        connection.rollback()
        assert TaskRunRepository(connection).all_runs() == []
        connection.rollback()
        TaskRunRepository(connection).add_runs(some[2:])
        connection.commit()
        bulk.insert_rows(connection, list(map(bulk.row_of, [])))
        bulk.insert_rows(connection, list(map(bulk.row_of, some[:2])))
        connection.rollback()
        assert TaskRunRepository(connection).all_runs() == some[2:]
    engine.dispose()


def test_a_taken_key_is_an_integrity_error(database: str, some: list[TaskRun]) -> None:
    engine = create_engine(database)
    with engine.begin() as connection:
        bulk.insert_rows(connection, list(map(bulk.row_of, some)))
    with pytest.raises(IntegrityError), engine.begin() as connection:
        bulk.insert_rows(connection, list(map(bulk.row_of, [run_of("c", 1), some[0]])))
    with engine.connect() as connection:
        assert TaskRunRepository(connection).all_runs() == in_order(some)
    engine.dispose()


def test_other_errors_come_out(empty_database: str, some: list[TaskRun]) -> None:
    engine = create_engine(empty_database)
    with pytest.raises(DBAPIError, match="task_runs") as caught, engine.begin() as connection:
        bulk.insert_rows(connection, list(map(bulk.row_of, some)))
    assert not isinstance(caught.value, IntegrityError)
    engine.dispose()


def test_lost_connection_is_noticed_and_tried_again(postgresql: str, histories: Histories, some: list[TaskRun]) -> None:
    history = histories.connect(postgresql)
    history.add_runs(some[:1])
    admin = create_engine(postgresql, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    admin.dispose()
    assert history.add_runs(some) == RunsAdded(3, 1, [])


def test_connection_lost_on_the_way_is_an_operational_error(postgresql: str, some: list[TaskRun]) -> None:
    engine = create_engine(postgresql)
    admin = create_engine(postgresql, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection, admin.connect() as other:
        pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        other.exec_driver_sql(f"SELECT pg_terminate_backend({pid})")
        with pytest.raises(OperationalError) as caught:
            bulk.insert_rows(connection, list(map(bulk.row_of, some)))
    assert caught.value.connection_invalidated
    engine.dispose()
    admin.dispose()


def test_racing_writers_add_each_run_once(database: str, histories: Histories) -> None:
    """They add the same runs in chunks of their own, one of them backwards, and so meet on the way."""
    history = histories.connect(database)
    runs = [run_of(f"task {number % 5}", number) for number in range(1, 601)]
    outcomes: list[RunsAdded] = []

    def add(chunk: int, step: int) -> None:
        with TaskRunHistory.connect(database, retry_for=30) as mine:
            chunks = (runs[::step][start : start + chunk] for start in range(0, len(runs), chunk))
            outcomes.extend(map(mine.add_runs, chunks))

    threads = [threading.Thread(target=add, args=arguments) for arguments in ((50, 1), (70, -1), (600, 1))]
    for thread in threads:
        thread.start()
    outcomes.append(history.add_runs(runs))
    for thread in threads:
        thread.join()
    assert sum(outcome.added for outcome in outcomes) == len(runs)
    assert sum(outcome.added + outcome.equal for outcome in outcomes) == 4 * len(runs)
    assert not any(outcome.conflicts for outcome in outcomes)
    assert all_of(history) == in_order(runs)


def test_a_run_that_appears_between_look_and_insert(
    history: TaskRunHistory, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first look misses what another writer adds right after it."""
    history.add_runs([run_of("a", 1)])
    look = bulk._stored

    def slow_look(*arguments: Any, **options: Any) -> Any:
        found = look(*arguments, **options)
        if not options.get("lock") and not database.startswith("sqlite"):
            with TaskRunHistory.connect(database) as other:
                other.open_run("a", attempt=2, started_at=FROM)
        return found

    monkeypatch.setattr(bulk, "_stored", slow_look)
    with history.begin() as runs:
        outcome = runs.add_runs([run_of("a", number) for number in (1, 2, 3)])
    if database.startswith("sqlite"):
        assert outcome == RunsAdded(2, 1, [])  # there the file is locked
    else:
        assert outcome == RunsAdded(1, 1, [run_of("a", 2)])


@pytest.fixture
def pages_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskruns.reader.PAGE", 3)
    monkeypatch.setattr("taskruns.aio.reader.PAGE", 3)


@pytest.mark.usefixtures("pages_of_three")
@pytest.mark.parametrize("sizes", [(), (1,), (3,), (2, 1, 3, 7, 1, 1, 1), (4, 4, 4)])
def test_all_runs_come_in_order(history: TaskRunHistory, sizes: tuple[int, ...]) -> None:
    names = "A", "B", "a", "a-b", "a b", "á", "b"
    runs = [run_of(name, 2 * number) for name, size in zip(names, sizes, strict=False) for number in range(1, size + 1)]
    history.add_runs(runs)
    found = all_of(history)
    assert found == sorted(runs, key=lambda run: (run.task_id.encode(), run.attempt))
    for name in names:
        assert list(history.all_runs(name)) == [run for run in found if run.task_id == name]


@pytest.mark.usefixtures("pages_of_three")
def test_all_runs_while_others_write(history: TaskRunHistory) -> None:
    runs = [run_of(task, 10 * number) for task in ("b", "d", "f") for number in range(1, 6)]
    history.add_runs(runs)
    seen = []
    for count, run in enumerate(history.all_runs()):
        seen.append(run)
        history.add_runs([run_of(task, 100 + count) for task in ("a", "b", "c") if count < 20])
        history.add_runs([run_of(run.task_id, max(run.attempt - 1, 1))])
    assert in_order(seen) == seen
    assert len(set(seen)) == len(seen)
    assert set(runs) <= set(seen)


def test_a_page_has_its_limits(history: TaskRunHistory, some: list[TaskRun]) -> None:
    history.add_runs(some)
    with history.begin() as runs:
        assert runs.all_runs(limit=2) == in_order(some)[:2]
        assert runs.all_runs(limit=2, after=("a", 3)) == in_order(some)[2:]
        assert runs.all_runs("a", after=("b", 1)) == []
        with pytest.raises(ValueError, match="limit"):
            runs.all_runs(limit=0)
        with pytest.raises(ValueError, match="task id"):
            runs.all_runs(after=(" ", 1))


@pytest.fixture
def plans(database: str) -> Iterator[list[str]]:
    """What the database plans to do for each query that is executed."""
    found: list[str] = []
    engine = create_engine(database)
    explain = "EXPLAIN QUERY PLAN" if engine.dialect.name == "sqlite" else "EXPLAIN"
    with engine.connect() as connection:

        @event.listens_for(connection, "before_cursor_execute")
        def explained(_c: object, cursor: Any, statement: str, parameters: Any, *_: object) -> None:
            if statement.startswith("SELECT"):
                cursor.execute(f"{explain} {statement}", parameters)
                found.append(str(cursor.fetchall()))

        runs = [run_of(f"task {number % 50}", number) for number in range(1, 2001)]
        repository = TaskRunRepository(connection)
        repository.add_runs(runs)
        connection.commit()
        if engine.dialect.name != "sqlite":
            connection.exec_driver_sql("ANALYZE task_runs" if engine.dialect.name == "postgresql" else "SELECT 1")
        found.clear()
        repository.all_runs(limit=3, after=("task 20", 30))
        repository.add_runs(runs[:3])
        yield found
    engine.dispose()


def test_pages_and_looks_use_the_key(plans: list[str], kind: str) -> None:
    used = {"sqlite": "USING PRIMARY KEY", "postgresql": "pk_task_runs", "mariadb": "'PRIMARY', 'PRIMARY'"}[kind]
    assert len(plans) >= 2
    for plan in plans:
        assert used in plan
